"""Attention of one new token per row to its cache, on TPU: what is read is what is visible.

The rows of the cache are as long as the longest of them may become, and most are shorter. So the
kernel moves columns to fast memory by itself: a list of work, one block of columns of one row after
the other, is walked by two cursors. The first starts copies, a few blocks ahead and over the ends
of rows; the second waits for them and attends. Rows that are idle are on no list.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flowrl_jax.errors import InputError
from flowrl_jax.models.attention import MASKED, interpreted
from flowrl_jax.models.cache import KVCache
from flowrl_jax.models.decode_layout import on_devices, padded

CHUNK = 128  # columns: the least that is read; scales have columns along lanes, which are 128
_DEPTH = 4  # blocks in fast memory: one is attended to while the others are on their way
_DEPTH_BYTES = 2**22
_BLOCK = 1024  # columns: a row that ends early in a block is computed to the block's end
_BLOCK_NUMBERS = 2**19  # keys and values: long enough that starting a copy is little
_ROWS_BYTES = 2**22  # of queries and results in fast memory
_OTHER_BYTES = 12 * 2**20  # what the compiler may take besides the blocks


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the kernel is made for.

    Attributes:
        scale: multiplies the scores.
        softcap: of the scores; 0 leaves them.
        rows: of one grid step.
        block: columns of one item of work; CHUNK times a power of two.
        depth: items that fast memory holds.
        kv_heads: key heads that are read.
        group: query heads that share a key head in the whole model.
        unit: query heads that are sure to share one here.
    """

    scale: float
    softcap: float
    rows: int
    block: int
    depth: int
    kv_heads: int
    group: int
    unit: int


def decode_attention(
    query: jax.Array, cache: KVCache, column: jax.Array | int, length: jax.Array, **options: Any
) -> jax.Array:
    """`decode_attention_kernel` on every device for its own slots and heads.

    Where key heads are fewer than shards, each shard reads the ones that its query heads need out
    of the whole cache that it holds.

    Args:
        query, cache, column, length: as there, of the whole model.
        options: `scale`, `window`, `softcap` and `block`, as there.

    Returns:
        As there.
    """
    run = functools.partial(decode_attention_kernel, **options, interpret=interpreted())
    return on_devices(run, query, cache, column, length)


