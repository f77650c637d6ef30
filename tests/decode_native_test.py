"""Kernels for CPUs: attention against loops in numpy, products against numpy's, in any company."""

import dataclasses
import functools
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from flowrl_jax.config import parse_config
from flowrl_jax.errors import InputError
from flowrl_jax.models.architecture import ACTIVATIONS, LoraConfig
from flowrl_jax.models.cache import KVCache
from flowrl_jax.models.decode import decode_params, decode_shardings, rotation_tables
from flowrl_jax.models.decode_attention import Held, decode_kernel, make_cache
from flowrl_jax.models.decode_native import (
    Norm,
    Prompts,
    in_panels,
    native_attention,
    native_gated_products,
    native_products,
    refusal,
    takes_panels,
)
from flowrl_jax.models.lora import init_lora, with_adapters
from flowrl_jax.models.native_block import native_block
from flowrl_jax.models.transformer import Block, View
from flowrl_jax.native import library
from flowrl_jax.sharding import MeshConfig, make_layout, make_mesh
from tests.decode_loops import CLOSE, HEADS_OF_SHARDS, SCALE, attend_on_devices, draw, loops
from tests.native import NATIVE
from tests.tiny import tiny_config, tiny_params

run = jax.jit(
    functools.partial(native_attention, scale=SCALE), static_argnames=("window", "softcap")
)


def attend(query, cache, column, length, prompts=None, **options):
    """What slots attend to in a cache whose newest column the kernel has to write."""
    newest = (x[:, :, column] for x in cache[:2])
    before = jax.tree.map(lambda x: x.at[:, :, column].set(jnp.nan), cache)
    out, after = run(query, *newest, before, column, length, prompts, **options)
    idle = (length == 0)[:, None, None, None]
    wanted = jax.tree.map(lambda old, new: jnp.where(idle, old, new), before, cache)
    jax.tree.map(np.testing.assert_array_equal, after, wanted)
    return out


@NATIVE
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize(
    ("shape", "column", "length"),
    [
        ((1, 1, 1, 1, 64), 0, [1]),  # one column
        ((3, 7, 7, 200, 16), 150, [151, 150, 17]),  # no group; all from the first column on
        ((5, 6, 2, 100, 80), 99, [100, 0, 1, 16, 33]),  # ends of vectors; an idle slot
        ((2, 15, 1, 70, 12), 60, [61, 5]),  # 8, 4, 2 and 1 heads; heads of three short vectors
        ((4, 4, 2, 50, 6), 49, [50, 49, 3, 0]),  # a head that no vector divides
        ((2, 4, 4, 300, 256), 280, [281, 130]),
    ],
)
def test_attention_equals_loops_at_odd_sizes(shape, column, length, options):
    query, cache = draw(*shape)
    out = attend(query, cache, column, jnp.array(length), **options)
    np.testing.assert_allclose(out, loops(query, *cache[:2], column, length, **options), atol=CLOSE)


@NATIVE
def test_scores_may_be_large_and_far_apart():
    """Weights are those of differences to the largest score, and of the least there is nothing."""
    query, cache = draw(2, 2, 1, 40, 16)
    cache = cache._replace(key=cache.key * 300.0)
    out = attend(query, cache, 39, jnp.array([40, 7]))
    # Scores of 1,000 have steps of 6e-5, by which weights change as much.
    np.testing.assert_allclose(out, loops(query, *cache[:2], 39, [40, 7]), atol=5e-4)
    assert np.isfinite(out).all()


@NATIVE
def test_attention_reads_only_what_is_visible():
    column, length, window = 300, np.array([120, 0, 33]), 100
    query, cache = draw(3, 2, 1, 512, 64)
    columns = np.arange(512)
    seen = (columns <= column) & (columns > column - np.minimum(length, window)[:, None])
    spoilt = jax.tree.map(lambda x: jnp.where(seen[:, None, :, None], x, jnp.nan), cache)
    first, second = (
        attend(query, kept, column, jnp.array(length), window=window) for kept in (cache, spoilt)
    )
    np.testing.assert_array_equal(first, second)
    assert np.any(first[0]) and not np.any(first[1])


@NATIVE
def test_a_row_attends_alike_wherever_it_is():
    """To the bit: in other slots, other columns, beside other rows and in a larger cache."""
    query, cache = draw(3, 4, 2, 60, 20)
    alone = attend(query[1:2], jax.tree.map(lambda x: x[1:2], cache), 50, jnp.array([45]))
    together = attend(query, cache, 50, jnp.array([3, 45, 51]))
    np.testing.assert_array_equal(alone[0], together[1])
    moved = jax.tree.map(lambda x: jnp.pad(x[1:2], ((6, 0), (0, 0), (13, 5), (0, 0))), cache)
    length = jnp.zeros(7, jnp.int32).at[6].set(45)
    elsewhere = attend(jnp.pad(query[1:2], ((6, 0), (0, 0), (0, 0))), moved, 63, length)
    np.testing.assert_array_equal(alone[0], elsewhere[6])


