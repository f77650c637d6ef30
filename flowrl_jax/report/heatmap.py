"""The page's part about problems: who solves which, as a heat map of pass rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flowrl_jax.report.data import Evaluation, ReportData
from flowrl_jax.report.plot import caption, open_svg, text

WIDTH = 1000.0
LEFT = 150.0  # of the cells; policies' names stand there
COLUMNS = 60  # problems beside each other
MAX_CELL, CELL_HEIGHT, GAP = 26.0, 17.0, 1.0
MAX_COLUMNS = 1200  # more problems than this share cells
SHADES = 10  # between none and all; colours are in plot.css, dark to light as cividis
_LABEL = 20  # characters of a policy's name


def heatmap_section(data: ReportData) -> str:
    """The section, empty where no problem was evaluated.

    Args:
      data: the report's data.

    Returns:
      HTML.
    """
    maps = [_evaluation(data, name, found) for name, found in data.evaluations.items()]
    if not any(maps):
        return ""
    return (
        "<section><h2>Problem by problem</h2>"
        '<p class="note">A column is a problem, a row a policy, a cell the share of the policy\'s'
        " samples that are correct. Problems are sorted by their mean over policies, the hardest"
        " first, and go on in the next band. Rest the pointer on a cell for its numbers.</p>"
        f"{_scale()}{''.join(maps)}</section>"
    )


def shade(rate: float) -> int:
    """Index of the colour of a pass rate.

    Args:
      rate: 0 to 1.

    Returns:
      0 exactly where nothing is correct, SHADES where everything is, 1 to SHADES - 1 between.
    """
    if rate <= 0.0 or rate >= 1.0:
        return 0 if rate <= 0.0 else SHADES
    return 1 + min(int(rate * (SHADES - 1)), SHADES - 2)


def _scale() -> str:
    cells = "".join(f'<i class="h{i}"></i>' for i in range(SHADES + 1))
    return (
        f'<p class="scale">no sample correct <span aria-hidden="true">{cells}</span> all correct'
        ' <span class="absent"><i class="hx"></i></span> not evaluated</p>'
    )


Column = tuple[list[int], dict[str, float], float]  # problems, policy -> pass rate, mean


def _columns(found: Evaluation) -> list[Column]:
    """The problems, hardest first; neighbours share a column where there are too many."""
    columns: list[Column] = []
    for i, problem in enumerate(found.problems):
        rates = {policy: each[i] for policy, each in found.rates.items()}
        columns.append(([problem], rates, _mean(list(rates.values()))))
    columns.sort(key=lambda column: (column[2], column[0]))
    size = math.ceil(len(columns) / MAX_COLUMNS)
    if size <= 1:
        return columns
    shared = []
    for start in range(0, len(columns), size):
        part = columns[start : start + size]
        rates = {policy: _mean([each[1][policy] for each in part]) for policy in found.rates}
        shared.append(([each[0][0] for each in part], rates, _mean([each[2] for each in part])))
    return shared


def _mean(values: Sequence[float]) -> float:
    """Mean of the values that are there."""
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def _evaluation(data: ReportData, name: str, found: Evaluation) -> str:
    columns = _columns(found)
    if not columns:
        return ""
    cell = min(MAX_CELL, (WIDTH - LEFT) / COLUMNS)
    if len(columns) < COLUMNS:
        cell = min(MAX_CELL, (WIDTH - LEFT) / len(columns))
    policies = list(found.rates)
    band = CELL_HEIGHT * len(policies) + 24
    parts = []
    bands = range(0, len(columns), COLUMNS)
    for number, start in enumerate(bands):
        top = number * band + 2
        for row, policy in enumerate(policies):
            label = data.label(policy)
            if len(label) > _LABEL:
                label = label[: _LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
            y = top + row * CELL_HEIGHT
            parts.append(caption("tick", LEFT - 8, y + CELL_HEIGHT - 5, label, "end"))
        inside = columns[start : start + COLUMNS]
        for i, column in enumerate(inside):
            parts += _cells(data, found, column, LEFT + i * cell, top, cell)
        last = start + len(inside)
        words = f"{start + 1} to {last} of {len(columns)}"
        words += ", hardest first" if start == 0 else ""
        y = top + CELL_HEIGHT * len(policies) + 13
        parts.append(caption("tick", LEFT, y, words, "start"))
    height = len(bands) * band
    size = len(columns[0][0])
    count = f"{len(found.problems)} problems"
    if size > 1:
        count += f"; a column is {size} problems of like difficulty, a cell their mean"
    picture = open_svg(WIDTH, height, f"pass rates of every problem of {name}")
    return (
        f'<figure class="card heat"><h3>{text(name)} <small>{count}</small></h3>'
        f'<div class="scroll">{picture}{"".join(parts)}</svg></div></figure>'
    )


def _cells(
    data: ReportData, found: Evaluation, column: Column, x: float, top: float, width: float
) -> list[str]:
    problems, rates, mean = column
    which = f"problem {problems[0]}" if len(problems) == 1 else f"{len(problems)} problems"
    cells = []
    for row, (policy, rate) in enumerate(rates.items()):
        kind, words = "hx", "not evaluated"
        if not math.isnan(rate):
            samples = found.samples[policy]
            exact = f" ({round(rate * samples)} of {samples})" if len(problems) == 1 else ""
            kind, words = f"h{shade(rate)}", f"{rate:.2f}{exact}, mean of policies {mean:.2f}"
        cells.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{top + row * CELL_HEIGHT:.0f}"'
            f' width="{width - GAP:.1f}" height="{CELL_HEIGHT - GAP:.0f}">'
            f"<title>{which}, {text(data.label(policy))}: {words}</title></rect>"
        )
    return cells
