"""Small SVG plots for the report: line charts with bands, a trajectory plane, a calibration
scatter.

Every function returns an `<svg>` element as text. Colours are CSS variables (`--c0`, `--c1`, ...
for the policies, `--ink`, `--muted`, `--grid`, `--paper`), so one picture serves light and dark
pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

NUM_COLORS = 6
MAX_POINTS = 600  # more points than pixels only make the file larger
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10, 13)} | {
    127: 0x2421
}
# Characters that change how others are shown, or that XML forbids: their names are shown instead.
_INVISIBLE = [
    *range(0x80, 0xA0),
    0x061C,
    0x200B,
    0x200E,
    0x200F,
    *range(0x2028, 0x202F),
    *range(0x2060, 0x2070),
    0xFEFF,
    0xFFFE,
    0xFFFF,
]
SHOWN = CONTROL_PICTURES | {code: f"\u27e6U+{code:04X}\u27e7" for code in _INVISIBLE}


def text(value: object) -> str:
    """Escapes a value for HTML and XML, in text and in quoted attributes.

    Control characters, which XML forbids, become their pictures; those that turn the direction of
    writing or cannot be seen become their numbers, unpaired surrogates question marks."""
    clean = str(value).translate(SHOWN).encode("utf-8", "replace").decode("utf-8")
    return escape(clean, quote=True)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
      label: shown when the pointer rests on a mark.
      color: CSS colour.
      x: [n] positions, increasing.
      y: [n] values; a non-finite one interrupts the line.
      low: [n] lower edge of the band around the line, or empty.
      high: [n] upper edge.
      style: "smooth" (every value faint, a moving average strong) or "marks" (a mark on every
        value).
      dashed: whether the line is dashed.
      shape: index of the mark.
      unit: what positions count.
    """

    label: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: str = "marks"
    dashed: bool = False
    shape: int = 0
    unit: str = "step"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A linear map from data to pixels, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def labels(self) -> list[str]:
        """The ticks as text, all with the decimals that the step between them needs."""
        if max(abs(t) for t in self.ticks) >= 10_000:
            return [f"{t / 1000:g}k" for t in self.ticks]
        room = 1e-6 * (self.high - self.low)
        for decimals in range(5):
            if all(abs(round(t, decimals) - t) < room for t in self.ticks):
                # Adding zero turns -0.0 into 0.0.
                return [f"{round(t, decimals) + 0.0:.{decimals}f}" for t in self.ticks]
        return [f"{t:.2g}" for t in self.ticks]