NUMBERS = [4, 9, 4, 9, 4, 2, 9, 9]  # of the slots' prompts; the first slot is idle
PROMPTS = {4: 30, 9: 17, 2: 5}  # their lengths
LENGTHS = [0, 60, 45, 18, 75, 6, 40, 81]


def with_prompts(shape, column: int) -> tuple[jax.Array, KVCache, Prompts, np.ndarray]:
    """Slots, some of which begin with one prompt; and its copies that are left over, `[S, C]`."""
    query, cache = draw(len(NUMBERS), *shape)
    copies, first = np.zeros((len(NUMBERS), shape[2]), bool), {}
    for slot, (number, length) in enumerate(zip(NUMBERS, LENGTHS, strict=True)):
        begin, size = column + 1 - length, PROMPTS[number]
        here = slice(begin, begin + size)
        if length and number in first:
            copies[slot, here] = True
            of, at = first[number]
            there = slice(at, at + size)
            cache = jax.tree.map(
                lambda x: x.at[slot, :, here].set(x[of, :, there]),  # noqa: B023
                cache,
            )
        elif length:
            first[number] = slot, begin
    sizes = [PROMPTS[number] for number in NUMBERS]
    return query, cache, Prompts(jnp.array(NUMBERS), jnp.array(sizes)), copies


@NATIVE
@pytest.mark.parametrize("window", [0, 50, 12])  # which leaves of a prompt all, some and nothing
@pytest.mark.parametrize("shape", [(6, 2, 90, 20), (8, 8, 81, 64), (3, 1, 100, 6)], ids=str)
def test_slots_of_one_prompt_read_it_from_one_of_them(shape, window):
    """To the bit what they read from copies of their own, which may hold anything then."""
    column = 80
    query, cache, prompts, copies = with_prompts(shape, column)
    options = {"window": window}
    wanted = attend(query, cache, column, jnp.array(LENGTHS), **options)
    expected = loops(query, *cache[:2], column, LENGTHS, **options)
    np.testing.assert_allclose(wanted, expected, atol=CLOSE)
    assert copies.sum() > 50
    spoilt = jax.tree.map(lambda x: jnp.where(copies[:, None, :, None], jnp.nan, x), cache)
    out = attend(query, spoilt, column, jnp.array(LENGTHS), prompts, **options)
    np.testing.assert_array_equal(out, wanted)


@NATIVE
def test_nothing_is_written_beside_a_cache():
    query, cache = draw(2, 2, 1, 20, 16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="column that the cache does not have"):
        run(query, query[:, :1], query[:, :1], cache, 20, jnp.array([4, 20]))


@NATIVE
def test_devices_read_prompts_from_slots_of_their_own():
    query, cache, prompts, _ = with_prompts((6, 2, 90, 20), 80)
    arguments = (query, *(x[:, :, 80] for x in cache[:2]), cache, 80, jnp.array(LENGTHS))
    layout = make_layout(make_mesh(MeshConfig(data=4, tensor=2)), {"heads": 6, "kv_heads": 2})
    attention = layout.jit(functools.partial(native_attention, scale=SCALE))
    jax.tree.map(np.testing.assert_array_equal, attention(*arguments, prompts), run(*arguments))


@NATIVE
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS_OF_SHARDS)
def test_devices_attend_for_their_own_slots_and_heads(heads, kv_heads):
    def attention(query, cache, column, *arguments, **options):
        key, value = (x[:, :, column] for x in cache[:2])
        return native_attention(query, key, value, cache, column, *arguments, **options)[0]

    out, expected = attend_on_devices(attention, heads, kv_heads)
    np.testing.assert_allclose(out, expected, atol=CLOSE)


def draw_products(rows: int, depth: int, widths: tuple[int, ...]):
    """Rows, and weights `[depth, width]` of normal numbers."""
    rng = np.random.default_rng(rows)
    make = lambda *shape: rng.normal(0, 1, shape).astype(np.float32)  # noqa: E731
    return make(rows, depth), [make(depth, width) for width in widths]


