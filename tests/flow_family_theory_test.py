"""What the flow family does in expectation, and which other objectives it contains, in float64.

Over the small space of `objectives_theory_test`, where an identity holds to rounding or not at all.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.objectives.advantages import group_normalize
from flowrl_jax.objectives.divergence import DIVERGENCES, group_constant
from flowrl_jax.objectives.flowrl import FlowRLConfig, flowrl_loss, log_z_estimate, log_z_target
from flowrl_jax.objectives.policy_gradient import (
    PolicyGradientConfig,
    aggregate_responses,
    policy_gradient_loss,
)
from flowrl_jax.objectives.presets import PRESETS
from tests.objectives_theory_test import (
    BALANCE,
    BETA,
    EXACT,
    MASK,
    SIZES,
    drawn,
    expected_gradient,
    logprobs_of,
    space,
    total,
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def divergence_of(log_policy, log_target, kind):
    """The sum of p f(policy / p), where p need not sum to 1."""
    policy, target = jnp.exp(log_policy), jnp.exp(log_target)
    if kind == "reverse_kl":
        return jnp.sum(policy * (log_policy - log_target))
    if kind == "forward_kl":
        return jnp.sum(target * (log_target - log_policy))
    middle = jnp.log((policy + target) / 2)
    return jnp.sum(policy * (log_policy - middle) + target * (log_target - middle))


@pytest.mark.slow
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("off", [0.0, 0.7])
def test_balance_of_other_divergences(kind, off):
    """Its expected gradient is twice the divergence's from p = pi_ref e^(beta r) / Z.

    For a wrong Z, too: p is then as much too large or too small. Only the reverse KL ignores that.
    """
    policy, reference, _, reward = space()
    weights = jnp.exp(total(logprobs_of(policy)))
    log_target = total(logprobs_of(reference)) + BETA * reward
    log_z = jax.nn.logsumexp(log_target) + off
    arguments = {"log_z": log_z, "reference": reference, "old": policy, "reward": reward}
    config = dataclasses.replace(BALANCE, divergence=kind)
    grad = expected_gradient(policy, weights, config=config, **arguments)
    by_table = jax.grad(
        lambda table: divergence_of(total(logprobs_of(table)), log_target - log_z, kind)
    )(policy)
    np.testing.assert_allclose(grad, 2 * by_table, atol=EXACT)
    assert jnp.abs(grad).max() > 1e-3


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_at_the_target_all_divergences_agree(kind):
    """The residuals are 0 there, and what a group takes for log Z is log Z."""
    _, reference, behaviour, reward = space()
    log_target = total(logprobs_of(reference)) + BETA * reward
    log_z = jax.nn.logsumexp(log_target)
    logprobs = jnp.where(MASK, ((log_target - log_z) / SIZES)[:, None], jnp.nan)
    arrays = {
        "ref_logprobs": logprobs_of(reference),
        "old_logprobs": logprobs_of(behaviour),
        "reward": reward,
        "mask": jnp.asarray(MASK),
        "config": dataclasses.replace(BALANCE, divergence=kind),
    }
    targets = {name: array for name, array in arrays.items() if name != "old_logprobs"}
    found = group_constant(log_z_target(logprobs, **targets), 4, kind)
    np.testing.assert_allclose(found, log_z, rtol=EXACT)
    loss = lambda logprobs: flowrl_loss(log_z=found, logprobs=logprobs, **arrays)[0].sum()  # noqa: E731
    value, grad = jax.value_and_grad(loss)(logprobs)
    np.testing.assert_allclose(value, 0.0, atol=EXACT)
    np.testing.assert_allclose(grad, 0.0, atol=EXACT)


@pytest.mark.slow
def test_flowrl_without_its_square_is_a_row_of_the_policy_gradients():
    """2 beta [REINFORCE with GRPO's advantage + mean (d/n + log Z)^2 / (2 beta)] at ratio 1.

    The control of a comparison: what is left of FlowRL without its squared term has a config.
    """
    policy, _, rows, arrays, size = drawn()
    arrays["reward"] = group_normalize(arrays["reward"], size).astype(jnp.float64)
    mask, log_z = arrays["mask"], jnp.linspace(-1, 1, len(rows))
    old = logprobs_of(policy)[rows]
    rest = PolicyGradientConfig(clip="none")
    assert (rest.reward_norm, rest.aggregation) == ("group", "sequence")

    def flowrl(table):
        losses, _ = flowrl_loss(
            log_z=log_z,
            logprobs=logprobs_of(table)[rows],
            old_logprobs=old,
            config=FlowRLConfig(beta=BETA, weight="two_sided"),
            **arrays,
        )
        return losses.mean()

    def composed(table):
        logprobs = logprobs_of(table)[rows]
        loss, _ = policy_gradient_loss(logprobs=logprobs, old_logprobs=old, config=rest, **arrays)
        part, count = aggregate_responses(loss, mask, rest)
        d = jnp.where(mask, logprobs - arrays["ref_logprobs"], 0.0).sum(axis=1) / SIZES[rows]
        return 2 * BETA * (part.sum() / count.sum() + jnp.mean((d + log_z) ** 2) / (2 * BETA))

    np.testing.assert_allclose(jax.grad(flowrl)(policy), jax.grad(composed)(policy), atol=EXACT)


def test_gvpo_is_group_log_z_with_the_old_policy_as_reference():
    """verl's loss, sample by sample and off policy, up to 2 beta^2 (G - 1) / G.

    Its beta is the inverse of ours, and whether the group's mean carries a gradient (as in the
    paper, arXiv 2504.19599) or not (as in verl) changes nothing.
    """
    policy, behaviour, rows, arrays, size = drawn()
    config: Any = PRESETS["gvpo"]
    old, mask = logprobs_of(behaviour)[rows], arrays["mask"]
    groups = arrays["reward"].reshape(-1, size)
    wanted = groups - groups.mean(axis=1, keepdims=True)

    def ours(table, config, reference):
        given: dict[str, Any] = arrays | {"logprobs": logprobs_of(table)[rows]}
        given |= {"old_logprobs": old, "reward": wanted.reshape(-1), "config": config}
        before: dict[str, Any] = given | {"ref_logprobs": old}
        log_z = log_z_estimate(**before, group_size=size)
        return flowrl_loss(log_z=log_z, **(given | {"ref_logprobs": reference}))[0].mean()

    def published(table, stop):
        d = jnp.where(mask, logprobs_of(table)[rows] - old, 0.0).sum(axis=1).reshape(-1, size)
        mean = d.mean(axis=1, keepdims=True)
        mean = jax.lax.stop_gradient(mean) if stop else mean
        per_group = 0.5 * ((d - mean) / config.beta - wanted) ** 2 / (size - 1)
        return per_group.sum(axis=1).mean()

    grad = jax.grad(ours)(policy, config, jnp.full_like(old, jnp.nan))
    factor = 2 * config.beta**2 * (size - 1) / size
    for stop in (True, False):
        other = factor * jax.grad(published)(policy, stop)
        np.testing.assert_allclose(grad, other, rtol=EXACT, atol=EXACT)
    vargrad: Any = PRESETS["tb_vargrad"]
    with_old = jax.grad(ours)(policy, dataclasses.replace(vargrad, beta=config.beta), old)
    np.testing.assert_allclose(grad, with_old, rtol=EXACT, atol=EXACT)
