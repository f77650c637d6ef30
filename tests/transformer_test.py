"""The decoder: against a restatement in numpy, and the invariances that training relies on."""

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from flowrl_jax.masking import positions_from_mask
from flowrl_jax.models import attention
from flowrl_jax.models.attention import Columns, attend, flash, visible
from flowrl_jax.models.decode import decode_params, decode_token, read_prompts, rotation_tables
from flowrl_jax.models.decode_attention import Held, attend_cached, make_cache
from flowrl_jax.models.transformer import (
    Transformer,
    TransformerConfig,
    init_params,
    rotary,
    rotary_table,
)
from tests.native import NATIVE
from tests.tiny import full_logits, left_padded, tiny_config, tiny_params

CONFIG = tiny_config()
# Float32 through two layers of width 16: differences of another order of summation.
ROUNDING: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def forward(config, params, tokens, mask=None) -> Any:
    """Hidden states `[B, T, D]`."""
    return Transformer(config).apply({"params": params}, tokens, mask)


def norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotate(x, position, theta):
    """One head `[H]` at one position: dimension i turns with dimension i + H/2."""
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-i / half)
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out


def decoder_reference(config, params, tokens):
    """Logits `[T, V]` of one row without padding, in float64, one token and head at a time."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = params["embedding"]["tokens"][tokens]
    shared = config.num_heads // config.num_kv_heads
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda p: p[i], params["layers"])  # noqa: B023
        attention, mlp = layer["attention"], layer["mlp"]
        h = norm(x, layer["attention_norm"]["scale"], config.norm_eps)
        heads = {}
        for name in ("query", "key", "value"):
            heads[name] = np.einsum("td,dnh->tnh", h, attention[name])
            if config.qkv_bias:
                heads[name] += attention[f"{name}_bias"]
        for name in ("query", "key"):
            for t, n in np.ndindex(heads[name].shape[:2]):
                heads[name][t, n] = rotate(heads[name][t, n], t, config.rope_theta)
        added = np.zeros_like(x)
        for t, n in np.ndindex(len(tokens), config.num_heads):
            keys, values = heads["key"][: t + 1, n // shared], heads["value"][: t + 1, n // shared]
            scores = np.exp(keys @ heads["query"][t, n] / np.sqrt(config.head_dim))
            added[t] += (scores / scores.sum()) @ values @ attention["out"][n]
        x = x + added
        h = norm(x, layer["mlp_norm"]["scale"], config.norm_eps)
        gate = h @ mlp["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ mlp["up"])) @ mlp["down"]
    x = norm(x, params["final_norm"]["scale"], config.norm_eps)
    embedding = params["embedding"]
    return x @ (embedding["tokens"].T if config.tie_embeddings else embedding["output"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "qkv_bias": True, "num_kv_heads": 4, "rope_theta": 5e5},
    ],
)
def test_against_numpy(changes):
    config = tiny_config(**changes)
    params = tiny_params(config)
    tokens = np.random.default_rng(0).integers(0, 17, 9)
    expected = decoder_reference(config, params, tokens)
    np.testing.assert_allclose(full_logits(config, params, tokens[None])[0], expected, **ROUNDING)


def test_parameters_are_counted():
    for config in (CONFIG, tiny_config(tie_embeddings=False, qkv_bias=True)):
        count = sum(leaf.size for leaf in jax.tree.leaves(tiny_params(config)))
        assert count == config.num_parameters


@pytest.mark.slow
def test_initialisation():
    """Kernels and embeddings normal, every layer its own; norms 1 and biases 0."""
    config = tiny_config(qkv_bias=True, init_std=0.02, num_layers=3)
    params = nn.unbox(jax.jit(lambda key: init_params(config, key))(jax.random.key(0)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        assert leaf.dtype == jnp.float32
        if name == "scale" or name.endswith("bias"):
            np.testing.assert_array_equal(leaf, float(name == "scale"))
            continue
        # A deviation estimated from 272 numbers or more: 4 % is one standard error.
        assert np.std(leaf) == pytest.approx(0.02, rel=0.2), name
        assert name == "tokens" or not (leaf[0] == leaf[1]).any()


@pytest.mark.slow
def test_causality_by_gradient_support():
    """The output at t depends on the tokens up to t, all of them, and on none after."""
    params = tiny_params(CONFIG)
    length = 6
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 17, (1, length)))

    def outputs(vectors):
        """Hidden states, from the token vectors instead of tokens: those have gradients."""
        swapped = params["embedding"] | {
            "tokens": jnp.concatenate([params["embedding"]["tokens"], vectors])
        }
        config = dataclasses.replace(CONFIG, vocab_size=17 + length)
        own = 17 + jnp.arange(length)[None]
        return forward(config, params | {"embedding": swapped}, own)[0]

    vectors = params["embedding"]["tokens"][tokens[0]]
    np.testing.assert_allclose(
        jax.jit(outputs)(vectors), forward(CONFIG, params, tokens)[0], **ROUNDING
    )
    jacobian = np.asarray(jax.jit(jax.jacrev(outputs))(vectors))  # [T, D, T, D]
    reaches = np.abs(jacobian).max(axis=(1, 3)) > 0
    np.testing.assert_array_equal(reaches, np.tril(np.ones((length, length), bool)))


@pytest.mark.slow
def test_left_padding_changes_nothing():
    """Not the outputs, whatever the padding holds, and not by how much there is."""
    params = tiny_params(CONFIG)
    tokens, mask = left_padded([3, 5, 1], 5, 17)
    logits = full_logits(CONFIG, params, tokens, mask)
    other = np.where(mask, tokens, 7)
    poisoned = full_logits(CONFIG, params, other, mask)
    # Exactly: the padding's weight in the softmax is exp(-1e30) = 0.
    np.testing.assert_array_equal(np.asarray(logits)[mask], np.asarray(poisoned)[mask])
    pad = lambda x: np.pad(x, ((0, 0), (4, 0)))  # noqa: E731
    wider = full_logits(CONFIG, params, pad(tokens), pad(mask))
    np.testing.assert_allclose(wider[:, 4:][mask], logits[mask], **ROUNDING)
    alone = full_logits(CONFIG, params, tokens[:1, 2:], mask[:1, 2:])
    np.testing.assert_allclose(alone, logits[:1, 2:], **ROUNDING)
    assert np.isfinite(wider).all()


def test_right_padding_changes_nothing():
    params = tiny_params(CONFIG)
    tokens, mask = left_padded([3, 5], 5, 17)
    pad = lambda x: np.pad(x, ((0, 0), (0, 3)))  # noqa: E731
    logits = full_logits(CONFIG, params, tokens, mask)
    padded = full_logits(CONFIG, params, pad(tokens), pad(mask))
    np.testing.assert_allclose(padded[:, :5][mask], logits[mask], **ROUNDING)


def test_rotary_theta_is_used():
    """A peer ignores it: its logits are the same for 1e4 and 5e6."""
    params = tiny_params(CONFIG)
    tokens = np.random.default_rng(0).integers(0, 17, (1, 12))
    logits = [full_logits(tiny_config(rope_theta=theta), params, tokens) for theta in (1e4, 5e6)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    np.testing.assert_allclose(logits[0][:, 0], logits[1][:, 0], **ROUNDING)  # position 0


def test_rotary_depends_on_the_distance():
    """Scores of a query and a key depend on how far apart they are, at any place."""
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(0, 1, (1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def turn(x, position):
        return rotary(x, rotary_table(jnp.array([[position]]), 8, 1e4))

    def score(i, j):
        return float(jnp.vdot(turn(query, i), turn(key, j)))

    assert score(5, 2) == pytest.approx(score(1005, 1002), abs=1e-3)
    assert abs(score(5, 2) - score(5, 4)) > 1e-2
    # Angles are float32 even for bfloat16 inputs: positions 256 and 257 stay apart.
    wide = turn(query.astype(jnp.bfloat16), 257)
    assert wide.dtype == jnp.bfloat16
    np.testing.assert_allclose(wide.astype(jnp.float32), turn(query, 257), atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "prefill"), [("xla", 1), ("xla", 4), pytest.param("native", 4, marks=NATIVE)]
)
def test_cached_decoding_is_the_full_forward(kernel, prefill):
    """Rows of different padding, a prefill, then tokens one by one where another row was."""
    config = tiny_config(qkv_bias=True, tie_embeddings=False, decode_kernel=kernel)
    params = tiny_params(config)
    tokens, mask = left_padded([4, 4, 2], 4, 17) if prefill == 4 else left_padded([1] * 3, 1, 17)
    more = np.random.default_rng(1).integers(0, 17, (3, 5)).astype(np.int32)
    whole = np.concatenate([tokens, more], 1)
    whole_mask = np.concatenate([mask, np.ones_like(more, bool)], 1)
    expected = full_logits(config, params, whole, whole_mask)
    positions = positions_from_mask(jnp.asarray(whole_mask))
    tokens, mask, rows = jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(whole)

    @jax.jit
    def decode(params):
        weights = decode_params(params, config)
        kept = read_prompts(params, config, tokens, positions[:, :prefill], mask)
        # Two columns of another row before the prompt, and seven after it to be written.
        pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (2, 7), (0, 0)), constant_values=9.0)  # noqa: E731
        caches = tuple(make_cache(*map(pad, one), jnp.float32, kernel) for one in kept)
        tables = rotation_tables(config, 9 + prefill)
        logits = []
        for i in range(5):
            length = mask.sum(1) + i
            held = Held(jnp.int32(2 + prefill + i), length + 1)
            one, caches = decode_token(
                weights, config, rows[:, prefill + i], length, tables, held, caches
            )
            logits.append(one)
        return jnp.stack(logits, 1)

    np.testing.assert_allclose(decode(params), expected[:, prefill:], **ROUNDING)


@pytest.mark.parametrize("window", [0, 2])
def test_eight_bits_round_a_little(window):
    """Errors of 1/254 of the largest entry in keys and values move scores and sums by as much."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(0, 1, (3, heads, size, 16)), jnp.float32)
        for heads, size in ((4, 1), (2, 7), (2, 7))
    )
    held = Held(jnp.int32(4), jnp.array([5, 1, 3]))
    caches = [make_cache(key, value, dtype, "xla") for dtype in (jnp.float32, jnp.int8)]
    options = {"scale": 0.25, "window": window, "kernel": "xla"}
    out, rounded = (attend_cached(query, cache, held, **options) for cache in caches)
    assert 0 < np.abs(out - rounded).max() < 0.04
    assert caches[1].key.dtype == jnp.int8


