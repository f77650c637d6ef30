"""Statistics of graded samples: accuracy, diversity of correct ones, length, KL to the reference.

Every statistic is first computed for one prompt from its n samples and then averaged over the
prompts; the 95 % intervals come from a bootstrap over prompts, because prompts (not samples) are
what an evaluation set is a draw of. Everything here is numpy on the host; nothing depends on how
the samples were produced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from flowrl_jax.errors import InputError
from flowrl_jax.graded import Samples

Summary = dict[str, dict[str, float]]

_BLOCK = 256  # resamples drawn at a time: bounds the [block, prompts] matrix, not the result


def miss_probability(n: int, k: int) -> np.ndarray:
    """Probability that k of n samples, drawn without replacement, avoid m marked ones, for every m.

    C(n - m, k) / C(n, k), evaluated as the product over j < m of (n - k - j) / (n - j): every
    factor lies in [0, 1], so nothing overflows for any n.

    Args:
      n: number of samples, >= 1.
      k: number drawn, 1 <= k <= n.

    Returns:
      [n + 1] float64, index m = 0..n.

    Raises:
      InputError: k is outside 1..n.
    """
    if not 1 <= k <= n:
        raise InputError(
            f"k={k} needs 1 <= k <= number of samples, which is {n}; draw at least {k} samples"
            " per prompt or ask for a smaller k"
        )
    j = np.arange(n)
    factors = np.maximum(n - k - j, 0) / (n - j)
    return np.concatenate([[1.0], np.cumprod(factors)])


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate of the probability that at least one of k samples is correct.

    1 - C(n - c, k) / C(n, k) with c correct of n samples (Chen et al. 2021, arXiv 2107.03374,
    equation 1).

    Args:
      correct: [P, n] bool.
      k: number of attempts, 1 <= k <= n.

    Returns:
      [P] float64.

    Raises:
      InputError: k is outside 1..n.
    """
    correct = np.asarray(correct, dtype=bool)
    return 1.0 - miss_probability(correct.shape[1], k)[correct.sum(axis=1)]


def distinct_correct(counts: Sequence[np.ndarray], n: int, k: int) -> np.ndarray:
    """Unbiased estimate of the number of distinct correct solutions among k samples.

    A solution seen m_s times in n samples is among k of them, drawn without replacement, with
    probability 1 - C(n - m_s, k) / C(n, k); the expectation is the sum over solutions
    (hypergeometric rarefaction, Hurlbert 1971, Ecology 52(4)). With a single solution it equals
    pass@k.

    Args:
      counts: for each prompt [solutions] int, how often each distinct correct solution occurs.
      n: samples per prompt.
      k: samples drawn, 1 <= k <= n.

    Returns:
      [P] float64, at least the prompt's pass@k and at most k.

    Raises:
      InputError: k is outside 1..n.
    """
    miss = miss_probability(n, k)
    return np.array([float(np.sum(1.0 - miss[m])) for m in counts])


def effective_solutions(counts: Sequence[np.ndarray]) -> np.ndarray:
    """Effective number of solutions: exp of the entropy of the solutions among the correct samples.

    The Hill number of order one (Hill 1973, Ecology 54(2)) with the plug-in entropy -sum p_s log
    p_s, p_s = m_s / c. It is 1 when all correct samples are one solution, S when S solutions are
    equally frequent, and 0 when no sample is correct. The plug-in entropy is too small by about (S
    - 1) / (2 c) nats (Miller 1955), more so for a policy with few correct samples; no correction is
    applied, so compare policies at the same number of samples and read the figure next to their
    accuracy.

    Args:
      counts: for each prompt [solutions] int.

    Returns:
      [P] float64.
    """
    values = np.zeros(len(counts))
    for i, m in enumerate(counts):
        if m.size:
            p = m / m.sum()
            values[i] = np.exp(-np.sum(p * np.log(p)))
    return values


def good_turing_coverage(counts: Sequence[np.ndarray]) -> np.ndarray:
    """Good-Turing estimate of the share of correct probability mass on solutions already seen.

    1 - f_1 / c, f_1 being the number of solutions seen exactly once among c correct samples (Good
    1953, Biometrika 40); 0 when no sample is correct.

    Args:
      counts: for each prompt [solutions] int.

    Returns:
      [P] float64 in [0, 1].
    """
    return np.array([1.0 - np.sum(m == 1) / m.sum() if m.size else 0.0 for m in counts])


def prompt_values(samples: Samples, *, k: int = 16, extra: bool = False) -> dict[str, np.ndarray]:
    """The statistics of every prompt, before any averaging.

    Args:
      samples: graded samples, n per prompt.
      k: number of samples of pass@k and of the distinct correct solutions, 1 <= k <= n.
      extra: also return "truncated_fraction" and "coverage" (`good_turing_coverage`).

    Returns:
      Name to [P] float64, in this order: pass_at_1, pass_at_{k}, distinct_correct_{k},
      effective_solutions, mean_length (tokens), kl_to_reference (nats per response).

    Raises:
      InputError: k is outside 1..n.
    """
    counts = samples.solution_counts()
    values = {
        "pass_at_1": pass_at_k(samples.correct, 1),
        f"pass_at_{k}": pass_at_k(samples.correct, k),
        f"distinct_correct_{k}": distinct_correct(counts, samples.num_samples, k),
        "effective_solutions": effective_solutions(counts),
        "mean_length": samples.length.mean(axis=1),
        "kl_to_reference": samples.kl.mean(axis=1),
    }
    if extra:
        values["truncated_fraction"] = samples.truncated.mean(axis=1)
        values["coverage"] = good_turing_coverage(counts)
    return values


