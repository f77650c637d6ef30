"""Rows that come into slots and rows that are put aside between two tokens, on the device."""

import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from flowrl_jax.models.cache import KVCache
from flowrl_jax.models.decode import decode_params, decode_shardings
from flowrl_jax.sampler import SamplerConfig
from flowrl_jax.sampler.exchange import let_in, let_out
from flowrl_jax.sampler.programs import Programs
from flowrl_jax.sampler.slots import Queue, Row, Rows, Shelf, Slots, Starts
from flowrl_jax.sharding import MeshConfig, make_layout, make_mesh
from tests.native import NATIVE
from tests.tiny import tiny_config, tiny_params

HEADS, WIDTH = 2, 3
LAYERS = 2


def axes(cache: str) -> tuple[KVCache, ...]:
    """Of the columns, as a CPU keeps them."""
    config = SamplerConfig(max_response_length=9, eos_ids=(3,), group_size=1, cache=cache)
    return (Programs(tiny_config(), config, None, None).column_axes,) * LAYERS


def draw_caches(rng, axes, rows: int, columns: int) -> tuple[KVCache, ...]:
    """Random numbers, as none are in two places."""

    def array(axis):
        shape = [rows, HEADS, WIDTH, WIDTH]
        shape[axis] = columns
        return jnp.array(rng.permutation(np.prod(shape)).reshape(shape).astype(np.float32))

    return tuple(jax.tree.map(array, one) for one in axes)


def columns_of(axes, caches, row: int, first: int, last: int) -> list[np.ndarray]:
    """Some columns of a row, of all arrays."""
    cut = lambda axis, x: np.take(np.asarray(x)[row], range(first, last), axis - 1)  # noqa: E731
    return jax.tree.leaves(jax.tree.map(cut, axes, caches))


def assert_equal(wanted: list[np.ndarray], found: list[np.ndarray]) -> None:
    for x, y in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(x, y)


def numbers(rng, count: int, high: int = 1000) -> jax.Array:
    return jnp.array(rng.integers(0, high, count), jnp.int32)


def draw_rows(rng, count: int) -> Rows:
    key = numbers(rng, 2 * count).reshape(count, 2)
    return Rows(key, numbers(rng, count), numbers(rng, count))


def draw_slots(rng, axes, index: list[int], columns: int, column: int, drawn: list[int]) -> Slots:
    """Slots with these rows, each with its tokens drawn up to the column."""
    count = len(index)
    fixed = draw_rows(rng, count)
    row = Row(
        index=jnp.array(index),
        first=column - jnp.array(drawn),
        token=numbers(rng, count),
        length=numbers(rng, count),
        drawn=jnp.array(drawn),
        search=numbers(rng, count),
        fixed=fixed,
    )
    caches = draw_caches(rng, axes, count, columns)
    return Slots(row, caches, jnp.int32(column), jnp.int32(5))


def draw_starts(rng, axes, places: int, width: int) -> Starts:
    return Starts(
        draw_caches(rng, axes, places, width), *(numbers(rng, places, 9) for _ in range(4))
    )


