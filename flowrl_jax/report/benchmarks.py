"""The page's part about evaluations: figures, chances with more samples, outcomes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from flowrl_jax.report.data import HELD_OUT, Evaluation, ReportData
from flowrl_jax.report.parts import dot, interval_table, legend, shape_of
from flowrl_jax.report.plane import colors
from flowrl_jax.report.plot import Line, line_chart, text
from flowrl_jax.report.table import heading

# Statistics of the table, in its order; the number is that of the samples, k.
_TABLE = (
    r"avg_at_\d+",
    r"pass_at_\d+",
    r"maj_at_\d+",
    r"distinct_correct_\d+",
    "judge_score",
    "mean_length",
    "truncated_fraction",
)
_OUTCOME = "outcome/"
_CURVES = (
    ("pass_at_", "pass@k", "chance that one of k samples is correct"),
    ("maj_at_", "maj@k", "chance that the most frequent answer of k is correct"),
)


def benchmarks_section(data: ReportData) -> str:
    """The section, empty where nothing was evaluated.

    Args:
      data: the report's data.

    Returns:
      HTML.
    """
    parts = [_evaluation(data, name, found) for name, found in data.evaluations.items()]
    if not any(parts):
        return ""
    return (
        "<section><h2>Evaluations</h2>"
        '<p class="note">Each figure is a mean over problems with its 95 % bootstrap interval over'
        " them, as a bar or a band. Chances with k samples are unbiased estimates from all samples"
        " of a problem.</p>" + "".join(parts) + "</section>"
    )


def _evaluation(data: ReportData, name: str, found: Evaluation) -> str:
    if not found.figures:
        return ""
    palette = colors(data)
    rows = {policy: (data.label(policy), palette[policy]) for policy in found.figures}
    known = list(dict.fromkeys(m for summary in found.figures.values() for m in summary))
    # The run's own figures are at the top of the page.
    shown = [] if name == HELD_OUT and data.results else _largest(known)
    table = interval_table(found.figures, rows, shown, "policy") if shown else ""
    curves = "".join(_curve(data, found, name, *curve) for curve in _CURVES)
    names = legend(data, list(found.figures)) if curves else ""
    figures = names + f'<div class="grid two">{curves}{_outcomes(found, rows)}</div>'
    title = f'<h3 class="part">{text(name)} <small>{_size(data, found)}</small></h3>'
    return title + table + figures


def _outcomes(found: Evaluation, rows: Mapping[str, tuple[str, str]]) -> str:
    """Shares of the outcomes, a bar for every policy."""
    known = {m for summary in found.figures.values() for m in summary if m.startswith(_OUTCOME)}
    # The most frequent ones first, after the correct.
    totals = {m: sum(s[m]["mean"] for s in found.figures.values() if m in s) for m in known}
    order = sorted(known, key=lambda m: (m != f"{_OUTCOME}correct", -totals[m], m))
    if not order:
        return ""
    items = []
    for policy, summary in found.figures.items():
        shares = [(i, heading(m)[0], summary[m]) for i, m in enumerate(order) if m in summary]
        bar = "".join(
            f'<i class="o{min(i, 5)}" style="width:{100 * v["mean"]:.2f}%"></i>'
            for i, _, v in shares
        )
        words = "".join(
            f'<span title="{100 * v["low"]:.1f} to {100 * v["high"]:.1f} %">'
            f'<i class="o{min(i, 5)}"></i>{text(word)} {100 * v["mean"]:.1f} %</span>'
            for i, word, v in shares
        )
        label, color = rows[policy]
        items.append(
            f'<li><b>{dot(color)}{text(label)}</b><span class="bar">{bar}</span>'
            f'<span class="words">{words}</span></li>'
        )
    title = "<h3>Outcomes <small>shares of all responses</small></h3>"
    return f'<figure class="card whole">{title}<ul class="shares">{"".join(items)}</ul></figure>'


def _size(data: ReportData, found: Evaluation) -> str:
    """How much was evaluated; of each policy where they differ."""
    given = {
        policy: (sum(rate == rate for rate in rates), found.samples[policy])  # NaN is not itself
        for policy, rates in found.rates.items()
    }
    if len(set(given.values())) == 1:
        problems, samples = next(iter(given.values()))
        return f"{problems} problems, {samples} samples of each"
    return ", ".join(
        f"{text(data.label(policy))}: {problems} problems, {samples} samples of each"
        for policy, (problems, samples) in given.items()
    )


def _largest(known: Sequence[str]) -> list[str]:
    """The metrics of the table; of those with several k, the one with most samples."""
    chosen = []
    for pattern in _TABLE:
        found = [metric for metric in known if re.fullmatch(pattern, metric)]
        chosen += sorted(found, key=_samples)[-1:]
    return chosen


def _samples(metric: str) -> int:
    return int(re.sub(r"\D", "", metric) or 0)


def _curve(
    data: ReportData, found: Evaluation, name: str, prefix: str, title: str, note: str
) -> str:
    """A statistic against the number of samples, nothing where no policy has two of them."""
    palette, lines = colors(data), []
    for policy, summary in reversed(list(found.figures.items())):
        points = sorted((_samples(m), v) for m, v in summary.items() if m.startswith(prefix))
        if len(points) > 1:
            lines.append(
                Line(
                    label=data.label(policy),
                    color=palette[policy],
                    x=[k for k, _ in points],
                    y=[v["mean"] for _, v in points],
                    low=[v["low"] for _, v in points],
                    high=[v["high"] for _, v in points],
                    shape=shape_of(data, policy),
                    unit="k =",
                )
            )
    if not lines:
        return ""
    svg = line_chart(
        lines,
        label=f"{title} on {name}",
        x_label="samples k",
        bounds=(0.0, 1.0),
        doubling=True,
        width=440,
        height=250,
    )
    return f'<figure class="card"><h3>{title} <small>{note}</small></h3>{svg}</figure>'
