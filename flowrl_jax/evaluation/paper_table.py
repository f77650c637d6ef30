"""The paper's tables as data, and ours beside them.

Figures are those of arXiv 2509.15207 v3 "FlowRL: Matching Reward Distributions for LLM Reasoning",
tables 1 to 3 and figure 4, in percent unless a column says otherwise. They are single runs without
intervals; settings behind them that the paper does not give (checkpoint, seeds) are not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowrl_jax.errors import require

Interval = Mapping[str, float]
"""{"mean", "low", "high"}"""

_SOURCE = "arXiv 2509.15207 v3"


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        title: what it shows and of which models.
        source: where it stands.
        columns: names of the columns, those of `benchmarks.BENCHMARKS` where one is meant.
        headings: of the columns, as printed.
        rows: method -> figures in the order of the columns; nan where the paper has none.
        scale: what our figures are multiplied by to be in the table's units, by column.
    """

    title: str
    source: str
    columns: tuple[str, ...]
    headings: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]
    scale: tuple[float, ...]


_MATH = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench", "average")
_MATH_HEADINGS = ("AIME24", "AIME25", "AMC23", "MATH500", "Minerva", "Olympiad", "Avg")


def _math(title: str, place: str, rows: Mapping[str, tuple[float, ...]]) -> PaperTable:
    return PaperTable(
        title=title,
        source=f"{_SOURCE}, {place}",
        columns=_MATH,
        headings=_MATH_HEADINGS,
        rows=rows,
        scale=(100.0,) * len(_MATH),
    )


TABLES: Mapping[str, PaperTable] = {
    "math_7b": _math(
        "Avg@16, Qwen2.5-7B, responses up to 8K tokens",
        "table 1",
        {
            "Backbone": (4.38, 2.08, 30.78, 54.47, 22.38, 24.03, 23.02),
            "REINFORCE++": (11.04, 5.41, 66.71, 54.25, 24.37, 27.33, 31.52),
            "PPO": (9.38, 7.29, 63.43, 57.98, 26.53, 27.25, 31.98),
            "GRPO": (13.54, 9.79, 64.53, 57.05, 23.06, 26.88, 32.48),
            "FlowRL": (15.41, 10.83, 54.53, 66.96, 31.41, 34.61, 35.63),
        },
    ),
    "math_32b": _math(
        "Avg@16, Qwen2.5-32B, responses up to 8K tokens",
        "table 1",
        {
            "Backbone": (4.58, 2.08, 28.59, 52.48, 26.99, 21.37, 22.68),
            "REINFORCE++": (14.79, 9.17, 52.65, 44.35, 17.37, 24.52, 27.14),
            "PPO": (26.87, 20.41, 76.40, 69.17, 28.79, 37.90, 43.25),
            "GRPO": (23.12, 14.58, 76.87, 61.60, 18.95, 34.94, 38.34),
            "FlowRL": (23.95, 21.87, 73.75, 80.75, 38.21, 51.83, 48.39),
        },
    ),
    "ablation_7b": _math(
        "Avg@16, Qwen2.5-7B, parts of the objective left out",
        "table 3",
        {
            "FlowRL": (15.41, 10.83, 54.53, 66.96, 31.41, 34.61, 35.63),
            "without importance sampling": (6.25, 7.91, 41.40, 56.97, 22.19, 25.52, 26.71),
            "combined loss": (10.41, 6.66, 53.75, 66.50, 30.97, 33.72, 33.67),
        },
    ),
    "code_7b": PaperTable(
        title="DeepSeek-R1-Distill-Qwen-7B, responses up to 8K tokens",
        source=f"{_SOURCE}, table 2",
        columns=(
            "livecodebench",
            "livecodebench_pass_at_16",
            "codeforces_rating",
            "codeforces_percentile",
            "humanevalplus",
        ),
        headings=("LCB Avg@16", "LCB Pass@16", "CF rating", "CF percentile", "HumanEval+ Avg@16"),
        rows={
            "Backbone": (30.68, 49.46, 886.68, 19.4, 80.90),
            "REINFORCE++": (30.46, 52.68, 1208.03, 56.8, 76.61),
            "PPO": (35.10, 54.48, 1403.07, 73.7, 82.32),
            "GRPO": (32.75, 52.32, 1313.82, 67.1, 80.13),
            "FlowRL": (37.43, 56.27, 1549.47, 83.3, 83.28),
        },
        scale=(100.0, 100.0, 1.0, 1.0, 100.0),
    ),
    "diversity_7b": PaperTable(
        title="Diversity by gpt-4o-mini from 1 to 5, AIME24 and AIME25",
        source=f"{_SOURCE}, figure 4",
        columns=("judge_score",),
        headings=("diversity",),
        rows={"REINFORCE++": (1.11,), "GRPO": (1.23,), "PPO": (1.31,), "FlowRL": (2.28,)},
        scale=(1.0,),
    ),
}
"""Name -> table."""


def render_paper_table(
    table: PaperTable, ours: Mapping[str, Mapping[str, Interval]], *, markdown: bool = False
) -> str:
    """A table of the paper with rows of ours below it.

    Args:
        table: of `TABLES`.
        ours: label -> column -> figure, in our units (accuracies between 0 and 1); columns that are
            absent show a dash.
        markdown: a Markdown table instead of plain text.

    Returns:
        Lines without trailing newline: the paper's figures, then ours with their intervals below
        the mean's row as [low, high], then the source.

    Raises:
        InputError: a column is not one of the table's.
    """
    lines = [[f"{table.title}", *table.headings]]
    for method, figures in table.rows.items():
        lines.append([f"{method} (paper)", *(_figure(x) for x in figures)])
    for label, results in ours.items():
        unknown = sorted(results.keys() - set(table.columns))
        require(
            not unknown,
            f"column {', '.join(unknown)} is not in the paper's table, which has"
            f" {', '.join(table.columns)}: leave it out",
        )
        cells = [results.get(column) for column in table.columns]
        pairs = list(zip(cells, table.scale, strict=True))
        lines.append([label, *(_figure(x["mean"] * by if x else None) for x, by in pairs)])
        lines.append(["  95 % interval", *(_span(x, by) for x, by in pairs)])
    text = _markdown(lines) if markdown else _plain(lines)
    return f"{text}\n\nPaper's figures: {table.source}."


def _figure(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _span(interval: Interval | None, by: float) -> str:
    if not interval:
        return ""
    return f"[{_figure(interval['low'] * by)}, {_figure(interval['high'] * by)}]"


def _plain(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = [
        "  ".join([line[0].ljust(widths[0])]
                  + [x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True)]).rstrip()
        for line in lines
    ]  # fmt: skip
    return "\n".join([shown[0], "  ".join("-" * w for w in widths), *shown[1:]])


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    cells = [[cell.replace("|", "\\|").strip() for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])
