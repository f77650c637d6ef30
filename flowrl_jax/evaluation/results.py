"""From the records of benchmarks to one set of figures for each, and to the paper's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowrl_jax.evaluation.diversity import diversity_values
from flowrl_jax.evaluation.paper_table import TABLES, render_paper_table
from flowrl_jax.evaluation.statistics import (
    Summary,
    bootstrap,
    distinct_correct,
    effective_solutions,
)
from flowrl_jax.evaluation.voting import (
    avg_at_k,
    curve_points,
    macro_average,
    maj_at_k,
    pass_at_k_curve,
)
from flowrl_jax.graded import samples_from_records

Record = Mapping[str, Any]
Values = Mapping[str, Mapping[str, np.ndarray]]
"""Benchmark -> its `benchmark_values`."""


def graded_values(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """The statistics of every prompt that follow from verdicts alone, without reading responses.

    Args:
        records: as `graded.samples_from_records` takes them, with "reward", "outcome" and "answer".

    Returns:
        Name -> [P] float64: avg_at_{n}, pass_at_{k} and, with answers, maj_at_{k} for k = 1, 2, 4,
        ... n, reward, distinct_correct_{n}, effective_solutions, mean_length, truncated_fraction
        and outcome/{word}.

    Raises:
        InputError: the records are not of one evaluation.
    """
    samples = samples_from_records(records)
    n, counts = samples.num_samples, samples.solution_counts()
    values = {f"avg_at_{n}": avg_at_k(samples.correct), **pass_at_k_curve(samples.correct)}
    answers = _answers(records)
    if answers is not None:
        for k in curve_points(n):
            values[f"maj_at_{k}"] = maj_at_k(answers, samples.correct, k)
    values["reward"] = avg_at_k(np.array([record["reward"] for record in records], np.float64))
    values[f"distinct_correct_{n}"] = distinct_correct(counts, n, n)
    values["effective_solutions"] = effective_solutions(counts)
    values["mean_length"] = samples.length.mean(axis=1)
    values["truncated_fraction"] = samples.truncated.mean(axis=1)
    for word in sorted({word for record in records for word in record["outcome"]}):
        shares = [record["outcome"].count(word) / n for record in records]
        values[f"outcome/{word}"] = np.array(shares)
    return values


def _answers(records: Sequence[Record]) -> Any:
    """What the responses answer, None where the task has no answers."""
    answers = [record["answer"] for record in records]
    return answers if any(answer for each in answers for answer in each) else None


def benchmark_values(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """The statistics of every prompt of a benchmark.

    Args:
        records: as `graded_values` takes them, with "responses".

    Returns:
        Name -> [P] float64: `graded_values`, and `diversity_values` where n >= 2.

    Raises:
        InputError: the records are not of one evaluation.
    """
    values = graded_values(records)
    responses = [record["responses"] for record in records]
    if len(responses[0]) > 1:
        values |= diversity_values(responses, answers=_answers(records))
    return values


def summarize_benchmarks(values: Values, *, seed: int = 0) -> dict[str, Summary]:
    """Means and 95 % intervals of `benchmark_values`, for each benchmark.

    Args:
        values: as `Values`.
        seed: of the bootstrap over prompts.

    Returns:
        Benchmark -> name -> {"mean", "low", "high"}; and "average", the mean of the benchmarks'
        avg_at_{n} where there are several with the same number of samples.
    """
    summary = {name: bootstrap(found, seed=seed) for name, found in values.items()}
    first = {next(iter(found)) for found in values.values()}
    if len(values) > 1 and len(first) == 1:
        name = first.pop()
        each = [found[name] for found in values.values()]
        summary["average"] = {name: macro_average(each, seed=seed)}
    return summary


def paper_columns(
    values: Values,
    columns: Sequence[str],
    *,
    more: Mapping[str, Mapping[str, float]] | None = None,
    seed: int = 0,
) -> dict[str, Mapping[str, float]]:
    """The figures of ours that belong into a table of the paper.

    Args:
        values: as `Values`.
        columns: of the table.
        more: column -> figure, of those that do not follow from `values`.
        seed: of the bootstrap over prompts.

    Returns:
        Column -> {"mean", "low", "high"} of Avg@n, of pass@16 where the column's name ends so, and
        of the average where all other columns are there.
    """
    found: dict[str, Mapping[str, float]] = {}
    averages: list[np.ndarray] = []
    for column in columns:
        benchmark = column.removesuffix("_pass_at_16")
        own = values.get(benchmark, {})
        name = next(iter(own), "") if benchmark == column else "pass_at_16"
        if name in own:
            found[column] = bootstrap({name: own[name]}, seed=seed)[name]
            averages.append(own[name])
    if "average" in columns and len(found) == len(columns) - 1:
        found["average"] = macro_average(averages, seed=seed)
    return found | {name: each for name, each in (more or {}).items() if name in columns}


def render_benchmarks(
    values: Values,
    label: str,
    *,
    more: Mapping[str, Mapping[str, float]] | None = None,
    markdown: bool = False,
    seed: int = 0,
) -> str:
    """Our figures in the layout of the paper's tables that have one of our benchmarks.

    Args:
        values: as `Values`.
        label: of our row.
        more: as `paper_columns` takes them.
        markdown: instead of plain text.
        seed: of the bootstrap over prompts.

    Returns:
        Tables with an empty line between; empty where the paper has none of the benchmarks.
    """
    shown = []
    for name in ("math_7b", "math_32b", "code_7b", "diversity_7b"):
        ours = paper_columns(values, TABLES[name].columns, more=more, seed=seed)
        if ours:
            shown.append(render_paper_table(TABLES[name], {label: ours}, markdown=markdown))
    return "\n\n".join(shown)
