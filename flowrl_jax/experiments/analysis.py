"""From the runs of an arm to its row of the table: matched accuracy, intervals, paired tests."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

Arrays = Mapping[str, np.ndarray]
_RESAMPLES = 4000


def first_crossing(accuracy: np.ndarray, level: float) -> tuple[int, float] | None:
    """Where a learning curve first reaches a level, on the straight line between two points.

    Args:
        accuracy: `[points]`.
        level: to reach.

    Returns:
        The point before and the way to the next one, 0 to 1; None if it never does.
    """
    above = np.flatnonzero(accuracy >= level)
    if not above.size:
        return None
    after = int(above[0])
    if after == 0:
        return 0, 0.0
    low, high = accuracy[after - 1], accuracy[after]
    return after - 1, float((level - low) / (high - low))


def at_level(runs: Arrays, level: float) -> dict[str, np.ndarray] | None:
    """Every measure where the accuracy, over prompts, first reaches a level.

    Args:
        runs: `[seeds, points, prompts]` each.
        level: to reach.

    Returns:
        `[seeds, prompts]` each; None if a run does not reach it.
    """
    rows = []
    for seed in range(len(runs["accuracy"])):
        found = first_crossing(runs["accuracy"][seed].mean(axis=1), level)
        if found is None:
            return None
        before, way = found
        after = min(before + 1, runs["accuracy"].shape[1] - 1)
        rows.append(
            {name: (1 - way) * x[seed, before] + way * x[seed, after] for name, x in runs.items()}
        )
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval over seeds and prompts, both drawn again.

    Args:
        values: `[seeds, prompts]`.
    """
    rng = np.random.default_rng(0)
    seeds, prompts = values.shape
    draws = (
        rng.integers(seeds, size=(_RESAMPLES, seeds, 1)),
        rng.integers(prompts, size=(_RESAMPLES, 1, prompts)),
    )
    means = values[draws].mean(axis=(1, 2))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p-value of paired differences `[n]` being symmetric around 0, exact for n <= 16."""
    differences = np.asarray(differences, np.float64)
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(differences))))
    sums = np.abs(signs @ differences)
    # The first row is the differences as they are; a sum of the same numbers may round otherwise.
    return float(np.mean(sums >= sums[0] * (1.0 - 1e-9)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of p-values for their number; the order stays."""
    order = np.argsort(p_values)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def equivalent(differences: np.ndarray, margin: float) -> bool:
    """Whether the 90 % interval of a mean of paired differences `[n]` lies within a margin.

    That is two one-sided tests at 5 %, by bootstrap.
    """
    rng = np.random.default_rng(0)
    draws = rng.integers(len(differences), size=(_RESAMPLES, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), (0.05, 0.95))
    return bool(-margin < low and high < margin)


def choose(trials: Mapping[str, Arrays], rates: Sequence[float], level: float) -> tuple[str, float]:
    """The setting and learning rate that end with most distinct solutions at an accuracy or above.

    Args:
        trials: by setting, `[rates, seeds, points, prompts]` each.
        rates: of the first axis.
        level: of accuracy. Where no setting ends there, the most accurate one is chosen.
    """
    enough, others = [], []
    for setting, arrays in trials.items():
        for i, rate in enumerate(rates):
            accuracy = float(arrays["accuracy"][i, :, -1].mean())
            distinct = float(arrays["distinct_64"][i, :, -1].mean())
            others.append((accuracy, setting, rate))
            if accuracy >= level:
                enough.append((distinct, setting, rate))
    _, setting, rate = max(enough or others)
    return setting, rate
