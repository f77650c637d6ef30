"""The policy-gradient family against loops that restate its formulas, gradients derived by hand."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.masking import masked_sum
from flowrl_jax.objectives import OBJECTIVES, for_length, objective_of
from flowrl_jax.objectives.grpo import GRPOConfig
from flowrl_jax.objectives.kl import kl_estimate
from flowrl_jax.objectives.policy_gradient import PolicyGradientConfig, policy_gradient_loss
from flowrl_jax.objectives.presets import PRESETS

CLOSE = 1e-10  # float64
LENGTHS = [1, 2, 3, 5, 0, 4, 5, 3, 2]  # one response has nothing to learn from
# log pi - log pi_old of each token: far out on both sides, just outside, just inside, at 0.
MEANS = [0.5, -0.5, 1e-4, 0.3, 0.0, -0.3, 0.0, 5e-4, -5e-4]
SPREADS = [0.0, 0.3, 0.2, 0.6, 0.0, 0.6, 0.0, 0.0, 0.0]
ADVANTAGES = [1.3, 0.7, -1.1, -0.8, 2.0, -1.7, 0.4, 0.9, 1.5]

FAMILY = {name: c for name, c in PRESETS.items() if isinstance(c, PolicyGradientConfig)}
CASES = FAMILY | {
    "plain": PolicyGradientConfig(clip="none"),
    "k1": PolicyGradientConfig(kl_coef=0.3, kl_estimator="k1"),
    "k2": PolicyGradientConfig(kl_coef=0.3, kl_estimator="k2", aggregation="token"),
    "k3": PolicyGradientConfig(kl_coef=0.3, aggregation="constant", length=11),
    "entropy": PolicyGradientConfig(entropy_coef=0.2),
    "dual": PolicyGradientConfig(clip_low=0.1, clip_high=0.3, dual_clip=1.5),
    "sequence token mean": PolicyGradientConfig(ratio="sequence", aggregation="token"),
    "gmpo by token": PolicyGradientConfig(ratio="token", clip="log", clip_low=0.1),
    "gmpo straight": PolicyGradientConfig(ratio="geometric_token", clip="log", clip_low=0.1),
    "cispo of responses": PolicyGradientConfig(ratio="geometric", clip="cispo"),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def example(padding: float = math.nan, per_token: bool = False) -> dict[str, Any]:
    """Nine responses of up to 5 tokens in float64."""
    rng = np.random.default_rng(0)
    mask = np.arange(5) < np.array(LENGTHS)[:, None]
    log_ratio, advantage, ref, old = (np.zeros(mask.shape) for _ in range(4))
    for i, n in enumerate(LENGTHS):
        noise = rng.normal(0, 1, n)
        noise -= noise.mean() if n else 0.0
        log_ratio[i, :n] = MEANS[i] + SPREADS[i] * noise
        old[i, :n] = -rng.exponential(1.0, n)
        ref[i, :n] = old[i, :n] + rng.normal(0, 0.5, n)
        advantage[i, :n] = ADVANTAGES[i] + per_token * rng.normal(0, 0.3, n)
    arrays = {
        "logprobs": np.where(mask, old + log_ratio, padding),
        "old_logprobs": np.where(mask, old, padding),
        "ref_logprobs": np.where(mask, ref, padding),
        "reward": np.where(mask, advantage, padding) if per_token else np.array(ADVANTAGES),
    }
    return arrays | {"mask": mask}


def joined(config, log_ratio):
    """Of one response: log of the ratio that weighs token t, and its derivative by token s."""
    n = len(log_ratio)
    if config.ratio == "token":
        return log_ratio, np.eye(n)
    total = sum(log_ratio) / (1 if config.ratio == "sequence" else max(n, 1))
    if config.ratio == "geometric_token":
        return [total] * n, np.eye(n)
    return [total] * n, np.full((n, n), 1.0 if config.ratio == "sequence" else 1.0 / max(n, 1))


def token_loss(config, advantage, log_rho, logprob):
    """Loss, its derivative by log rho and by log pi, and whether a bound was met."""
    rho = math.exp(log_rho)
    if config.clip in ("none", "log"):
        return -advantage * rho, -advantage * rho, 0.0, False
    low, high = 1 - config.clip_low, 1 + config.clip_high
    if config.clip == "cispo":
        weight = min(max(rho, low), high)
        return -weight * advantage * logprob, 0.0, -weight * advantage, weight != rho
    if advantage >= 0:
        bound = rho > high
        value = -advantage * (high if bound else rho)
    else:
        bound = rho < low
        value = -advantage * (low if bound else rho)
        if config.dual_clip and rho > config.dual_clip:
            value, bound = -advantage * config.dual_clip, True
    return value, 0.0 if bound else -advantage * rho, 0.0, bound


def penalties(config, logprob, ref):
    """Value and derivative of what is added to a token's loss."""
    value, slope = config.entropy_coef * logprob**2 / 2, config.entropy_coef * logprob
    if config.kl_coef and config.kl_in == "loss":
        delta = logprob - ref
        k, dk = {
            "k1": (delta, 1.0),
            "k2": (delta**2 / 2, delta),
            "k3": (math.exp(-delta) + delta - 1, 1 - math.exp(-delta)),
        }[config.kl_estimator]
        value, slope = value + config.kl_coef * k, slope + config.kl_coef * dk
    return value, slope