@pytest.mark.parametrize("cache", ["float32", "int8"])
@pytest.mark.parametrize(("taken", "count"), [(0, 5), (2, 5), (1, 2), (2, 2)])
def test_rows_come_in_by_their_order(cache, taken, count):
    """Into the free slots from the first on, until the queue is at its end."""
    rng, at = np.random.default_rng(count), axes(cache)
    index = [7, -1, 3, -1, -1]
    slots = draw_slots(rng, at, index, 11, 8, [1, 0, 2, 0, 0])
    starts, width = draw_starts(rng, at, 4, 6), 6
    rows = draw_rows(rng, 10)
    place, who = np.array([3, 0, 2, 1, 3]), np.array([9, 4, 0, 6, 2])
    queue = Queue(jnp.array(place)[None], jnp.array(who)[None], jnp.array([count]))
    after, came = let_in(at, slots, jnp.array([taken]), starts, rows, queue)
    entries = dict(zip([1, 3, 4], range(taken, count), strict=False))
    assert came == taken + len(entries)
    for slot in range(5):
        whole = columns_of(at, after.caches, slot, 0, 11)
        row = jax.tree.map(lambda x: np.asarray(x)[slot], after.row)  # noqa: B023
        if slot not in entries:
            assert_equal(columns_of(at, slots.caches, slot, 0, 11), whole)
            assert row.index == index[slot]
            continue
        of, other = place[entries[slot]], who[entries[slot]]
        came_with = columns_of(at, starts.caches, of, 0, width)
        assert_equal(came_with, columns_of(at, after.caches, slot, 8 - width, 8))
        for first, last in ((0, 8 - width), (8, 11)):  # the rest is as it was
            old = columns_of(at, slots.caches, slot, first, last)
            assert_equal(old, columns_of(at, after.caches, slot, first, last))
        assert (row.index, row.first) == (other, 8 - starts.drawn[of])
        for name in ("token", "length", "drawn", "search"):
            assert getattr(row, name) == getattr(starts, name)[of]
        assert row.fixed.limit == rows.limit[other]
        np.testing.assert_array_equal(row.fixed.key, rows.key[other])


@pytest.mark.parametrize("cache", ["float32", "int8"])
@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("taken", [0, 2, 3])
def test_rows_are_put_aside_with_what_they_have(cache, all_rows, taken):
    """Those with five tokens, or all; the shelf has four places, some of them taken."""
    rng, at = np.random.default_rng(taken), axes(cache)
    index, width, column = [7, -1, 3, 5, 8], 7, 9
    slots = draw_slots(rng, at, index, 11, column, [5, 5, 4, 5, 1])
    # The second that leaves came to its limit two columns ago.
    slots = slots.replace(row=slots.row.replace(first=slots.row.first.at[3].add(-2)))
    starts = draw_starts(rng, at, 4, width)
    shelf = Shelf(starts, numbers(rng, 4), jnp.array([taken]))
    after, kept = let_out(at, slots, shelf, all_rows=all_rows)
    leave = [0, 2, 3, 4] if all_rows else [0, 3]
    left = leave[: 4 - taken]
    assert kept.count == taken + len(left)
    now = [-1 if slot in left else row for slot, row in enumerate(index)]
    np.testing.assert_array_equal(after.row.index, now)
    for slot in range(5):
        assert_equal(*(columns_of(at, x.caches, slot, 0, 11) for x in (slots, after)))
    for place in range(4):
        here = columns_of(at, kept.starts.caches, place, 0, width)
        if not taken <= place < taken + len(left):
            assert_equal(columns_of(at, starts.caches, place, 0, width), here)
            assert kept.row[place] == shelf.row[place]
            continue
        slot = left[place - taken]
        end = column - 2 * (slot == 3)
        assert_equal(columns_of(at, slots.caches, slot, end - width, end), here)
        assert kept.row[place] == index[slot]
        for name in ("token", "length", "drawn", "search"):
            assert getattr(kept.starts, name)[place] == getattr(slots.row, name)[slot]


def test_a_row_shorter_than_the_shelf_ends_where_the_shelf_does():
    """It has fewer columns before its end than a place; what comes before does not matter."""
    rng, at = np.random.default_rng(0), axes("float32")
    slots = draw_slots(rng, at, [2], 11, 4, [5])
    shelf = Shelf(draw_starts(rng, at, 1, 7), numbers(rng, 1), jnp.array([0]))
    _, kept = let_out(at, slots, shelf, all_rows=False)
    found = columns_of(at, kept.starts.caches, 0, 3, 7)
    assert_equal(columns_of(at, slots.caches, 0, 0, 4), found)


