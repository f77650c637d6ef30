"""Attention of one token per slot: the GPU kernel, interpreted, against loops in numpy."""

import functools
import importlib.util
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.topologies import get_topology_desc

from configs import base
from flowrl_jax.config import parse_config
from flowrl_jax.errors import InputError
from flowrl_jax.models import attention, decode_attention, decode_native
from flowrl_jax.models.cache import KVCache
from flowrl_jax.models.decode import decode_params, decode_token, rotation_tables
from flowrl_jax.models.decode_attention import (
    Held,
    attend_cached,
    decode_kernel,
    make_cache,
    write,
)
from flowrl_jax.models.decode_triton import (
    SPLIT,
    refusal,
    triton_attention,
    triton_attention_kernel,
)
from flowrl_jax.sharding import MeshConfig, make_layout, make_mesh
from tests.decode_loops import CLOSE, HEADS_OF_SHARDS, SCALE, attend_on_devices, draw, loops
from tests.tiny import tiny_config, tiny_params

kernel = functools.partial(triton_attention_kernel, scale=SCALE, interpret=True)
CASE: dict[str, Any] = {
    "head_dim": 64, "softcap": 0.0, "dtype": jnp.bfloat16, "kept": jnp.bfloat16
}  # fmt: skip
CUSTOM_CALL = "__gpu$xla.gpu.triton"


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 140])
@pytest.mark.parametrize(
    ("shape", "column", "length"),
    [
        ((1, 1, 1, 200, 256), 150, [151]),  # all from the first column on; padded to a split
        ((7, 6, 2, 600, 64), 517, [1, 2, 255, 256, 257, 517, 518]),  # three splits, ends of splits
        ((4, 7, 7, 512, 16), 255, [0, 256, 0, 5]),  # a split with nothing in it; idle slots
        ((2, 20, 1, 257, 32), 256, [1, 257]),  # more heads to a key head than a block has
    ],
)
def test_equals_loops_at_odd_sizes(shape, column, length, window):
    query, cache = draw(*shape)
    out = kernel(query, cache, column, jnp.array(length), window=window)
    expected = loops(query, *cache[:2], column, length, window=window)
    np.testing.assert_allclose(out, expected, atol=CLOSE)


@pytest.mark.slow
def test_bfloat16_rounds_results_and_not_sums():
    column, length = 760, [761, 0, 300]
    query, cache = draw(3, 6, 2, 768, 64, jnp.bfloat16)
    out = kernel(query, cache, column, jnp.array(length))
    assert out.dtype == jnp.bfloat16
    # bfloat16 has 8 bits: results near 1 are rounded by 2^-9, and those of splits before that.
    expected = loops(query, *cache[:2], column, length)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2**-7)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_slots_without_a_row_are_zero(dtype):
    query, cache = draw(3, 4, 2, 512, 16, dtype)
    out = kernel(query, cache, 300, jnp.zeros(3, jnp.int32))
    assert not np.any(out) and np.isfinite(np.asarray(out, np.float32)).all()


def test_what_is_hidden_changes_nothing():
    column, length, window = 300, np.array([120, 0, 33]), 100
    query, cache = draw(3, 2, 1, 512, 64)
    columns = np.arange(512)
    seen = (columns <= column) & (columns > column - np.minimum(length, window)[:, None])
    other = jax.tree.map(lambda x: jnp.where(seen[:, None, :, None], x, 1e4), cache)
    run = jax.jit(functools.partial(kernel, window=window))
    first, second = (run(query, kept, column, jnp.array(length)) for kept in (cache, other))
    np.testing.assert_array_equal(first, second)
    assert np.any(first[0])


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS_OF_SHARDS)
def test_devices_attend_for_their_own_slots_and_heads(heads, kv_heads):
    out, expected = attend_on_devices(triton_attention, heads, kv_heads)
    np.testing.assert_allclose(out, expected, atol=CLOSE)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"head_dim": 96}, "head_dim=96"),
        ({"head_dim": 8}, "from 16 to 256"),
        ({"head_dim": 512}, "from 16 to 256"),
        ({"softcap": 50.0}, "at 50"),
        ({"dtype": jnp.float16, "kept": jnp.float16}, "float16"),
        ({"kept": jnp.int8}, "int8"),
        ({"kept": jnp.float32}, "not in float32"),
    ],
)
def test_says_what_it_cannot_do(case, reason, monkeypatch):
    assert not refusal() and not refusal(**CASE)
    assert reason in refusal(**(CASE | case))
    with pytest.raises(InputError, match=f"decode_kernel='triton'.*{reason}.*: use 'auto'"):
        choose("triton", **case)
    trace_for(monkeypatch, "gpu")
    assert choose("auto") == "triton"
    assert choose("auto", **case) == "xla"


