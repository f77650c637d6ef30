"""Where the flow family ends and what moves it there, over every response, in float64.

The space is that of `objectives_theory_test`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowrl_jax.exact.fixed_point import expected_normalized, fixed_point
from flowrl_jax.objectives.flowrl import FlowRLConfig, flowrl_loss, log_z_target
from tests.objectives_theory_test import (
    BETA,
    MASK,
    RESPONSES,
    SIZES,
    expected_gradient,
    kl_to_target,
    logprobs_of,
    space,
    total,
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def descended(log_z, reference, reward, config, steps=6000):
    """A table after Adam on the exact expected gradient, its rate falling to 0."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))

    def step(carry, _):
        table, state = carry
        weights = jnp.exp(total(logprobs_of(table)))
        arguments = {"log_z": log_z, "reference": reference, "old": table, "reward": reward}
        grad = expected_gradient(table, weights, config=config, **arguments)
        updates, state = optimizer.update(grad, state, table)
        return (optax.apply_updates(table, updates), state), None

    run = jax.jit(lambda start: jax.lax.scan(step, (start, optimizer.init(start)), None, steps))
    return run(reference)[0][0]


@pytest.mark.parametrize("log_z", [0.0, 2.5])
def test_a_wrong_log_z_that_is_held_bends_the_length_tilted_law(log_z):
    """`pi_ref e^(n (beta r - zeta) - lambda n^2)`, lambda by normalisation."""
    _, reference, _, reward = space()
    config = FlowRLConfig(beta=BETA, weight="unit", reward_norm="none")
    log_policy = total(logprobs_of(descended(log_z, reference, reward, config)))
    straight = total(logprobs_of(reference)) + SIZES * (BETA * reward - log_z)
    low, high = -5.0, 5.0
    for _ in range(100):
        middle = (low + high) / 2
        too_much = jnp.exp(straight - middle * SIZES**2).sum() > 1.0
        low, high = (middle, high) if too_much else (low, middle)
    wanted = jnp.exp(straight - low * SIZES**2)
    variation = 0.5 * jnp.abs(jnp.exp(log_policy) - wanted).sum()
    assert variation < 5e-4  # what Adam's 6,000 steps leave; without lambda it is above 0.01
    assert abs(low) > 0.01
    free = fixed_point(
        config, np.asarray(total(logprobs_of(reference))), np.asarray(reward), SIZES, group_size=8
    )
    assert 0.5 * np.abs(np.exp(free.logprobs) - wanted).sum() > 0.01


@pytest.mark.parametrize("group_size", [4, 8])
def test_group_normalised_rewards_shift_the_log_odds(group_size):
    """Of being right, by beta times how far a right answer is ahead in its group, at the end."""
    _, reference, _, reward = space()
    log_reference = np.asarray(total(logprobs_of(reference)))
    right = np.asarray(reward) > 0.3
    config = FlowRLConfig(beta=0.5, length_normalize=False)
    found = fixed_point(config, log_reference, right.astype(float), SIZES, group_size=group_size)
    before, after = (np.exp(x)[right].sum() for x in (log_reference, found.logprobs))
    worst, best = expected_normalized(
        np.array([0.0, 1.0]), np.array([1 - after, after]), group_size
    )
    odds = lambda p: np.log(p / (1 - p))  # noqa: E731
    np.testing.assert_allclose(odds(after) - odds(before), 0.5 * (best - worst), rtol=1e-6)
    # The shares among right answers are the reference's.
    among = np.exp(found.logprobs - log_reference)[right]
    np.testing.assert_allclose(among, among[0], rtol=1e-9)


def test_the_group_s_own_mean_makes_beta_larger():
    """Its estimate of log Z holds a share 1 / G of each response's own log-ratio."""
    _, reference, _, reward = space()
    log_reference = np.asarray(total(logprobs_of(reference)))
    right = (np.asarray(reward) > 0.3).astype(float)
    config = FlowRLConfig(beta=0.5, length_normalize=False)
    own = dataclasses.replace(config, log_z=dataclasses.replace(config.log_z, kind="group"))
    larger = dataclasses.replace(config, beta=0.5 * 8 / 7)
    one, two = (fixed_point(x, log_reference, right, SIZES, group_size=8) for x in (own, larger))
    np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-12)


def test_without_truncated_responses_zero_loss_says_nothing_of_their_mass():
    """Two policies that cut a thousandth and a fifth of all responses: both have no loss."""
    _, reference, _, reward = space()
    ended = np.array([response[-1] == 0 for response in RESPONSES])
    log_target = np.asarray(total(logprobs_of(reference)) + BETA * reward)
    log_target = np.where(ended, log_target, -np.inf)
    log_target -= np.log(np.exp(log_target).sum())
    mask = jnp.asarray(MASK & ended[:, None])
    losses = []
    for cut in (0.001, 0.2):
        log_policy = np.where(ended, log_target + np.log1p(-cut), np.log(cut / (~ended).sum()))
        assert np.exp(log_policy).sum() == pytest.approx(1.0)
        logprobs = jnp.where(MASK, (log_policy / SIZES)[:, None], jnp.nan)
        config = FlowRLConfig(beta=BETA, weight="unit", length_normalize=False)
        arrays = {"ref_logprobs": logprobs_of(reference), "reward": reward, "config": config}
        log_z = log_z_target(logprobs=logprobs, mask=mask, **arrays)[int(np.argmax(ended))]
        loss, _ = flowrl_loss(
            log_z=jnp.full(len(RESPONSES), log_z),
            logprobs=logprobs,
            old_logprobs=logprobs,
            mask=mask,
            **arrays,
        )
        losses.append(np.abs(loss[ended]).max())
        kept = flowrl_loss(
            log_z=jnp.full(len(RESPONSES), log_z),
            logprobs=logprobs,
            old_logprobs=logprobs,
            mask=jnp.asarray(MASK),
            **arrays,
        )[0]
        assert np.abs(kept[~ended]).max() > 0.01  # kept as leaves they do have one
    np.testing.assert_allclose(losses, 0.0, atol=1e-20)


def test_clipped_weights_make_log_z_matter():
    """Far off policy the clipped gradient is biased, the more so if log Z is off; capped, not."""
    policy, reference, behaviour, reward = space()
    weights = jnp.exp(total(logprobs_of(behaviour)))
    wanted = 2 * jax.grad(lambda table: kl_to_target(table, reference, reward)[0])(policy)
    mean = jnp.sum(
        jnp.exp(total(logprobs_of(policy)))
        * (BETA * reward - total(logprobs_of(policy)) + total(logprobs_of(reference)))
    )

    def error(weight, log_z):
        config = FlowRLConfig(beta=BETA, weight=weight, length_normalize=False)
        arguments = {"log_z": log_z, "reference": reference, "old": behaviour, "reward": reward}
        grad = expected_gradient(policy, weights, config=config, **arguments)
        return float(jnp.linalg.norm(grad - wanted) / jnp.linalg.norm(wanted))

    assert 0.02 < error("two_sided", mean) < error("two_sided", mean + 3.0)
    assert error("max", mean) < 0.02
    assert error("max", mean + 3.0) < 0.1 * error("two_sided", mean + 3.0)