def decode_attention_kernel(
    query: jax.Array,
    cache: KVCache,
    column: jax.Array | int,
    length: jax.Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    first_head: jax.Array | int = 0,
    group: int = 0,
    block: int = 0,
    interpret: Any = False,
) -> jax.Array:
    """Grouped-query attention of one token per slot, with softmax in float32, on one device.

    Only the columns that a slot may attend to are read, rounded outwards to multiples of `CHUNK`.
    A cache whose C is no multiple of that is padded first, which reads and writes all of it.

    Args:
        query: `[S, N, H]`; N query heads.
        cache: of one layer, S slots and C columns, the new token's written in.
        column: scalar int32, the newest column, of all slots.
        length: `[S]` int32, columns that a slot may attend to: `(column - length, column]`. 0 is
            an idle slot.
        scale: multiplies the scores.
        window: columns that a token looks back to, its own included; 0 means all.
        softcap: scores s become `softcap * tanh(s / softcap)`; 0 leaves them.
        first_head: where the query heads begin among the model's, if they are a part of them;
            scalar int32.
        group: query heads per key head; N / K by default, which it is unless the query heads are
            a part of the model's.
        block: columns that are attended to at a time, `CHUNK` times a power of two; chosen by size
            if 0.
        interpret: of `pallas_call`, to run it without a TPU.

    Returns:
        `[S, N, H]` in the dtype of `query`; zeros in idle slots.

    Raises:
        InputError: query heads do not share key heads evenly, or `block` is not as above.
    """
    slots, heads = query.shape[:2]
    if not group and heads % cache.key.shape[1]:
        raise InputError(
            f"{heads} query heads are not a multiple of {cache.key.shape[1]} key heads: say group"
        )
    if block and (block % CHUNK or block & (block - 1)):
        raise InputError(f"block={block} is not a power of two: choose {CHUNK} or twice, ...")
    group = group or heads // cache.key.shape[1]
    cache = padded(cache, CHUNK)
    plan = _plan(query, cache, group, block, scale, softcap)
    column = jnp.asarray(column, jnp.int32)
    steps = pl.cdiv(slots, plan.rows)
    visible = jnp.clip(length, 0, jnp.minimum(column + 1, window or cache.key.shape[2]))
    visible = jnp.pad(visible.astype(jnp.int32), (0, steps * plan.rows - slots))
    first_head = jnp.asarray(first_head, jnp.int32)
    first_kv = jnp.minimum(first_head // group, cache.key.shape[1] - plan.kv_heads)
    clock = jnp.stack([column, first_kv, first_head - first_kv * group])
    units = query.reshape(slots, heads // plan.unit, plan.unit, -1)
    out = _call(plan, units, cache, steps, interpret)(clock, visible, units, *_arrays(cache))
    return out.reshape(query.shape)


def _arrays(cache: KVCache) -> tuple[jax.Array, ...]:
    return tuple(x for x in cache if x is not None)


def _plan(
    query: jax.Array, cache: KVCache, group: int, block: int, scale: float, softcap: float
) -> _Plan:
    """Sizes by which what is in fast memory stays within bounds."""
    slots, heads, head_dim = query.shape
    unit = math.gcd(group, heads)
    kv_heads = (group - unit + heads - 1) // group + 1  # of those that query heads may straddle
    kv_heads = min(kv_heads, cache.key.shape[1])
    numbers = 2 * kv_heads * head_dim  # of a column
    if not block:
        chunks = min(_BLOCK, _BLOCK_NUMBERS // numbers, cache.key.shape[2]) // CHUNK
        block = CHUNK * 2 ** int(math.log2(max(chunks, 1)))
    block_bytes = block * numbers * cache.key.dtype.itemsize
    depth = min(max(2, _DEPTH_BYTES // block_bytes), _DEPTH)
    row_bytes = heads // unit * (unit + -unit % 16) * head_dim * query.dtype.itemsize
    # Two steps at least: some devices are two cores, which share the steps.
    rows = min(max(1, _ROWS_BYTES // (4 * row_bytes)), pl.cdiv(slots, 2))
    return _Plan(scale, softcap, rows, block, depth, kv_heads, group, unit)


def _call(plan: _Plan, query: jax.Array, cache: KVCache, steps: int, interpret: Any) -> Any:
    """The kernel for arrays of these shapes."""
    of_rows = pl.BlockSpec((plan.rows, *query.shape[1:]), lambda step, *_: (step, 0, 0, 0))
    arrays = _arrays(cache)
    kv = pltpu.VMEM((plan.depth, plan.kv_heads, plan.block, cache.key.shape[3]), cache.key.dtype)
    scales = pltpu.VMEM((plan.depth, cache.key.shape[1], plan.block), jnp.float32)
    buffers = [kv, kv, scales, scales][: len(arrays)]
    units, unit, head_dim = query.shape[1:]
    running = [pltpu.VMEM((units, unit, size), jnp.float32) for size in (1, 1, head_dim)]
    held = sum(math.prod(x.shape) * x.dtype.itemsize for x in buffers)
    return pl.pallas_call(
        functools.partial(_kernel, plan, len(arrays)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(steps,),
            in_specs=[of_rows, *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(arrays)],
            out_specs=of_rows,
            scratch_shapes=[*buffers, *running, pltpu.SemaphoreType.DMA((plan.depth,))],
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=held + _OTHER_BYTES
        ),
        cost_estimate=_cost(query, arrays),
        interpret=interpret,
        name="decode_attention",
    )


def _cost(query: jax.Array, arrays: tuple[jax.Array, ...]) -> pl.CostEstimate:
    """What it takes where all columns are visible: how many are, no compiler can know."""
    scores = query.size // query.shape[3] * arrays[0].shape[2]
    return pl.CostEstimate(
        flops=4 * scores * query.shape[3],
        transcendentals=scores,
        bytes_accessed=2 * query.nbytes + sum(x.nbytes for x in arrays),
    )


def _kernel(plan: _Plan, count: int, clock: Any, length: Any, query_ref: Any, *refs: Any) -> None:
    """Attends for the rows of one grid step."""
    stored, out_ref, rest = refs[:count], refs[count], refs[count + 1 :]
    buffers, running, arrived = rest[:count], _Running(*rest[count:-1]), rest[-1]
    newest = clock[0]
    work = _Work(plan, newest, length, pl.program_id(0) * plan.rows)
    out_ref[...] = jnp.zeros_like(out_ref)

    def copies(cursor, place, do):
        """Starts or awaits the copies of an item: one for each binary digit of its size."""
        columns = jnp.minimum((newest & -CHUNK) + CHUNK - cursor.base, plan.block)
        # Scales have heads along sublanes, where a copy cannot begin anywhere: it takes them all.
        heads = {4: pl.ds(clock[1], plan.kv_heads), 3: slice(None)}
        size = plan.block
        while size >= CHUNK:
            at = columns & -(2 * size)

            @pl.when(columns & size != 0)
            def _digit(at=at, size=size):
                source = pl.ds(pl.multiple_of(cursor.base + at, CHUNK), size)
                target = pl.ds(pl.multiple_of(at, CHUNK), size)
                for array, buffer in zip(stored, buffers, strict=True):
                    there = array.at[cursor.slot, heads[len(array.shape)], source]
                    here = buffer.at[place, :, target]
                    do(pltpu.make_async_copy(there, here, arrived.at[place]))

            size //= 2

    def start(number, cursor):
        @pl.when(cursor.slot < work.end)
        def _start():
            copies(cursor, jax.lax.rem(number, plan.depth), lambda copy: copy.start())

        return work.advance(cursor)

    def item(state):
        number, ahead, cursor = state
        ahead = start(number + plan.depth - 1, ahead)
        place = jax.lax.rem(number, plan.depth)
        row = cursor.slot - work.first
        copies(cursor, place, lambda copy: copy.wait())

        @pl.when(cursor.base == work.begin(cursor.slot))
        def _first():
            running.top[...] = jnp.full_like(running.top, MASKED)
            running.total[...] = jnp.zeros_like(running.total)
            running.values[...] = jnp.zeros_like(running.values)

        seen = _Seen(cursor.base, newest - length[cursor.slot], newest)
        kv = KVCache(*(buffer.at[place] for buffer in buffers))
        _attend(plan, clock, query_ref[row], kv, seen, running)

        @pl.when(cursor.base + plan.block > newest)
        def _last():
            out_ref[row] = (running.values[...] / running.total[...]).astype(out_ref.dtype)

        return number + 1, ahead, work.advance(cursor)

    cursor = work.from_slot(work.first)
    ahead = jax.lax.fori_loop(0, plan.depth - 1, start, cursor)
    jax.lax.while_loop(lambda state: state[2].slot < work.end, item, (0, ahead, cursor))


class _Cursor(NamedTuple):
    """An item of work: the columns of a slot from `base` on, a multiple of `CHUNK`."""

    slot: Any
    base: Any


class _Work(NamedTuple):
    """The items of a grid step, in order: blocks of columns of the slots that are not idle."""

    plan: _Plan
    newest: Any
    length: Any
    first: Any

    @property
    def end(self) -> Any:
        """The slot after the last."""
        return self.first + self.plan.rows

    def begin(self, slot: Any) -> Any:
        """Where the first item of a slot begins."""
        return (self.newest + 1 - self.length[slot]) & -CHUNK

    def from_slot(self, slot: Any) -> _Cursor:
        """The first item of this slot or, where it is idle, of one that follows."""
        last = self.end - 1
        idle = lambda slot: (slot < last) & (self.length[jnp.minimum(slot, last)] == 0)  # noqa: E731
        slot = jax.lax.while_loop(idle, lambda slot: slot + 1, slot)
        inside = jnp.minimum(slot, last)
        slot = jnp.where((slot == last) & (self.length[inside] == 0), self.end, slot)
        return _Cursor(slot, self.begin(inside))

    def advance(self, cursor: _Cursor) -> _Cursor:
        """The item that follows; past the last one, at `end`, nothing is there."""
        base = cursor.base + self.plan.block
        same = base <= self.newest
        found = self.from_slot(jnp.where(same, cursor.slot, cursor.slot + 1))
        return _Cursor(found.slot, jnp.where(same, base, found.base))


class _Seen(NamedTuple):
    """The columns of a block that begins at `base` which may be attended to: (after, newest]."""

    base: Any
    after: Any
    newest: Any

    def mask(self, shape: tuple[int, ...], axis: int) -> jax.Array:
        """Which they are, along an axis."""
        columns = self.base + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (columns > self.after) & (columns <= self.newest)


class _Running(NamedTuple):
    """The softmax of the scores so far, by query head: the largest, the sum, the sum of values."""

    top: Any
    total: Any
    values: Any


def _attend(
    plan: _Plan, clock: Any, query: jax.Array, kv: KVCache, seen: _Seen, running: _Running
) -> None:
    """Takes a block of columns into the running softmax.

    Args:
        plan: sizes.
        clock: the newest column, the first key head that is read, and the first query head here,
            counted from the first one of that key head.
        query: `[U, u, H]`, units of query heads.
        kv: the block, `[k, block, H]` and, of int8, the scales `[K, block]` of all key heads.
        seen: its columns.
        running: is updated.
    """
    units, dtype = query.shape[0], query.dtype
    heads = units * plan.unit
    if plan.group % heads and heads % plan.group:
        of_unit = [jax.lax.div(clock[2] + n * plan.unit, plan.group) for n in range(units)]
    else:
        of_unit = [n * plan.unit // plan.group for n in range(units)]
    if kv.value_scale is None:
        _clean(kv.value, seen, plan.block)

    def product(left, right, axis):
        dims = (((1,), (axis,)), ((), ()))
        parts = [
            jax.lax.dot_general(
                left[n], right[head].astype(dtype), dims, preferred_element_type=jnp.float32
            )
            for n, head in enumerate(of_unit)
        ]
        return jnp.stack(parts)

    def scales(of):
        skipped = 0 if of.shape[0] == plan.kv_heads else clock[1]
        return jnp.stack([of[pl.ds(skipped + head, 1), :] for head in of_unit])

    scores = product(query, kv.key, 1) * plan.scale
    if kv.key_scale is not None:
        scores *= scales(kv.key_scale)
    if plan.softcap:
        scores = plan.softcap * jnp.tanh(scores / plan.softcap)
    mask = seen.mask((1, 1, plan.block), 2)
    scores = jnp.where(mask, scores, MASKED)
    top = jnp.maximum(running.top[...], scores.max(axis=2, keepdims=True))
    shrink = jnp.exp(running.top[...] - top)
    weights = jnp.exp(scores - top)
    running.top[...] = top
    running.total[...] = shrink * running.total[...] + weights.sum(axis=2, keepdims=True)
    if kv.value_scale is not None:
        weights = jnp.where(mask, weights * scales(kv.value_scale), 0.0)
    running.values[...] = shrink * running.values[...] + product(weights.astype(dtype), kv.value, 0)


def _clean(values: Any, seen: _Seen, block: int) -> None:
    """Makes values zero that were not read, or are not to be seen: 0 x NaN is NaN."""

    @pl.when((seen.base <= seen.after) | (seen.base + block > seen.newest + 1))
    def _edge():
        mask = seen.mask((1, block, values.shape[2]), 1)
        kept = jnp.where(mask, values[...].astype(jnp.float32), 0.0)
        values[...] = kept.astype(values.dtype)
