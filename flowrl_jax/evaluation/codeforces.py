"""The rating of the benchmark `codeforces` from its verdicts and a folder of files.

    problems.json   ["1971A", "1971B", ...]: the problem of each row, in the rows' order
    contests.json   standings of the contests, see `evaluation.rating`
    ratings.json    {"1200": 91, ...}: how many people have a rating; without it no percentile

`problems.json` and `ratings.json` have the form of rLLM's `metadata_cf.json` and
`ratings_2024.json`, which the paper's script reads; it asks Codeforces itself for the standings,
which here `contest_entry` takes from the replies.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowrl_jax.errors import InputError, require
from flowrl_jax.evaluation.rating import Contest, codeforces_rating, load_contests
from flowrl_jax.evaluation.statistics import Summary

PROBLEMS, CONTESTS, RATINGS = "problems.json", "contests.json", "ratings.json"
_PROBLEM = re.compile(r"([0-9]+)([A-Z][A-Z0-9]*)")


@dataclass(frozen=True, kw_only=True)
class Standings:
    """What verdicts are rated with.

    Attributes:
        problems: (contest, problem) of each row of the benchmark.
        contests: name -> contest.
        people: [N] float, ratings of people; None where there are none.
        folder: where this was read, for messages.
    """

    problems: Sequence[tuple[str, str]]
    contests: Mapping[str, Contest]
    people: np.ndarray | None
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Rated:
    """A policy's rating.

    Attributes:
        summary: "rating" and, where people's ratings are known, "percentile" -> interval.
        contests: how many it is the mean of.
        unknown: contests of the benchmark that are left out, for want of standings.
    """

    summary: Summary
    contests: int
    unknown: Sequence[str]

    def describe(self) -> str:
        """One line about what the rating is a mean of."""
        total = self.contests + len(self.unknown)
        left = f"; without standings: {', '.join(self.unknown)}" if self.unknown else ""
        return f"rating over {self.contests} of {total} contests{left}"


def load_standings(folder: str | Path) -> Standings:
    """Reads the files of a folder, see the module.

    Raises:
        InputError: a file is missing, except ratings.json, or is not as it should be; or no contest
            of a problem is known.
    """
    folder = Path(folder)
    names = _json(folder / PROBLEMS)
    if not isinstance(names, list) or not names:
        raise InputError(f'{folder / PROBLEMS} is no list of problems: write ["1971A", ...]')
    problems = [_problem(folder, row, name) for row, name in enumerate(names)]
    most, times = Counter(problems).most_common(1)[0]
    require(times == 1, f"{folder / PROBLEMS} has {''.join(most)} twice: give each row its own")
    contests = {contest.name: contest for contest in load_contests(folder / CONTESTS)}
    require(
        any(contest in contests for contest, _ in problems),
        f"{folder / CONTESTS} has none of the contests of {PROBLEMS}: add {problems[0][0]} and"
        " others",
    )
    people = _people(folder / RATINGS) if (folder / RATINGS).is_file() else None
    return Standings(problems=problems, contests=contests, people=people, folder=folder)


def rate(records: Sequence[Mapping[str, Any]], standings: Standings) -> Rated:
    """The rating of a policy from its samples of the benchmark.

    A prompt's samples are the policy's attempts, in their order.

    Args:
        records: one for every row of the benchmark, with "prompt_id" and "correct".
        standings: of the contests.

    Returns:
        The rating, its interval over contests.

    Raises:
        InputError: there is not a record for each problem, or a contest lacks a problem.
    """
    found = {int(record["prompt_id"]): record["correct"] for record in records}
    count = len(standings.problems)
    require(
        sorted(found) == list(range(count)),
        f"{standings.folder / PROBLEMS} has {count} problems and {len(found)} rows were evaluated:"
        " give the problem of every row, and evaluate all rows",
    )
    attempts: dict[str, dict[str, Sequence[bool]]] = {}
    for row, (contest, problem) in enumerate(standings.problems):
        attempts.setdefault(contest, {})[problem] = found[row]
    known = {name: each for name, each in attempts.items() if name in standings.contests}
    summary = codeforces_rating(
        [standings.contests[name] for name in known], known, ratings=standings.people
    )
    unknown = [name for name in attempts if name not in known]
    return Rated(summary=summary, contests=len(known), unknown=unknown)


def contest_entry(standings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of contests.json from two replies of Codeforces.

    Args:
        standings: JSON of contest.standings, without unofficial participants.
        changes: JSON of contest.ratingChanges of the same contest.

    Returns:
        The entry, of the participants that both know.

    Raises:
        InputError: a reply is not such a one.
    """
    try:
        rated = {change["handle"]: change["oldRating"] for change in changes["result"]}
        result = standings["result"]
        people = [
            {"rating": rated[handle], "points": row["points"], "penalty": row["penalty"]}
            for row in result["rows"]
            for handle in (row["party"]["members"][0]["handle"],)
            if handle in rated
        ]
        problems = {problem["index"]: problem.get("points") for problem in result["problems"]}
        return {
            "contest": str(result["contest"]["id"]),
            "problems": problems,
            "standings": people,
        }
    except (LookupError, TypeError) as error:
        raise InputError(
            f"not what Codeforces replies ({type(error).__name__}: {error}): give the JSON of"
            " contest.standings and of contest.ratingChanges"
        ) from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): put it there") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): mend it") from None


def _problem(folder: Path, row: int, name: Any) -> tuple[str, str]:
    match = _PROBLEM.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise InputError(
            f"{folder / PROBLEMS} entry {row} is {name!r}: write contest and problem, such as 1971A"
        )
    return match[1], match[2]


def _people(path: Path) -> np.ndarray:
    counts = _json(path)
    try:
        return np.repeat([float(rating) for rating in counts], [*map(int, counts.values())])
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f'{path} does not say how many people have a rating ({error}): write {{"1200": 91}}'
        ) from None
