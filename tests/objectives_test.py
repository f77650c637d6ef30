"""Objectives against loops in float64 numpy that restate their formulas."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.objectives import OBJECTIVES, objective_of
from flowrl_jax.objectives.advantages import group_center, group_normalize, normalize_rewards
from flowrl_jax.objectives.flowrl import FlowRLConfig, flowrl_loss, importance_weight, log_z_target
from flowrl_jax.objectives.grpo import GRPOConfig, aggregate_tokens, grpo_loss
from flowrl_jax.objectives.log_z import LogZConfig
from flowrl_jax.objectives.presets import PRESETS

# The figure asked of everything that is compared with a formula: float32 sums of a few tens of
# terms of size 10 round at about 1e-6.
TOLERANCE = 1e-5

WEIGHTS = ["two_sided", "max", "none", "unit"]
LENGTHS = [1, 2, 3, 5, 7, 7]


def example(seed=0, padding=0.0) -> dict[str, Any]:
    """Six responses of up to 7 tokens; whole-response ratios below 0.8, near 1 and above 10."""
    rng = np.random.default_rng(seed)
    mask = np.arange(7) < np.array(LENGTHS)[:, None]
    old = -rng.exponential(1.0, mask.shape)
    sums = np.array([0.05, -0.9, 3.0, -0.1, 0.6, -4.0])  # log pi - log pi_old of each response
    noise = rng.normal(0, 0.2, mask.shape) * mask
    noise -= mask * (noise.sum(1) / mask.sum(1))[:, None]
    arrays = {
        "logprobs": old + noise + mask * (sums / mask.sum(1))[:, None],
        "old_logprobs": old,
        "ref_logprobs": old + rng.normal(0, 0.5, mask.shape),
        "reward": rng.normal(0, 1, 6),
        "log_z": rng.normal(0, 3, 6),
    }
    for name in ("logprobs", "old_logprobs", "ref_logprobs"):
        arrays[name] = np.where(mask, arrays[name], padding)
    # The loops start from the float32 values that the code sees.
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    return arrays | {"mask": mask}


def device(arrays):
    return jax.tree.map(jnp.asarray, arrays)


def flowrl_reference(config, *, log_z, logprobs, ref_logprobs, old_logprobs, reward, mask):
    """Section 1.1 of the paper's analysis, one response at a time: loss, weight and residual."""
    losses, weights, residuals = [], [], []
    for i in range(len(reward)):
        n, d, log_ratio = 0, 0.0, 0.0
        for t in range(mask.shape[1]):
            if mask[i, t]:
                n += 1
                d += float(logprobs[i, t]) - float(ref_logprobs[i, t])
                log_ratio += float(logprobs[i, t]) - float(old_logprobs[i, t])
        ratio = math.exp(log_ratio)
        weight = {
            "none": ratio,
            "max": min(ratio, config.weight_max),
            "two_sided": min(max(ratio, 1 - config.clip_low), 1 + config.clip_high),
            "unit": 1.0,
        }[config.weight]
        residual = float(log_z[i]) + (d / n if config.length_normalize else d)
        residual -= config.beta * float(reward[i])
        losses.append(weight * residual**2)
        weights.append(weight)
        residuals.append(residual)
    return np.array(losses), np.array(weights), np.array(residuals)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("length_normalize", [True, False])
