"""Advantages of the policy-gradient family against loops."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.objectives import for_length
from flowrl_jax.objectives.advantages import (
    group_center,
    group_normalize,
    leave_one_out,
    overlong_punishment,
    whiten,
)
from flowrl_jax.objectives.flowrl import FlowRLConfig, flowrl_loss, log_z_target
from flowrl_jax.objectives.log_z import group_mean
from flowrl_jax.objectives.policy_gradient import (
    PolicyGradientConfig,
    aggregate_responses,
    policy_gradient_advantages,
    policy_gradient_loss,
)
from flowrl_jax.objectives.presets import PRESETS

GROUP = 3
LENGTHS = [1, 4, 5, 2, 5, 3, 5, 5, 2]
TRUNCATED = [False, False, True, False, True, False, True, True, False]
# A group of all kinds, one of equal rewards, one that is nearly all wrong.
REWARDS = [1.0, 0.0, 0.25, 0.7, 0.7, 0.7, 0.0, 1.0, 0.0]


def rollout(padding: float = math.nan, columns: int = 5) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    mask = np.arange(5) < np.array(LENGTHS)[:, None]
    old = -rng.exponential(1.0, mask.shape)
    ref = old + rng.normal(0, 0.5, mask.shape)
    wide = ((0, 0), (0, columns - 5))
    return {
        "old_logprobs": np.pad(np.where(mask, old, padding), wide, constant_values=padding),
        "ref_logprobs": np.pad(np.where(mask, ref, padding), wide, constant_values=padding),
        "mask": np.pad(mask, wide),
        "truncated": np.array(TRUNCATED),
    }


def advantages(config, reward=REWARDS, arrays=None):
    arrays = {k: jnp.asarray(v) for k, v in (arrays or rollout()).items()}
    reward = jnp.asarray(reward, jnp.float32)
    found, mask = policy_gradient_advantages(config, reward, group_size=GROUP, **arrays)
    assert found.dtype == jnp.float32 and mask.dtype == bool
    assert found.ndim == (2 if config.token_advantages else 1)
    return np.asarray(found), np.asarray(mask)


def by_hand(config, reward, arrays):
    """One response at a time, `[B, T]` or `[B]`."""
    mask, count = arrays["mask"], len(reward)
    limit = mask.shape[1]
    reward, returns = list(reward), np.zeros(mask.shape)
    for i in range(count):
        n = mask[i].sum()
        if config.overlong_buffer:
            over = n - (limit - config.overlong_buffer)
            reward[i] -= config.overlong_penalty * max(over, 0) / config.overlong_buffer
        costs = []
        for t in range(n):
            d = arrays["old_logprobs"][i, t] - arrays["ref_logprobs"][i, t]
            k = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) + d - 1}[config.kl_estimator]
            costs.append(config.kl_coef * k if config.kl_in == "reward" else 0.0)
        for t in range(n):
            returns[i, t] = reward[i] - sum(costs[t:])
        if config.reward_norm != "batch":
            reward[i] -= sum(costs)
    result = np.zeros(count)
    for i in range(count):
        first = i // GROUP * GROUP
        group = reward[first : first + GROUP]
        others = [reward[j] for j in range(first, first + GROUP) if j != i]
        mean = sum(group) / GROUP
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / (GROUP - 1))
        result[i] = {
            "group": (reward[i] - mean) / (deviation + 1e-6),
            "leave_one_out": reward[i] - sum(others) / len(others),
            "none": reward[i],
        }.get(config.reward_norm, reward[i] - mean)
    if not config.token_advantages:
        return result
    values = returns if config.reward_norm == "batch" else result[:, None] * np.ones(limit)
    cut = np.array(TRUNCATED)[:, None] & config.mask_truncated
    counted = values[mask & ~cut]
    scale = math.sqrt(counted.var(ddof=1) + 1e-8)
    return np.where(mask & ~cut, (values - counted.mean()) / scale, 0.0)


NORMS = ("group", "center", "leave_one_out", "batch", "center_batch", "none")
CHANGES = {
    "plain": {},
    "penalty": {"kl_coef": 0.3, "kl_in": "reward", "kl_estimator": "k1"},
    "k2, in tokens": {
        **{"kl_coef": 0.3, "kl_in": "reward", "kl_estimator": "k2"},
        **{"overlong_buffer": 3, "overlong_penalty": 0.5, "mask_truncated": True},
    },
    "k3, by the loss": {"kl_coef": 0.3, "kl_estimator": "k3", "overlong_buffer": 5},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("norm", NORMS)
def test_advantages_against_a_loop(norm, change):
    config = PolicyGradientConfig(reward_norm=norm, **CHANGES[change])
    found, mask = advantages(config)
    arrays = rollout()
    cut = np.array(TRUNCATED)[:, None] & config.mask_truncated
    np.testing.assert_array_equal(mask, arrays["mask"] & ~cut)
    expected = by_hand(config, REWARDS, arrays)
    if config.token_advantages and not config.mask_truncated:
        assert not found[~arrays["mask"]].any()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_padding_and_order_of_groups_do_not_matter(norm):
    config = PolicyGradientConfig(reward_norm=norm, **CHANGES["penalty"])
    found, _ = advantages(config)
    order = np.array([6, 7, 8, 0, 1, 2, 3, 4, 5])
    arrays = {k: v[order] for k, v in rollout(padding=-2.0, columns=8).items()}
    moved, mask = advantages(config, np.array(REWARDS)[order], arrays)
    if moved.ndim == 2:
        assert not moved[~mask].any()
        moved = moved[:, :5]
    np.testing.assert_allclose(moved, found[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["group", "center", "leave_one_out", "center_batch"])
def test_groups_without_variance_have_no_advantage(norm):
    reward = np.repeat([0.1, 1 / 3, 0.7], GROUP)
    found, _ = advantages(PolicyGradientConfig(reward_norm=norm), reward)
    assert not found.any()


@pytest.mark.parametrize("value", [0.1, 1.0, -1 / 3])
def test_equal_returns_are_exactly_zero(value):
    assert not advantages(PolicyGradientConfig(reward_norm="batch"), np.full(9, value))[0].any()


@pytest.mark.parametrize("norm", NORMS)
def test_where_all_are_cut_nothing_is_learned(norm):
    arrays = rollout() | {"truncated": np.ones(9, bool)}
    config = PolicyGradientConfig(reward_norm=norm, mask_truncated=True)
    found, mask = advantages(config, arrays=arrays)
    assert not mask.any() and np.isfinite(found).all()


def test_leave_one_out_is_the_mean_baseline_enlarged():
    """G / (G - 1) times it; a group of one keeps its reward."""
    reward = jnp.asarray(REWARDS[:8])
    for size in (2, 4, 8):
        wanted = group_center(reward, size) * size / (size - 1)
        np.testing.assert_allclose(leave_one_out(reward, size), wanted, rtol=1e-6)
    np.testing.assert_array_equal(leave_one_out(reward, 1), reward)
    with pytest.raises(ValueError, match="groups"):
        leave_one_out(reward, 3)


@pytest.mark.slow
def test_rloo_with_its_penalty_is_trajectory_balance():
    """On policy, with the mean of the group for log Z: sample by sample, up to 2 beta (G-1)/G."""
    beta, arrays = 4.0, rollout(padding=0.0)
    mask, ref = jnp.asarray(arrays["mask"]), jnp.asarray(arrays["ref_logprobs"])
    old, reward = jnp.asarray(arrays["old_logprobs"]), jnp.asarray(REWARDS)
    rest = {"ref_logprobs": ref, "old_logprobs": old, "mask": mask}
    balance = FlowRLConfig(beta=beta, weight="unit", length_normalize=False, reward_norm="none")
    target = log_z_target(old, ref, reward, mask, balance)

    def flow(logprobs):
        log_z = group_mean(target, GROUP)
        return flowrl_loss(log_z=log_z, logprobs=logprobs, reward=reward, config=balance, **rest)[
            0
        ].mean()

    rloo = dataclasses.replace(PRESETS["rloo"], kl_coef=1.0 / beta)
    advantage, _ = advantages(rloo, arrays=arrays)

    def rivals(logprobs):
        loss, _ = policy_gradient_loss(
            logprobs=logprobs, reward=jnp.asarray(advantage), config=rloo, **rest
        )
        total, weight = aggregate_responses(loss, mask, rloo)
        return total.sum() / weight.sum()

    factor = 2 * beta * (GROUP - 1) / GROUP
    np.testing.assert_allclose(
        jax.grad(flow)(old), factor * jax.grad(rivals)(old), rtol=1e-4, atol=1e-6
    )


def test_the_family_s_group_norms_are_grpo_s():
    reward = jnp.asarray(REWARDS)
    for norm, of in (("group", group_normalize), ("center", group_center)):
        found, _ = advantages(PolicyGradientConfig(reward_norm=norm))
        np.testing.assert_array_equal(found, of(reward, GROUP))


def test_whitened_tokens_have_mean_0_and_variance_1():
    rng = np.random.default_rng(3)
    mask = rng.random((7, 9)) < 0.6
    found = np.asarray(whiten(jnp.asarray(rng.normal(5, 3, mask.shape), jnp.float32), mask))[mask]
    assert abs(found.mean()) < 1e-6
    assert found.var(ddof=1) == pytest.approx(1.0, rel=1e-5)


def test_overlong_punishment_in_tokens():
    """The published setting: 0 up to 16,384 tokens, -1 at 20,480."""
    length = jnp.array([1, 16384, 17408, 18432, 20480])
    found = overlong_punishment(length, 20480, 4096)
    np.testing.assert_allclose(found, [0.0, 0.0, -0.25, -0.5, -1.0])


def test_the_constant_is_as_long_as_a_response_may_be():
    assert for_length(PRESETS["dr_grpo"], 77).length == 77
    assert for_length(dataclasses.replace(PRESETS["dr_grpo"], length=5), 77).length == 5
    assert for_length(FlowRLConfig(), 77) == FlowRLConfig()
