"""The report as one HTML file: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from importlib import resources

from flowrl_jax.report.benchmarks import benchmarks_section
from flowrl_jax.report.data import SERIES, ReportData, Run, Series
from flowrl_jax.report.heatmap import heatmap_section
from flowrl_jax.report.parts import dot, interval_table, legend, shape_of, signed
from flowrl_jax.report.plane import colors, diversity_metric, equal_accuracy, plane_svg
from flowrl_jax.report.plot import Line, calibration_chart, line_chart, text
from flowrl_jax.report.samples import samples_section
from flowrl_jax.report.table import figure, heading

# The browser itself then refuses anything that is not in the file.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

LOG_Z_HEIGHT = 270.0
# Lines (label, curve), the grey one first; what they are; what the panel's heading says.
_LOG_Z_PANELS = (
    (
        (("Monte Carlo", "log_z_monte_carlo"), ("learned", "log_z")),
        "log Z",
        "learned, and estimated (grey)",
    ),
    (
        (("mean size", "residual_abs"), ("mean", "residual")),
        "residual",
        "residual of the balance: its mean, and mean size (grey)",
    ),
)


def page(data: ReportData) -> str:
    """Renders a report.

    Args:
      data: what to show; all text in it is escaped.

    Returns:
      A complete HTML document.
    """
    style = "".join(
        resources.files("flowrl_jax.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("plot.css", "page.css")
    )
    sections = [
        _header(data),
        _results(data),
        _plane(data),
        benchmarks_section(data),
        heatmap_section(data),
        _learning(data),
        _log_z(data),
        samples_section(data),
        _settings(data),
        _footer(data),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(data.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in sections if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(data: ReportData) -> str:
    lead = f'<p class="lead">{text(data.summary)}</p>' if data.summary else ""
    return (
        f'<header><p class="eyebrow">flowrl_jax report</p><h1>{text(data.title)}</h1>{lead}'
        f"</header>{_tiles(data)}"
    )


def _tiles(data: ReportData) -> str:
    """The figures to read first: accuracy and diversity of every trained policy, and its
    start's.
    """
    metric, palette = diversity_metric(data), colors(data)
    if metric is None:
        return ""
    start = data.results.get(data.start or "", {})
    tiles = []
    for policy, summary in data.results.items():
        if policy == data.start or not {"pass_at_1", metric} <= summary.keys():
            continue
        pair = []
        for name in ("pass_at_1", metric):
            origin = f", from {figure(start[name]['mean'])}" if name in start else ""
            pair.append(
                f"<div><strong>{signed(summary[name]['mean'])}</strong>"
                f'<span class="what">{heading(name)[0]}{origin}</span></div>'
            )
        tiles.append(
            f'<div class="card tile"><h3>{dot(palette[policy])}{text(data.label(policy))}</h3>'
            f'<div class="pair">{"".join(pair)}</div></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _results(data: ReportData) -> str:
    if not data.results:
        return ""
    metrics = list(dict.fromkeys(m for summary in data.results.values() for m in summary))
    terms = "".join(
        f"<dt>{text(heading(m)[0])}</dt><dd>{text(heading(m)[1])}</dd>"
        for m in metrics
        if heading(m)[1]
    )
    palette = colors(data)
    rows = {policy: (data.label(policy), palette[policy]) for policy in data.results}
    differences = ""
    if data.differences:
        names = {name: (name, "var(--ink)") for name in data.differences}
        differences = (
            interval_table(data.differences, names, metrics, "difference", zero=True)
            + '<p class="note under">Differences are taken prompt by prompt on the same prompts: an'
            " interval that leaves out zero is evidence even where the intervals above overlap.</p>"
        )
    return (
        "<section><h2>Results on held-out problems</h2>"
        '<p class="note">Mean over problems with its 95 % bootstrap interval.</p>'
        + interval_table(data.results, rows, metrics, "policy")
        + differences
        + f'<dl class="terms">{terms}</dl></section>'
    )


def _plane(data: ReportData) -> str:
    svg = plane_svg(data)
    if svg is None:
        return ""
    aside = (
        "<p>Up and to the right is better. Small marks are evaluations during training, from faint"
        " (early) to strong (late); the large mark is the end, with 95 % intervals."
        + (
            f" The diamond is the common start, {text(data.label(data.start))}."
            if data.start
            else ""
        )
        + "</p>"
    )
    compared = equal_accuracy(data)
    if compared:
        first, second, at = compared
        palette = colors(data)
        values = "".join(
            f'<span class="big">{dot(palette[name])}{signed(float(value))}'
            f" <small>{text(data.label(name))}</small></span>"
            for name, value in ((first, at.first[-1]), (second, at.second[-1]))
        )
        aside += (
            f"<p>Distinct correct solutions when each policy first reached pass@1 ="
            f" {figure(float(at.accuracy[-1]))}, the highest that both reached"
            f" (dashed):</p>{values}"
        )
    return (
        "<section><h2>Accuracy and diversity</h2>"
        '<p class="note">A policy can grow accurate by settling on one solution per problem, or'
        " while keeping many. Comparing the two at equal accuracy separates the effects.</p>"
        f'<div class="card wide"><div>{svg}</div><aside>{aside}</aside></div></section>'
    )


def _panel(data: ReportData, series: Series, last_step: float) -> str:
    palette = colors(data)
    lines = []
    for policy, run in reversed(list(data.runs.items())):
        curve = run.curves.get(series.name)
        if curve is not None and len(curve.steps):
            lines.append(
                Line(
                    label=data.label(policy),
                    color=palette[policy],
                    x=curve.steps,
                    y=curve.values,
                    low=curve.low,
                    high=curve.high,
                    style=series.style,
                    shape=shape_of(data, policy),
                )
            )
    if not lines:
        return ""
    svg = line_chart(lines, label=series.title, x_range=(0.0, last_step), bounds=series.bounds)
    title = f"<h3>{text(series.title)} <small>{text(series.note)}</small></h3>"
    return f'<figure class="card">{title}{svg}</figure>'


def _learning(data: ReportData) -> str:
    steps = [s for run in data.runs.values() for c in run.curves.values() for s in c.steps]
    last_step = float(max(steps, default=0)) or 1.0
    panels = "".join(_panel(data, series, last_step) for series in SERIES if series.title)
    if not panels:
        return ""
    return (
        "<section><h2>Learning curves</h2>"
        '<p class="note">Marks are evaluations on held-out problems, with a band where the run'
        " logged intervals. Lines without marks are"
        " training steps: every value faint, their moving average strong.</p>"
        f'{legend(data, list(data.runs))}{_alarms(data)}<div class="grid">{panels}</div></section>'
    )


def _alarms(data: ReportData) -> str:
    """What each run's alarm called, one line a run."""
    palette = colors(data)
    lines = []
    for policy, run in data.runs.items():
        calls = [
            f"{name} at step {first}" if first == last else f"{name} from step {first} to {last}"
            for name, first, last in run.alarms
        ]
        if calls:
            lines.append(
                f'<p class="note alarm">{dot(palette[policy])}Alarms of'
                f" {text(data.label(policy))}: {text(', '.join(calls))}</p>"
            )
    return "".join(lines)


