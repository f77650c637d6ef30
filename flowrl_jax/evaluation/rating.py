"""Elo ratings of a policy from verdicts and files, without asking any server.

Two of them. `contest_rating` is that of CodeElo (arXiv 2501.01257) and of the script behind the
paper's table: the policy takes part, after the fact, in a contest whose standings are known, and
its rating is the one from which its place is to be expected; a policy's rating is the mean over
contests. `problem_rating` needs no standings, only the problems' own ratings.

Everywhere a wins against b with probability 1 / (1 + 10^((b - a) / 400)).

A contests file is a JSON list:

    [{"contest": "1950", "problems": {"A": 500, "B": 1000},
      "standings": [{"rating": 1873, "points": 1456, "penalty": 0}, ...]}, ...]

`points` of a problem are null where contests count problems and penalty minutes instead. The
standings are those of the rated participants with their ratings before the contest, as Codeforces'
contest.standings and contest.ratingChanges give them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowrl_jax.errors import InputError
from flowrl_jax.evaluation.statistics import Summary, bootstrap

LOST_POINTS = 50  # for every failed attempt before the one that passes
PENALTY_MINUTES = 10  # the same where problems have no points
_SCALE = 400.0 / math.log(10.0)
_TOLERANCE = 1e-3  # of a rating


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A contest that has ended.

    Attributes:
        name: of the contest.
        problems: name -> points of a problem; None in a contest that counts problems.
        rating: [N] float, of the participants, before the contest.
        points: [N] float, their results; the number of problems solved where these have no points.
        penalty: [N] float, among equal points less is better.
    """

    name: str
    problems: Mapping[str, float | None]
    rating: np.ndarray
    points: np.ndarray
    penalty: np.ndarray


def win_probability(own: np.ndarray | float, other: np.ndarray | float) -> np.ndarray:
    """Chance that one of rating `own` does better than one of rating `other` (Elo 1978)."""
    difference = np.asarray(own, np.float64) - np.asarray(other, np.float64)
    return 0.5 * (1.0 + np.tanh(difference / (2.0 * _SCALE)))


def problem_rating(
    difficulty: np.ndarray, solved: np.ndarray, *, low: float = 0.0, high: float = 4000.0
) -> float:
    """Maximum-likelihood rating of a policy that solves problems of known rating.

    The r at which as many problems are expected to be solved as are: sum of P(r beats d_p) = sum of
    solved_p, the score equation of the logistic likelihood. Codeforces rates a problem d where
    participants of rating d solve it with probability 1/2.

    Args:
        difficulty: [N] float, ratings of the problems.
        solved: [N] bool, or the share of attempts that solved each, in [0, 1].
        low: least rating; also that of a policy that solves nothing, where the likelihood has no
            maximum.
        high: greatest rating; also that of a policy that solves all.

    Returns:
        The rating, in [low, high].

    Raises:
        InputError: there is no problem, the arrays differ in length, or a share is outside [0, 1].
    """
    difficulty = np.asarray(difficulty, np.float64)
    solved = np.asarray(solved, np.float64)
    if difficulty.shape != solved.shape or difficulty.ndim != 1 or not len(difficulty):
        raise InputError(
            f"{difficulty.shape} ratings of problems and {solved.shape} results: give one result"
            " for every problem, at least one"
        )
    if not ((solved >= 0.0) & (solved <= 1.0)).all():
        raise InputError(
            f"results lie in [{solved.min()}, {solved.max()}]: give the share of attempts that"
            " solved a problem, between 0 and 1"
        )
    excess = lambda r: win_probability(r, difficulty).sum() - solved.sum()  # noqa: E731
    return _root(excess, low, high)


def contest_result(contest: Contest, attempts: Mapping[str, Sequence[bool]]) -> tuple[float, float]:
    """Points and penalty of a policy, from its attempts in their order.

    A problem is solved by the first attempt that passes. It brings its points less 50 for each
    failed attempt before, at least 0; where problems have no points it counts 1, and each failed
    attempt before costs 10 minutes. Time is not counted, as a policy has none.

    Args:
        contest: with the problems' points.
        attempts: problem -> verdicts in order; problems that are absent were not tried.

    Raises:
        InputError: a problem is not in the contest.
    """
    points = penalty = 0.0
    for problem, verdicts in attempts.items():
        if problem not in contest.problems:
            raise InputError(
                f"problem {problem!r} is not in contest {contest.name!r}, which has"
                f" {', '.join(contest.problems)}: correct the verdicts or the contests file"
            )
        failed = next((i for i, passed in enumerate(verdicts) if passed), None)
        if failed is None:
            continue
        worth = contest.problems[problem]
        if worth is None:
            points += 1.0
            penalty += PENALTY_MINUTES * failed
        else:
            points += max(0.0, worth - LOST_POINTS * failed)
    return points, penalty


