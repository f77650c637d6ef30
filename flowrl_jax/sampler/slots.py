"""What the sampler's programs pass to each other: rows, their slots, and what they drew."""

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
    """

    key: jax.Array
    limit: jax.Array


@struct.dataclass
class Row:
    """What is known of the rows in S slots.

    Attributes:
        token: `[S]` int32, the newest token, which is not in the cache yet.
        length: `[S]` int32, tokens in the cache: the last so many columns.
        drawn: `[S]` int32, tokens of the response.
        active: `[S]` bool, whether there is a row that has not ended.
        stopped: `[S]` bool, whether it has ended by what it says, not by its limit.
        search: `[S]` int32, how far a stop string has been read, see `StopTable`.
        fixed: their rows' keys and limits.
    """

    token: jax.Array
    length: jax.Array
    drawn: jax.Array
    active: jax.Array
    stopped: jax.Array
    search: jax.Array
    fixed: Rows


@struct.dataclass
class Slots:
    """Rows that are being decoded, and their caches.

    Attributes:
        row: of each slot.
        caches: `[S, K, C, H]` of each layer.
        column: scalar int32, the next column that is written.
    """

    row: Row
    caches: tuple[KVCache, ...]
    column: jax.Array


@struct.dataclass
class Log:
    """What a segment drew, one row for each of its steps.

    Attributes:
        token: `[L, S]` int32.
        logprob: `[L, S]` float32, of the distribution that was drawn from.
        policy_logprob: `[L, S]` float32, of the policy itself.
    """

    token: jax.Array
    logprob: jax.Array
    policy_logprob: jax.Array