@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_flowrl_loss_and_gradients(weight, length_normalize, padding):
    config = FlowRLConfig(
        beta=3.0, weight=weight, clip_low=0.1, clip_high=0.3, length_normalize=length_normalize
    )
    arrays = example(padding=padding)
    loss, w, delta = flowrl_reference(config, **arrays)

    def mean_loss(log_z, logprobs):
        rest = device({k: v for k, v in arrays.items() if k not in ("log_z", "logprobs")})
        losses, _ = flowrl_loss(log_z=log_z, logprobs=logprobs, config=config, **rest)
        return losses.mean(), losses

    inputs = jnp.asarray(arrays["log_z"]), jnp.asarray(arrays["logprobs"])
    (_, losses), grads = jax.value_and_grad(mean_loss, argnums=(0, 1), has_aux=True)(*inputs)

    np.testing.assert_allclose(losses, loss, rtol=TOLERANCE)
    # The closed form: the weight carries no gradient, the residual's mean over |y| tokens does.
    by_log_z = 2 * w * delta / 6
    kappa = arrays["mask"].sum(1) if length_normalize else np.ones(6)
    by_logprob = (2 * w * delta / kappa / 6)[:, None] * arrays["mask"]
    np.testing.assert_allclose(grads[0], by_log_z, rtol=TOLERANCE)
    np.testing.assert_allclose(grads[1], by_logprob, rtol=TOLERANCE)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_flowrl_metrics(weight):
    config = FlowRLConfig(beta=2.0, weight=weight)
    arrays = example()
    _, w, delta = flowrl_reference(config, **arrays)
    _, metrics = flowrl_loss(config=config, **device(arrays))
    expected = {
        "residual": delta.mean(),
        "residual_abs": np.abs(delta).mean(),
        "flow_abs": np.abs(delta + 2.0 * arrays["reward"]).mean(),
        "scaled_reward_abs": np.abs(2.0 * arrays["reward"]).mean(),
        "importance_weight": w.mean(),
        "importance_weight_max": w.max(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=TOLERANCE, err_msg=name)
    # Ratios of the example: e^0.05, e^-0.9, e^3, e^-0.1, e^0.6, e^-4.
    clipped = {"two_sided": 4 / 6, "max": 1 / 6, "none": 0.0}
    if weight in clipped:
        assert metrics["weight_clipped"] == pytest.approx(clipped[weight])


@pytest.mark.parametrize(
    ("weight", "log_ratio"), [("none", 110.0), ("none", -110.0), ("max", -110.0), ("max", 1.5)]
)
def test_long_responses_are_not_called_clipped(weight, log_ratio):
    """Ratios of thousands of tokens under- and overflow: that must not pass for clipping."""
    logprobs = jnp.full((1, 7), log_ratio / 7)
    zeros = jnp.zeros((1, 7))
    _, metrics = flowrl_loss(
        log_z=jnp.zeros(1),
        logprobs=logprobs,
        ref_logprobs=zeros,
        old_logprobs=zeros,
        reward=jnp.zeros(1),
        mask=jnp.ones((1, 7), bool),
        config=FlowRLConfig(weight=weight),
    )
    assert metrics["weight_clipped"] == 0.0


def test_weight_of_extreme_ratios():
    """Bounded weights stay finite where the ratio itself overflows; only "none" may not."""
    log_ratio = jnp.array([-1000.0, 0.0, 1000.0])
    weights = {kind: importance_weight(log_ratio, FlowRLConfig(weight=kind)) for kind in WEIGHTS}
    np.testing.assert_allclose(weights["two_sided"], [0.8, 1.0, 1.2], rtol=1e-6)
    np.testing.assert_allclose(weights["max"], [0.0, 1.0, 10.0], rtol=1e-6)
    np.testing.assert_array_equal(weights["unit"], [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(weights["none"], [0.0, 1.0, np.inf])


def test_log_z_target_is_the_residuals_root():
    arrays = device(example())
    config = FlowRLConfig(beta=4.0)
    rest = {k: v for k, v in arrays.items() if k not in ("log_z", "old_logprobs")}
    target = log_z_target(config=config, **rest)
    loss, _ = flowrl_loss(config=config, **(arrays | {"log_z": target}))
    # Squares of rounding errors of about 1e-6.
    np.testing.assert_allclose(loss, np.zeros(6), atol=1e-10)
    grad = jax.grad(lambda x: log_z_target(config=config, **(rest | {"logprobs": x})).sum())(
        arrays["logprobs"]
    )
    assert not grad.any()


@pytest.mark.parametrize("name", ["ref_logprobs", "old_logprobs", "mask", "log_z", "reward"])
def test_flowrl_refuses_shapes_that_would_broadcast(name):
    arrays = device(example())
    wrong = arrays[name][:, :1] if arrays[name].ndim == 2 else arrays[name][:, None]
    with pytest.raises(ValueError, match=name):
        flowrl_loss(config=FlowRLConfig(), **(arrays | {name: wrong}))


@pytest.mark.parametrize("name", ["ref_logprobs", "old_logprobs", "mask", "reward"])
def test_grpo_refuses_shapes_that_would_broadcast(name):
    arrays = device(example())
    del arrays["log_z"]
    wrong = arrays[name][:, :1] if arrays[name].ndim == 2 else arrays[name][:, None]
    with pytest.raises(ValueError, match=name):
        grpo_loss(config=GRPOConfig(), **(arrays | {name: wrong}))


def grpo_reference(config, *, logprobs, ref_logprobs, old_logprobs, reward, mask):
    """Token losses, one at a time."""
    loss = np.zeros(mask.shape)
    for i, t in zip(*np.nonzero(mask), strict=True):
        rho = math.exp(float(logprobs[i, t]) - float(old_logprobs[i, t]))
        clipped = min(max(rho, 1 - config.clip_low), 1 + config.clip_high)
        loss[i, t] = max(-reward[i] * rho, -reward[i] * clipped)
        delta = float(logprobs[i, t]) - float(ref_logprobs[i, t])
        loss[i, t] += config.kl_coef * (math.exp(-delta) + delta - 1)
    return loss


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_grpo_loss_and_gradient(aggregation, padding):
    config = GRPOConfig(clip_low=0.1, clip_high=0.3, kl_coef=0.05, aggregation=aggregation)
    arrays = example(padding=padding)
    del arrays["log_z"]
    mask = arrays["mask"]
    expected = grpo_reference(config, **arrays)
    per_token = (1 / mask.sum(1) / 6)[:, None] if aggregation == "sequence" else 1 / mask.sum()

    def mean_loss(logprobs):
        loss, _ = grpo_loss(config=config, **(device(arrays) | {"logprobs": logprobs}))
        total, weight = aggregate_tokens(loss, jnp.asarray(mask), aggregation)
        return total.sum() / weight.sum(), loss

    (mean, loss), grad = jax.value_and_grad(mean_loss, has_aux=True)(
        jnp.asarray(arrays["logprobs"])
    )
    np.testing.assert_allclose(loss, expected, rtol=TOLERANCE, atol=1e-6)
    np.testing.assert_allclose(mean, (expected * per_token).sum(), rtol=TOLERANCE)

    # By hand: -A rho where the ratio is inside or moves back inside, 0 where the clip binds.
    with np.errstate(invalid="ignore"):
        rho = np.exp(arrays["logprobs"] - arrays["old_logprobs"])
        delta = arrays["logprobs"] - arrays["ref_logprobs"]
    advantage = arrays["reward"][:, None]
    binds = ((advantage > 0) & (rho > 1.3)) | ((advantage < 0) & (rho < 0.9))
    by_logprob = np.where(binds, 0.0, -advantage * rho) + 0.05 * (1 - np.exp(-delta))
    by_logprob = np.where(mask, by_logprob * per_token, 0.0)
    assert binds[mask].any() and not binds[mask].all()
    np.testing.assert_allclose(grad, by_logprob, rtol=TOLERANCE, atol=1e-7)


def test_grpo_pulls_back_from_far_away():
    """However far below the reference a token falls, the penalty never pushes it further."""
    logprobs = jnp.array([[-11.0, -25.0, -100.0]])
    zeros = jnp.zeros((1, 3))

    def loss(logprobs):
        losses, _ = grpo_loss(
            logprobs=logprobs,
            ref_logprobs=zeros,
            old_logprobs=logprobs,
            reward=jnp.zeros(1),
            mask=jnp.ones((1, 3), bool),
            config=GRPOConfig(kl_coef=1.0),
        )
        return losses.sum()

    assert (jax.grad(loss)(logprobs) <= 0.0).all()


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_grpo_on_policy_is_reinforce(aggregation):
    """At ratio 1 nothing is clipped: the gradient is that of -A log pi."""
    arrays = example()
    mask = jnp.asarray(arrays["mask"])
    logprobs, reward = jnp.asarray(arrays["logprobs"]), jnp.asarray(arrays["reward"])
    config = GRPOConfig(kl_coef=0.0, aggregation=aggregation)

    def mean(losses):
        total, weight = aggregate_tokens(losses, mask, aggregation)
        return total.sum() / weight.sum()

    def grpo(logprobs_):
        return mean(
            grpo_loss(
                logprobs=logprobs_,
                ref_logprobs=logprobs,
                old_logprobs=logprobs,
                reward=reward,
                mask=mask,
                config=config,
            )[0]
        )

    reinforce = jax.grad(lambda x: mean(-reward[:, None] * x))(logprobs)
    np.testing.assert_allclose(jax.grad(grpo)(logprobs), reinforce, rtol=1e-6)


def test_aggregations_weigh_tokens_differently():
    """A response of 1 token against one of 7: equal by sequence, one to seven by token."""
    loss = jnp.array([[1.0] + [0.0] * 6, [2.0] * 7])
    mask = jnp.array([[True] + [False] * 6, [True] * 7])
    total, weight = aggregate_tokens(loss, mask, "sequence")
    assert total.sum() / weight.sum() == pytest.approx((1 + 2) / 2)
    total, weight = aggregate_tokens(loss, mask, "token")
    assert total.sum() / weight.sum() == pytest.approx((1 + 14) / 8)


# Correct of 8 -> normalised reward of a correct and of a wrong sample, as the released code
# computes them (Bessel's correction, eps 1e-6).
RELEASED = {
    1: (2.4749, -0.3536),
    2: (1.6202, -0.5401),
    3: (1.2076, -0.7246),
    4: (0.9354, -0.9354),
    5: (0.7246, -1.2076),
    6: (0.5401, -1.6202),
    7: (0.3536, -2.4749),
}


@pytest.mark.parametrize("wrong", [-1.0, 0.0])
def test_group_normalize_as_released(wrong):
    order = np.random.default_rng(0)
    groups, expected = [], []
    for correct, (high, low) in RELEASED.items():
        hits = order.permutation(np.arange(8) < correct)
        groups.append(np.where(hits, 1.0, wrong))
        expected.append(np.where(hits, high, low))
    normalised = group_normalize(jnp.asarray(np.concatenate(groups), jnp.float32), 8)
    # The table has four decimals.
    np.testing.assert_allclose(normalised, np.concatenate(expected), atol=5e-5)


def test_group_normalize_against_a_loop():
    reward = np.random.default_rng(1).normal(3, 2, 12).astype(np.float32)
    for size in (2, 3, 12):
        expected = []
        for start in range(0, 12, size):
            group = [float(r) for r in reward[start : start + size]]
            mean = sum(group) / size
            deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / (size - 1))
            expected += [(r - mean) / (deviation + 1e-6) for r in group]
        np.testing.assert_allclose(
            group_normalize(jnp.asarray(reward), size), expected, rtol=TOLERANCE, atol=1e-6
        )


def test_groups_of_one():
    """Nothing to compare with: the reward itself, as released: 0.999999 of it."""
    reward = jnp.array([1.0, -1.0, 0.5])
    np.testing.assert_allclose(group_normalize(reward, 1), reward / (1 + 1e-6), rtol=1e-7)
    np.testing.assert_array_equal(group_center(reward, 1), reward)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.1, 1 / 3, 1000.1])
