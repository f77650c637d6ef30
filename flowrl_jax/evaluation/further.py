"""Figures of benchmarks that are no means over verdicts: a rating, and what a judge says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowrl_jax.evaluation.codeforces import Standings, rate
from flowrl_jax.evaluation.judgements import Judged, read_judged
from flowrl_jax.evaluation.statistics import Summary, bootstrap

JUDGED_BY_THE_PAPER = ("aime24", "aime25")
"""The benchmarks whose problems, taken together, figure 4 of the paper is about."""

_Records = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Further:
    """Figures to show beside those of `evaluation.results`.

    Attributes:
        summary: benchmark -> name -> {"mean", "low", "high"}.
        columns: the same for columns of the paper's tables, see `paper_table.TABLES`.
        notes: lines on what figures are means of, and what there is none of.
    """

    summary: dict[str, Summary] = field(default_factory=dict)
    columns: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def further_figures(
    records: _Records, samples: Mapping[str, Path], standings: Standings | None, *, seed: int = 0
) -> Further:
    """The rating of Codeforces' verdicts, and the judge's scores that are there.

    Args:
        records: benchmark -> its records, with responses.
        samples: benchmark -> the file they are in, beside which judgements are.
        standings: for the rating.
        seed: of the bootstrap over prompts.

    Raises:
        InputError: records and standings do not fit, or a file of judgements is damaged.
    """
    found = Further()
    if "codeforces" in records:
        _add_rating(found, records["codeforces"], standings)
    judged = {name: read_judged(samples[name], own) for name, own in records.items()}
    _add_scores(found, {name: each for name, each in judged.items() if each}, seed)
    return found


def _add_rating(
    found: Further, records: Sequence[Mapping[str, Any]], standings: Standings | None
) -> None:
    if standings is None:
        found.notes.append("codeforces: no rating without --codeforces=FOLDER")
        return
    rated = rate(records, standings)
    found.summary["codeforces"] = dict(rated.summary)
    found.columns.update({f"codeforces_{name}": each for name, each in rated.summary.items()})
    found.notes.append(f"codeforces: {rated.describe()}")


def _add_scores(found: Further, judged: Mapping[str, Judged], seed: int) -> None:
    for name, each in judged.items():
        found.notes.append(f"{name}: {each.describe()}")
        if len(each.scores):
            scores = bootstrap({"judge_score": each.scores}, seed=seed)
            found.summary.setdefault(name, {}).update(scores)
    both = [judged[name] for name in JUDGED_BY_THE_PAPER if name in judged]
    if not both:
        return
    if len(both) < len(JUDGED_BY_THE_PAPER) or any(b.settings != both[0].settings for b in both):
        names = " and ".join(JUDGED_BY_THE_PAPER)
        found.notes.append(f"the paper's diversity is that of {names}: judge both, and alike")
        return
    scores = np.concatenate([each.scores for each in both])
    if len(scores):
        found.columns.update(bootstrap({"judge_score": scores}, seed=seed))
