"""Attention of one new token per slot over the keys and values that decoding keeps.

All slots write the same column at a step: one slice of the cache, which XLA writes or a kernel that
attends. What a slot may attend to are the last so many columns up to that one: nothing else has to
be masked or known.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowrl_jax.errors import InputError
from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.models.attention import MASKED, capped, platform_device
from flowrl_jax.models.cache import KVCache, quantize
from flowrl_jax.models.decode_kernel import decode_attention
from flowrl_jax.models.decode_native import Prompts, native_attention
from flowrl_jax.models.decode_support import refusal, require_support
from flowrl_jax.models.decode_triton import triton_attention
from flowrl_jax.models.rotary import Rotation, rotary
from flowrl_jax.native import library

_WITHOUT_KERNEL = ("TPU v2", "TPU v3")  # their compiler refuses its bfloat16 products
_TRITON_FROM = 8.0  # compute capability; Ampere's
_MADE_FOR = {"pallas": "tpu", "triton": "gpu", "native": "cpu"}


class Held(NamedTuple):
    """The columns of a cache that slots may attend to.

    Attributes:
        column: scalar int32, the newest column.
        length: `[S]` int32, how many columns a slot's row has, up to the newest one and with it; 0
            for a slot without a row, whose output means nothing.
        prompts: what rows have in common; None if that is not known.
    """

    column: jax.Array
    length: jax.Array
    prompts: Prompts | None = None


def decode_kernel(config: TransformerConfig, kept: Any) -> str:
    """The kernel that decoding attends with on the devices that are traced for.

    Args:
        config: the decoder, `decode_kernel` of it what is wanted.
        kept: dtype of keys and values.

    Returns:
        "xla", "pallas", "triton" or "native".

    Raises:
        InputError: the kernel that is wanted by name is for other devices, or cannot do this.
    """
    wanted, device = config.decode_kernel, platform_device()
    case = {"head_dim": config.head_dim, "softcap": config.attention_softcap}
    case |= {"dtype": config.dtype, "kept": kept}
    require_support(wanted, **case)
    if device.platform not in ("cpu", _MADE_FOR.get(wanted, device.platform)):
        raise InputError(
            f"model.decode_kernel={wanted!r} is a kernel for {_MADE_FOR[wanted].upper()}s, and this"
            f" is a {device.platform.upper()}: use 'auto'"
        )
    if wanted == "native" and library.missing():
        raise InputError(f"model.decode_kernel='native': {library.missing()}; or use 'auto'")
    if wanted != "auto":
        return wanted
    best = _best(device)
    if refusal(best, **case) or (best == "native" and library.missing()):
        return "xla"
    return best


def _best(device: Any) -> str:
    """The kernel for a device, where it can do what is wanted."""
    if device.platform == "tpu" and device.device_kind not in _WITHOUT_KERNEL:
        return "pallas"
    if device.platform == "cpu":
        return "native"
    return "triton" if _compiles_triton(device) else "xla"


def _compiles_triton(device: Any) -> bool:
    """Whether it is an NVIDIA GPU that Triton's compiler knows."""
    # AMD's say "gfx942". Devices that are planned for say nothing, and none of them is older.
    capability = str(getattr(device, "compute_capability", _TRITON_FROM))
    return (
        device.platform == "gpu" and capability[:1].isdigit() and float(capability) >= _TRITON_FROM
    )


def column_axes(kernel: str, dtype: Any) -> KVCache:
    """The axis of columns in each array of a cache.

    XLA multiplies a query with `[H, C]` keys without packing them first, which its CPU backend does
    with `[C, H]` keys and takes more than twice as long for.

    Args:
        kernel: from `decode_kernel`.
        dtype: that keys and values are kept in.
    """
    scale = 2 if dtype == jnp.int8 else None
    return KVCache(3 if kernel == "xla" else 2, 2, scale, scale)


def make_cache(key: jax.Array, value: jax.Array, dtype: Any, kernel: str) -> KVCache:
    """A cache of given columns.

    Args:
        key: `[S, K, C, H]`.
        value: `[S, K, C, H]`.
        dtype: that they are kept in; int8 for eight bits with a scale for each of their vectors.
        kernel: that is to attend, from `decode_kernel`.
    """
    scales = ()
    if dtype == jnp.int8:
        (key, key_scale), (value, value_scale) = quantize(key), quantize(value)
        scales = (key_scale, value_scale)
    if column_axes(kernel, dtype).key == 3:
        key = jnp.swapaxes(key, 2, 3)
    return KVCache(key.astype(dtype), value.astype(dtype), *scales)


