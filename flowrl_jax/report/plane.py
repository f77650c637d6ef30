"""The accuracy-diversity plane: how many distinct solutions a policy keeps as it becomes
accurate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise

from flowrl_jax.evaluation import EqualAccuracy, distinct_at_equal_accuracy
from flowrl_jax.report.data import ReportData
from flowrl_jax.report.plot import Scale, axes, mark, nice_scale, open_svg, segment, text

WIDTH, HEIGHT = 640.0, 430.0


def colors(data: ReportData) -> dict[str, str]:
    """CSS colour of each policy: grey for the common start, the palette in order for the others."""
    others = [name for name in data.policies if name != data.start]
    chosen = {name: f"var(--c{i % 6 + 1})" for i, name in enumerate(others)}
    return {name: chosen.get(name, "var(--c0)") for name in data.policies}


def diversity_metric(data: ReportData) -> str | None:
    """Name of the results' distinct_correct_k, None if there is none."""
    names = [m for summary in data.results.values() for m in summary]
    return next((m for m in names if m.startswith("distinct_correct_")), None)


def _result(data: ReportData, policy: str) -> Mapping[str, Mapping[str, float]] | None:
    """{"x", "y"} intervals of a policy's final evaluation, None if it has none."""
    metric, summary = diversity_metric(data), data.results.get(policy, {})
    if metric is None or metric not in summary or "pass_at_1" not in summary:
        return None
    return {"x": summary["pass_at_1"], "y": summary[metric]}


def trajectory(data: ReportData, policy: str) -> list[tuple[float, float]]:
    """(pass@1, distinct correct solutions) of a policy over its training, oldest first.

    Args:
      data: the report's data.
      policy: name of a policy.

    Returns:
      The start policy's result (unless an evaluation at step 0 stands for it), the evaluations
      during training at which both statistics are finite, and the policy's own result. Empty if
      there are none of them.
    """
    run = data.runs.get(policy)
    curves = run.curves if run else {}
    points: dict[int, tuple[float, float]] = {}
    if "pass_at_1" in curves and "distinct_correct" in curves:
        accuracy = dict(zip(curves["pass_at_1"].steps, curves["pass_at_1"].values, strict=True))
        distinct = curves["distinct_correct"]
        for step, value in zip(distinct.steps, distinct.values, strict=True):
            if math.isfinite(accuracy.get(step, math.nan) + value):
                points[step] = (accuracy[step], value)
    found = [points[step] for step in sorted(points)]
    start = _result(data, data.start) if data.start and data.start != policy else None
    if start and 0 not in points:
        found.insert(0, (start["x"]["mean"], start["y"]["mean"]))
    final = _result(data, policy)
    if final:
        found.append((final["x"]["mean"], final["y"]["mean"]))
    return found


def equal_accuracy(data: ReportData) -> tuple[str, str, EqualAccuracy] | None:
    """Compares the first two trained policies of a report at equal accuracy.

    Args:
      data: the report's data.

    Returns:
      (first policy, second policy, comparison), or None when there are not two trained policies or
      their trajectories share no accuracy.
    """
    trained = [p for p in data.policies if p != data.start and len(trajectory(data, p)) > 1]
    if len(trained) < 2:
        return None
    found = distinct_at_equal_accuracy(trajectory(data, trained[0]), trajectory(data, trained[1]))
    return (trained[0], trained[1], found) if found else None


def _cross(result: Mapping[str, Mapping[str, float]], x: Scale, y: Scale, color: str) -> str:
    """The 95 % intervals of a final evaluation, as a cross."""
    at_x, at_y = x(result["x"]["mean"]), y(result["y"]["mean"])
    style = f'stroke="{color}" stroke-width="1.6" stroke-opacity="0.6" stroke-linecap="round"'
    left, right = x(result["x"]["low"]), x(result["x"]["high"])
    low, high = y(result["y"]["low"]), y(result["y"]["high"])
    return (
        f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{at_y:.1f}" y2="{at_y:.1f}" {style}/>'
        f'<line x1="{at_x:.1f}" x2="{at_x:.1f}" y1="{low:.1f}" y2="{high:.1f}" {style}/>'
    )


def _trajectory_elements(
    data: ReportData, policy: str, shape: int, x: Scale, y: Scale, color: str
) -> str:
    points = trajectory(data, policy)
    pixels = [(x(a), y(b)) for a, b in points]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in pixels)
    parts = [
        f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2" stroke-opacity="0.55"'
        ' stroke-linejoin="round"/>'
    ]
    name = data.label(policy)
    for i, (a, b) in enumerate(points[:-1]):
        title = f"{name}, evaluation {i + 1} of {len(points)}: pass@1 {a:.3f}, distinct {b:.2f}"
        # Later evaluations are stronger, so that the direction of time can be seen.
        fade = 0.35 + 0.65 * i / len(points)
        fill = f'fill="{color}" fill-opacity="{fade:.2f}"'
        parts.append(mark(shape, *pixels[i], 3.2, fill, title))
    result = _result(data, policy)
    if result:
        parts.append(_cross(result, x, y, color))
    fill = f'fill="{color}" stroke="var(--paper)" stroke-width="1.8"'
    title = f"{name}, end: pass@1 {points[-1][0]:.3f}, distinct {points[-1][1]:.2f}"
    parts.append(mark(shape, *pixels[-1], 7, fill, title))
    return "".join(parts)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and one[2] > other[0] and one[1] < other[3] and one[3] > other[1]


