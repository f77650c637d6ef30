"""The flow family against loops that restate its formulas, gradients derived by hand."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.objectives import OBJECTIVES
from flowrl_jax.objectives.divergence import DIVERGENCES, divergence_loss, group_constant
from flowrl_jax.objectives.flowrl import (
    FlowRLConfig,
    flowrl_loss,
    log_z_estimate,
    log_z_target,
    prior_logprobs,
)
from flowrl_jax.objectives.log_z import LogZConfig
from flowrl_jax.objectives.presets import PRESETS

CLOSE = 1e-10  # float64
GROUP = 3
LENGTHS = [1, 2, 3, 5, 0, 4, 5, 3, 2]  # one response has no token to learn from
# log pi - log pi_old of each response: far out on both sides, just outside, just inside, at 0.
RATIOS = [0.0, -0.9, 3.0, 0.1, 0.0, 0.4, -4.0, -0.05, 0.2]

FAMILY = {name: config for name, config in PRESETS.items() if isinstance(config, FlowRLConfig)}
CASES = FAMILY | {
    "geometric": FlowRLConfig(beta=2.0, weight="geometric", clip_low=0.1, clip_high=0.05),
    "old table": FlowRLConfig(beta=2.0, reference="old", log_z=LogZConfig(kind="table")),
    "forward_kl head": FlowRLConfig(beta=2.0, divergence="forward_kl"),
    "jensen_shannon head": FlowRLConfig(beta=2.0, divergence="jensen_shannon", weight="max"),
    "normalised forward_kl": FlowRLConfig(
        beta=2.0, divergence="forward_kl", log_z=LogZConfig(kind="group")
    ),
    "gap head": FlowRLConfig(beta=2.0, gap_low=0.5, gap_high=3.0, length_normalize=False),
    "gap old": FlowRLConfig(
        beta=2.0, reference="old", gap_low=0.5, gap_high=0.5, log_z=LogZConfig(kind="group")
    ),
    "gap jensen_shannon": FlowRLConfig(
        beta=2.0,
        divergence="jensen_shannon",
        gap_low=0.7,
        gap_high=0.9,
        log_z=LogZConfig(kind="group_old"),
    ),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def example(padding: float = math.nan, ratios: list[float] = RATIOS) -> dict[str, Any]:
    """Nine responses of up to 5 tokens in float64, in three groups."""
    rng = np.random.default_rng(0)
    mask = np.arange(5) < np.array(LENGTHS)[:, None]
    moved, ref, old = (np.zeros(mask.shape) for _ in range(3))
    for i, n in enumerate(LENGTHS):
        noise = rng.normal(0, 0.3, n)
        moved[i, :n] = noise - (noise.mean() - ratios[i] / n if n else 0.0)
        old[i, :n] = -rng.exponential(1.0, n)
        ref[i, :n] = old[i, :n] + rng.normal(0, 0.5, n)
    arrays = {
        "logprobs": np.where(mask, old + moved, padding),
        "ref_logprobs": np.where(mask, ref, padding),
        "old_logprobs": np.where(mask, old, padding),
        "reward": rng.normal(0, 1, len(LENGTHS)),
        "mask": mask,
    }
    return jax.tree.map(jnp.asarray, arrays)


def slope(x: float, divergence: str) -> float:
    """l' of the module's table, as f'(u) of the divergence's own f, minus f'(1)."""
    u = math.exp(x)
    return {
        "reverse_kl": x,  # f = u log u
        "forward_kl": 1 - 1 / u,  # f = -log u
        "jensen_shannon": math.log(2 * u / (1 + u)),  # f = u log u - (1 + u) log((1 + u) / 2)
    }[divergence]


def cost(x: float, divergence: str) -> float:
    """l, as the integral of its slope from 0, by 80 points of Gauss."""
    points, weights = np.polynomial.legendre.leggauss(80)
    values = [slope(x * (p + 1) / 2, divergence) for p in points]
    return x / 2 * float(np.dot(weights, values))


