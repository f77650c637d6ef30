"""Attention over rows of real tokens and padding, with the kernel that the platform does best.

Which columns a token may attend to follows from three things: which columns hold tokens, which
column is its own, and how far back it looks. No array of all pairs is made of that for a long row:
every kernel here derives it piece by piece.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from flowrl_jax.sharding import Layout, active_layout

# Large and finite: a row that may attend to nothing (padding) gets the mean of its values rather
# than NaN, and nothing reads it.
MASKED = -1e30
CHUNK = 512  # queries whose scores the XLA path holds at one time
_LANES = 128  # what the TPU kernel wants sequences and heads to be multiples of
_BLOCK = 512


class Columns(NamedTuple):
    """The columns that tokens may attend to.

    Attributes:
        real: `[B, S]` bool, true on columns that hold a token.
        first: column of the first query; the queries' columns are adjacent.
    """

    real: jax.Array
    first: jax.Array | int = 0


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    columns: Columns,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    implementation: str = "xla",
) -> jax.Array:
    """Grouped-query causal attention with softmax in float32.

    Args:
        query: `[B, N, T, H]`; N query heads, a multiple of K.
        key: `[B, K, S, H]`.
        value: `[B, K, S, H]`.
        columns: of the keys, and where the queries are among them.
        scale: multiplies the scores.
        window: columns that a token looks back to, its own included; 0 means all. It counts
            columns, as in transformers: the real tokens of a row must be adjacent.
        softcap: scores s become `softcap * tanh(s / softcap)`; 0 leaves them.
        implementation: "xla"; "cudnn", flash attention on NVIDIA GPUs for bfloat16 and float16;
            or "splash", flash attention on TPU. The last wants T = S.

    Returns:
        `[B, N, T, H]` in the dtype of `query`; what it holds in rows of padding means nothing.
    """
    if implementation == "splash":
        return _splash(query, key, value, columns.real, scale, window, softcap)
    if implementation == "cudnn":
        return flash(query, key, value, columns.real, scale=scale, window=window)
    dense = functools.partial(_dense, scale=scale, window=window, softcap=softcap)
    local = functools.partial(_chunked, dense)
    layout = active_layout()
    if layout is None or layout.context_shards == 1:
        return local(query, key, value, columns)

    def own_queries(query, key, value, real):
        first = columns.first + jax.lax.axis_index("context") * query.shape[2]
        return local(query, key, value, Columns(real, first))

    return _on_devices(own_queries, layout, query, key, value, rows=(columns.real,), cut=(False,))


def _chunked(dense: Any, query: jax.Array, key: jax.Array, value: jax.Array, columns: Columns):
    """Some queries after the other, where they are many."""
    length = query.shape[2]
    if length <= CHUNK:
        return dense(query, key, value, columns)

    @jax.checkpoint  # else the backward pass would keep the scores of every chunk
    def some(chunk, number):
        first = columns.first + number * CHUNK
        return dense(chunk, key, value, Columns(columns.real, first))

    padded = jnp.pad(query, ((0, 0), (0, 0), (0, -length % CHUNK), (0, 0)))
    chunks = padded.reshape(*query.shape[:2], -1, CHUNK, query.shape[3])
    out = jax.lax.map(
        lambda inputs: some(*inputs), (jnp.moveaxis(chunks, 2, 0), jnp.arange(chunks.shape[2]))
    )
    return jnp.moveaxis(out, 0, 2).reshape(padded.shape)[:, :, :length]


def visible(columns: Columns, length: int, window: int = 0) -> jax.Array:
    """Which columns each of some tokens may attend to, pair by pair.

    Args:
        columns: of the keys.
        length: T, number of queries.
        window: columns that a token looks back to; 0 means all.

    Returns:
        `[B, T, S]` bool.
    """
    own = (columns.first + jnp.arange(length))[:, None]
    other = jnp.arange(columns.real.shape[1])[None]
    pairs = other <= own
    if window:
        pairs &= other > own - window
    return pairs[None] & columns.real[:, None]


def _dense(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    columns: Columns,
    *,
    scale: float,
    window: int,
    softcap: float,
) -> jax.Array:
    """All scores at once."""
    batch, heads, length, head_dim = query.shape
    mask = visible(columns, length, window)
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, (heads // kv_heads) * length, head_dim)
    scores = jnp.einsum("bkth,bksh->bkts", grouped, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, length, -1)
    scores = jnp.where(mask[:, None, None], capped(scores * scale, softcap), MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkts,bksh->bkth", probs.reshape(batch, kv_heads, -1, key.shape[2]), value)
    return out.reshape(batch, heads, length, head_dim)


def capped(scores: jax.Array, softcap: float) -> jax.Array:
    """Scores s as `softcap * tanh(s / softcap)`; 0 leaves them."""
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


def flash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    real: jax.Array,
    *,
    scale: float,
    window: int = 0,
    implementation: Any = "cudnn",
) -> jax.Array:
    """Attention of rows to themselves with the kernel that `jax.nn` has for a platform.

    The kernel knows rows that begin with their tokens and end with padding, and needs no mask for
    them. So rows are turned until their first token is in front, and turned back.

    Args:
        query, key, value, scale, window: as in `attend`, with T = S.
        real: `[B, T]` bool; the real tokens of a row are adjacent.
        implementation: of `jax.nn.dot_product_attention`.

    Returns:
        As `attend`.
    """
    first = jnp.argmax(real, axis=1)
    count = jnp.maximum(real.sum(axis=1, dtype=jnp.int32), 1)  # a row may be all padding
    turned = [_turn(jnp.swapaxes(x, 1, 2), first) for x in (query, key, value)]
    out = jax.nn.dot_product_attention(
        *turned,
        scale=scale,
        is_causal=True,
        query_seq_lengths=count,
        key_value_seq_lengths=count,
        local_window_size=(window - 1, 0) if window else None,
        implementation=implementation,
    )
    return jnp.swapaxes(_turn(out, -first), 1, 2)


def _turn(x: jax.Array, by: jax.Array) -> jax.Array:
    """Rows `[B, T, ...]` turned to the left, each by its own number of places."""
    length = x.shape[1]
    places = (jnp.arange(length) + by[:, None]) % length
    return jnp.take_along_axis(x, places[:, :, None, None], axis=1)


def _on_devices(
    local: Any,
    layout: Layout,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    rows: tuple[jax.Array, ...],
    cut: tuple[bool, ...],
    kernel: tuple[Any, ...] = (),
    kernel_specs: tuple[Any, ...] = (),
) -> jax.Array:
    """Runs attention on every device for its own rows, heads and queries.

    Args:
        local: what a device does, of the arrays that follow.
        layout: of the devices.
        query, key, value: as in `attend`; every device gets the keys of all columns.
        rows: arrays `[B, S]`.
        cut: for each of them whether it is cut as the queries are.
        kernel: what else `local` is given, before the rest.
        kernel_specs: how that is cut.
    """
    of = lambda *axes: layout.sharding(*axes).spec  # noqa: E731
    query_spec = of("batch", "heads", "seq", "head_dim")
    kv_spec = of("batch", "kv_heads", None, "head_dim")
    if kv_spec[1] != query_spec[1]:
        # Fewer key heads than shards: each shard's query heads get key heads of their own.
        key, value = (jnp.repeat(x, query.shape[1] // x.shape[1], axis=1) for x in (key, value))
        kv_spec = PartitionSpec(kv_spec[0], query_spec[1], None, None)
    row_specs = tuple(of("batch", "seq" if own else None) for own in cut)
    run = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(*kernel_specs, query_spec, kv_spec, kv_spec, *row_specs),
        out_specs=query_spec,
        check_vma=False,
    )
    return run(*kernel, query, key, value, *rows)


def _splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    real: jax.Array,
    scale: float,
    window: int,
    softcap: float,
) -> jax.Array:
    """JAX's Pallas kernel, on every device for its own rows, heads and queries."""
    layout = active_layout()
    if layout is not None and layout.mesh.size == 1:
        layout = None
    heads, length, head_dim = query.shape[1:]
    parts = 1 if layout is None else layout.context_shards
    pad = ((0, 0), (0, 0), (0, -length % (_LANES * parts)), (0, -head_dim % _LANES))
    # The kernel has no scale of its own; zeros at the end of heads add nothing to scores.
    scaled = query * jnp.asarray(scale, query.dtype)
    query, key, value = (jnp.pad(x, pad) for x in (scaled, key, value))
    segments = jnp.pad(real, ((0, 0), pad[2])).astype(jnp.int32)

    def local(kernel, query, key, value, own, other):
        rows = jax.vmap(lambda q, k, v, *ids: kernel(q, k, v, splash.SegmentIds(*ids)))
        return rows(query, key, value, own, other)

    padded = length + pad[2][1]
    if layout is None:
        kernel = _splash_kernel(heads, padded, window, softcap)
        out = local(kernel, query, key, value, segments, segments)
    else:
        cut = layout.sharding("heads", "seq")
        kernel = _splash_kernel(heads, padded, window, softcap, layout.shards("heads"), parts)
        out = _on_devices(
            local,
            layout,
            query,
            key,
            value,
            rows=(segments, segments),
            cut=(True, False),
            kernel=(kernel,),
            kernel_specs=(kernel.manual_sharding_spec(cut),),
        )
    return out[:, :, :length, :head_dim]


def _splash_kernel(
    heads: int, length: int, window: int, softcap: float, head_parts: int = 1, parts: int = 1
) -> Any:
    """The kernel for one row; its tables of blocks are made by numpy while tracing."""
    shape = (length, length)
    mask = splash.LocalMask(shape, (window - 1, 0), 0) if window else splash.CausalMask(shape)
    block = next(size for size in (_BLOCK, 384, 256, _LANES) if length // parts % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=head_parts,
        q_seq_shards=parts,
        mask_value=float(np.finfo(np.float32).min) / 2,
        attn_logits_soft_cap=softcap or None,
        interpret=interpreted(),
    )


def platform_device(layout: Layout | None = None) -> Any:
    """A device of a layout, by default of those that are traced for."""
    layout = layout or active_layout()
    return jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]


def interpreted() -> bool:
    """Whether a kernel has to be interpreted: on a CPU, where tests run it."""
    return platform_device().platform == "cpu"