def test_equal_rewards_are_exactly_zero(value):
    """A mean rounds; divided by eps that would pass for a preference of up to one deviation."""
    for size in (3, 7, 8):
        reward = jnp.full(2 * size, value)
        assert not group_normalize(reward, size).any()
        assert not group_center(reward, size).any()


def test_normalize_rewards_by_name():
    reward = jnp.array([0.0, 1.0, 3.0, 3.0])
    np.testing.assert_allclose(normalize_rewards(reward, 2, "center"), [-0.5, 0.5, 0.0, 0.0])
    np.testing.assert_array_equal(normalize_rewards(reward, 2, "group"), group_normalize(reward, 2))
    np.testing.assert_array_equal(normalize_rewards(reward, 2, "none"), reward)
    with pytest.raises(ValueError, match="reward_norm"):
        normalize_rewards(reward, 2, "grpo")


@pytest.mark.parametrize("size", [0, 3, 8])
def test_groups_must_divide(size):
    with pytest.raises(ValueError, match="groups"):
        group_normalize(jnp.zeros(4), size)


def test_presets_are_what_their_sources_do():
    presets: dict[str, Any] = PRESETS
    paper, release, recipe = (presets[f"flowrl_{n}"] for n in ("paper", "release", "recipe"))
    for preset in (paper, release, recipe):
        assert preset.beta == 15.0 and preset.length_normalize and preset.reward_norm == "group"
        head = preset.log_z
        assert (head.kind, head.num_layers, head.dropout) == ("head", 3, 0.1)
        assert not head.detach and not head.zero_init
    assert (paper.weight, paper.clip_low, paper.clip_high) == ("two_sided", 0.2, 0.2)
    assert release.weight == "none"
    assert (recipe.weight, recipe.weight_max) == ("max", 10.0)
    assert paper.log_z.pooling == "all"
    assert release.log_z.pooling == recipe.log_z.pooling == "drop_last"
    grpo = presets["grpo"]
    assert (grpo.clip_low, grpo.clip_high, grpo.kl_coef) == (0.2, 0.2, 1e-3)
    assert (grpo.aggregation, grpo.reward_norm) == ("sequence", "group")


