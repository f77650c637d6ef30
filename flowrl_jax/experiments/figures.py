"""The accuracy-diversity plane of the comparison: the best that each arm reaches."""

from collections.abc import Mapping, Sequence

import numpy as np

from flowrl_jax.experiments.arms import ARMS
from flowrl_jax.report.plane import stand_alone
from flowrl_jax.report.plot import axes, mark, nice_scale, open_svg, text

_WIDTH, _HEIGHT = 860.0, 470.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 60.0, 600.0, 30.0, 420.0
_FROM = 0.3  # accuracy: below it all arms are the reference
_BINS = 24
_COLORS = {
    "policy gradient": "var(--c1)",
    "flow": "var(--c2)",
    "ablation": "var(--c4)",
    "control": "var(--c3)",
}


def frontier(
    runs: Sequence[Mapping[str, np.ndarray]], samples: int = 64, start: float = _FROM
) -> list[tuple[float, float]]:
    """The upper edge of all points of an arm's learning curves.

    Args:
        runs: of its settings: `[rates, seeds, points, prompts]` arrays of `measure`.
        samples: among which solutions are counted, `distinct_SAMPLES`.
        start: least accuracy.

    Returns:
        Accuracies, increasing, each with the most distinct solutions that any setting and rate
        keep at that accuracy or a higher one, on average over seeds and prompts.
    """
    accuracy = np.concatenate([x["accuracy"].mean(axis=(1, 3)).ravel() for x in runs])
    distinct = np.concatenate([x[f"distinct_{samples}"].mean(axis=(1, 3)).ravel() for x in runs])
    edge = []
    for low in np.linspace(start, 1.0, _BINS + 1):
        above = accuracy >= low
        if above.any():
            edge.append((float(low), float(distinct[above].max())))
    return edge


def frontier_figure(
    title: str,
    arms: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    *,
    samples: int = 64,
    start: float = _FROM,
) -> str:
    """An SVG of the arms' frontiers.

    Args:
        title: of the task.
        arms: runs by ARM, of all its settings, or by ARM:SETTING; as in `frontier`.
        samples: as in `frontier`.
        start: as in `frontier`.
    """
    edges = {name: frontier(runs, samples, start) for name, runs in arms.items()}
    edges = {name: edge for name, edge in edges.items() if edge}
    most = max((y for edge in edges.values() for _, y in edge), default=1.0)
    x = nice_scale([start, 1.0], _LEFT, _RIGHT, bounds=(0.0, 1.0))
    y = nice_scale([0.0, most], _BOTTOM, _TOP)
    parts = [open_svg(_WIDTH, _HEIGHT, title)]
    parts.append(axes(x, y, "accuracy", f"distinct correct solutions in {samples}"))
    order = sorted(edges, key=lambda name: -edges[name][-1][1])
    for i, name in enumerate(order):
        arm, _, setting = name.partition(":")
        color, shape = _COLORS[ARMS[arm].family], i % 6
        label = ", ".join([ARMS[arm].label, *([setting] if setting else [])])
        points = [(x(a), y(b)) for a, b in edges[name]]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" opacity="0.5"/>')
        parts.append(mark(shape, *points[-1], 4.0, f'fill="{color}"', label))
        row = _TOP + 13.0 * i
        parts.append(mark(shape, _RIGHT + 24, row, 4.0, f'fill="{color}"'))
        label += f" ({edges[name][-1][0]:.2f}, {edges[name][-1][1]:.1f})"
        parts.append(f'<text x="{_RIGHT + 34}" y="{row + 4}" font-size="11">{text(label)}</text>')
    return stand_alone("".join([*parts, "</svg>"]), title, _WIDTH, _HEIGHT)
