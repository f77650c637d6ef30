"""Accuracy of several samples together: their mean, their vote, and how chances grow with them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from flowrl_jax.errors import InputError
from flowrl_jax.evaluation.statistics import pass_at_k

Answers = Sequence[Sequence[str | None]]
"""[P][n], what each response answers, right or wrong, in a form that equal answers share; None
where a response has no answer."""

_BLOCK = 256  # resamples drawn at a time


def avg_at_k(score: np.ndarray) -> np.ndarray:
    """Mean score of a prompt's samples: Avg@n, with n = 16 in the tables of arXiv 2509.15207.

    The expectation over k of the n samples is the same for every k.

    Args:
        score: [P, n] bool or float.

    Returns:
        [P] float64.
    """
    return np.asarray(score, np.float64).mean(axis=1)


def curve_points(n: int) -> list[int]:
    """The k of a curve over numbers of samples: 1, 2, 4, ... and n itself."""
    return sorted({1 << i for i in range(n.bit_length()) if 1 << i <= n} | {n})


def pass_at_k_curve(correct: np.ndarray) -> dict[str, np.ndarray]:
    """pass@k of every prompt for k = 1, 2, 4, ... n.

    Args:
        correct: [P, n] bool.

    Returns:
        "pass_at_{k}" -> [P] float64, k increasing; values never fall along it.
    """
    return {f"pass_at_{k}": pass_at_k(correct, k) for k in curve_points(correct.shape[1])}


def maj_at_k(answers: Answers, correct: np.ndarray, k: int) -> np.ndarray:
    """Chance that the most frequent answer among k samples is right: maj@k.

    The vote is self-consistency (Wang et al. 2022, arXiv 2203.11171); the name is that of
    Lewkowycz et al. 2022, arXiv 2206.14858.

    The exact expectation over all C(n, k) ways to draw k of the n samples without replacement, by
    counting and not by drawing them. Samples without an answer cast no vote; answers with equally
    many votes are chosen among evenly; where nobody votes, nothing is right.

    Args:
        answers: as `Answers`.
        correct: [P, n] bool. Where equal answers are judged differently, an answer is as right as
            its share of correct samples.
        k: votes, 1 <= k <= n.

    Returns:
        [P] float64 in [0, 1]; with k = 1 it is the share of samples that are correct, if every
        correct one has an answer.

    Raises:
        InputError: k is outside 1..n, or answers and `correct` differ in shape.
    """
    correct = np.asarray(correct, dtype=bool)
    count, n = correct.shape
    if len(answers) != count or any(len(row) != n for row in answers):
        raise InputError(
            f"answers are {len(answers)} prompts, correct has shape {correct.shape}; give an"
            " answer, or None, for every sample"
        )
    if not 1 <= k <= n:
        raise InputError(
            f"k={k} needs 1 <= k <= number of samples, which is {n}; draw at least {k} samples"
            " per prompt or ask for a smaller k"
        )
    return np.array([_vote(_ballots(a, c), n, k) for a, c in zip(answers, correct, strict=True)])


def _ballots(answers: Sequence[str | None], correct: np.ndarray) -> tuple[tuple[int, float], ...]:
    """How often each answer occurs and how right it is; sorted, as prompts often agree in it."""
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers, correct.tolist(), strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(right)
    return tuple(sorted((len(x), sum(x) / len(x)) for x in votes.values()))


@functools.lru_cache(maxsize=65536)
def _vote(ballots: tuple[tuple[int, float], ...], n: int, k: int) -> float:
    """Expected rightness of the answer that wins among k of n samples.

    The numbers of votes that answers get in a draw without replacement are independent binomials
    of any rate, given that they add up to k: so all sums below are of probabilities, which cannot
    overflow, and the one of the condition divides at the end.
    """
    if k == n:
        return _winner(ballots)
    rate = k / n
    silent = n - sum(m for m, _ in ballots)
    # total[x]: how likely x samples are drawn of those that cast no vote.
    total = _binomial(silent, rate, k)
    expected = 0.0
    for most in range(1, min(k, max((m for m, _ in ballots), default=0)) + 1):
        expected += _won_with(ballots, most, rate, total)
    return expected / _binomial(n, rate, k)[k]


def _winner(ballots: tuple[tuple[int, float], ...]) -> float:
    if not ballots:
        return 0.0
    most = max(m for m, _ in ballots)
    tied = [right for m, right in ballots if m == most]
    return sum(tied) / len(tied)


def _won_with(
    ballots: tuple[tuple[int, float], ...], most: int, rate: float, silent: np.ndarray
) -> float:
    """The part of the expectation where the winners have `most` votes, before the condition.

    Goes through the answers with ways[x, s]: how likely x samples are drawn so far and s answers
    have `most` votes, and right[x, s]: the same times the summed rightness of those s.
    """
    k = len(silent) - 1
    ties = k // most
    ways = np.zeros((k + 1, ties + 1))
    ways[:, 0] = silent
    right = np.zeros_like(ways)
    for m, rightness in ballots:
        chance = _binomial(m, rate, k)
        new_ways, new_right = np.zeros_like(ways), np.zeros_like(right)
        for j in range(min(m, most) + 1):
            drawn = k + 1 - j
            if j < most:
                new_ways[j:] += chance[j] * ways[:drawn]
                new_right[j:] += chance[j] * right[:drawn]
            else:
                new_ways[j:, 1:] += chance[j] * ways[:drawn, :-1]
                new_right[j:, 1:] += chance[j] * (right + rightness * ways)[:drawn, :-1]
        ways, right = new_ways, new_right
    return float(np.sum(right[k, 1:] / np.arange(1, ties + 1)))


def _binomial(m: int, rate: float, k: int) -> np.ndarray:
    """[k + 1] float64: the chances of 0..k successes in m trials, 0 < rate < 1."""
    chances = np.zeros(k + 1)
    j = np.arange(1, m + 1)
    # In logarithms: (1 - rate)^m alone may underflow.
    logs = np.concatenate([[0.0], np.cumsum(np.log((m - j + 1) / j))])
    logs += np.arange(m + 1) * np.log(rate) + np.arange(m, -1, -1) * np.log1p(-rate)
    size = min(m, k) + 1
    chances[:size] = np.exp(logs[:size])
    return chances


def macro_average(
    values: Sequence[np.ndarray], *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> dict[str, float]:
    """Mean of the means of several evaluation sets, each counting the same whatever its size.

    The interval is a bootstrap in which every set's prompts are drawn anew from that set alone, as
    the sets themselves are no sample of anything.

    Args:
        values: for every set [P_i] float, one value per prompt.
        seed: of the draws.
        resamples: number of draws.
        level: probability content of the interval.

    Returns:
        {"mean", "low", "high"}.

    Raises:
        InputError: there is no set, or an empty one.
    """
    if not values or any(len(v) == 0 for v in values):
        raise InputError("an average over evaluation sets needs a prompt in each of them")
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for value in values:
        count = len(value)
        for start in range(0, resamples, _BLOCK):
            size = min(_BLOCK, resamples - start)
            draws = rng.multinomial(count, np.full(count, 1.0 / count), size=size)
            means[start : start + size] += draws @ np.asarray(value, np.float64) / count
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(means / len(values), [tail, 100.0 - tail])
    mean = np.mean([np.mean(value) for value in values])
    return {"mean": float(mean), "low": float(low), "high": float(high)}