def constant(targets: list[float], divergence: str) -> float:
    """The root of the sum of slopes, by bisection."""
    low, high = min(targets), max(targets)
    for _ in range(70):
        middle = (low + high) / 2
        if sum(slope(middle - t, divergence) for t in targets) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def reference(config: FlowRLConfig, arrays: dict[str, Any], given: np.ndarray):
    """Loss, gradients by log-probability and by log Z, and log Z, one response at a time."""
    arrays = jax.tree.map(np.asarray, arrays)
    count, mask = len(LENGTHS), arrays["mask"]
    n, d, before, moved = (np.zeros(count) for _ in range(4))
    prior = arrays["old_logprobs" if config.reference == "old" else "ref_logprobs"]
    for i in range(count):
        for t in range(5):
            if mask[i, t]:
                n[i] += 1
                d[i] += arrays["logprobs"][i, t] - prior[i, t]
                before[i] += arrays["old_logprobs"][i, t] - prior[i, t]
                moved[i] += arrays["logprobs"][i, t] - arrays["old_logprobs"][i, t]
    kappa = np.maximum(n, 1) if config.length_normalize else np.ones(count)
    scaled = config.beta * arrays["reward"]
    log_z = {"head": given, "table": given, "zero": np.zeros(count)}.get(config.log_z.kind)
    if log_z is None:
        targets = scaled - (before if config.log_z.kind == "group_old" else d / kappa)
        log_z = np.zeros(count)
        for start in range(0, count, GROUP):
            found = constant(list(targets[start : start + GROUP]), config.divergence)
            log_z[start : start + GROUP] = found
    loss, grad, by_log_z = np.zeros(count), np.zeros(mask.shape), np.zeros(count)
    for i in range(count):
        mean = moved[i] / max(n[i], 1)
        weight = {
            "unit": 1.0,
            "none": math.exp(moved[i]),
            "max": min(math.exp(moved[i]), config.weight_max),
            "two_sided": min(max(math.exp(moved[i]), 1 - config.clip_low), 1 + config.clip_high),
            "geometric": min(max(math.exp(mean), 1 - config.clip_low), 1 + config.clip_high),
        }[config.weight]
        gap, inside = log_z[i] + before[i] / kappa[i] - scaled[i], 1.0
        if config.gap_high:
            inside = float(-config.gap_low < gap < config.gap_high)
            gap = min(max(gap, -config.gap_low), config.gap_high)
        residual = gap + moved[i] / kappa[i]
        loss[i] = 2 * weight * cost(residual, config.divergence)
        grad[i] = mask[i] * 2 * weight * slope(residual, config.divergence) / kappa[i] / count
        by_log_z[i] = inside * 2 * weight * slope(residual, config.divergence) / count
    return loss, grad, by_log_z, log_z


def log_z_of(config: FlowRLConfig, arrays: dict[str, Any], given: jax.Array) -> jax.Array:
    """What the train step does, with the head's or the table's value given."""
    if config.log_z.kind in ("head", "table"):
        return given
    if config.log_z.kind == "zero":
        return jnp.zeros_like(given)
    prior = prior_logprobs(arrays["ref_logprobs"], arrays["old_logprobs"], config)
    return log_z_estimate(**(arrays | {"ref_logprobs": prior}), config=config, group_size=GROUP)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_loss_and_gradients(name, padding):
    config, arrays = CASES[name], example(padding)
    given = np.random.default_rng(1).normal(0, 2, len(LENGTHS))
    loss, grad, by_log_z, log_z = reference(config, arrays, given)
    found = log_z_of(config, arrays, jnp.asarray(given))
    np.testing.assert_allclose(found, log_z, rtol=CLOSE, atol=CLOSE)

    def mean(logprobs, log_z):
        rest = arrays | {"logprobs": logprobs, "log_z": log_z}
        losses, metrics = flowrl_loss(config=config, **rest)
        return losses.mean(), (losses, metrics)

    grads, (losses, metrics) = jax.grad(mean, (0, 1), has_aux=True)(arrays["logprobs"], found)
    np.testing.assert_allclose(losses, loss, rtol=CLOSE, atol=CLOSE)
    np.testing.assert_allclose(grads[0], grad, rtol=CLOSE, atol=CLOSE)
    np.testing.assert_allclose(grads[1], by_log_z, rtol=CLOSE, atol=CLOSE)
    assert all(np.isfinite(value) for value in metrics.values())
    if config.gap_high:
        assert metrics["gap_clipped"] < 1.0 or name == "gflowrl"  # whose bounds are narrow
        assert metrics["gap_clipped"] == pytest.approx(np.mean(by_log_z == 0.0))


def test_no_token_at_all():
    """A batch whose every row is masked has the loss of its log Z alone, and no gradient."""
    arrays = example() | {"mask": jnp.zeros((len(LENGTHS), 5), bool)}
    for config in CASES.values():
        log_z = log_z_of(config, arrays, jnp.ones(len(LENGTHS)))

        def total(logprobs, config=config, log_z=log_z):
            rest = arrays | {"logprobs": logprobs, "log_z": log_z}
            return flowrl_loss(config=config, **rest)[0].sum()

        value, grad = jax.value_and_grad(total)(arrays["logprobs"])
        assert np.isfinite(value) and not grad.any()