def lowered_segment(programs: Programs, slots: int, width: int, columns: int, *, aside: bool):
    """A segment of a decoder, with rows that come in and, if wished, a shelf; not yet compiled."""
    shape, within, shards = programs.shape, programs.within, programs.shards
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731

    def placed(tree, shardings):
        if within is None:
            return tree
        return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), tree, shardings)

    weights = jax.eval_shape(lambda: decode_params(tiny_params(shape), shape, within))
    if within is not None:
        weights = placed(weights, decode_shardings(shape, within))
    each = array(4 * slots)
    rows = Rows(jax.ShapeDtypeStruct((4 * slots, 2), jnp.uint32), each, each)

    def empty():
        layer = [jnp.zeros((slots, shape.num_kv_heads, width, shape.head_dim), shape.dtype)] * 2
        if programs.column_axes.key == 3:
            layer[0] = jnp.swapaxes(layer[0], 2, 3)
        caches = (KVCache(*layer),) * shape.num_layers
        starts = Starts(caches, *[jnp.zeros(slots, jnp.int32)] * 4)
        keys = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rows)
        held = programs.without_rows(starts, keys, 99, slots, columns)
        shelf = Shelf(starts, starts.token, jnp.zeros(shards, jnp.int32)) if aside else None
        return starts, held, shelf

    starts, held, shelf = jax.eval_shape(empty)
    starts = placed(starts, programs.shardings(Starts))
    held = placed(held, programs.shardings(Slots))
    rows = placed(rows, programs.shardings(Rows))
    shelf = placed(shelf, programs.shardings(Shelf)) if aside else None
    each = slots // shards
    queue = Queue(array(shards, each), array(shards, each), array(shards))
    key_impl = jax.random.key_impl(jax.random.key(0))
    arguments = (
        weights,
        held,
        shelf,
        (starts, rows, queue),
        array(shards),
        array(),
        key_impl,
        None,
    )
    return programs.segment.lower(*arguments), held, shelf


@pytest.mark.parametrize("kernel", ["xla", pytest.param("native", marks=NATIVE)])
def test_a_segment_holds_no_second_cache(kernel):
    """What comes in and goes out between tokens leaves the caches where they are."""
    sizes = {"num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64}
    shape = tiny_config(**sizes, decode_kernel=kernel)
    config = SamplerConfig(max_response_length=512, eos_ids=(3,), group_size=1)
    programs = Programs(shape, config, None, None)
    lowered, slots, shelf = lowered_segment(programs, 32, 64, 640, aside=True)
    sizes: Any = lowered.compile().memory_analysis()
    bytes_of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    one_array = bytes_of(slots.caches) / 8
    assert sizes.alias_size_in_bytes >= bytes_of(slots.caches) + bytes_of(shelf.starts.caches)
    assert sizes.temp_size_in_bytes < one_array


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ,
    reason="needs the TPU compiler: pip install libtpu, or TPU_LIBRARY_PATH=.../libtpu.so",
)
def test_a_segment_holds_no_second_cache_on_a_tpu():
    """128 slots with 2,560 columns, 8 layers, 4 key heads of 128 over v5e:2x4: 0.7 GB a chip."""
    devices = topologies.get_topology_desc("v5e:2x4", "tpu").devices
    layout = make_layout(make_mesh(MeshConfig(data=2, fsdp=1, tensor=4), devices), {"kv_heads": 4})
    shape = tiny_config(
        num_layers=8,
        num_heads=4,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=64,
        dtype=jnp.bfloat16,
    )
    config = SamplerConfig(max_response_length=2048, eos_ids=(3,), group_size=1)
    programs = Programs(shape, config, layout, layout)
    lowered, slots, _ = lowered_segment(programs, 128, 512, 2560, aside=False)
    sizes: Any = lowered.compile().memory_analysis()
    caches = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(slots.caches)) / 8
    assert sizes.alias_size_in_bytes >= caches > 6e8
    assert sizes.temp_size_in_bytes < caches / 16 / 2  # there are sixteen arrays