@dataclass(frozen=True, kw_only=True)
class DoublingScale(Scale):
    """A map to pixels on which every doubling is one step; low, high and ticks are positive."""

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        share = math.log2(value / self.low) / math.log2(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def labels(self) -> list[str]:
        """The ticks as text."""
        return [f"{t:g}" for t in self.ticks]


def doubling_scale(last: int, start: float, end: float) -> DoublingScale:
    """A scale from 1 to `last` with a tick at every power of two; `start`, `end` in pixels."""
    ticks = tuple(2.0**i for i in range(max(last, 2).bit_length()) if 2**i <= max(last, 2))
    return DoublingScale(low=1.0, high=float(max(last, 2)), start=start, end=end, ticks=ticks)


def nice_scale(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    count: int = 5,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Scale:
    """A scale whose ends are round numbers around the values.

    Args:
      values: data; non-finite ones are ignored.
      start: pixel of the low end.
      end: pixel of the high end.
      count: about how many intervals between ticks.
      bounds: rounding does not take the ends beyond these (a probability stays in 0..1).

    Returns:
      The scale; from 0 to 1 when there is no finite value.
    """
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if high - low < 1e-9 * max(1.0, abs(low)):
        pad = 0.5 * abs(low) or 0.5
        low, high = low - pad, high + pad
    bounds = min(bounds[0], low), max(bounds[1], high)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    ticks = [t for t in ticks if bounds[0] - 1e-9 <= t <= bounds[1] + 1e-9] or [low, high]
    low, high = max(first * step, bounds[0]), min(last * step, bounds[1])
    return Scale(low=low, high=high, start=start, end=end, ticks=tuple(ticks))


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over an odd window that shrinks at the ends; non-finite values are left out."""
    half = window // 2
    smooth = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        smooth.append(sum(near) / len(near) if near else math.nan)
    return smooth


def _thin(columns: Sequence[Sequence[float]]) -> list[list[float]]:
    """Averages neighbours of all columns alike until at most MAX_POINTS are left."""
    size = math.ceil(len(columns[0]) / MAX_POINTS)
    if size <= 1:
        return [list(c) for c in columns]
    return [
        [sum(c[i : i + size]) / len(c[i : i + size]) for i in range(0, len(c), size)]
        for c in columns
    ]


def _path(points: Iterable[tuple[float, float]]) -> str:
    """Path data through the points, broken where one is not finite."""
    parts, pen_down = [], False
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
            pen_down = True
        else:
            pen_down = False
    return "".join(parts)


def mark(shape: int, x: float, y: float, radius: float, attributes: str, title: str = "") -> str:
    """A mark: circle, square, triangle, diamond, inverted triangle or hexagon by `shape`.

    Args:
      shape: index, taken modulo six.
      x: centre in pixels.
      y: centre in pixels.
      radius: size in pixels; all shapes have about the area of the circle.
      attributes: SVG attributes of the element, already escaped.
      title: shown when the pointer rests on it; escaped here.

    Returns:
      The element.
    """
    inner = f"<title>{text(title)}</title>" if title else ""
    if shape % 6 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" {attributes}>{inner}</circle>'
    corners, turn, scale = [(4, 45, 1.25), (3, 90, 1.5), (4, 0, 1.3), (3, -90, 1.5), (6, 0, 1.1)][
        shape % 6 - 1
    ]
    angles = [math.radians(turn + 360 * i / corners) for i in range(corners)]
    points = " ".join(
        f"{x + scale * radius * math.cos(a):.1f},{y - scale * radius * math.sin(a):.1f}"
        for a in angles
    )
    return f'<polygon points="{points}" {attributes}>{inner}</polygon>'


def open_svg(width: float, height: float, label: str) -> str:
    """The opening tag of a picture that scales with its container."""
    box = f"0 0 {width:g} {height:g}"
    return f'<svg class="plot" viewBox="{box}" role="img" aria-label="{text(label)}">'


def segment(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight line of the CSS class `kind`."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def caption(kind: str, x: float, y: float, content: str, anchor: str = "middle") -> str:
    """Words of the CSS class `kind`; the content is escaped here."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{text(content)}</text>'


def axes(x: Scale, y: Scale, x_label: str, y_label: str = "") -> str:
    """Horizontal grid lines, tick labels and axis titles.

    Args:
      x: scale from left to right.
      y: scale from bottom (`start`) to top (`end`).
      x_label: title below the axis; escaped here.
      y_label: title along the axis, none if empty.

    Returns:
      SVG elements.
    """
    parts = []
    for value, label in zip(y.ticks, y.labels(), strict=True):
        at = y(value)
        parts.append(segment("grid", x.start, at, x.end, at))
        parts.append(caption("tick", x.start - 8, at + 3.8, label, "end"))
    parts.append(segment("axis", x.start, y.start, x.end, y.start))
    for value, label in zip(x.ticks, x.labels(), strict=True):
        at = x(value)
        parts.append(segment("axis", at, y.start, at, y.start + 4))
        parts.append(caption("tick", at, y.start + 17, label))
    parts.append(caption("label", (x.start + x.end) / 2, y.start + 36, x_label))
    if y_label:
        turned = f"translate(20 {(y.start + y.end) / 2:.1f}) rotate(-90)"
        parts.append(f'<g transform="{turned}">{caption("label", 0, 0, y_label)}</g>')
    return "".join(parts)


def _line_elements(line: Line, x: Scale, y: Scale) -> str:
    band = len(line.low) == len(line.x) and len(line.high) == len(line.x)
    columns = [line.x, line.y] + ([line.low, line.high] if band else [])
    xs, ys, *edges = _thin(columns)
    pixels = [x(v) for v in xs]
    parts = []
    if band:
        whole = [(p, a, b) for p, a, b in zip(pixels, *edges, strict=True) if math.isfinite(a + b)]
        outline = [(p, y(a)) for p, a, _ in whole] + [(p, y(b)) for p, _, b in reversed(whole)]
        if outline:
            parts.append(f'<path d="{_path(outline)}Z" fill="{line.color}" fill-opacity="0.16"/>')
    stroke = f'fill="none" stroke="{line.color}" stroke-linejoin="round" stroke-linecap="round"'
    if line.style == "smooth" and len(xs) >= 20:
        raw = _path(zip(pixels, map(y, ys), strict=True))
        parts.append(f'<path d="{raw}" {stroke} stroke-width="1" stroke-opacity="0.28"/>')
        ys = moving_average(ys, 2 * (len(ys) // 40) + 3)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    curve = _path(zip(pixels, map(y, ys), strict=True))
    parts.append(f'<path d="{curve}" {stroke} stroke-width="2"{dash}/>')
    if line.style == "marks" or len(xs) == 1:
        fill = f'fill="{line.color}" stroke="var(--paper)" stroke-width="1.2"'
        for at, value, pixel in zip(xs, ys, pixels, strict=True):
            if math.isfinite(value):
                title = f"{line.label}, {line.unit} {at:g}: {value:.4g}"
                parts.append(mark(line.shape, pixel, y(value), 3.4, fill, title))
    return "".join(parts)


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_label: str = "step",
    x_range: tuple[float, float] | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    doubling: bool = False,
    width: float = 340,
    height: float = 220,
) -> str:
    """A chart of values over training steps, or over numbers of samples.

    Args:
      lines: drawn in order, the last on top.
      label: description for screen readers.
      x_label: title of the x axis.
      x_range: steps the axis spans; by default those of the lines.
      bounds: limits of the y axis.
      doubling: whether the x axis goes from 1 by doublings.
      width: of the view box, in pixels.
      height: of the view box, in pixels.

    Returns:
      An `<svg>` element.
    """
    span = x_range or (0.0, max((v for line in lines for v in line.x), default=1.0))
    x = nice_scale(span, 42, width - 14, count=4)
    if doubling:
        x = doubling_scale(int(span[1]), 48, width - 14)
    values = [v for line in lines for v in (*line.y, *line.low, *line.high)]
    y = nice_scale(values, height - 44, 12, count=4, bounds=bounds)
    body = "".join(_line_elements(line, x, y) for line in lines)
    return open_svg(width, height, label) + axes(x, y, x_label) + body + "</svg>"


def calibration_chart(
    points: Sequence[tuple[float, float, float, float]],
    *,
    color: str,
    label: str,
    x_label: str,
    y_label: str,
    width: float = 440,
    height: float = 300,
) -> str:
    """A scatter of estimates (with intervals) against learned values, with the line of equality.

    Args:
      points: (estimate, low, high, learned) of each prompt.
      color: CSS colour of the points.
      label: description for screen readers.
      x_label: title of the x axis.
      y_label: title of the y axis.
      width: of the view box, in pixels.
      height: of the view box, in pixels.

    Returns:
      An `<svg>` element.
    """
    # One range for both axes, or the line of equality would not be the diagonal.
    values = [v for point in points for v in point]
    x = nice_scale(values, 62, width - 16, count=5)
    y = nice_scale(values, height - 44, 12, count=5)
    parts = [
        f'<path d="{_path([(x(x.low), y(y.low)), (x(x.high), y(y.high))])}" class="guide"/>',
    ]
    for estimate, low, high, learned in points:
        if math.isfinite(estimate + low + high + learned):
            at = y(learned)
            parts.append(
                f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{at:.1f}" y2="{at:.1f}"'
                f' stroke="{color}" stroke-opacity="0.45"/>'
            )
            title = f"Monte Carlo {estimate:.3g} ({low:.3g} to {high:.3g}), learned {learned:.3g}"
            fill = f'fill="{color}" fill-opacity="0.85"'
            parts.append(mark(0, x(estimate), at, 3, fill, title))
    return open_svg(width, height, label) + axes(x, y, x_label, y_label) + "".join(parts) + "</svg>"


def whisker(
    interval: tuple[float, float, float],
    span: tuple[float, float],
    color: str,
    *,
    zero: bool = False,
) -> str:
    """A tiny interval with its mean, for a table cell.

    Args:
      interval: (mean, low, high).
      span: values at the left and right edge, the same for all cells of a column.
      color: CSS colour.
      zero: mark the place of zero, which `span` then contains.

    Returns:
      An `<svg>` element.
    """
    width = 84.0
    scale: Callable[[float], float] = Scale(
        low=span[0],
        high=span[1] if span[1] > span[0] else span[0] + 1,
        start=5,
        end=width - 5,
        ticks=(),
    )
    mean, low, high = (scale(v) for v in interval)
    tick = (
        f'<line class="axis" x1="{scale(0.0):.1f}" x2="{scale(0.0):.1f}" y1="0" y2="12"/>'
        if zero
        else ""
    )
    return (
        f'<svg class="whisker" viewBox="0 0 {width:g} 12" aria-hidden="true">'
        f'<line class="grid" x1="5" x2="{width - 5:g}" y1="6" y2="6"/>{tick}'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="6" y2="6" stroke="{color}" stroke-width="3"'
        f' stroke-opacity="0.4" stroke-linecap="round"/>'
        f'<circle cx="{mean:.1f}" cy="6" r="3.2" fill="{color}"/></svg>'
    )
