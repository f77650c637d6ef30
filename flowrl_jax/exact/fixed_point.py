"""The policy at which the flow family's expected gradient is zero, computed and not trained.

With r the reward as the loss sees it, on average over the group that normalises it, n a response's
tokens and F(zeta) = sum of pi_ref e^(n (beta r - zeta)):

    without length normalisation   pi_ref e^(beta r) / Z
    with it                        pi_ref e^(n (beta r - zeta)),  F(zeta) = 1

`docs/objective.md` derives both. They are what a policy converges to that is free at every prefix.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

from flowrl_jax.errors import require
from flowrl_jax.objectives.flowrl import FlowRLConfig

_MOST_WAYS = 100_000  # in which the rewards of a group are mixed
_EPS = 1e-6  # of `advantages.group_normalize`


class FixedPoint(NamedTuple):
    """Of one prompt.

    Attributes:
        logprobs: `[N]`, of its responses.
        log_z: that goes with it.
        scaled: `[N]`, beta times the reward as the loss sees it.
    """

    logprobs: np.ndarray
    log_z: float
    scaled: np.ndarray


def fixed_point(
    config: FlowRLConfig,
    reference: np.ndarray,
    reward: np.ndarray,
    sizes: np.ndarray,
    *,
    group_size: int,
) -> FixedPoint:
    """Where training ends.

    Args:
        config: of the objective.
        reference: `[N]` log-probabilities of all responses.
        reward: `[N]`, as judged.
        sizes: `[N]`, tokens of each.
        group_size: samples of a group.

    Returns:
        Distribution and log Z.
    """
    levels, level = np.unique(np.asarray(reward, np.float64), return_inverse=True)
    reference = np.asarray(reference, np.float64)
    beta = config.beta
    if config.log_z.kind == "group" and config.reward_norm == "group":
        # The rewards of a group sum to 0, so that its mean estimate of log Z knows none of them,
        # but holds 1 / G of each response's own log-ratio.
        beta *= group_size / (group_size - 1)
    settle = _tilted if config.length_normalize else _gibbs
    found = settle(reference, beta * levels[level], sizes)
    if config.reward_norm != "group":
        return found
    # Its rewards depend on the policy, and the policy on them: found from small beta to large.
    mean = np.zeros_like(levels)
    for part in np.linspace(0.0, 1.0, 21)[1:]:
        for _ in range(20 if part < 1.0 else 200):
            found = settle(reference, part * beta * mean[level], sizes)
            chance = np.bincount(level, np.exp(found.logprobs), len(levels))
            mean += 0.5 * (expected_normalized(levels, chance, group_size) - mean)
    return settle(reference, beta * mean[level], sizes)


def _gibbs(reference: np.ndarray, scaled: np.ndarray, sizes: np.ndarray) -> FixedPoint:
    del sizes
    log_z = _log_sum(reference + scaled)
    return FixedPoint(reference + scaled - log_z, log_z, scaled)


def _tilted(reference: np.ndarray, scaled: np.ndarray, sizes: np.ndarray) -> FixedPoint:
    low, high = scaled.min(), scaled.max()
    zeta = low
    for _ in range(60):
        zeta = 0.5 * (low + high)
        too_much = _log_sum(reference + sizes * (scaled - zeta)) > 0.0
        low, high = (zeta, high) if too_much else (low, zeta)
    logprobs = reference + sizes * (scaled - zeta)
    return FixedPoint(logprobs - _log_sum(logprobs), zeta, scaled)


def expected_normalized(levels: np.ndarray, chance: np.ndarray, group_size: int) -> np.ndarray:
    """The mean of a response's group-normalised reward, over the others of its group.

    Args:
        levels: `[K]` rewards that occur.
        chance: `[K]`, how likely each of them is.
        group_size: samples of a group, 2 or more.

    Returns:
        `[K]`, for a response of each level; exact, a sum over all ways to fill the group.

    Raises:
        InputError: there are too many such ways.
    """
    others, count = group_size - 1, len(levels)
    ways = math.comb(others + count - 1, count - 1)
    require(
        ways <= _MOST_WAYS,
        f"{count} different rewards in groups of {group_size} mix in {ways} ways: give fewer than"
        f" {_MOST_WAYS}, by fewer rewards or smaller groups",
    )
    bars = np.array(list(itertools.combinations(range(others + count - 1), count - 1)))
    bars = bars.reshape(ways, count - 1)
    edges = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, others + count - 1)))
    times = np.diff(edges, axis=1) - 1  # [ways, K]: how many of the others have each reward
    log_ways = [math.lgamma(n + 1) for n in range(group_size)]
    log_chance = np.log(np.maximum(chance / chance.sum(), 1e-300))
    weight = np.exp(log_ways[others] - np.take(log_ways, times).sum(axis=1) + times @ log_chance)
    times = times + np.eye(count, dtype=int)[:, None]  # [K, ways, K], oneself among them
    mean = times @ levels / group_size
    square = (times * (levels - mean[..., None]) ** 2).sum(axis=2)
    normalized = (levels[:, None] - mean) / (np.sqrt(square / others) + _EPS)
    return normalized @ weight


def _log_sum(x: np.ndarray) -> float:
    largest = x.max()
    return float(largest + np.log(np.exp(x - largest).sum()))