TWO_KINDS = {"window": 2, "windowed_layers": (True, False), "local_rope_theta": 30.0}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, TWO_KINDS], ids=["one-kind", "two-kinds"])
def test_remat_changes_nothing_but_memory(changes):
    """Where layers with and without a window share the scan, too."""
    params = tiny_params(CONFIG)
    tokens, mask = left_padded([4, 6], 6, 17)

    def value_and_grad(remat):
        def loss(params):
            config = tiny_config(remat=remat, **changes)
            return (forward(config, params, tokens, mask) ** 2)[mask].sum()

        return jax.value_and_grad(loss)

    grads = {r: jax.jit(value_and_grad(r))(params) for r in ("none", "dots", "full")}
    chex.assert_trees_all_close(grads["none"], grads["dots"], **ROUNDING)
    chex.assert_trees_all_close(grads["none"], grads["full"], **ROUNDING)
    # And it does happen: the backward pass computes matrix products again, and without "full"
    # only those of activations with each other.
    products = {r: count(value_and_grad(r), params, "dot_general") for r in grads}
    assert products["none"] < products["dots"] < products["full"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, TWO_KINDS], ids=["one-kind", "two-kinds"])
def test_gradients_may_be_added_to_a_sum(changes):
    """The layers' gradient comes out added to what was there; the others' is their own."""
    config, params = tiny_config(**changes), tiny_params(CONFIG)
    tokens, mask = left_padded([4, 6], 6, 17)
    sums = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size)).reshape(x.shape), params["layers"])

    def loss(params, gradients=None):
        hidden: Any = Transformer(config).apply({"params": params}, tokens, mask, None, gradients)
        return (hidden**2)[mask].sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    other_value, added = jax.jit(jax.value_and_grad(loss))(params, sums)
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    wanted = {**grads, "layers": jax.tree.map(jnp.add, grads["layers"], sums)}
    chex.assert_trees_all_close(added, wanted, **ROUNDING)


