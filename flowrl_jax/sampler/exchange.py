"""Rows that come into slots, and rows that are put aside: on one shard, between two tokens.

Both are loops that mostly run no times: they cost a step little, and the caches stay in place.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from flowrl_jax.sampler.columns import copy_columns
from flowrl_jax.sampler.slots import Queue, Row, Rows, Shelf, Slots, Starts


def let_in(
    axes: Any, slots: Slots, taken: jax.Array, starts: Starts, rows: Rows, queue: Queue
) -> tuple[Slots, jax.Array]:
    """Puts rows of the queue into free slots, as far as either goes.

    Args:
        axes: the axis of columns in each array of the caches.
        slots: of the shard; donated.
        taken: `[1]` int32, how many of the queue have come in before.
        starts: what they start from.
        rows: of the shard.
        queue: of the shard.

    Returns:
        The slots, and how many have come in by now.
    """
    width = starts.caches[0].value.shape[2]

    def wanted(carry):
        slots, taken = carry
        return (taken[0] < queue.count[0]) & jnp.any(slots.free)

    def one(carry):
        slots, taken = carry
        at = jnp.argmax(slots.free)
        of, who = queue.place[0, taken[0]], queue.row[0, taken[0]]
        values = Row(
            index=who,
            first=slots.column - starts.drawn[of],
            token=starts.token[of],
            length=starts.length[of],
            drawn=starts.drawn[of],
            search=starts.search[of],
            fixed=jax.tree.map(lambda x: x[who], rows),
        )
        copy = functools.partial(copy_columns, (of, 0), (at, slots.column - width), width)
        slots = dataclasses.replace(
            slots,
            row=jax.tree.map(lambda x, value: x.at[at].set(value), slots.row, values),
            caches=jax.tree.map(copy, axes, starts.caches, slots.caches),
        )
        return slots, taken + 1

    return jax.lax.while_loop(wanted, one, (slots, taken))


def let_out(axes: Any, slots: Slots, shelf: Shelf, *, all_rows: bool) -> tuple[Slots, Shelf]:
    """Puts rows on the shelf, and frees their slots, as far as it has room.

    Args:
        axes: as of `let_in`.
        slots: of the shard; donated.
        shelf: of the shard; donated.
        all_rows: whether every row leaves, or only those that have as many tokens as they may.
    """
    places, width = shelf.row.shape[0], shelf.starts.caches[0].value.shape[2]

    def leaving(slots):
        return ~slots.free if all_rows else slots.leaves

    def wanted(carry):
        slots, shelf = carry
        return (shelf.count[0] < places) & jnp.any(leaving(slots))

    def one(carry):
        slots, shelf = carry
        at, to, row = jnp.argmax(leaving(slots)), shelf.count[0], slots.row
        end = row.first[at] + row.drawn[at]
        copy = functools.partial(copy_columns, (at, end - width), (to, 0), width)
        names = ("token", "length", "drawn", "search")
        starts = Starts(
            caches=jax.tree.map(copy, axes, slots.caches, shelf.starts.caches),
            **{
                name: getattr(shelf.starts, name).at[to].set(getattr(row, name)[at])
                for name in names
            },
        )
        shelf = Shelf(starts, shelf.row.at[to].set(row.index[at]), shelf.count + 1)
        row = dataclasses.replace(row, index=row.index.at[at].set(-1))
        return dataclasses.replace(slots, row=row), shelf

    return jax.lax.while_loop(wanted, one, (slots, shelf))
