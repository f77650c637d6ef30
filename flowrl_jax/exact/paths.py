"""Two listed tasks with many right answers: to a number by operations, to a node by edges."""

import itertools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from flowrl_jax.exact.language import Language
from flowrl_jax.exact.problem import Problem

OPERATIONS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda x: x + 1,
    lambda x: x + 3,
    lambda x: 2 * x,
    lambda x: x - 2,
)
_FEWEST, _MOST = 100, 260  # solutions of an integer path
_SEEN_GAP = 20  # the largest difference to the target that has a feature of its own


def integer_paths(seed: int = 0, prompts: int = 8, length: int = 7) -> Problem:
    """From one number to another by +1, +3, x2 and -2, in any number of operations that fits.

    A policy sees which prompt it is, how far the target is and how many tokens are left. Two
    solutions are one strategy if they use the same operations equally often.

    Args:
        seed: of the choice of starts and targets, among those with 100 to 260 solutions.
        prompts: how many.
        length: tokens, the end token among them.
    """
    language = Language(len(OPERATIONS), length)
    _, tokens = language.paths()
    counts = (tokens[:, :, None] == np.arange(1, language.symbols + 1)).sum(axis=1)
    kind, kinds = _numbered(counts)
    steps = [lambda x, step=step: step(x) for step in OPERATIONS]
    correct, seen = [], []
    pairs = np.array(list(itertools.product(range(1, 10), range(2, 25))))
    for start, target in np.random.default_rng(seed).permutation(pairs):
        value = _walk(language, start, steps)
        solved = (language.depths < length) & (value == target)
        if start != target and _FEWEST <= solved.sum() <= _MOST and len(correct) < prompts:
            correct.append(solved)
            seen.append(np.stack([target - value, language.depths], axis=1)[: language.places])

    def features(prompt: int, rows: np.ndarray) -> np.ndarray:
        gap, depth = rows.T
        near = np.clip(gap, -_SEEN_GAP, _SEEN_GAP) + _SEEN_GAP
        columns = (np.tanh(gap / _SEEN_GAP)[:, None], gap[:, None] % 2)
        who = np.full(len(rows), prompt)
        return np.hstack(
            [np.eye(prompts)[who], np.eye(2 * _SEEN_GAP + 1)[near], *columns, np.eye(length)[depth]]
        )

    return _problem(language, correct, [kind] * prompts, kinds, seen, features)


def graph_routes(
    seed: int = 0, nodes: int = 14, prompts: int = 48, length: int = 6, degree: int = 4
) -> Problem:
    """From one node of a random directed graph to another, along edges that a token each names.

    A policy sees the node it stands at, the target and how many tokens are left, so that what it
    learns of one start serves others. Two solutions are one strategy if they are the same route
    once round trips are left out.

    Args:
        seed: of the graph and of the choice of prompts.
        nodes: of the graph.
        prompts: pairs of nodes, all different.
        length: tokens, the end token among them.
        degree: edges that leave a node.
    """
    language = Language(degree, length)
    rng = np.random.default_rng(seed)
    others = [np.delete(np.arange(nodes), node) for node in range(nodes)]
    edges = np.stack([rng.choice(some, degree, replace=False) for some in others])
    steps = [lambda x, column=column: edges[x, column] for column in range(degree)]
    pairs = np.array(list(itertools.permutations(range(nodes), 2)))
    correct, seen, kind = [], [], []
    numbers: dict[tuple[int, ...], int] = {}
    for start, target in rng.permutation(pairs)[:prompts]:
        node = _walk(language, start, steps)
        solved = (language.depths < length) & (node == target)
        correct.append(solved)
        places = np.stack([node, np.full_like(node, target), language.depths], axis=1)
        seen.append(places[: language.places])
        kind.append(np.zeros(language.responses, np.int64))
        for response in np.flatnonzero(solved):
            route = _without_round_trips(_nodes_on_the_way(language, node, int(response)))
            kind[-1][response] = numbers.setdefault(route, len(numbers))

    def features(_: int, rows: np.ndarray) -> np.ndarray:
        node, target, depth = rows.T
        there = (node == target)[:, None]
        return np.hstack([np.eye(nodes)[node], np.eye(nodes)[target], np.eye(length)[depth], there])

    return _problem(language, correct, kind, len(numbers), seen, features)


def _walk(
    language: Language, start: int, steps: Sequence[Callable[[np.ndarray], np.ndarray]]
) -> np.ndarray:
    """Where each response ends, `[responses]`: at `start`, moved once by each of its symbols."""
    levels = [np.array([start])]
    for _ in range(language.length):
        levels.append(np.stack([step(levels[-1]) for step in steps], axis=1).reshape(-1))
    return np.concatenate(levels)


def _nodes_on_the_way(language: Language, ends: np.ndarray, response: int) -> list[int]:
    way = [int(ends[response])]
    while response:
        response = (response - 1) // language.symbols
        way.append(int(ends[response]))
    return way[::-1]


def _without_round_trips(way: Sequence[int]) -> tuple[int, ...]:
    kept: list[int] = []
    for node in way:
        kept = kept[: kept.index(node)] if node in kept else kept
        kept.append(node)
    return tuple(kept)


def _numbered(rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Equal rows get the same number, counted from 0; and how many numbers there are."""
    different, number = np.unique(rows, axis=0, return_inverse=True)
    return number.reshape(-1), len(different)


def _problem(
    language: Language,
    correct: Sequence[np.ndarray],
    kind: Sequence[np.ndarray],
    kinds: int,
    seen: Sequence[np.ndarray],
    features: Callable[[int, np.ndarray], np.ndarray],
) -> Problem:
    """A problem of 0 and 1, whose policy sees each place through `features` of what is `seen`."""
    state, rows = [], []
    for i, places in enumerate(seen):
        different, index = np.unique(places, axis=0, return_inverse=True)
        state.append(index.reshape(-1))
        rows.append(features(i, different))
    most = max(map(len, rows))
    padded = [np.pad(x, ((0, most - len(x)), (0, 0))) for x in rows]
    return Problem(
        language=language,
        reward=jnp.asarray(np.stack(correct), jnp.float32),
        correct=jnp.asarray(np.stack(correct)),
        kind=jnp.asarray(np.stack(kind), jnp.int32),
        state=jnp.asarray(np.stack(state), jnp.int32),
        features=jnp.asarray(np.stack(padded), jnp.float32),
        kinds=kinds,
    )


def skewed_prior(problem: Problem, seed: int, *, solved: float, skew: float) -> np.ndarray:
    """What a policy is to have seen before it is rewarded: some answers right, some ways preferred.

    Args:
        problem: its prompts.
        seed: of the preferences.
        solved: probability of a right answer.
        skew: deviation of the logarithm of a preference; 0: none.

    Returns:
        `[P, responses]` probabilities.
    """
    rng = np.random.default_rng(seed)
    correct = np.asarray(problem.correct)
    liked = np.exp(skew * rng.normal(size=correct.shape))
    language = problem.language
    # As likely as the strings of a policy that ends at each token with probability 1 / L.
    stop = 1.0 / language.length
    even = ((1.0 - stop) / language.symbols) ** language.depths
    even *= np.where(language.depths < language.length, stop, 1.0)
    wrong = np.where(correct, 0.0, even * liked)
    right = np.where(correct, even * liked, 0.0)
    wrong /= wrong.sum(axis=1, keepdims=True)
    right /= right.sum(axis=1, keepdims=True)
    return (1.0 - solved) * wrong + solved * right