def write(
    cache: KVCache, key: jax.Array, value: jax.Array, column: jax.Array, kernel: str
) -> KVCache:
    """The cache with one column written, in place where it may.

    Args:
        cache: of a layer.
        key: `[S, K, 1, H]` in the compute dtype.
        value: `[S, K, 1, H]`.
        column: scalar int32, where.
        kernel: that attends, from `decode_kernel`.
    """
    dtype = cache.key.dtype
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=column)
    return jax.tree.map(
        lambda old, new, axis: put(old, new, axis=axis),
        cache,
        make_cache(key, value, dtype, kernel),
        column_axes(kernel, dtype),
    )


def attend_next(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rotation: Rotation,
    cache: KVCache,
    held: Held,
    *,
    kernel: str,
    **scores: Any,
) -> tuple[jax.Array, KVCache]:
    """Writes a token of every slot to the cache, and attends to it and those before.

    Positions are put into its queries and its key first.

    Args:
        query: `[S, N, 1, H]`.
        key: `[S, K, 1, H]`.
        value: `[S, K, 1, H]`.
        rotation: of the slots' positions, `[S, 1, 1, H / 2]` each (see `rotary`).
        cache: of the layer; donated.
        held: what each slot may attend to, this token the newest.
        kernel: from `decode_kernel`. "native", for CPUs, turns and writes as it reads, and reads
            what each slot may attend to and nothing else; for the others see `attend_cached`.
        scores: `scale`, `window` and `softcap` as there.

    Returns:
        `[S, N, 1, H]` in the dtype of `query`, and the cache.
    """
    if kernel == "native":
        out, cache = native_attention(
            query[:, :, 0],
            key[:, :, 0],
            value[:, :, 0],
            cache,
            held.column,
            held.length,
            held.prompts,
            jax.tree.map(lambda x: x[:, 0, 0], rotation),
            **scores,
        )
        return out[:, :, None], cache
    query, key = rotary(query, rotation), rotary(key, rotation)
    cache = write(cache, key, value, held.column, kernel)
    return attend_cached(query, cache, held, kernel=kernel, **scores), cache


def attend_cached(
    query: jax.Array,
    cache: KVCache,
    held: Held,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    kernel: str,
) -> jax.Array:
    """Grouped-query attention of one token per slot, softmax in float32.

    Args:
        query: `[S, N, 1, H]`; N query heads, a multiple of K.
        cache: of the layer, the token's own column in it.
        held: what each slot may attend to.
        scale: multiplies the scores.
        window: columns that a token looks back to, its own included; 0 means all.
        softcap: scores s become `softcap * tanh(s / softcap)`; 0 leaves them.
        kernel: from `decode_kernel`, but "native". "pallas", for TPU, and "triton", for NVIDIA
            GPUs, read what each slot may attend to and little more; "xla" all columns.

    Returns:
        `[S, N, 1, H]` in the dtype of `query`.
    """
    assert kernel != "native", "attend_next writes and attends at once"
    if kernel != "xla":
        seen = (query[:, :, 0], cache, held.column, held.length)
        options: dict[str, Any] = {"scale": scale, "window": window}
        if kernel == "triton":
            return triton_attention(*seen, **options)[:, :, None]
        return decode_attention(*seen, softcap=softcap, **options)[:, :, None]
    slots, heads, _, head_dim = query.shape
    kv_heads, columns = cache.value.shape[1:3]
    grouped = query.reshape(slots, kv_heads, heads // kv_heads, head_dim)
    key = cache.key if cache.key_scale is None else cache.key.astype(query.dtype)
    scores = jnp.einsum("skgh,skhc->skgc", grouped, key, preferred_element_type=jnp.float32)
    if cache.key_scale is not None:
        scores *= cache.key_scale[:, :, None]
    age = held.column - jnp.arange(columns)
    reach = jnp.minimum(held.length, window) if window else held.length
    # Added rather than chosen, so that it is worked out once for all layers.
    hidden = jnp.where((age >= 0) & (age < reach[:, None]), 0.0, MASKED)
    scores = capped(scores * scale, softcap) + hidden[:, None, None]
    probs = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(probs, axis=-1, keepdims=True)
    if cache.value_scale is not None:
        probs *= cache.value_scale[:, :, None]
    value = cache.value if cache.value_scale is None else cache.value.astype(query.dtype)
    out = jnp.einsum(
        "skgc,skch->skgh", probs.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    # Divided last: there are fewer numbers in a head than columns.
    return (out / total).reshape(query.shape).astype(query.dtype)