def multiply(rows, weights, jit=jax.jit):
    """Of host arrays; what `native_products` makes of them."""
    widths = tuple(weight.shape[1] for weight in weights)
    panels = tuple(in_panels(jnp.asarray(weight)) for weight in weights)
    return jit(lambda rows, panels: native_products(rows, panels, widths))(rows, panels)


@NATIVE
@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 37])  # around blocks of rows
@pytest.mark.parametrize(
    ("depth", "widths"), [(1, (1,)), (7, (31, 32, 33)), (130, (5, 64)), (64, (1000,))], ids=str
)
def test_products_equal_numpys_at_odd_sizes(rows, depth, widths):
    some, weights = draw_products(rows, depth, widths)
    outs = multiply(some, weights)
    for out, weight in zip(outs, weights, strict=True):
        assert out.shape == (rows, weight.shape[1])
        expected = some.astype(np.float64) @ weight.astype(np.float64)
        # Numbers near 11 at most, in sums of 130 that are rounded at every step.
        np.testing.assert_allclose(out, expected, atol=2e-5)


def gate(rows, weights, activation="silu", jit=jax.jit):
    """Of host arrays and two weights of one width; what `native_gated_products` makes of them."""
    width = weights[0].shape[1]
    panels = tuple(in_panels(jnp.asarray(weight)) for weight in weights)
    run = lambda rows, panels: native_gated_products(rows, panels, width, activation)  # noqa: E731
    return jit(run)(rows, panels)


@NATIVE
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 7, 1), (13, 130, 70), (37, 64, 1000)])
def test_gated_products_equal_numpys_at_odd_sizes(rows, depth, width, activation):
    some, weights = draw_products(rows, depth, (width, width))
    opened, passed = (some.astype(np.float64) @ weight.astype(np.float64) for weight in weights)
    with jax.enable_x64(True):
        expected = np.asarray(ACTIVATIONS[activation](jnp.array(opened))) * passed
    out = gate(some, weights, activation)
    # Products of two numbers near 40, each as far off as in the test above.
    np.testing.assert_allclose(out, expected, atol=1e-3, rtol=1e-5)


@NATIVE
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_may_be_wide_open_and_shut(activation):
    """Finite numbers of any size are gated as they should be; what is none stays none."""
    sizes = [0.0, 100, -100, 3e4, -3e4, 3e38, -3e38, np.nan]
    x = np.concatenate([np.linspace(-20, 20, 3000), sizes]).astype(np.float32)
    one = np.ones_like(x)
    out = gate(one[:1, None], (x[None], one[None]), activation)[0]
    with jax.enable_x64(True):
        expected = ACTIVATIONS[activation](jnp.asarray(x, jnp.float64))
    # What e is raised to is rounded: at 20 by 1e-6, and by as much the result. Expected are sums of
    # 1 and nearly -1, which leave 1e-16.
    np.testing.assert_allclose(out, expected, rtol=3e-6, atol=1e-14)


@NATIVE
@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_normalised_and_added_to(bias):
    rows, weights = draw_products(37, 70, (40, 33))
    scale = np.linspace(-1, 2, 70, dtype=np.float32)
    onto = tuple(jnp.asarray(w[:1] if bias else rows @ w) for w in weights)
    panels = tuple(in_panels(jnp.asarray(weight)) for weight in weights)
    norm = Norm(jnp.asarray(scale), 0.1, 1.0)
    outs = jax.jit(lambda rows: native_products(rows, panels, (40, 33), norm=norm, onto=onto))(rows)
    wide = rows.astype(np.float64)
    normed = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 0.1) * (1.0 + scale)
    for out, weight, more in zip(outs, weights, onto, strict=True):
        # Sums near 50 of 70 numbers, each rounded.
        np.testing.assert_allclose(out, normed @ weight + more, atol=5e-5)