def by_hand(config, *, logprobs, ref_logprobs, old_logprobs, reward, mask):
    """Mean loss, gradient by log-probabilities, and bounds met per token, one at a time."""
    sizes = mask.sum(1)
    grad, bounds, total = np.zeros(mask.shape), np.zeros(mask.shape, bool), 0.0
    for i, n in enumerate(sizes):
        weight = {
            "sequence": 1 / (max(n, 1) * (sizes > 0).sum()),
            "token": 1 / sizes.sum(),
            "constant": 1 / (len(mask) * (config.length or mask.shape[1])),
        }[config.aggregation]
        advantage = [reward[i, t] if reward.ndim == 2 else reward[i] for t in range(n)]
        q = [logprobs[i, t] - old_logprobs[i, t] for t in range(n)]
        free = np.ones(n)
        if config.clip == "log":
            for t in range(n):
                sign = 1 if advantage[t] >= 0 else -1
                limited = min(max(q[t], -config.clip_low), config.clip_high)
                if sign * limited < sign * q[t]:
                    q[t], free[t], bounds[i, t] = limited, 0.0, True
        log_rho, jacobian = joined(config, q)
        for t in range(n):
            value, by_rho, by_logprob, bound = token_loss(
                config, advantage[t], log_rho[t], logprobs[i, t]
            )
            extra, slope = penalties(config, logprobs[i, t], ref_logprobs[i, t])
            total += weight * (value + extra)
            grad[i, :n] += weight * by_rho * jacobian[t] * free
            grad[i, t] += weight * (by_logprob + slope)
            bounds[i, t] |= bound
    return total, grad, bounds


def mean_loss(config, arrays) -> Any:
    """Loss as the trainer divides it, and its gradient: `(value, metrics), gradient`."""

    def loss(logprobs):
        rest = {k: jnp.asarray(v) for k, v in arrays.items() if k != "logprobs"}
        total, weight, metrics = objective_of(config).terms(
            config, log_z=None, logprobs=logprobs, **rest
        )
        return total.sum() / jnp.maximum(weight.sum(), 1.0), metrics

    return jax.value_and_grad(loss, has_aux=True)(jnp.asarray(arrays["logprobs"]))


