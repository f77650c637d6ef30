"""Attention of one token per slot: the TPU kernel, interpreted, against loops in numpy."""

import functools
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from flowrl_jax.errors import InputError
from flowrl_jax.models.cache import KVCache, dequantize, quantize
from flowrl_jax.models.decode_kernel import CHUNK, decode_attention, decode_attention_kernel
from flowrl_jax.planning.chips import describe
from flowrl_jax.sharding import MeshConfig, make_layout, make_mesh
from tests.decode_loops import CLOSE, SCALE, draw, loops

kernel = functools.partial(decode_attention_kernel, scale=SCALE, interpret=True)


def in_eight_bits(cache: KVCache) -> KVCache:
    (key, key_scale), (value, value_scale) = quantize(cache.key), quantize(cache.value)
    return KVCache(key, value, key_scale, value_scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "column", "length"),
    [
        ((1, 1, 1, 200, 256), 150, [151]),  # all from the first column on
        ((3, 6, 2, 384, 80), 380, [1, 300, 129]),  # three blocks of work; a single column
        ((5, 7, 1, 130, 96), 128, [0, 0, 0, 129, 5]),  # the first grid step has no work
        ((5, 8, 8, 257, 128), 256, [257, 0, 128, 127, 0]),  # ends of chunks, idle slots between
    ],
)
def test_equals_loops_at_odd_sizes(shape, column, length):
    query, cache = draw(*shape)
    out = kernel(query, cache, column, jnp.array(length), block=CHUNK)
    np.testing.assert_allclose(out, loops(query, *cache[:2], column, length), atol=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("float32", {"window": 140, "softcap": 2.0}, CLOSE),
        ("int8", {"window": 140, "softcap": 2.0}, CLOSE),  # equal to what eight bits stand for
        # bfloat16 has 8 bits: half a step of results between 1 and 2 is 2^-8. The weights, which
        # are rounded before they meet the values, add less.
        ("bfloat16", {"window": 140}, 2**-7),
    ],
)
def test_options_and_dtypes(kind, options, tolerance):
    column, length = 330, [331, 139, 141]
    query, cache = draw(3, 6, 2, 384, 64, jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
    stands_for = cache[:2]
    if kind == "int8":
        cache = in_eight_bits(cache)
        stands_for = (dequantize(cache.key, cache.key_scale), dequantize(*cache[1::2]))
    out = kernel(query, cache, column, jnp.array(length), block=2 * CHUNK, **options)
    assert out.dtype == query.dtype
    expected = loops(query, *stands_for, column, length, **options)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_reads_only_what_is_visible(kind):
    """Whatever else the cache holds, NaN as well, changes nothing."""
    column, length, window = 300, np.array([120, 0, 33]), 100
    query, cache = draw(3, 2, 1, 512, 64)
    cache = in_eight_bits(cache) if kind == "int8" else cache
    columns = np.arange(512)
    seen = (columns <= column) & (columns > column - np.minimum(length, window)[:, None])
    hidden = lambda x: ~seen[:, None].reshape(3, 1, 512, *[1] * (x.ndim - 3))  # noqa: E731
    spoilt = lambda x: jnp.where(hidden(x), jnp.nan if x.dtype != jnp.int8 else 99, x)  # noqa: E731
    spoilt_cache = jax.tree.map(lambda x: spoilt(x).astype(x.dtype), cache)
    run = jax.jit(functools.partial(kernel, window=window, block=CHUNK))
    out = run(query, cache, column, jnp.array(length))
    np.testing.assert_array_equal(out, run(query, spoilt_cache, column, jnp.array(length)))
    assert np.isfinite(out).all() and np.any(out[0])


def test_copies_arrive_before_they_are_used():
    """Copies are made as late as they may be, and races are looked for."""
    query, cache = draw(4, 2, 1, 640, 128)
    column, length = 639, [640, 5, 0, 300]
    late = pltpu.InterpretParams(
        dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan"
    )
    out = kernel(query, cache, column, jnp.array(length), block=CHUNK, interpret=late)
    np.testing.assert_allclose(out, loops(query, *cache[:2], column, length), atol=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "kv_heads", "kind"),
    [
        (8, 4, "float32"),  # a key head for each shard
        (8, 2, "float32"),  # shards share key heads
        (20, 5, "int8"),  # a shard's five query heads straddle two key heads or three
    ],
)
def test_devices_attend_for_their_own_slots_and_heads(heads, kv_heads, kind):
    query, cache = draw(4, heads, kv_heads, 128, 64)
    cache = in_eight_bits(cache) if kind == "int8" else cache
    length = jnp.array([100, 0, 3, 77])
    layout = make_layout(
        make_mesh(MeshConfig(data=2, tensor=4)), {"heads": heads, "kv_heads": kv_heads}
    )
    attend = functools.partial(decode_attention, scale=SCALE, softcap=3.0)
    out = layout.jit(attend)(query, cache, 99, length)
    np.testing.assert_allclose(out, jax.jit(attend)(query, cache, 99, length), atol=1e-6)


def test_eight_bits_are_near_and_zero_stays_zero():
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (2, 3, 5, 64)), jnp.bfloat16)
    x = x.at[0, 1, 2].set(0).at[1, 2, 3].set(1e-30)
    codes, scale = quantize(x)
    assert codes.dtype == jnp.int8 and scale.shape == x.shape[:-1]
    exact = np.asarray(x, np.float64)
    half_steps = np.abs(exact).max(-1, keepdims=True) / 127 / 2
    error = np.abs(np.asarray(dequantize(codes, scale), np.float64) - exact)
    assert np.all(error <= half_steps * (1 + 1e-4))
    assert not np.any(codes[0, 1, 2])


@pytest.mark.parametrize(
    ("options", "rule"), [({"block": 384}, "power of two"), ({}, "not a multiple")]
)
def test_refuses_what_it_cannot_do(options, rule):
    query, cache = draw(1, 4 if options else 3, 2, 8, 8)
    with pytest.raises(InputError, match=rule):
        kernel(query, cache, 3, jnp.array([1]), **options)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ,
    reason="needs the TPU compiler: pip install libtpu, or TPU_LIBRARY_PATH=.../libtpu.so",
)
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("columns", [2048, 8448])
def test_the_tpu_compiler_takes_it(chip, dtype, columns):
    """A step of Qwen2.5-7B, 64 slots: the cache is written and read in place."""
    sharding = SingleDeviceSharding(describe(f"{chip}:2x2").devices[0])
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    kv = array((64, 4, columns, 128), dtype)
    scales = array((64, 4, columns), jnp.float32) if dtype == jnp.int8 else None
    cache = KVCache(kv, kv, scales, scales)

    def step(query, new, cache, column, length):
        write = lambda x, at: jax.lax.dynamic_update_slice_in_dim(x, at, column, 2)  # noqa: E731
        cache = jax.tree.map(write, cache, new)
        scale = query.shape[2] ** -0.5
        return decode_attention_kernel(query, cache, column, length, scale=scale), cache

    lowered = jax.jit(step, donate_argnums=2).lower(
        array((64, 28, 128), jnp.bfloat16),
        jax.tree.map(lambda x: array((*x.shape[:2], 1, *x.shape[3:]), x.dtype), cache),
        cache,
        array((), jnp.int32),
        array((64,), jnp.int32),
    )
    memory: Any = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**20
    held = sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == held
