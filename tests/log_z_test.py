"""Log Z: the head against a restatement in numpy, the table and the group mean against loops."""

import math
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.models.log_z import LogZHead, init_log_z, pool_prompt, row_dropout
from flowrl_jax.objectives.log_z import LogZConfig, group_mean, update_table

WIDTH = 12


@partial(jax.jit, static_argnums=(0, 1))
def init(config, width, seed):
    return init_log_z(config, width, 5, jax.random.key(seed))


@partial(jax.jit, static_argnums=0)
def head(config, params, pooled, keys=None):
    return LogZHead(config).apply({"params": params}, pooled, keys)


def head_reference(params, x):
    """`ProjZModule` for one pooled vector in float64: linear, exact GELU, layer norm; linear."""
    x = np.asarray(x, np.float64)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    for i in range(sum(name.startswith("hidden") for name in params)):
        layer, norm = params[f"hidden_{i}"], params[f"norm_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
        x = (x - x.mean()) / math.sqrt(x.var() + 1e-5) * norm["scale"] + norm["bias"]
    return (x @ params["output"]["kernel"] + params["output"]["bias"])[0]


def random_params(config, width=WIDTH):
    """Parameters away from their initial values, where norms are 1 and 0 and biases small."""
    shapes = jax.eval_shape(lambda: init_log_z(config, width, 5, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.3, 0.3, x.shape), x.dtype), shapes)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_head_as_released(num_layers):
    config = LogZConfig(num_layers=num_layers)
    params = random_params(config)
    # Small inputs too: there eps matters.
    pooled = np.random.default_rng(1).normal(0, 1, (4, WIDTH)) * [[1], [3], [0.01], [0.0]]
    pooled = jnp.asarray(pooled, jnp.float32)
    values = head(config, params, pooled)
    assert values.shape == (4,) and values.dtype == jnp.float32
    expected = [head_reference(params, row) for row in pooled]
    # Float32 through three layers of width 12.
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("width", [16, 1536])
def test_number_of_parameters(width):
    """Section 2 of the analysis: 2 (H^2 + H) + 4 H + H + 1; 4,729,345 for H = 1536."""
    shapes = jax.eval_shape(lambda: init_log_z(LogZConfig(), width, 0, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == 2 * (width**2 + width) + 4 * width + width + 1
    assert width != 1536 or count == 4_729_345


def test_initialised_like_torch():
    """Weights and biases uniform within 1 / sqrt(H), norms 1 and 0."""
    width = 64
    params = init(LogZConfig(), width, 0)
    bound = 1 / math.sqrt(width)
    for name in ("hidden_0", "hidden_1", "output"):
        for value in params[name].values():
            assert np.abs(value).max() <= bound
            assert value.size == 1 or np.abs(value).max() > 0.8 * bound
        # A uniform variable's deviation, to the accuracy that 64 x 64 samples allow.
        assert name == "output" or np.std(params[name]["kernel"]) == pytest.approx(
            bound / math.sqrt(3), rel=0.05
        )
    for name in ("norm_0", "norm_1"):
        assert (params[name]["scale"] == 1).all() and not params[name]["bias"].any()
    assert not np.array_equal(params["hidden_0"]["kernel"], params["hidden_1"]["kernel"])


@pytest.mark.slow
def test_zero_init_starts_at_exactly_zero():
    config = LogZConfig(zero_init=True)
    params = init(config, WIDTH, 0)
    pooled = jnp.asarray(np.random.default_rng(0).normal(0, 5, (4, WIDTH)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 4)
    assert not head(config, params, pooled).any()
    assert not head(config, params, pooled, keys).any()
    # And it can leave zero.
    grad = jax.jit(jax.grad(lambda p: head(config, p, pooled).sum()))(params)
    assert jnp.abs(grad["output"]["kernel"]).max() > 0


@pytest.mark.parametrize("detach", [True, False])
def test_detach_stops_the_gradient_to_the_policy(detach):
    config = LogZConfig(detach=detach)
    params = random_params(config)
    pooled = jnp.asarray(np.random.default_rng(0).normal(0, 1, (2, WIDTH)), jnp.float32)

    def total(params, pooled):
        return head(config, params, pooled).sum()

    by_params, by_pooled = jax.jit(jax.grad(total, argnums=(0, 1)))(params, pooled)
    assert all(leaf.any() for leaf in jax.tree.leaves(by_params))
    assert bool(by_pooled.any()) is not detach


@pytest.mark.parametrize(
    ("pooling", "columns"),
    [("all", [[3, 4, 5], [0, 1, 2, 3, 4, 5], [5]]), ("drop_last", [[3, 4], [0, 1, 2, 3, 4], []])],
)
def test_pooling_of_left_padded_prompts(pooling, columns):
    mask = np.array([[0, 0, 0, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 0, 1]], bool)
    hidden = np.random.default_rng(0).normal(0, 1, (3, 6, 4)).astype(np.float32)
    poisoned = np.where(mask[..., None], hidden, np.nan)
    pooled = pool_prompt(jnp.asarray(poisoned), jnp.asarray(mask), pooling)
    for row, wanted in enumerate(columns):
        mean = hidden[row, wanted].mean(axis=0) if wanted else np.zeros(4)
        np.testing.assert_allclose(pooled[row], mean, rtol=1e-6, atol=1e-7)
    # More padding on the left changes nothing.
    wider = pool_prompt(
        jnp.pad(poisoned, ((0, 0), (2, 0), (0, 0))), jnp.pad(mask, ((0, 0), (2, 0))), pooling
    )
    np.testing.assert_allclose(wider, pooled, rtol=1e-6)


def test_pooling_is_float32():
    """The mean of 300 bfloat16 values near 1 would stall at 256 in bfloat16."""
    hidden = jnp.ones((1, 300, 2), jnp.bfloat16)
    pooled = pool_prompt(hidden, jnp.ones((1, 300), bool), "all")
    assert pooled.dtype == jnp.float32
    np.testing.assert_array_equal(pooled, 1.0)


def test_dropout_belongs_to_the_row():
    keys = jax.random.split(jax.random.key(0), 6)
    x = jnp.ones((6, 200))
    whole = row_dropout(x, 0.25, keys)
    np.testing.assert_array_equal(whole[2:4], row_dropout(x[2:4], 0.25, keys[2:4]))
    order = jnp.array([5, 0, 3, 1, 4, 2])
    np.testing.assert_array_equal(whole[order], row_dropout(x, 0.25, keys[order]))
    assert len({bytes(np.asarray(row)) for row in whole}) == 6
    # Kept values are scaled so that the mean stays; 1200 draws give +-0.0125 (1 sd) of zeros.
    assert set(np.unique(whole)) == {0.0, np.float32(1 / 0.75)}
    assert float((whole == 0).mean()) == pytest.approx(0.25, abs=0.05)


@pytest.mark.slow
def test_dropout_differs_between_layers():
    """With the same noise in both layers, dropping would be correlated."""
    config = LogZConfig(dropout=0.5)
    params = random_params(config, 64)
    keys = jax.random.split(jax.random.key(1), 2)
    _, state = LogZHead(config).apply(
        {"params": params}, jnp.ones((2, 64)), keys, capture_intermediates=True
    )
    out = head(config, params, jnp.ones((2, 64)), keys)
    again = head(config, params, jnp.ones((2, 64)), keys)
    still = head(config, params, jnp.ones((2, 64)))
    np.testing.assert_array_equal(out, again)
    assert (out != still).all() and out[0] != out[1]
    # Rebuild the output from the captured norms under each layer's own noise.
    norms: Any = state["intermediates"]["norm_1"]["__call__"][0]
    dropped = row_dropout(norms, 0.5, jax.vmap(jax.random.fold_in, (0, None))(keys, 1))
    rebuilt = dropped @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(out, rebuilt[:, 0], rtol=1e-5)


def test_group_mean():
    target = jnp.array([1.0, 3.0, -2.0, 0.0, 5.0, 5.0])
    np.testing.assert_allclose(group_mean(target, 2), [2, 2, -1, -1, 5, 5])
    np.testing.assert_allclose(group_mean(target, 1), target)
    weights = jnp.arange(6.0)
    assert not jax.grad(lambda t: (group_mean(t, 3) * weights).sum())(target).any()


def test_table_is_a_running_mean():
    """Against a dictionary: the first visit is taken whole, duplicates in a batch are averaged."""
    rng = np.random.default_rng(0)
    rate, size = 0.3, 5
    table = init(LogZConfig(kind="table"), WIDTH, 0)
    expected: dict[int, float] = {}
    visits = np.zeros(size)
    update = jax.jit(update_table)
    for prompt_id in ([0, 0, 3, 3], [3, 1, 1, 1], [3, 0, 3, 4], [1, 1, 1, 1]):
        target = rng.normal(2, 1, 4).astype(np.float32)
        table = update(table, jnp.array(prompt_id), jnp.asarray(target), rate)
        for prompt in set(prompt_id):
            values = [float(t) for p, t in zip(prompt_id, target, strict=True) if p == prompt]
            mean = sum(values) / len(values)
            old = expected.get(prompt)
            expected[prompt] = mean if old is None else (1 - rate) * old + rate * mean
            visits[prompt] += 1
    assert 2 not in expected
    np.testing.assert_allclose(
        table["value"], [expected.get(i, 0.0) for i in range(size)], rtol=1e-5
    )
    np.testing.assert_array_equal(table["visits"], visits)


@pytest.mark.parametrize("kind", ["group", "zero"])
def test_nothing_to_learn(kind):
    assert init_log_z(LogZConfig(kind=kind), WIDTH, 5, jax.random.key(0)) == {}
    assert init_log_z(None, WIDTH, 5, jax.random.key(0)) == {}


def test_initialisation_follows_its_key():
    first, again = (init(LogZConfig(), 64, 7) for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    other = init(LogZConfig(), 64, 8)
    assert (first["hidden_0"]["kernel"] != other["hidden_0"]["kernel"]).any()