@NATIVE
@pytest.mark.parametrize(
    ("changes", "gated"),
    [
        ({}, True),
        ({"activation": "gelu_tanh", "norm_offset": 1.0}, True),
        ({"activation": "gelu"}, False),
        ({"activation": "relu"}, False),
        ({"mlp_bias": True, "qkv_bias": True, "out_bias": True}, False),
        ({"qk_norm": True}, True),
        ({"sandwich_norm": True}, True),
        ({"lora": LoraConfig(rank=2, targets=("gate",))}, False),
        ({"lora": LoraConfig(rank=2, targets=("up",))}, False),
        ({"lora": LoraConfig(rank=2, targets=("query", "out", "down"))}, True),
    ],
    ids=str,
)
def test_a_layer_in_panels_is_the_same_layer(changes, gated):
    config = tiny_config(**changes)
    params = jax.tree.map(
        lambda x: x + 0.01 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), tiny_params(config)
    )
    adapters = jax.tree.map(lambda x: x + 0.1, nn.unbox(init_lora(config, jax.random.key(1))))
    params = with_adapters(params, adapters) if config.lora.rank else params
    x = jax.random.normal(jax.random.key(0), (5, config.embed_dim))
    shape = (5, config.num_kv_heads, 9, config.head_dim)
    cache = KVCache(*jax.random.normal(jax.random.key(2), (2, *shape)))
    table = rotation_tables(config, 9)
    turn = jax.tree.map(lambda x: x[0, 0, jnp.array([6, 0, 3, 1, 5]), None, None], table)
    held = Held(jnp.int32(6), jnp.array([7, 1, 4, 2, 6]))
    windowed = config.windows[1]
    layer = jax.tree.map(lambda x: x[1], params["layers"])
    by_xla = Block(dataclasses.replace(config, decode_kernel="xla"))
    expected, written = by_xla.apply(
        {"params": layer},
        x[:, None],
        View(turn, held),
        windowed,
        make_cache(*cache[:2], x.dtype, "xla"),
    )
    weights = decode_params(params, config)["layers"][1]
    run = jax.jit(
        lambda weights: native_block(config, weights, x, turn[windowed], held, windowed, cache)
    )
    out, kept = run(weights)
    # Sums of numbers up to 30, whose last bits are 2e-6.
    np.testing.assert_allclose(out, expected[:, 0], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(kept.key, jnp.swapaxes(written.key, 2, 3), atol=2e-6)
    np.testing.assert_allclose(kept.value, written.value, atol=2e-6)
    assert (library.GATED_PRODUCTS in run.lower(weights).as_text()) == gated


@NATIVE
def test_a_row_is_multiplied_alike_in_any_company():
    """To the bit: alone, among others, in another order, and over devices."""
    rows, weights = draw_products(40, 96, (48, 100))
    together = multiply(rows, weights)
    one_by_one = [multiply(row[None], weights) for row in rows]
    alone = [np.concatenate(outs) for outs in zip(*one_by_one, strict=True)]
    backwards = multiply(rows[::-1].copy(), weights)
    layout = make_layout(make_mesh(MeshConfig(data=8, fsdp=1)), {})
    over_devices = multiply(rows, weights, layout.jit)
    assert over_devices[0].sharding.num_devices == 8
    for i, wanted in enumerate(together):
        np.testing.assert_array_equal(alone[i], wanted)
        np.testing.assert_array_equal(np.asarray(backwards[i])[::-1], wanted)
        np.testing.assert_array_equal(over_devices[i], wanted)
    both = weights[1], weights[1][::-1].copy()
    gated = gate(rows, both)
    np.testing.assert_array_equal(np.concatenate([gate(row[None], both) for row in rows]), gated)
    np.testing.assert_array_equal(gate(rows, both, jit=layout.jit), gated)


@NATIVE
def test_panels_are_for_whole_weights_in_float32_on_cpus():
    mesh = lambda **sizes: make_layout(make_mesh(MeshConfig(**sizes)), {})  # noqa: E731
    assert takes_panels("auto", jnp.float32, None)
    assert takes_panels("native", jnp.float32, mesh(data=8, fsdp=1))
    assert not takes_panels("xla", jnp.float32, None)
    assert not takes_panels("auto", jnp.bfloat16, None)
    assert not takes_panels("auto", jnp.float32, mesh(data=4, fsdp=2))
    assert not takes_panels("auto", jnp.float32, mesh(data=4, fsdp=1, tensor=2))


@NATIVE
@pytest.mark.parametrize("tied", [True, False])
def test_weights_in_panels_have_shardings_of_their_own(tied):
    config = tiny_config(tie_embeddings=tied)
    layout = make_layout(make_mesh(MeshConfig(data=8, fsdp=1)), {})
    weights = layout.jit(lambda params: decode_params(params, config, layout))(tiny_params(config))
    shardings = decode_shardings(config, layout)
    assert jax.tree.structure(weights) == jax.tree.structure(shardings)
    assert ("output" in weights["embedding"], "tokens" in weights["embedding"]) == (False, True)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(weights))


def test_says_what_it_cannot_do():
    assert not refusal() and not refusal(dtype=jnp.float32, kept=jnp.float32, head_dim=7)
    assert "model.dtype=bfloat16" in refusal(dtype=jnp.bfloat16)
    assert "rollout.cache=int8" in refusal(dtype=jnp.float32, kept=jnp.int8)
    with pytest.raises(InputError, match="'native' decodes in float32 alone.*: use 'auto'"):
        tiny_config(decode_kernel="native", dtype=jnp.bfloat16)
    config = base.get_config()
    config.model.decode_kernel, config.model.dtype = "native", "float32"
    parse_config(config)
    config.rollout.cache = "int8"
    with pytest.raises(InputError, match="rollout.cache=int8: use 'auto' or 'xla'"):
        parse_config(config)