def count(function, argument, primitive=None):
    """Equations in a program and those it calls, all or of one primitive."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for inner in jaxprs_in_params(equation.params):
                yield from walk(inner)

    names = list(walk(jax.make_jaxpr(function)(argument).jaxpr))
    return len(names) if primitive is None else names.count(primitive)


def test_program_does_not_grow_with_depth():
    def size(layers):
        config = tiny_config(num_layers=layers)
        shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

        def loss(params):
            return forward(config, params, jnp.zeros((1, 3), jnp.int32)).sum()

        return count(jax.grad(loss), shapes)

    assert size(2) == size(7)


@pytest.mark.slow
def test_bfloat16_computes_from_float32_masters():
    """Activations and gradients' arithmetic in bfloat16; parameters and their gradients float32."""
    params = tiny_params(CONFIG)
    tokens, mask = left_padded([4, 6], 6, 17)
    low = tiny_config(dtype=jnp.bfloat16)
    run = jax.jit(forward, static_argnums=0)
    hidden, exact = run(low, params, tokens, mask), run(CONFIG, params, tokens, mask)
    assert hidden.dtype == jnp.bfloat16
    # bfloat16 has 8 bits: 0.4 % per operation, through two layers.
    difference = np.abs(hidden.astype(jnp.float32) - exact)[mask]
    assert 0 < difference.max() < 0.1 * np.abs(exact).max()
    grads = jax.jit(jax.grad(lambda p: forward(low, p, tokens, mask).astype(jnp.float32).sum()))(
        params
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    logits = full_logits(low, params, tokens, mask)
    assert logits.dtype == jnp.float32


def reference_attention(query, key, value, real, scale, window, softcap):
    """Row by row, head by head, pair by pair, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(query)
    group = query.shape[1] // key.shape[1]
    for row, head, own in np.ndindex(*query.shape[:3]):
        seen = [c for c in range(own + 1) if real[row, c] and (not window or c > own - window)]
        if not seen:
            continue
        scores = scale * key[row, head // group, seen] @ query[row, head, own]
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        weights = np.exp(scores - scores.max())
        out[row, head, own] = weights / weights.sum() @ value[row, head // group, seen]
    return out


KERNELS = [("xla", 0, 0.0), ("xla", 5, 0.0), ("xla", 0, 1.5), ("flash", 0, 0.0), ("flash", 5, 0.0),
           ("splash", 0, 0.0), ("splash", 5, 0.0), ("splash", 7, 1.5)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "window", "softcap"), KERNELS)
def test_attention_kernels(kernel, window, softcap, monkeypatch):
    """Odd sizes, grouped heads, padding on both sides; chunks that do not divide the row."""
    monkeypatch.setattr(attention, "CHUNK", 8)
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(0, 1, (2, heads, 21, 6)), jnp.float32)  # noqa: E731
    query, key, value = draw(6), draw(2), draw(2)
    real = (np.arange(21) >= [[4], [0]]) & (np.arange(21) < [[18], [21]])

    def run(query, key, value):
        if kernel == "flash":  # cuDNN's, whose stand-in on CPUs takes the same arguments
            out = flash(
                query, key, value, jnp.asarray(real), scale=0.4, window=window, implementation="xla"
            )
            return jnp.where(real[:, None, :, None], out, 0.0)
        out = attend(
            query, key, value, Columns(jnp.asarray(real)), scale=0.4, window=window,
            softcap=softcap, implementation=kernel,
        )  # fmt: skip
        return jnp.where(real[:, None, :, None], out, 0.0)

    expected = reference_attention(query, key, value, real, 0.4, window, softcap)
    expected = np.where(real[:, None, :, None], expected, 0.0)
    np.testing.assert_allclose(jax.jit(run)(query, key, value), expected, atol=1e-5)
    # Gradients against those of the dense path, which the model's parity with torch holds.
    cotangent = jnp.asarray(rng.normal(0, 1, query.shape), jnp.float32)
    grads = jax.jit(jax.vjp(run, query, key, value)[1])(cotangent)
    monkeypatch.setattr(attention, "CHUNK", 64)
    kernel = "xla"
    for grad, wanted in zip(grads, jax.vjp(run, query, key, value)[1](cotangent), strict=True):
        np.testing.assert_allclose(grad, wanted, atol=2e-5)


@pytest.mark.parametrize("window", [0, 3])
def test_visible_pairs(window):
    real = np.array([[False, True, True, True, True, False]])
    pairs = np.asarray(visible(Columns(jnp.asarray(real), 2), 3, window))[0]
    for i, own in enumerate((2, 3, 4)):
        wanted = [real[0, c] and c <= own and (not window or c > own - window) for c in range(6)]
        np.testing.assert_array_equal(pairs[i], wanted)


def test_attention_that_may_see_nothing_is_finite():
    """A padding row attends to nothing: no NaN in its value, and none in the gradient."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(0, 1, (1, 2, 3, 4)), jnp.float32) for _ in "qkv")
    columns = Columns(jnp.array([[False, True, False]]))
    out, grads = jax.value_and_grad(
        lambda q, k, v: attend(q, k, v, columns, scale=0.5)[:, :, 1:].sum(), argnums=(0, 1, 2)
    )(query, key, value)
    assert np.isfinite(out) and all(np.isfinite(grad).all() for grad in grads)
    assert not grads[2][:, :, 2].any()  # nobody saw the last value


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_kv_heads", 3), ("head_dim", 3), ("remat", "all"), ("attention", "flash"),
     ("vocab_size", 0), ("num_layers", 0)],
)  # fmt: skip
def test_wrong_shapes_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        tiny_config(**{field: value})


def test_config_can_be_a_static_argument():
    assert hash(tiny_config()) == hash(CONFIG) and tiny_config() == CONFIG
    assert isinstance(CONFIG, TransformerConfig)