def contest_place(contest: Contest, points: float, penalty: float) -> float:
    """Place of a result among the participants: 1, those who did better, and half of the ties."""
    better = (contest.points > points) | ((contest.points == points) & (contest.penalty < penalty))
    ties = (contest.points == points) & (contest.penalty == penalty)
    return 1.0 + float(better.sum()) + 0.5 * float(ties.sum())


def expected_place(contest: Contest, rating: float) -> float:
    """Place to be expected of a rating: 1 + the participants' chances to do better.

    The seed of Codeforces' rating system (codeforces.com/blog/entry/20762).
    """
    return 1.0 + float(win_probability(contest.rating, rating).sum())


def contest_rating(
    contest: Contest,
    attempts: Mapping[str, Sequence[bool]],
    *,
    low: float = 0.0,
    high: float | None = None,
) -> float:
    """The rating from which the policy's place in a contest is to be expected.

    Args:
        contest: with standings.
        attempts: as `contest_result` takes them.
        low: least rating, also where the place is behind all.
        high: greatest rating, also where it is before all; default: the best participant's and 100
            more.

    Returns:
        The rating, in [low, high].

    Raises:
        InputError: a problem is not in the contest.
    """
    place = contest_place(contest, *contest_result(contest, attempts))
    if high is None:
        high = float(contest.rating.max()) + 100.0
    return _root(lambda r: place - expected_place(contest, r), low, high)


def _root(increasing: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that does not fall is 0, or the end of [low, high] nearest to that."""
    if increasing(low) >= 0.0:
        return low
    if increasing(high) <= 0.0:
        return high
    while high - low > _TOLERANCE:
        middle = 0.5 * (low + high)
        if increasing(middle) < 0.0:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def codeforces_rating(
    contests: Sequence[Contest],
    attempts: Mapping[str, Mapping[str, Sequence[bool]]],
    *,
    ratings: np.ndarray | None = None,
    seed: int = 0,
) -> Summary:
    """Mean of `contest_rating` over contests, with a bootstrap interval over contests.

    Args:
        contests: those the policy took part in.
        attempts: contest -> problem -> verdicts in order.
        ratings: of many people, for the percentile.
        seed: of the bootstrap.

    Returns:
        "rating" and, where `ratings` are given, "percentile" -> {"mean", "low", "high"}; the
        percentile is that of the mean rating and of its interval's ends.

    Raises:
        InputError: there is no contest, or a contest has no attempts or is not known.
    """
    known = {contest.name for contest in contests}
    if not contests or known != attempts.keys():
        odd = sorted(known ^ attempts.keys())[:3]
        raise InputError(
            f"{len(known)} contests and verdicts of {len(attempts)}, which differ in"
            f" {', '.join(odd) or 'nothing'}: give verdicts of every contest, at least one"
        )
    found = [contest_rating(contest, attempts[contest.name]) for contest in contests]
    summary = bootstrap({"rating": np.array(found)}, seed=seed)
    if ratings is not None:
        summary["percentile"] = {
            end: percentile(value, ratings) for end, value in summary["rating"].items()
        }
    return summary


def percentile(rating: float, ratings: np.ndarray) -> float:
    """Share of people with a lower rating, half of those with the same one included, in percent.

    Raises:
        InputError: there are no ratings.
    """
    ratings = np.asarray(ratings, np.float64)
    if not ratings.size:
        raise InputError("a percentile needs the ratings of people: the list of them is empty")
    return float(100.0 * np.mean((ratings < rating) + 0.5 * (ratings == rating)))


def load_contests(path: str | Path) -> list[Contest]:
    """Reads a contests file, see the module.

    Raises:
        InputError: the file is missing, or an entry is not as it should be.
    """
    try:
        entries = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): name a contests file"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): write a list of contests") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} is not a list of contests: write one with at least one contest")
    return [_contest(path, place, entry) for place, entry in enumerate(entries)]


def _contest(path: str | Path, place: int, entry: Any) -> Contest:
    try:
        standings = entry["standings"]
        columns = {
            name: np.array([float(row.get(name, 0.0) if name == "penalty" else row[name])
                            for row in standings])
            for name in ("rating", "points", "penalty")
        }  # fmt: skip
        problems = {
            str(name): None if worth is None else float(worth)
            for name, worth in entry["problems"].items()
        }
        name = str(entry["contest"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} entry {place} is no contest ({type(error).__name__}: {error}): give contest,"
            " problems and standings with rating and points"
        ) from None
    if not problems or not standings:
        raise InputError(f"{path} entry {place} ({name}) lacks problems or standings: give both")
    return Contest(name=name, problems=problems, **columns)
