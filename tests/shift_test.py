"""A cache that is full of columns nobody attends to any more loses the first of them, in place."""

import importlib.util
import os
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from flowrl_jax.models.cache import KVCache
from flowrl_jax.sampler import SamplerConfig
from flowrl_jax.sampler.programs import Programs
from flowrl_jax.sampler.slots import Row, Slots
from flowrl_jax.sharding import MeshConfig, make_layout, make_mesh
from tests.tiny import tiny_config

SLOTS, HEADS, WIDTH = 3, 2, 4


def make_programs(cache: str) -> Programs:
    """Those of a decoder of two layers."""
    config = SamplerConfig(max_response_length=500, eos_ids=(3,), group_size=1, cache=cache)
    return Programs(tiny_config(num_layers=2), config, None, None)


def row(first: Any) -> Row:
    """What is known of rows, as far as it matters here."""
    rest: Any = dict.fromkeys(("index", "token", "length", "drawn", "search", "fixed"))
    return Row(first=first, **rest)


until: Any = None


def draw_slots(programs: Programs, columns: int) -> Slots:
    """Slots without rows whose caches hold random numbers and are full."""
    rng = np.random.default_rng(columns)

    def array(axis: int | None, dtype: Any, rank: int):
        if axis is None:
            return None
        shape = [SLOTS, HEADS, *[WIDTH] * (rank - 2)]
        shape[axis] = columns
        return jax.numpy.array(rng.integers(-99, 99, shape).astype(dtype))

    dtypes = (programs.cache_dtype,) * 2 + (np.float32,) * 2
    axes = programs.column_axes
    layers = [KVCache(*map(array, axes, dtypes, (4, 4, 3, 3))) for _ in range(2)]
    return Slots(row(jax.numpy.arange(SLOTS)), tuple(layers), jax.numpy.int32(columns), until)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["float32", "int8"])
@pytest.mark.parametrize("columns", [5, 128, 301])
def test_what_is_left_is_what_was_there(cache, columns):
    """Around the chunk of 128 columns, and where the last chunk is not a whole one."""
    programs = make_programs(cache)
    for shift in {0, 1, 4, 64, 127, 128, 172, 173, 300} & set(range(columns)):
        before = draw_slots(programs, columns)
        wanted = jax.tree.map(np.array, before.caches)
        after = programs.shift(before, np.int32(shift))
        assert after.column == columns - shift
        np.testing.assert_array_equal(after.row.first, np.arange(SLOTS) - shift)
        for old, new in zip(wanted, after.caches, strict=True):
            for axis, x, y in zip(programs.column_axes, old, new, strict=True):
                if axis is not None:
                    kept = np.take(np.array(y), np.arange(columns - shift), axis)
                    np.testing.assert_array_equal(kept, np.take(x, range(shift, columns), axis))


def test_nothing_else_is_as_large():
    """Of arrays of twelve chunks, fewer than four are held twice."""
    programs = make_programs("float32")
    slots = draw_slots(programs, 12 * 128)
    shift: Any = programs.shift
    sizes = shift.lower(slots, np.int32(5)).compile().memory_analysis()
    cache = sum(x.nbytes for x in jax.tree.leaves(slots.caches))
    assert sizes.alias_size_in_bytes >= cache
    assert sizes.temp_size_in_bytes < cache / 4 / 3  # there are four arrays


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ,
    reason="needs the TPU compiler: pip install libtpu, or TPU_LIBRARY_PATH=.../libtpu.so",
)
@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_a_tpu_needs_no_second_cache(cache):
    """128 slots with 8,704 columns, 28 layers, 4 key heads of 128 over v5e:2x4: 8 GB a chip."""
    devices = topologies.get_topology_desc("v5e:2x4", "tpu").devices
    layout = make_layout(make_mesh(MeshConfig(data=2, fsdp=1, tensor=4), devices), {"kv_heads": 4})
    shape = tiny_config(num_layers=28, num_heads=4, num_kv_heads=4, head_dim=128)
    config = SamplerConfig(max_response_length=8192, eos_ids=(3,), group_size=1, cache=cache)
    programs = Programs(shape, config, layout, layout)
    where = programs.shardings(Slots)

    def abstract(sharding, rank):
        dtype = programs.cache_dtype if rank == 4 else np.float32
        return jax.ShapeDtypeStruct((128, 4, 8704, 128)[:rank], dtype, sharding=sharding)

    assert programs.column_axes.key == 2  # as the TPU's kernel wants it
    layer = KVCache(*map(abstract, where.caches[0], (4, 4, 3, 3)[: 2 + 2 * (cache == "int8")]))
    number: Any = jax.ShapeDtypeStruct((), np.int32, sharding=where.column)
    first = jax.ShapeDtypeStruct((128,), np.int32, sharding=where.row.first)
    slots = Slots(row(first), (layer,) * 28, number, until)
    out = Slots(row(where.row.first), where.caches, where.column, until)
    shift = layout.jit(programs._shift, donate_argnums=0, out_shardings=out)
    sizes = shift.lower(slots, number).compile().memory_analysis()
    assert sizes.alias_size_in_bytes > 0.999 * sizes.argument_size_in_bytes > 4e9
    assert sizes.temp_size_in_bytes < 1e6