def _place_labels(
    wanted: Sequence[tuple[float, float, str, str]], lines: Sequence[Sequence[Box]], frame: Box
) -> str:
    """Puts labels beside their marks, where they hide least.

    Args:
      wanted: (x, y, label, colour) of each mark, in pixels.
      lines: small boxes along everything drawn.
      frame: the drawing area.

    Returns:
      Text elements.
    """
    placed: list[Box] = []
    parts = []
    for at_x, at_y, label, color in wanted:
        width = 8.2 * len(label) + 4
        options: list[tuple[float, Box, float, float, str]] = []
        for dy in (-13.0, 23.0, 5.0, -30.0, 40.0):
            for anchor, left in (("start", 12.0), ("end", -12.0 - width)):
                box = (at_x + left, at_y + dy - 12, at_x + left + width, at_y + dy + 4)
                inside = frame[0] <= box[0] and box[2] <= frame[2]
                inside = inside and frame[1] <= box[1] and box[3] <= frame[3]
                hidden = sum(_overlap(box, part) for line in lines for part in line)
                cost = 1000.0 * (not inside) + 100 * sum(_overlap(box, b) for b in placed) + hidden
                x = at_x + (12.0 if anchor == "start" else -12.0)
                options.append((cost, box, x, at_y + dy, anchor))
        _, box, x, y, anchor = min(options, key=lambda option: option[0])
        placed.append(box)
        parts.append(
            f'<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
            f' style="fill:{color}">{text(label)}</text>'
        )
    return "".join(parts)


def _boxes_along(points: Sequence[tuple[float, float]]) -> list[Box]:
    """Boxes of six pixels every six pixels along a polygonal line."""
    boxes = []
    for (x0, y0), (x1, y1) in pairwise([points[0], *points]):
        count = max(1, round(math.hypot(x1 - x0, y1 - y0) / 6))
        for i in range(1, count + 1):
            x, y = x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count
            boxes.append((x - 3, y - 3, x + 3, y + 3))
    return boxes


def plane_svg(data: ReportData) -> str | None:
    """The accuracy-diversity plane as an `<svg>` element.

    pass@1 to the right, distinct correct solutions upward; each policy's evaluations during
    training joined from the common start (a hollow diamond) to its end point (a large mark with its
    95 % intervals).

    Args:
      data: the report's data.

    Returns:
      The element, or None when no policy has both statistics.
    """
    metric = diversity_metric(data)
    paths = {p: trajectory(data, p) for p in data.policies}
    paths = {p: points for p, points in paths.items() if points}
    if not paths:
        return None
    results = [r for p in paths if (r := _result(data, p))]
    values = [
        [v for points in paths.values() for v in (point[axis] for point in points)]
        + [r[name][edge] for r in results for edge in ("low", "high")]
        for axis, name in ((0, "x"), (1, "y"))
    ]
    x = nice_scale(values[0], 62, WIDTH - 22, count=6, bounds=(0.0, 1.0))
    y = nice_scale([*values[1], 0.0], HEIGHT - 52, 18, count=6, bounds=(0.0, math.inf))
    k = metric.removeprefix("distinct_correct_") if metric else "k"
    parts = [axes(x, y, "pass@1", f"distinct correct solutions in {k} samples")]
    compared = equal_accuracy(data)
    if compared:
        at = compared[2]
        ends = sorted([y(at.first[-1]), y(at.second[-1])])
        level = x(float(at.accuracy[-1]))
        parts.append(segment("guide", level, ends[0], level, ends[1]))
    palette, labels = colors(data), []
    trained = [p for p in paths if p != data.start]
    # Drawn last to first: the first policy, the one the report is about, lies on top.
    for shape, policy in reversed(list(enumerate(trained))):
        parts.append(_trajectory_elements(data, policy, shape, x, y, palette[policy]))
        a, b = paths[policy][-1]
        labels.append((x(a), y(b), data.label(policy), palette[policy]))
    if data.start in paths:
        a, b = paths[data.start][-1]
        result = _result(data, data.start)
        parts.append(_cross(result, x, y, palette[data.start]) if result else "")
        fill = f'fill="var(--paper)" stroke="{palette[data.start]}" stroke-width="2.4"'
        parts.append(mark(3, x(a), y(b), 6.5, fill, f"{data.label(data.start)}, the start"))
        labels.append((x(a), y(b), data.label(data.start), palette[data.start]))
    drawn = [_boxes_along([(x(a), y(b)) for a, b in points]) for points in paths.values()]
    parts.append(_place_labels(labels, drawn, (x.start, y.end, x.end, y.start)))
    label = "Accuracy-diversity plane: " + ", ".join(data.label(p) for p in paths)
    return open_svg(WIDTH, HEIGHT, label) + "".join(parts) + "</svg>"


def stand_alone(svg: str, title: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    """Makes an inline picture a file of its own, with its colours, fonts and a background.

    Args:
      svg: from `plane_svg`.
      title: written above the picture.
      width: of the picture.
      height: of the picture.

    Returns:
      An SVG document.
    """
    style = resources.files("flowrl_jax.report").joinpath("plot.css").read_text(encoding="utf-8")
    inner = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    label = svg[svg.index("aria-label=") : svg.index(">")]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height + 40:g}"'
        f' width="{width:g}" height="{height + 40:g}" role="img" {label}>'
        f"<style>{style}</style>"
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1:g}" height="{height + 39:g}"'
        ' rx="10"/>'
        f'<text class="heading" x="24" y="32">{text(title)}</text>'
        f'<g transform="translate(0 40)">{inner}</g></svg>\n'
    )