@pytest.mark.parametrize("per_token", [False, True], ids=["response", "token"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient(name, per_token):
    config = CASES[name]
    arrays = example(per_token=per_token)
    expected, by_logprob, bounds = by_hand(config, **arrays)
    (value, metrics), grad = mean_loss(config, arrays)
    np.testing.assert_allclose(value, expected, rtol=CLOSE)
    np.testing.assert_allclose(grad, by_logprob, rtol=CLOSE, atol=1e-14)
    share = (bounds.sum(1) / np.maximum(arrays["mask"].sum(1), 1)).mean()
    np.testing.assert_allclose(metrics["ratio_clipped"], share, rtol=1e-6)


@pytest.mark.parametrize("name", ["dapo", "gmpo", "gspo", "dual", "rloo"])
def test_the_example_meets_bounds_on_both_sides(name):
    _, _, bounds = by_hand(CASES[name], **example())
    sign = np.array(ADVANTAGES)[:, None] * np.ones(bounds.shape)
    assert (bounds & (sign > 0)).any() and (bounds & (sign < 0)).any()
    assert not bounds[example()["mask"]].all()


@pytest.mark.parametrize("name", CASES)
def test_padding_and_order_do_not_matter(name):
    """Wider padding, other values in it, and another order of responses."""
    config = for_length(CASES[name], 5)
    (value, _), grad = mean_loss(config, example(padding=-3.0))
    wide = {
        k: np.pad(v, ((0, 0), (0, 3)), constant_values=0) if v.ndim == 2 else v
        for k, v in example(padding=math.nan).items()
    }
    order = np.random.default_rng(2).permutation(len(LENGTHS))
    (moved, _), moved_grad = mean_loss(config, {k: v[order] for k, v in wide.items()})
    np.testing.assert_allclose(moved, value, rtol=1e-12)
    np.testing.assert_allclose(moved_grad[:, :5], np.asarray(grad)[order], rtol=1e-12, atol=1e-16)
    assert not moved_grad[:, 5:].any()


@pytest.mark.parametrize("name", CASES)
def test_cuts_of_the_batch_add_up(name):
    """Numerators and denominators of pieces, one of them cut to its lengths."""
    config = for_length(CASES[name], 5)
    arrays = example()
    terms = objective_of(config).terms
    whole = terms(config, log_z=None, **{k: jnp.asarray(v) for k, v in arrays.items()})
    sums = np.zeros(2)
    for rows, columns in (((0, 3), 3), ((3, 6), 5), ((6, 9), 5)):
        piece = {k: v[slice(*rows)] for k, v in arrays.items()}
        piece = {k: jnp.asarray(v[:, :columns] if v.ndim == 2 else v) for k, v in piece.items()}
        total, weight, _ = terms(config, log_z=None, **piece)
        sums += [total.sum(), weight.sum()]
    np.testing.assert_allclose(sums, [whole[0].sum(), whole[1].sum()], rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_nothing_to_learn_from_is_no_loss(name):
    arrays = example()
    arrays["mask"] = np.zeros_like(arrays["mask"])
    (value, metrics), grad = mean_loss(CASES[name], arrays)
    assert value == 0.0 and not grad.any()
    assert all(np.isfinite(x) for x in metrics.values())


def on_policy() -> dict[str, Any]:
    arrays = example(padding=0.0)
    return arrays | {"old_logprobs": arrays["logprobs"]}


def gradient(arrays, **fields):
    return np.asarray(mean_loss(PolicyGradientConfig(**fields), arrays)[1])


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_on_policy_all_surrogates_are_reinforce(aggregation):
    """At ratio 1: PPO's clip, CISPO, GMPO by token, no clip and GSPO-token."""
    arrays = on_policy()
    mask, advantage = jnp.asarray(arrays["mask"]), arrays["reward"][:, None]
    sizes = np.array(LENGTHS)
    weight = {
        "sequence": 1 / (np.maximum(sizes, 1)[:, None] * (sizes > 0).sum()),
        "token": 1 / sizes.sum(),
        "constant": 1 / mask.size,
    }[aggregation]

    def reinforce(logprobs):
        return masked_sum(-advantage * logprobs * weight, mask)

    wanted = jax.grad(reinforce)(jnp.asarray(arrays["logprobs"]))
    for change in (
        {},
        {"clip": "cispo"},
        {"clip": "log"},
        {"clip": "none"},
        {"ratio": "geometric_token"},
    ):
        found = gradient(arrays, aggregation=aggregation, **change)
        np.testing.assert_allclose(found, wanted, rtol=CLOSE, err_msg=str(change))


def test_on_policy_gspo_and_gmpo_are_grpo_and_rloo_is_longer():
    arrays = on_policy()
    grpo = gradient(arrays)
    for change in ({"ratio": "geometric"}, {"ratio": "geometric", "clip": "log"}):
        np.testing.assert_allclose(gradient(arrays, **change), grpo, rtol=CLOSE)
    # The product of all ratios: each token counts whole, not by 1 / n.
    sizes = np.array(LENGTHS)[:, None]
    np.testing.assert_allclose(gradient(arrays, ratio="sequence"), grpo * sizes, rtol=CLOSE)


@pytest.mark.parametrize("clip", ["ppo", "cispo", "log", "none"])
def test_levels_agree_for_responses_of_one_token(clip):
    arrays = example()
    arrays["mask"] = arrays["mask"] & (np.arange(5) == 0)
    token = gradient(arrays, clip=clip)
    for ratio in ("sequence", "geometric", "geometric_token"):
        np.testing.assert_allclose(gradient(arrays, clip=clip, ratio=ratio), token, rtol=CLOSE)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_grpo_is_a_row_of_the_family(aggregation):
    """Off policy, with its penalty, and with weights of tokens and of responses."""
    rng = np.random.default_rng(4)
    arrays = {k: v[np.array(LENGTHS) > 0] for k, v in example().items()}
    grpo = GRPOConfig(clip_low=0.1, clip_high=0.3, kl_coef=0.02, aggregation=aggregation)
    ours = PolicyGradientConfig(**dataclasses.asdict(grpo))
    for shape in (None, (8,), (8, 5)):
        weights = {} if shape is None else {"correction": rng.random(shape)}
        (a, _), a_grad = mean_loss(grpo, arrays | weights)
        (b, _), b_grad = mean_loss(ours, arrays | weights)
        np.testing.assert_allclose(b, a, rtol=CLOSE)
        np.testing.assert_allclose(b_grad, a_grad, rtol=CLOSE)


def test_corrections_weigh_the_surrogate_alone():
    arrays = example(padding=0.0)
    config = PolicyGradientConfig(kl_coef=0.3, entropy_coef=0.2)
    none = arrays | {"correction": np.zeros(len(LENGTHS))}
    still = arrays | {"reward": np.zeros(len(LENGTHS))}
    np.testing.assert_allclose(mean_loss(config, none)[1], mean_loss(config, still)[1], rtol=CLOSE)


def test_expected_gradients_of_penalties():
    """Over all tokens: k1 has none, k2 is KL(pi || ref), k3 is KL(ref || pi), and the bonus."""
    rng = np.random.default_rng(5)
    logits, ref = jnp.asarray(rng.normal(size=6)), jax.nn.log_softmax(rng.normal(size=6))
    chance = jax.nn.softmax(logits)

    def expected(of):
        return jax.grad(lambda x: jnp.sum(chance * of(jax.nn.log_softmax(x))))(logits)

    def exact(of):
        return jax.grad(lambda x: of(jax.nn.log_softmax(x)))(logits)

    k = {name: expected(lambda p, n=name: kl_estimate(p - ref, n)) for name in ("k1", "k2", "k3")}
    np.testing.assert_allclose(k["k1"], np.zeros(6), atol=1e-12)
    forward = exact(lambda p: jnp.sum(jnp.exp(p) * (p - ref)))
    np.testing.assert_allclose(k["k2"], forward, atol=1e-12)
    backward = exact(lambda p: jnp.sum(jnp.exp(ref) * (ref - p)))
    np.testing.assert_allclose(k["k3"], backward, atol=1e-12)

    def bonus(p):
        loss, _ = policy_gradient_loss(
            logprobs=p[:, None],
            ref_logprobs=jnp.zeros((6, 1)),
            old_logprobs=p[:, None],
            reward=jnp.zeros(6),
            mask=jnp.ones((6, 1)),
            config=PolicyGradientConfig(entropy_coef=1.0),
        )
        return loss[:, 0]

    entropy = exact(lambda p: -jnp.sum(jnp.exp(p) * p))
    np.testing.assert_allclose(expected(bonus), -entropy, atol=1e-12)


@pytest.mark.parametrize("name", ["ref_logprobs", "old_logprobs", "mask", "reward", "correction"])
def test_shapes_that_would_broadcast_are_refused(name):
    arrays = {k: jnp.asarray(v) for k, v in example(per_token=True).items()}
    arrays["correction"] = jnp.ones(arrays["mask"].shape)
    arrays[name] = arrays[name][:, :1]
    with pytest.raises(ValueError, match=name):
        policy_gradient_loss(config=PolicyGradientConfig(), **arrays)


def test_reference_is_needed_only_where_it_is_read():
    needs = OBJECTIVES["policy_gradient"].needs_reference
    assert {name for name, config in FAMILY.items() if needs(config)} == {
        *("prorl", "rloo", "reinforce_pp", "reinforce_pp_baseline")
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"ratio": "tokens"},
        {"clip": "both"},
        {"aggregation": "mean"},
        {"reward_norm": "rloo"},
        {"kl_estimator": "k4"},
        {"kl_in": "advantage"},
        {"kl_coef": -1.0},
        {"entropy_coef": -0.1},
        {"clip_low": 1.5},
        {"clip_high": -0.1},
        {"dual_clip": 1.1},
        {"dual_clip": 3.0, "clip": "cispo"},
        {"length": -1},
        {"overlong_buffer": -1},
        {"overlong_penalty": -1.0},
    ],
)
def test_wrong_settings_are_named(fields):
    with pytest.raises(ValueError, match=f"loss.{next(iter(fields))}"):
        PolicyGradientConfig(**fields)