def test_configs_are_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="head_dim=4:"):
        tiny_config(decode_kernel="triton")
    with pytest.raises(ValueError, match="soft-cap"):
        tiny_config(decode_kernel="triton", head_dim=16, attention_softcap=30.0)
    config = base.get_config()
    config.model.decode_kernel = "triton"
    parse_config(config)
    config.rollout.cache = "int8"
    with pytest.raises(InputError, match=r"not in int8 \(rollout.cache\): use 'auto' or 'xla'"):
        parse_config(config)


def choose(wanted: str, **changes: Any) -> str:
    """The kernel of a model like `CASE`."""
    case = CASE | changes
    model: Any = SimpleNamespace(
        decode_kernel=wanted,
        head_dim=case["head_dim"],
        attention_softcap=case["softcap"],
        dtype=case["dtype"],
    )
    return decode_kernel(model, case["kept"])


def trace_for(monkeypatch, platform: str, **also: str) -> None:
    """Makes models be traced for a device that is not there."""
    device = SimpleNamespace(platform=platform, device_kind="any", **also)
    for module in (attention, decode_attention, decode_native):
        monkeypatch.setattr(module, "platform_device", lambda *_: device)


def test_platforms_have_their_kernels(monkeypatch):
    assert choose("auto") == "xla" and choose("triton") == "triton"  # on the CPU of these tests
    trace_for(monkeypatch, "tpu")
    assert choose("auto") == "pallas"
    with pytest.raises(InputError, match="'triton' is a kernel for GPUs, and this is a TPU"):
        choose("triton")
    for capability, expected in (
        ("9.0", "triton"),
        ("12.0", "triton"),
        ("7.5", "xla"),
        ("gfx942", "xla"),
    ):
        trace_for(monkeypatch, "gpu", compute_capability=capability)
        assert choose("auto") == expected
    assert choose("xla") == "xla"
    with pytest.raises(InputError, match="'pallas' is a kernel for TPUs, and this is a GPU"):
        choose("pallas")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_is_lowered_for_gpus(monkeypatch, dtype):
    """Into a call of Triton for each layer, whose operand is the cache as it lies."""
    trace_for(monkeypatch, "gpu")
    config = tiny_config(head_dim=16, dtype=dtype)
    kv = jnp.zeros((3, config.num_kv_heads, 2 * SPLIT, 16))
    caches = (make_cache(kv, kv, dtype, "triton"),) * config.num_layers
    tables = rotation_tables(config, 2 * SPLIT)
    weights = decode_params(tiny_params(config), config)

    def step(weights, tokens, held, caches):
        return decode_token(weights, config, tokens, held.length, tables, held, caches)

    held = Held(jnp.int32(5), jnp.array([6, 0, 1]))
    traced = jax.jit(step).trace(weights, jnp.array([1, 2, 3]), held, caches)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    lines = text.splitlines()
    assert sum(CUSTOM_CALL in line for line in lines) == config.num_layers
    turned = [line for line in lines if "stablehlo.transpose" in line]
    assert not [line for line in turned if f"x{SPLIT}x" in line or f"x{2 * SPLIT}x" in line]


