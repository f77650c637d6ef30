"""What the sampler's programs pass to each other: rows, their slots, and what they drew."""

from typing import Any

import jax
from flax import struct

from flowrl_jax.models.cache import KVCache


@struct.dataclass
class Starts:
    """What rows may enter slots with, W times: prompts as read, or responses that were put aside.

    Attributes:
        caches: `[W, K, P, H]` of each layer; columns of padding first, one at least.
        token: `[W]` int32, the newest token, which is not in the cache.
        length: `[W]` int32, columns that are no padding.
        drawn: `[W]` int32, tokens of the response.
        search: `[W]` int32, how far a stop string has been read, see `StopTable`.
    """

    caches: tuple[KVCache, ...]
    token: jax.Array
    length: jax.Array
    drawn: jax.Array
    search: jax.Array


@struct.dataclass
class Rows:
    """What is fixed about the rows of a batch, B of them.

    Attributes:
        key: `[B, ...]` uint32, data of each row's key.
        limit: `[B]` int32, tokens that its response may have.
        group: `[B]` int32, a number of those that have one prompt; those of a shard start from one
            copy of its keys and values, which decoding relies on, see `Prompts`.
    """

    key: jax.Array
    limit: jax.Array
    group: jax.Array


@struct.dataclass
class Row:
    """What is known of the rows in S slots.

    Attributes:
        index: `[S]` int32, the row among its shard's; -1 where there is none.
        first: `[S]` int32, the column of its response's first token, whether or not it is kept.
        token: `[S]` int32, the newest token, which is not in the cache yet.
        length: `[S]` int32, tokens in the cache: so many columns before `first + drawn`.
        drawn: `[S]` int32, tokens of the response.
        search: `[S]` int32, how far a stop string has been read, see `StopTable`.
        fixed: of their rows.
    """

    index: jax.Array
    first: jax.Array
    token: jax.Array
    length: jax.Array
    drawn: jax.Array
    search: jax.Array
    fixed: Rows


@struct.dataclass
class Slots:
    """Rows that are being decoded, and their caches.

    Attributes:
        row: of each slot.
        caches: `[S, K, C, H]` of each layer.
        column: scalar int32, the next column that is written.
        until: scalar int32, the tokens at which a row waits to be put aside.
    """

    row: Row
    caches: tuple[KVCache, ...]
    column: jax.Array
    until: jax.Array

    @property
    def free(self) -> jax.Array:
        """`[S]` bool, slots without a row."""
        return self.row.index < 0

    @property
    def decodes(self) -> jax.Array:
        """`[S]` bool, slots whose rows want a token."""
        return ~self.free & (self.row.drawn < self.until)

    @property
    def leaves(self) -> jax.Array:
        """`[S]` bool, slots whose rows are to be put aside."""
        return ~self.free & (self.row.drawn >= self.until)


@struct.dataclass
class Queue:
    """Rows that may take slots as these become free, in this order; all start from one `Starts`.

    Attributes:
        place: `[D, Q]` int32, what each starts from: places in its shard's part.
        row: `[D, Q]` int32, each among its shard's.
        count: `[D]` int32, how many these are.
    """

    place: Any
    row: Any
    count: Any


@struct.dataclass
class Shelf:
    """Responses that were put aside; W places, in equal parts the shards'.

    Attributes:
        starts: what they are to go on from.
        row: `[W]` int32, each among its shard's.
        count: `[D]` int32, places of a shard that are taken, the first ones.
    """

    starts: Starts
    row: jax.Array
    count: jax.Array


@struct.dataclass
class Shelved:
    """What the host is told of a `Shelf`: rows, their tokens, and places that are taken."""

    row: jax.Array
    drawn: jax.Array
    count: jax.Array


@struct.dataclass
class Log:
    """What a segment drew, one row for each of its steps.

    Attributes:
        index: `[L, S]` int32, as of `Row`; -1 where nothing was drawn.
        token: `[L, S]` int32.
        logprob: `[L, S]` float32, of the distribution that was drawn from.
        policy_logprob: `[L, S]` float32, of the policy itself.
        stopped: `[L, S]` bool, whether the token ends the response by what it says.
    """

    index: jax.Array
    token: jax.Array
    logprob: jax.Array
    policy_logprob: jax.Array
    stopped: jax.Array


@struct.dataclass
class Seen:
    """What the host is told of slots after a segment.

    Attributes:
        index: as of `Row`, and so `first` and `drawn`.
        column: as of `Slots`.
        taken: `[D]` int32, how many of a `Queue` have come in.
        shelved: of the shelf, where there is one.
    """

    index: jax.Array
    first: jax.Array
    drawn: jax.Array
    column: jax.Array
    taken: jax.Array
    shelved: Shelved | None
