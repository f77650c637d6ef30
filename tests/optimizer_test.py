"""The optimiser: schedules by hand, AdamW against a loop, and which group moves how."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowrl_jax.optimizer import OptimizerConfig, make_optimizer, make_schedule

POLICY = np.array([1.0, -2.0, 0.5], np.float32)
HEAD = np.array([0.3, -0.1], np.float32)
# 1 - b2^k, about 1e-3, has lost three digits in float32: updates of 0.1 are right to 6e-6.
FLOAT32: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
GRADS = [
    (np.array([3.0, 0.0, -4.0], np.float32), np.array([12.0, 0.0], np.float32)),  # norms 5, 12
    (np.array([0.01, -0.02, 0.03], np.float32), np.array([-0.02, 0.01], np.float32)),
    (np.array([-1.0, 1.0, 2.0], np.float32), np.array([0.5, 0.5], np.float32)),
]


def adamw(config, rates, start, grads):
    """One group in float64; `grads` already clipped."""
    x, m, v = start.astype(np.float64), 0.0, 0.0
    for k, (rate, grad) in enumerate(zip(rates, grads, strict=True), start=1):
        grad = grad.astype(np.float64)
        m = config.b1 * m + (1 - config.b1) * grad
        v = config.b2 * v + (1 - config.b2) * grad**2
        step = m / (1 - config.b1**k) / (np.sqrt(v / (1 - config.b2**k)) + config.eps)
        x = x - rate * (step + config.weight_decay * x)
    return x


def clipped(grad, norm, limit):
    return grad * min(1.0, limit / norm)


def run(config, *, train_log_z=True, updates_per_rollout=1):
    optimizer = make_optimizer(config, 100, updates_per_rollout, train_log_z=train_log_z)
    params = {"policy": {"w": jnp.asarray(POLICY)}, "log_z": {"w": jnp.asarray(HEAD)}}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for policy, head in GRADS:
        params, state = step(params, state, {"policy": {"w": policy}, "log_z": {"w": head}})
    return params["policy"]["w"], params["log_z"]["w"]


@pytest.mark.slow
def test_moments_in_bfloat16_follow_those_in_float32():
    """The second moment, too, which rounding to the nearest would leave where it is."""
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, moments="bfloat16")
    rng = np.random.default_rng(0)
    grads = rng.normal(0, 0.1, (300, 1000)).astype(np.float32)
    grads[150:] *= 0.1  # a mean that has to come down slowly

    def moments(config):
        optimizer = make_optimizer(config, 100, 1, train_log_z=True)
        params = {"policy": {"w": jnp.ones(1000)}, "log_z": {"w": jnp.ones(1)}}
        state = optimizer.init(params)

        @jax.jit
        def step(state, grad):
            updates = {"policy": {"w": grad}, "log_z": {"w": jnp.ones(1)}}
            return optimizer.update(updates, state, params)[1]

        for grad in grads:
            state = step(state, grad)
        return [x for x in jax.tree.leaves(state) if x.shape == (1000,)]

    rounded, exact = moments(config), moments(dataclasses.replace(config, moments="float32"))
    assert [x.dtype for x in rounded] == [jnp.bfloat16] * 2
    mu, nu = (np.asarray(x, np.float32) for x in rounded)
    # One in 256 is bfloat16's last place; 1000 of the second moment's errors average out.
    np.testing.assert_allclose(mu, exact[0], atol=0.02 * np.abs(exact[0]).max())
    np.testing.assert_allclose(nu, exact[1], rtol=0.15)
    np.testing.assert_allclose(nu.mean(), exact[1].mean(), rtol=0.005)


@pytest.mark.parametrize("jointly", [True, False])
def test_two_groups_of_adamw(jointly):
    """Own learning rates; one norm over both groups, as released, or one over each."""
    config = OptimizerConfig(
        learning_rate=0.1,
        log_z_learning_rate=0.02,
        warmup_steps=2,
        weight_decay=0.3,
        clip_norm=1.0,
        clip_jointly=jointly,
    )
    policy, head = [], []
    for p, h in GRADS:
        norms = np.linalg.norm(p), np.linalg.norm(h)
        if jointly:
            norms = (math.hypot(*norms),) * 2
        policy.append(clipped(p, norms[0], 1.0))
        head.append(clipped(h, norms[1], 1.0))
    warm = np.array([0.5, 1.0, 1.0])
    found = run(config)
    expected = adamw(config, 0.1 * warm, POLICY, policy), adamw(config, 0.02 * warm, HEAD, head)
    np.testing.assert_allclose(found[0], expected[0], **FLOAT32)
    np.testing.assert_allclose(found[1], expected[1], **FLOAT32)


def test_released_head_shares_the_policys_rate():
    """Also: a clip norm of 0 clips nothing."""
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, clip_norm=0.0)
    found = run(config)
    for ours, start, group in ((found[0], POLICY, 0), (found[1], HEAD, 1)):
        expected = adamw(config, [0.1] * 3, start, [g[group] for g in GRADS])
        np.testing.assert_allclose(ours, expected, **FLOAT32)


def test_a_table_is_not_the_optimisers():
    """Neither its gradient nor weight decay moves it."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    _, table = run(config, train_log_z=False)
    np.testing.assert_array_equal(table, HEAD)


def test_nothing_to_learn_for_log_z():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), 10, 1, train_log_z=False)
    params = {"policy": jnp.ones(2), "log_z": {}}
    updates: Any = optimizer.update(params, optimizer.init(params), params)[0]
    assert updates["log_z"] == {} and (updates["policy"] < 0).all()


def cosine(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1.0] * 6),
        ("constant", 4, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ("linear", 2, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", 2, [0.5, 1.0, *map(cosine, (0.0, 0.25, 0.5, 0.75))]),
        ("linear", 0, [1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ],
)
@pytest.mark.parametrize("updates", [1, 3])
def test_schedules(schedule, warmup, expected, updates):
    """Rates of 6 rollout steps, constant within each, and never beyond the end of the run."""
    config = OptimizerConfig(schedule=schedule, warmup_steps=warmup)
    rate: Any = make_schedule(config, 2e-3, 6, updates)
    found = [float(rate(jnp.asarray(count))) for count in range(6 * updates)]
    np.testing.assert_allclose(found, 2e-3 * np.repeat(expected, updates), rtol=1e-5)
    if schedule != "constant":
        ends = [float(rate(jnp.asarray(count))) for count in (6 * updates, 100 * updates)]
        np.testing.assert_allclose(ends, 0.0, atol=1e-9)


def test_first_step_moves():
    """The released code's first step has rate 0: a whole rollout is thrown away."""
    assert make_schedule(OptimizerConfig(), 1e-6, 100, 16)(0) == pytest.approx(1e-7)


@pytest.mark.parametrize(
    ("field", "value"),
    [("schedule", "step"), ("learning_rate", -1.0), ("log_z_learning_rate", -1.0),
     ("warmup_steps", -1), ("weight_decay", -0.1), ("clip_norm", -1.0)],
)  # fmt: skip
def test_wrong_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"optimizer.{field}"):
        OptimizerConfig(**{field: value})


def test_defaults_are_the_released_ones():
    config = OptimizerConfig()
    assert (config.learning_rate, config.warmup_steps, config.schedule) == (1e-6, 10, "constant")
    assert (config.weight_decay, config.clip_norm, config.clip_jointly) == (0.1, 1.0, True)
    assert (config.b1, config.b2, config.eps) == (0.9, 0.999, 1e-8)
    assert config.log_z_learning_rate == 0.0  # the policy's
