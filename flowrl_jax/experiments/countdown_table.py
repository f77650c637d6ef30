"""From the curves of runs on Countdown to countdown.csv, curves.csv, table.md and a figure."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowrl_jax.experiments import analysis
from flowrl_jax.experiments.arms import ARMS
from flowrl_jax.experiments.figures import frontier_figure
from flowrl_jax.experiments.scales import K
from flowrl_jax.experiments.tables import cell, numbers, write_csv

_OURS = "flowrl"
_DISTINCT = f"distinct_{K}"
_BINS = 10  # of the figure's least accuracy: a tenth


@dataclasses.dataclass(frozen=True)
class Curves:
    """Learning curves of an arm at one setting, or of the warm-up.

    Attributes:
        arm: name in `ARMS`, or "warmup".
        setting: name in the arm's `settings`.
        steps: `[points]` int.
        measured: `[seeds, points, prompts]` each.
        drawn: prompts that a run has sampled responses to.
    """

    arm: str
    setting: str
    steps: np.ndarray
    measured: dict[str, np.ndarray]
    drawn: float


def write_results(workdir: Path, title: str, curves: Sequence[Curves], level: float) -> None:
    """Writes the files.

    Args:
        workdir: folder that they go to.
        title: of table and figure.
        curves: the warm-up's, a single point, then those of the arms, on the same problems.
        level: of accuracy, at which arms are compared.
    """
    warmup, *arms = curves
    # Every curve begins at the warm-up.
    arms = [_from(warmup, x) for x in arms]
    rows = table_rows(warmup, arms, level)
    write_csv(workdir / "countdown.csv", rows)
    write_csv(workdir / "curves.csv", [row for x in arms for row in _points(x)])
    seeds = len(warmup.measured["accuracy"])
    text = markdown(f"{title}, {seeds} seed{'s'[: seeds > 1]}", rows, level)
    (workdir / "table.md").write_text(text, encoding="utf-8")
    start = np.floor(warmup.measured["accuracy"].mean() * _BINS) / _BINS
    names = [f"{x.arm}:{x.setting}" for x in arms]
    runs = {name: [_with_rates(x)] for name, x in zip(names, arms, strict=True)}
    figure = frontier_figure(title, runs, samples=K, start=float(start))
    (workdir / "frontier.svg").write_text(figure, encoding="utf-8")


def table_rows(warmup: Curves, arms: Sequence[Curves], level: float) -> list[dict[str, Any]]:
    """A row for each arm and one for the warm-up.

    Args:
        warmup: a single point.
        arms: that begin at it.
        level: of accuracy.

    Returns:
        Names and values: `end_*` where runs end, `at_LEVEL_*` where they first reach the level, if
        all seeds do, and `ours_minus_it*`, distinct solutions there, seeds and problems paired,
        with the p-value over seeds corrected for the number of arms.
    """
    rows, found = [], []
    for x in arms:
        row: dict[str, Any] = {"arm": x.arm, "family": ARMS[x.arm].family, "setting": x.setting}
        row |= {"seeds": len(x.measured["accuracy"]), "steps": int(x.steps[-1])}
        row |= {"prompts_sampled": x.drawn}
        row |= numbers("end", {name: values[:, -1] for name, values in x.measured.items()})
        at_level = analysis.at_level(x.measured, level)
        row |= numbers(f"at_{level:g}", at_level) if at_level else {}
        rows.append(row)
        found.append(at_level[_DISTINCT] if at_level else None)
    _compare(rows, found)
    start = {"arm": "warmup", "family": "reference", "setting": "", "steps": 0}
    start["seeds"] = len(warmup.measured["accuracy"])
    rows.append(start | numbers("end", {k: x[:, -1] for k, x in warmup.measured.items()}))
    return rows


def _compare(rows: list[dict[str, Any]], found: Sequence[np.ndarray | None]) -> None:
    """Ours, at the first of its settings, against every other arm that reaches the level."""
    ours = next((i for i, row in enumerate(rows) if row["arm"] == _OURS), None)
    if ours is None or found[ours] is None:
        return
    others = [i for i, x in enumerate(found) if x is not None and i != ours]
    differences = [np.asarray(found[ours]) - np.asarray(found[i]) for i in others]
    corrected = analysis.holm([analysis.sign_flip(x.mean(axis=1)) for x in differences])
    for i, difference, p in zip(others, differences, corrected, strict=True):
        mean, low, high = analysis.interval(difference)
        rows[i] |= {"ours_minus_it": mean, "ours_minus_it_low": low, "ours_minus_it_high": high}
        rows[i]["p_holm"] = p


def markdown(title: str, rows: Sequence[dict[str, Any]], level: float) -> str:
    """The table.

    Args:
        title: above it.
        rows: from `table_rows`.
        level: of accuracy.
    """
    at, head = f"at_{level:g}", f"at {level:.0%}"
    columns = {
        f"distinct in {K} {head}": f"{at}_{_DISTINCT}",
        f"ours minus it {head}": "ours_minus_it",
        f"KL {head}": f"{at}_kl_to_reference",
        f"length {head}": f"{at}_length",
        "pass@1 at the end": "end_accuracy",
        f"distinct in {K} at the end": f"end_{_DISTINCT}",
        "KL at the end": "end_kl_to_reference",
    }
    lines = [
        f"### {title}",
        "",
        f"Means with 95 % intervals over seeds and problems; KL in nats per response. {head}:"
        " where the mean pass@1 of a run first is that; a dash: not all seeds reach it.",
        "",
        f"| arm | setting | {' | '.join(columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for row in sorted(rows, key=lambda row: -row.get(f"{at}_{_DISTINCT}", 0.0)):
        label = ARMS[row["arm"]].label if row["arm"] in ARMS else "warm-up"
        cells = " | ".join(cell(row, name) for name in columns.values())
        lines.append(f"| {label} | {row['setting']} | {cells} |")
    return "\n".join([*lines, ""])


def _from(warmup: Curves, arm: Curves) -> Curves:
    """An arm's curves with the point that they start from."""
    measured = {
        name: np.concatenate([warmup.measured[name][:, -1:], x], axis=1)
        for name, x in arm.measured.items()
    }
    steps = np.concatenate([[0], arm.steps])
    return dataclasses.replace(arm, steps=steps, measured=measured)


def _points(arm: Curves) -> list[dict[str, Any]]:
    """Means over problems at every point of every seed."""
    seeds, points, _ = arm.measured["accuracy"].shape
    return [
        {"arm": arm.arm, "setting": arm.setting, "seed": seed, "step": int(arm.steps[point])}
        | {name: float(x[seed, point].mean()) for name, x in arm.measured.items()}
        for seed in range(seeds)
        for point in range(points)
    ]


def _with_rates(arm: Curves) -> dict[str, np.ndarray]:
    """Arrays as the figure takes them; all runs are at the same learning rate."""
    return {name: x[None] for name, x in arm.measured.items()}
