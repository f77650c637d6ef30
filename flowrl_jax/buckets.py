"""Short responses do not pay for long ones: micro-batches of like lengths, cut short.

A rollout has room for the longest response that may be sampled, and most responses are shorter. The
rows of an optimiser step are sorted by length, so that those of a micro-batch are alike, and each
micro-batch is cut to the least of a few lengths that holds its longest response. There is a program
for every length that occurs, and the result is the one of `train_step`, which is made of the same
parts, up to rounding.

The host decides, from the lengths of all responses; every host knows all of them and decides alike.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowrl_jax.errors import InputError
from flowrl_jax.learner import Learner
from flowrl_jax.sharding import constrain
from flowrl_jax.train_step import (
    abstract_policy,
    abstract_state,
    add_rows,
    finish_step,
    make_score,
    make_train_step,
    score_rows,
    with_ids,
    zero_sums,
)
from flowrl_jax.types import TrainBatch


class MicroBatch(NamedTuple):
    """Rows that are computed together.

    Attributes:
        rows: `[size]` int32, their places in the batch.
        length: tokens of response that are computed.
    """

    rows: np.ndarray
    length: int


def cut(
    lengths: np.ndarray, size: int, unit: int, buckets: Sequence[int], limit: int
) -> list[MicroBatch]:
    """Cuts a batch into micro-batches of like lengths, the longest first.

    Args:
        lengths: `[B]` int, tokens of each response.
        size: rows of a micro-batch; divides B.
        unit: adjacent rows that stay together; divides `size`.
        buckets: increasing lengths.
        limit: one more of them: the room for responses in the batch.

    Returns:
        B / size micro-batches.
    """
    order = np.argsort(-lengths.reshape(-1, unit).max(axis=1), kind="stable")
    rows = (order[:, None] * unit + np.arange(unit)).reshape(-1, size).astype(np.int32)
    return [
        MicroBatch(some, next((n for n in buckets if n >= lengths[some].max()), limit))
        for some in rows
    ]


def _of_step(learner: Learner, lengths: np.ndarray, limit: int) -> list[MicroBatch]:
    """The micro-batches of an optimiser step."""
    size = learner.micro_batch(lengths.size)
    return cut(lengths, size, learner.unit, learner.config.length_buckets, limit)


def padding_saved(learner: Learner, lengths: np.ndarray, limit: int) -> float:
    """Share of the responses' columns that the optimiser's steps on a rollout need not compute.

    Args:
        learner: names the buckets.
        lengths: `[U, B]` int, tokens of each response of U optimiser steps.
        limit: room for responses in the batch.
    """
    if not learner.config.length_buckets:
        return 0.0
    parts = [part for step in lengths for part in _of_step(learner, step, limit)]
    return 1.0 - sum(part.rows.size * part.length for part in parts) / (lengths.size * limit)


def check_buckets(learner: Learner, prompt_length: int) -> None:
    """Refuses buckets that the mesh cannot cut.

    Args:
        learner: names the buckets and the mesh.
        prompt_length: columns of the prompts.

    Raises:
        InputError: with the size, the rule and the remedy.
    """
    shards = learner.layout.context_shards
    for length in learner.config.length_buckets:
        if (prompt_length + length) % shards:
            raise InputError(
                f"train.length_buckets={learner.config.length_buckets}: {length} and"
                f" rollout.max_prompt_length={prompt_length} are {prompt_length + length} tokens,"
                f" which do not divide over mesh.context={shards}: choose lengths that do"
            )


def make_lengths(learner: Learner) -> Callable:
    """A jitted `response_mask [B, T] -> lengths [B]` int32, which every host holds whole."""
    count = lambda mask: mask.sum(axis=1, dtype=jnp.int32)  # noqa: E731
    return jax.jit(count, out_shardings=learner.layout.replicated)


def make_update(learner: Learner, num_prompts: int) -> Callable:
    """An optimiser step that cuts its rows as `learner.config` says.

    Args:
        learner: what is fixed.
        num_prompts: size of a log Z table.

    Returns:
        A function of a state, which is donated, a batch, the `[B]` lengths of its responses on the
        host, a key and, for a policy with adapters, its frozen weights; to what `train_step` gives.
    """
    if not learner.config.length_buckets:
        fused = make_train_step(learner, num_prompts)
        return lambda state, batch, lengths, key, *base: fused(state, batch, key, *base)
    start, add, finish = _step_programs(learner, num_prompts)

    def update(state, batch, lengths, key, *base):
        sums, seen = start(), []
        for part in _of_step(learner, lengths, batch.response_mask.shape[1]):
            arguments = (state.params, state.step, sums, batch, part.rows, key, *base)
            sums, of_part = add(part.length, *arguments)
            seen.append(of_part)
        return finish(state, sums, seen)

    return update


def _step_programs(learner: Learner, num_prompts: int) -> tuple[Callable, Callable, Callable]:
    """What an optimiser step consists of: no sums, a micro-batch added to them, the step itself."""
    layout = learner.layout
    shapes, states = abstract_state(learner, num_prompts)
    whole = layout.replicated
    sums_shardings = (whole, whole, states.params)
    base_shardings = ()
    if learner.model.config.lora.rank:
        base_shardings = (jax.tree.map(lambda x: x.sharding, abstract_policy(learner)),)

    def add(length, params, step, sums, batch, rows, key, *base):
        part = _take(with_ids(learner, batch), rows, length)
        key = jax.random.fold_in(key, step)
        return add_rows(learner, params, part, key, base[0] if base else None, sums)

    def finish(state, sums, seen):
        seen = jax.tree.map(lambda *parts: jnp.stack(parts), *seen)
        return finish_step(learner, state, sums, seen)

    return (
        jax.jit(lambda: zero_sums(shapes.params), out_shardings=sums_shardings),
        layout.jit(
            add,
            static_argnums=0,
            donate_argnums=3,
            in_shardings=(
                states.params, whole, sums_shardings, layout.batch, whole, whole, *base_shardings
            ),
            out_shardings=(sums_shardings, whole),
        ),
        # The sums are not donated: there is nothing of their kind among the results to become.
        layout.jit(
            finish,
            donate_argnums=0,
            in_shardings=(states, sums_shardings, whole),
            out_shardings=(states, whole),
        ),
    )  # fmt: skip


def _take(batch: TrainBatch, rows: jax.Array, length: int) -> TrainBatch:
    """Some rows of a batch with the first columns of their responses."""
    width = batch.prompt_mask.shape[1]
    tokens_of = lambda x: x[:, :length] if x is not None and x.ndim == 2 else x  # noqa: E731
    short = dataclasses.replace(
        batch,
        tokens=batch.tokens[:, : width + length],
        response_mask=batch.response_mask[:, :length],
        old_logprobs=batch.old_logprobs[:, :length],
        ref_logprobs=batch.ref_logprobs[:, :length],
        reward=tokens_of(batch.reward),
        correction=tokens_of(batch.correction),
        old_values=tokens_of(batch.old_values),
        returns=tokens_of(batch.returns),
    )
    return jax.tree.map(lambda x: _rows(x, rows), short)


def _rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    return constrain(x.at[rows].get(mode="promise_in_bounds"), "batch")


def make_scores(learner: Learner, rows_per_update: int = 0) -> Callable:
    """`make_score`'s function with rows cut as `learner.config` says.

    Args:
        learner: what is fixed.
        rows_per_update: as in `make_score`.

    Returns:
        A function `(policy, tokens, prompt_mask, response_mask, lengths, head=None)` to what
        `make_score`'s gives, the lengths `[B]` being the host's.
    """
    if not learner.config.length_buckets:
        score = make_score(learner, rows_per_update)
        return lambda policy, tokens, prompt_mask, response_mask, lengths, head=None: score(
            policy, tokens, prompt_mask, response_mask, head
        )
    layout = learner.layout
    start = jax.jit(lambda mask: jnp.zeros(mask.shape), out_shardings=layout.batch)

    def some(length, scored, policy, tokens, prompt_mask, response_mask, rows, head):
        tokens = tokens[:, : prompt_mask.shape[1] + length]
        arrays = (tokens, prompt_mask, response_mask[:, :length])
        found = score_rows(learner, policy, head, *(_rows(x, rows) for x in arrays))
        put = lambda x, own: x.at[rows, :length].set(own, mode="promise_in_bounds")  # noqa: E731
        return jax.tree.map(put, scored, found)

    some = layout.jit(some, static_argnums=0, donate_argnums=1, out_shardings=layout.batch)

    def scores(policy, tokens, prompt_mask, response_mask, lengths, head=None):
        size = math.gcd(lengths.size, learner.micro_batch(rows_per_update or lengths.size))
        limit = response_mask.shape[1]
        scored = start(response_mask)
        if head is not None:
            scored = (scored, start(response_mask))
        arrays = (policy, tokens, prompt_mask, response_mask)
        for part in cut(lengths, size, 1, learner.config.length_buckets, limit):
            scored = some(part.length, scored, *arrays, part.rows, head)
        return scored

    return scores