@pytest.mark.slow
def test_every_preset_has_an_objective_and_runs():
    arrays = device(example())
    for config in PRESETS.values():
        names = ("values", "old_values", "returns") if hasattr(config, "value") else ()
        values = dict.fromkeys(names, arrays["old_logprobs"])
        total, weight, metrics = objective_of(config).terms(config, **arrays, **values)
        assert total.shape == weight.shape == (6,)
        assert np.isfinite(total).all() and (weight > 0).all()
        assert all(value.shape == () for value in metrics.values())
    with pytest.raises(TypeError, match="LogZConfig"):
        objective_of(LogZConfig())


def test_reference_is_needed_only_where_it_is_read():
    grpo = OBJECTIVES["grpo"]
    assert OBJECTIVES["flowrl"].needs_reference(FlowRLConfig())
    assert grpo.needs_reference(GRPOConfig(kl_coef=0.1))
    config = GRPOConfig(kl_coef=0.0)
    assert not grpo.needs_reference(config)
    arrays = device(example())
    without = arrays | {"ref_logprobs": jnp.full_like(arrays["logprobs"], jnp.nan)}
    np.testing.assert_array_equal(grpo.terms(config, **arrays)[0], grpo.terms(config, **without)[0])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FlowRLConfig(weight="clip"), "weight"),
        (lambda: FlowRLConfig(beta=0.0), "beta"),
        (lambda: FlowRLConfig(clip_low=1.0), "clip_low"),
        (lambda: FlowRLConfig(clip_high=-0.1), "clip_high"),
        (lambda: FlowRLConfig(weight_max=0.0), "weight_max"),
        (lambda: FlowRLConfig(reward_norm="std"), "reward_norm"),
        (lambda: GRPOConfig(aggregation="mean"), "aggregation"),
        (lambda: GRPOConfig(kl_coef=-1.0), "kl_coef"),
        (lambda: GRPOConfig(clip_low=1.5), "clip_low"),
        (lambda: GRPOConfig(reward_norm="std"), "reward_norm"),
        (lambda: LogZConfig(kind="net"), "kind"),
        (lambda: LogZConfig(pooling="mean"), "pooling"),
        (lambda: LogZConfig(dropout=1.0), "dropout"),
        (lambda: LogZConfig(table_rate=0.0), "table_rate"),
        (lambda: LogZConfig(num_layers=0), "num_layers"),
    ],
)
def test_wrong_settings_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