def test_without_kernels_xla_decodes(monkeypatch):
    monkeypatch.setattr(library, "missing", lambda: "no C++ compiler 'c++': install one")
    config = tiny_config()
    assert decode_kernel(config, jnp.float32) == "xla"
    assert not takes_panels("auto", jnp.float32, None)
    weights = decode_params(tiny_params(config), config)
    assert "query" in weights["layers"][0]["attention"]
    assert "output_panels" not in weights["embedding"]
    with pytest.raises(InputError, match="'native': no C\\+\\+ compiler.*install one; or use"):
        decode_kernel(tiny_config(decode_kernel="native"), jnp.float32)
    monkeypatch.setattr(library, "missing", lambda: "")
    assert decode_kernel(config, jnp.float32) == "native"
    assert decode_kernel(config, jnp.int8) == "xla"


ASK = "from flowrl_jax.native import library; print(repr(library.missing()))"


def missing(folder: Path, **environment: str) -> str:
    """What a new process, which keeps what it compiles in a folder, says is missing."""
    own = {name: value for name, value in os.environ.items() if name != "CXX"}
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env=own | {"XDG_CACHE_HOME": str(folder)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("CPUs decode with XLA, which is slower" in done.stderr) == (done.stdout != "''\n")
    return done.stdout


@pytest.mark.slow
def test_machines_without_a_compiler_say_so(tmp_path):
    found = missing(tmp_path, CXX="no-such-compiler -O1")
    assert (
        "no C++ compiler 'no-such-compiler': install GCC 11 or later, or clang, or name one in CXX"
        in found
    )
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "an error here" >&2; exit 3; }\n')
    broken.chmod(0o755)
    assert f"{broken} exits 3: an error here" in missing(tmp_path, CXX=str(broken))
    (tmp_path / "flowrl_jax").rmdir()
    (tmp_path / "flowrl_jax").write_text("no folder")
    works = tmp_path / "works"  # as far as its version
    works.write_text("#!/bin/sh\n")
    works.chmod(0o755)
    assert "cannot write to" in missing(tmp_path, CXX=str(works))
    assert "cannot compile or load: No closing quotation" in missing(tmp_path, CXX="'c++")


@NATIVE
@pytest.mark.slow
def test_compilers_are_known_behind_others(tmp_path):
    """GCC is told what clang does not know, by whatever name it is called."""
    calls, wrapper = tmp_path / "calls", tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec "$@"\n')
    wrapper.chmod(0o755)
    assert missing(tmp_path, CXX=f"{wrapper} c++") == "''\n"
    asked, compiled = calls.read_text().splitlines()
    assert asked == "c++ --version"
    gcc = (
        "Free Software"
        in subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout
    )
    assert ("-fno-if-conversion" in compiled) == gcc


@NATIVE
@pytest.mark.slow
def test_what_is_compiled_is_kept(tmp_path):
    assert missing(tmp_path) == "''\n"
    (kept,) = (tmp_path / "flowrl_jax").iterdir()
    before = kept.stat().st_mtime_ns
    assert missing(tmp_path) == "''\n"
    assert [kept] == list((tmp_path / "flowrl_jax").iterdir())
    assert kept.stat().st_mtime_ns == before
    kept.write_bytes(b"cut short")
    assert missing(tmp_path) == "''\n"  # made again
    assert kept.stat().st_size > len(b"cut short")


MEET = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from configs import test_tiny
from flowrl_jax.assembly import assemble
from flowrl_jax.config import parse_config
from flowrl_jax.native import library
assemble(parse_config(test_tiny.get_config()), sys.argv[3])
print(library.missing())
"""


@NATIVE
@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["c++", "none-here"])
def test_processes_have_kernels_together_or_not_at_all(compiler, tmp_path):
    """Two of which one had none waited for each other: their programs were not alike."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", MEET, address, str(index), str(tmp_path)],
                    env=os.environ | ({"CXX": compiler} if index else {}),
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for index in range(2)
        ]
        for process in processes:
            stack.callback(process.kill)
        said = [process.communicate(timeout=100)[0].splitlines()[-1] for process in processes]
    if compiler == "c++":
        assert said == ["", ""]
    else:
        assert said[0] == "another process of this run has no kernels"
        assert "no C++ compiler 'none-here'" in said[1]
