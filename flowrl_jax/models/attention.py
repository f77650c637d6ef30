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

from flowrl_jax.sharding import active_layout

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
        return _cudnn(query, key, value, columns, scale, window)
    length = query.shape[2]
    dense = functools.partial(_dense, scale=scale, window=window, softcap=softcap)
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
    if length == 1:
        # Keys are the left factor here, which XLA's CPU backend need not transpose. Were the
        # scores turned before they are masked, XLA would exchange the factors again.
        scores = jnp.einsum("bksh,bkth->bkst", key, grouped, preferred_element_type=jnp.float32)
        scores = _capped(scores * scale, softcap)
        scores = jnp.where(jnp.swapaxes(mask, 1, 2)[:, None], scores, MASKED)
        scores = jnp.swapaxes(scores, 2, 3)
    else:
        scores = jnp.einsum("bkth,bksh->bkts", grouped, key, preferred_element_type=jnp.float32)
        scores = scores.reshape(batch, kv_heads, heads // kv_heads, length, -1)
        scores = jnp.where(mask[:, None, None], _capped(scores * scale, softcap), MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkts,bksh->bkth", probs.reshape(batch, kv_heads, -1, key.shape[2]), value)
    return out.reshape(batch, heads, length, head_dim)


def _capped(scores: jax.Array, softcap: float) -> jax.Array:
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


def _cudnn(query, key, value, columns: Columns, scale: float, window: int) -> jax.Array:
    swap = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
    out = jax.nn.dot_product_attention(
        swap(query),
        swap(key),
        swap(value),
        mask=visible(columns, query.shape[2], window)[:, None],
        scale=scale,
        implementation="cudnn",
    )
    return swap(out)


def _splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    real: jax.Array,
    scale: float,
    window: int,
    softcap: float,
) -> jax.Array:
    """JAX's Pallas kernel, on every device for its own rows and heads."""
    heads, length, head_dim = query.shape[1:]
    pad = ((0, 0), (0, 0), (0, -length % _LANES), (0, -head_dim % _LANES))
    # The kernel has no scale of its own; zeros at the end of heads add nothing to scores.
    arrays = [jnp.pad(x, pad) for x in (query * jnp.asarray(scale, query.dtype), key, value)]
    segments = jnp.pad(real, ((0, 0), pad[2])).astype(jnp.int32)

    def local(query, key, value, segments):
        kernel: Any = _splash_kernel(query.shape[1], query.shape[2], window, softcap)
        rows = jax.vmap(lambda q, k, v, s: kernel(q, k, v, splash.SegmentIds(s, s)))
        return rows(query, key, value, segments)

    layout = active_layout()
    if layout is not None and layout.mesh.size > 1:
        of = lambda *axes: layout.sharding(*axes).spec  # noqa: E731
        query_spec = of("batch", "heads", "seq", "head_dim")
        kv_spec = of("batch", "kv_heads", "seq", "head_dim")
        if kv_spec[1] != query_spec[1]:
            # Fewer key heads than shards: each shard's query heads get key heads of their own.
            arrays[1:] = (jnp.repeat(x, heads // x.shape[1], axis=1) for x in arrays[1:])
            kv_spec = query_spec
        local = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(query_spec, kv_spec, kv_spec, PartitionSpec(query_spec[0], None)),
            out_specs=query_spec,
            check_vma=False,
        )
    query, key, value = arrays
    return local(query, key, value, segments)[:, :, :length, :head_dim]


def _splash_kernel(heads: int, length: int, window: int, softcap: float):
    """The kernel for one row; its tables of blocks are made by numpy while tracing."""
    shape = (length, length)
    mask = splash.LocalMask(shape, (window - 1, 0), 0) if window else splash.CausalMask(shape)
    block = next(size for size in (_BLOCK, 384, 256, _LANES) if length % size == 0)
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
        head_shards=1,
        q_seq_shards=1,
        mask_value=float(np.finfo(np.float32).min) / 2,
        attn_logits_soft_cap=softcap or None,
        interpret=_interpreted(),
    )


def _interpreted() -> bool:
    """Whether the kernel has to be interpreted: on a CPU, where tests run it."""
    layout = active_layout()
    devices = jax.devices() if layout is None else layout.mesh.devices.reshape(-1)
    return devices[0].platform == "cpu"