def test_a_mesh_is_lowered_for_gpus(monkeypatch):
    """Each device calls Triton for its own slots and heads."""
    query, cache = draw(4, 8, 4, 256, 16)
    layout = make_layout(make_mesh(MeshConfig(data=2, tensor=4)), {"heads": 8, "kv_heads": 4})
    trace_for(monkeypatch, "gpu")
    attend = layout.jit(functools.partial(triton_attention, scale=SCALE))
    traced = attend.trace(query, cache, jnp.int32(99), jnp.array([100, 0, 3, 77]))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in text.splitlines() if CUSTOM_CALL in line]
    assert call.count(f"tensor<2x1x{SPLIT}x16xf32>") == 2, call.rpartition(" : ")  # keys, values


# What XLA asks of a chip that is not there, by NVIDIA's CUDA programming guide and data sheet.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352000000000 device_memory_size: 85000000000 l2_cache_size: 52428800
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100"
"""


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs XLA for GPUs: pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt",
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(
    ("tensor", "heads", "kv_heads"),
    [
        (1, 28, 4),
        (4, 28, 4),  # a key head for each shard
        (4, 12, 2),  # shards share key heads
    ],
)
def test_the_gpu_compiler_takes_it(dtype, head_dim, tensor, heads, kv_heads):
    """A layer's step, 64 slots: the cache is written and read in place, and stays where it is."""
    topology = get_topology_desc("h100", "cuda", target_config=H100, topology=f"1x1x{tensor}")
    mesh = make_mesh(MeshConfig(tensor=tensor), topology.devices)
    layout = make_layout(mesh, {"heads": heads, "kv_heads": kv_heads})

    def array(*shape, axes=("batch",), kind=dtype):
        return jax.ShapeDtypeStruct(shape, kind, sharding=layout.sharding(*axes))

    def step(query, key, value, cache, column, length):
        cache = write(cache, key, value, column, "triton")
        return attend_cached(
            query, cache, Held(column, length), scale=SCALE, kernel="triton"
        ), cache

    of_heads = functools.partial(array, axes=("batch", "kv_heads", None, "head_dim"))
    kv, new = (of_heads(64, kv_heads, columns, head_dim) for columns in (2560, 1))
    query = array(64, heads, 1, head_dim, axes=("batch", "heads", None, "head_dim"))
    column, length = array(axes=(), kind=jnp.int32), array(64, kind=jnp.int32)
    run = layout.jit(step, donate_argnums=3)
    made = run.lower(query, new, new, KVCache(kv, kv), column, length).compile()
    text, memory = made.as_text(), made.memory_analysis()
    assert text.count(f'custom_call_target="{CUSTOM_CALL}"') == 1
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    held = 2 * math.prod(kv.sharding.shard_shape(kv.shape)) * kv.dtype.itemsize
    assert memory.alias_size_in_bytes == held
    assert memory.temp_size_in_bytes < held / 16


@pytest.mark.accelerator
@pytest.mark.parametrize("window", [0, 140])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-6)])
def test_a_gpu_computes_the_same(dtype, tolerance, head_dim, window):
    if jax.devices()[0].platform != "gpu":
        pytest.skip("the kernel is for GPUs")
    column = 1100
    length = jnp.array([1, 0, 140, 256, 700, 1000, 1100, 1101])
    query, cache = draw(8, 28, 4, 1280, head_dim, dtype)
    held = Held(jnp.int32(column), length)

    def attend(kernel):
        run = functools.partial(attend_cached, scale=SCALE, window=window, kernel=kernel)
        own = make_cache(*cache[:2], dtype, kernel)
        return np.asarray(jax.jit(run)(query[:, :, None], own, held)[:, :, 0], np.float64)

    assert choose("auto", head_dim=head_dim, dtype=dtype, kept=dtype) == "triton"
    with jax.default_matmul_precision("highest"):  # else float32 is multiplied with 11 bits
        outs = {kernel: attend(kernel) for kernel in ("triton", "xla")}
    expected = loops(query, *cache[:2], column, np.asarray(length), window=window)
    assert not outs["triton"][1].any()
    np.testing.assert_allclose(outs["triton"], expected, atol=tolerance)
    seen = np.asarray(length) > 0
    np.testing.assert_allclose(outs["triton"][seen], outs["xla"][seen], atol=2 * tolerance)