@partial(jax.jit, static_argnums=1)
def cost_and_slope(x: jax.Array, divergence: str) -> tuple[jax.Array, jax.Array]:
    """The code's loss and its gradient, for each of an array's residuals."""
    return jax.vmap(jax.value_and_grad(lambda x: divergence_loss(x, divergence)))(x)


found_constant = jax.jit(group_constant, static_argnums=(1, 2))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_cost_and_slope(divergence):
    """The closed forms are the integrals, on both sides of where they change."""
    at = [-19.0, -3.0, -0.51, -0.49, -1e-3, 0.0, 1e-5, 0.3, 0.499, 0.501, 2.0, 30.0]
    loss, grad = cost_and_slope(jnp.asarray(at), divergence)
    np.testing.assert_allclose(loss, [2 * cost(x, divergence) for x in at], rtol=1e-9, atol=1e-17)
    np.testing.assert_allclose(grad, [2 * slope(x, divergence) for x in at], rtol=CLOSE, atol=1e-15)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_far_residuals_stay_finite_and_pull_back(divergence):
    """In float32, and without a jump where forward_kl goes on along its tangent."""
    far = jnp.asarray(
        [-1e4, -100, -20 - 1e-5, -20, -20 + 1e-5, -1e-3, 1e-3, 20, 100, 1e4, 2e4, 3e4], jnp.float32
    )
    loss, grad = cost_and_slope(far, divergence)
    assert np.isfinite(loss).all() and (loss > 0).all()
    assert np.isfinite(grad).all() and (np.sign(grad) == np.sign(far)).all()
    assert (np.diff(grad) >= 0).all()  # convex
    np.testing.assert_allclose(loss[2:4], loss[3:5], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_group_constant_is_the_root(divergence, size, dtype):
    """Also of groups with one estimate far above or far below the others."""
    rng = np.random.default_rng(size)
    close = 1e-12 if dtype == "float64" else 5e-7
    for spread in (0.0, 1e-2, 1.0, 30.0, 100.0):
        groups = 2.0 + spread * rng.normal(0, 1, (4, size))
        groups[1:3] = 2.0
        groups[1, 0] += spread
        groups[2, 0] -= spread
        target = jnp.asarray(groups.reshape(-1), dtype)
        found = found_constant(target, size, divergence)
        assert found.dtype == dtype and found.shape == target.shape
        rows = np.asarray(target).reshape(4, size)
        expected = [constant([float(t) for t in row], divergence) for row in rows]
        bound = close * max(spread, 2.0)
        np.testing.assert_allclose(found, np.repeat(expected, size), rtol=0, atol=bound)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_group_constant_has_no_gradient_and_needs_none(divergence):
    """It is where the group's loss is least, so that stopping its gradient changes nothing."""
    target = jnp.asarray(np.random.default_rng(0).normal(0, 2, 6))

    @jax.jit
    def gradients(target):
        found = group_constant(target, 6, divergence)
        by_constant = jax.grad(lambda c: divergence_loss(c - target, divergence).sum())
        stopped = jax.grad(lambda t: group_constant(t, 6, divergence).sum())
        return by_constant(found[0]), stopped(target)

    by_constant, stopped = gradients(target)
    np.testing.assert_allclose(by_constant, 0.0, atol=1e-12)
    assert not stopped.any()


def test_unknown_divergence():
    for function in (divergence_loss, lambda x, kind: group_constant(x, 2, kind)):
        with pytest.raises(ValueError, match="divergence='kl' is not known"):
            function(jnp.zeros(2), "kl")


@pytest.mark.parametrize(
    "name", [n for n, c in FAMILY.items() if c.needs_reference and c.log_z.kind != "zero"]
)
def test_zero_loss_where_every_residual_is_zero(name):
    """On policy and at the targets' common value, which every estimate of log Z then is."""
    config, arrays = FAMILY[name], example(0.0, [0.0] * len(LENGTHS))
    arrays["logprobs"] = arrays["old_logprobs"]
    if config.log_z.kind == "group_old":
        # Sums and means agree for responses of one token alone.
        arrays["mask"] = jnp.arange(5) < jnp.ones((len(LENGTHS), 1))
    plain = {k: v for k, v in arrays.items() if k not in ("old_logprobs", "reward")}
    arrays["reward"] = (
        1.7 - log_z_target(reward=jnp.zeros(9), config=config, **plain)
    ) / config.beta
    log_z = log_z_of(config, arrays, jnp.full(len(LENGTHS), 1.7))
    np.testing.assert_allclose(log_z, 1.7, rtol=1e-12)
    loss, _ = flowrl_loss(config=config, log_z=log_z, **arrays)
    np.testing.assert_allclose(loss, 0.0, atol=1e-12)


def test_old_reference_is_never_read():
    """The trainer spares the reference's pass, and hands over whatever it has in its place."""
    config = FlowRLConfig(reference="old", log_z=LogZConfig(kind="zero"))
    assert not OBJECTIVES["flowrl"].needs_reference(config)
    assert OBJECTIVES["flowrl"].needs_reference(FlowRLConfig())
    arrays = example() | {"log_z": jnp.zeros(len(LENGTHS))}
    missing = arrays | {"ref_logprobs": jnp.full_like(arrays["logprobs"], jnp.nan)}
    with_it, without = (flowrl_loss(config=config, **given)[0] for given in (arrays, missing))
    np.testing.assert_array_equal(with_it, without)


def test_which_kinds_need_whole_groups():
    def needs(kind, divergence="reverse_kl"):
        return FlowRLConfig(log_z=LogZConfig(kind=kind), divergence=divergence).whole_groups

    assert needs("group") and needs("group_old") and needs("table", "forward_kl")
    assert not needs("table") and not needs("head", "forward_kl") and not needs("zero")


def test_a_table_moves_to_the_visits_constant():
    config, arrays = PRESETS["ftb_jensen_shannon"], example()
    assert isinstance(config, FlowRLConfig)
    table = dataclasses.replace(config, log_z=LogZConfig(kind="table"))
    by_group, by_table = (
        log_z_estimate(**arrays, config=kind, group_size=GROUP) for kind in (config, table)
    )
    np.testing.assert_array_equal(by_group, by_table)
    plain = dataclasses.replace(table, divergence="reverse_kl")
    target = log_z_target(
        arrays["logprobs"], arrays["ref_logprobs"], arrays["reward"], arrays["mask"], plain
    )
    estimate = log_z_estimate(**arrays, config=plain, group_size=GROUP)
    np.testing.assert_array_equal(estimate, target)  # whose mean the table takes itself


def test_presets_are_what_their_sources_do():
    balance = [FAMILY[name] for name in ("tb", "tb_table", "tb_ema", "tb_vargrad")]
    balance += [FAMILY[name] for name in ("ftb_forward_kl", "ftb_jensen_shannon", "gvpo")]
    assert all(not c.length_normalize and c.weight == "unit" for c in balance)
    assert all(c.reward_norm == "none" for c in balance[:-1])
    kinds = [(c.log_z.kind, c.log_z.table_rate) for c in balance[:4]]
    assert [kind for kind, _ in kinds] == ["head", "table", "table", "group"]
    assert [rate for kind, rate in kinds if kind == "table"] == [1.0, 0.3]
    gvpo, gflowrl = FAMILY["gvpo"], FAMILY["gflowrl"]
    assert (gvpo.beta, gvpo.reference, gvpo.log_z.kind) == (10.0, "old", "group")
    assert (gflowrl.beta, gflowrl.reward_norm, gflowrl.length_normalize) == (8.0, "none", True)
    assert (gflowrl.gap_low, gflowrl.gap_high, gflowrl.log_z.kind) == (0.2, 0.28, "group_old")
    for name, reference_policy in (("flowrl_no_z", "reference"), ("flowrl_old_ref", "old")):
        config = FAMILY[name]
        assert (config.beta, config.weight, config.weight_max) == (15.0, "max", 10.0)
        assert (config.log_z.kind, config.reference) == ("zero", reference_policy)
        assert config.length_normalize and config.reward_norm == "group"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FlowRLConfig(reference="none"), "loss.reference='none' is not known"),
        (lambda: FlowRLConfig(divergence="kl"), "loss.divergence='kl' is not known"),
        (lambda: FlowRLConfig(gap_low=0.2), "gap_low=0.2 and loss.gap_high=0.0 must both"),
        (lambda: FlowRLConfig(gap_low=-0.2, gap_high=0.2), "gap_low=-0.2"),
    ],
)
def test_wrong_settings_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