def _log_z_figures(label: str, color: str, run: Run) -> list[str]:
    figures = []
    for names, what, note in _LOG_Z_PANELS:
        pairs = [(name, run.curves.get(key)) for name, key in names]
        lines = [
            Line(
                label=name,
                color=color if name != names[0][0] else "var(--muted)",
                x=curve.steps,
                y=curve.values,
                low=curve.low,
                high=curve.high,
                style="smooth",
                dashed=name == names[0][0],
            )
            for name, curve in pairs
            if curve is not None
        ]
        if len(lines) == len(names):
            svg = line_chart(
                lines, label=f"{what} of {label} over training", width=440, height=LOG_Z_HEIGHT
            )
            title = f"<h3>{text(label)} <small>{note}</small></h3>"
            figures.append(f'<figure class="card">{title}{svg}</figure>')
    if run.log_z_points:
        svg = calibration_chart(
            run.log_z_points,
            color=color,
            label=f"learned log Z of {label} against its Monte-Carlo estimate",
            x_label="Monte-Carlo estimate of log Z",
            y_label="learned log Z",
            height=LOG_Z_HEIGHT,
        )
        title = f"<h3>{text(label)} <small>per prompt, with 95 % intervals</small></h3>"
        figures.append(f'<figure class="card">{title}{svg}</figure>')
    return figures


def _log_z(data: ReportData) -> str:
    palette = colors(data)
    figures = [
        part
        for policy, run in data.runs.items()
        for part in _log_z_figures(data.label(policy), palette[policy], run)
    ]
    if not figures:
        return ""
    return (
        "<section><h2>log Z, learned and estimated</h2>"
        '<p class="note">The partition function that FlowRL learns (coloured) against the'
        " Monte-Carlo estimate from the group of samples (grey, dashed, with its interval). Where"
        " the two part, the learned baseline of the loss is off, and the residual's mean with"
        " it.</p>"
        f'<div class="grid two">{"".join(figures)}</div></section>'
    )


def _settings(data: ReportData) -> str:
    if not data.settings:
        return ""
    rows = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"
        for name, value in data.settings.items()
    )
    return f'<section><h2>Settings</h2><dl class="card settings">{rows}</dl></section>'


def _footer(data: ReportData) -> str:
    facts = []
    if data.seed is not None:
        facts.append(f"seed {text(data.seed)}")
    if data.seconds is not None:
        minutes, seconds = divmod(round(data.seconds), 60)
        facts.append(f"{minutes} min {seconds} s" if minutes else f"{seconds} s")
    facts += [f"{text(name)} {text(version)}" for name, version in data.versions.items()]
    command = f"<p>Made by</p><pre>{text(data.command)}</pre>" if data.command else ""
    return f"<footer>{command}<p>{' · '.join(facts)}</p></footer>"