def bootstrap(
    values: Mapping[str, np.ndarray], *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Summary:
    """Means over prompts with percentile bootstrap intervals.

    Prompts are drawn with replacement, the same draw for every statistic (Efron 1979, Annals of
    Statistics 7); the interval is the central `level` part of the resampled means. With fewer than
    about 20 prompts such an interval is too narrow; with one prompt it has no width.

    Args:
      values: name to [P] float, one value per prompt, the same P for all.
      seed: the draw depends on it and on P alone.
      resamples: number of resampled evaluation sets.
      level: probability content of the interval, in (0, 1).

    Returns:
      name -> {"mean", "low", "high"}.

    Raises:
      InputError: P is zero or differs between statistics.
    """
    sizes = {len(v) for v in values.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(
            f"statistics have {sorted(sizes)} prompts; all need the same number, at least one"
        )
    count = sizes.pop()
    table = np.stack([np.asarray(v, dtype=np.float64) for v in values.values()], axis=1)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        # How often each prompt is drawn is multinomial: resampling is one matrix product.
        draws = rng.multinomial(count, np.full(count, 1.0 / count), size=size)
        means.append(draws @ table / count)
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(np.concatenate(means), [tail, 100.0 - tail], axis=0)
    mean = table.mean(axis=0)
    return {
        name: {"mean": float(mean[i]), "low": float(low[i]), "high": float(high[i])}
        for i, name in enumerate(values)
    }


def summarize(
    samples: Samples, *, k: int = 16, seed: int = 0, resamples: int = 2000, extra: bool = False
) -> Summary:
    """Mean and 95 % bootstrap interval of every statistic of `prompt_values`.

    Args:
      samples: graded samples, n >= k per prompt.
      k: as in `prompt_values`.
      seed: of the bootstrap.
      resamples: of the bootstrap.
      extra: as in `prompt_values`.

    Returns:
      name -> {"mean", "low", "high"}.

    Raises:
      InputError: k is outside 1..n.
    """
    return bootstrap(prompt_values(samples, k=k, extra=extra), seed=seed, resamples=resamples)


def paired_difference(
    first: Samples, second: Samples, *, k: int = 16, seed: int = 0, resamples: int = 2000
) -> Summary:
    """Mean and 95 % interval of first minus second, bootstrapped over the prompts both answered.

    Pairing removes the difficulty of the prompts, which the two separate intervals both contain: an
    interval here that excludes zero is evidence even where the separate intervals overlap.

    Args:
      first: samples of one policy.
      second: samples of the other on the same prompts in the same order.
      k: as in `prompt_values`.
      seed: of the bootstrap.
      resamples: of the bootstrap.

    Returns:
      name -> {"mean", "low", "high"} of the difference.

    Raises:
      InputError: the two evaluations are not of the same prompts in the same order, or k is outside
        1..n.
    """
    if not np.array_equal(first.prompt_id, second.prompt_id):
        raise InputError(
            f"paired evaluations are of different prompts ({first.num_prompts} and"
            f" {second.num_prompts} of them); evaluate both policies on the same split, in the same"
            " order"
        )
    a, b = prompt_values(first, k=k), prompt_values(second, k=k)
    return bootstrap({name: a[name] - b[name] for name in a}, seed=seed, resamples=resamples)


@dataclass(frozen=True, kw_only=True)
class EqualAccuracy:
    """Diversity of two policies at the accuracies both passed through while learning.

    Attributes:
      accuracy: [levels] float, increasing.
      first: [levels] float, distinct correct solutions of the first policy when it first reached
        the level.
      second: [levels] float, of the second policy.
    """

    accuracy: np.ndarray
    first: np.ndarray
    second: np.ndarray


def value_at_accuracy(curve: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """Diversity where a learning curve first reaches an accuracy.

    Linear interpolation between the two evaluations around the crossing. The first crossing is
    taken, not the end point, because a policy's end point depends on how long it was trained.
    Evaluation noise makes a crossing early on average; that acts alike on the policies compared.

    Args:
      curve: (accuracy, distinct correct solutions) of successive evaluations, oldest first.
      accuracy: the level.

    Returns:
      The interpolated value, or None if the curve starts above the level or never reaches it.
    """
    if not curve or curve[0][0] > accuracy:
        return None
    if curve[0][0] == accuracy:
        return float(curve[0][1])
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 < accuracy <= x1:
            return float(y0 + (y1 - y0) * (accuracy - x0) / (x1 - x0))
    return None


def distinct_at_equal_accuracy(
    first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]], *, levels: int = 21
) -> EqualAccuracy | None:
    """Compares two learning curves at equal accuracy.

    Args:
      first: (pass@1, distinct correct solutions) of one policy's successive evaluations, oldest
        first.
      second: the same of the other policy.
      levels: number of equally spaced accuracies, from the higher of the two starts to the lower of
        the two best accuracies; the last level is the highest accuracy that both reached.

    Returns:
      The interpolated values, or None when the curves have no accuracy in common.
    """
    if not first or not second:
        return None
    low = max(first[0][0], second[0][0])
    high = min(max(x for x, _ in first), max(x for x, _ in second))
    if low > high:
        return None
    accuracy = np.linspace(low, high, levels)
    a = [value_at_accuracy(first, x) for x in accuracy.tolist()]
    b = [value_at_accuracy(second, x) for x in accuracy.tolist()]
    return EqualAccuracy(
        accuracy=accuracy, first=np.array(a, np.float64), second=np.array(b, np.float64)
    )
