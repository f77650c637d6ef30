"""Resets of the reference: when they are due, and what becomes of the optimiser."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowrl_jax.errors import InputError
from flowrl_jax.evaluator import metric_names
from flowrl_jax.optimizer import OptimizerConfig, make_optimizer, make_schedule, reset_moments
from flowrl_jax.reference import ReferenceConfig, Resets, anchored, check_metric
from flowrl_jax.sampling_config import EvalConfig
from flowrl_jax.types import TrainState
from tests.tiny_runs import tiny_run

METRIC = "eval/pass_at_1"


def resets_at(config: ReferenceConfig, values: list[float], *, stopped_after: int = 0) -> list[int]:
    """Steps after which a run whose evaluations, one a step, give these values is reset."""
    resets, found = Resets(config), []
    for step, value in enumerate(values, start=1):
        resets.evaluated({METRIC: value})
        if resets.due(step):
            resets.done()
            found.append(step)
        if step == stopped_after:
            resets = Resets(config, json.loads(json.dumps(resets.record())))
    assert resets.count == len(found)
    return found


def test_nothing_is_due_by_default():
    config = ReferenceConfig()
    assert not config.moves
    assert resets_at(config, [0.5] * 20) == []


def test_by_the_clock():
    assert resets_at(ReferenceConfig(reset_every=3), [0.0] * 10) == [3, 6, 9]


PLATEAUS = {
    # The first value, and any that is greater than all before it, is a new best.
    "rising": ([0.1, 0.2, 0.3, 0.4, 0.5], []),
    "equal is no improvement": ([0.1, 0.1, 0.1, 0.2, 0.2, 0.2], [3, 6]),
    "falling": ([0.5, 0.4, 0.3], [3]),
    "a new best starts the count anew": ([0.1, 0.1, 0.2, 0.1, 0.3, 0.3, 0.3], [7]),
    # After a reset at 0.3 the value 0.4 is progress, though 0.5 was reached once.
    "what was best before a reset is forgotten": ([0.5, 0.4, 0.3, 0.4, 0.4, 0.2], [3, 6]),
}


@pytest.mark.parametrize("case", PLATEAUS)
def test_on_a_plateau(case):
    values, expected = PLATEAUS[case]
    config = ReferenceConfig(on_plateau=2)
    for stopped_after in range(len(values) + 1):  # 0: not at all
        assert resets_at(config, values, stopped_after=stopped_after) == expected


def test_either_resets():
    config = ReferenceConfig(reset_every=4, on_plateau=2)
    assert resets_at(config, [0.1, 0.1, 0.1, 0.2, 0.1, 0.1, 0.3, 0.4]) == [3, 4, 6, 8]


def test_the_reason_is_said():
    resets = Resets(ReferenceConfig(on_plateau=1))
    for value in (0.25, 0.125):
        resets.evaluated({METRIC: value})
    assert resets.due(7) == "eval/pass_at_1 has not exceeded 0.25 in 1 evaluations"
    assert Resets(ReferenceConfig(reset_every=7)).due(7) == "as at every 7 steps"


@pytest.mark.slow
@pytest.mark.parametrize("jointly, moments", [(True, "float32"), (False, "bfloat16")])
def test_moments_are_new_and_the_schedule_goes_on(jointly, moments):
    """The step after a reset is the first one of Adam, at the rate of the fifth of the schedule."""
    config = OptimizerConfig(
        learning_rate=0.1, schedule="cosine", warmup_steps=3, weight_decay=0.0, clip_norm=0.0,
        clip_jointly=jointly, moments=moments,
    )  # fmt: skip
    optimizer = make_optimizer(config, 10, 1, train_log_z=True)
    params = {"policy": {"w": jnp.ones(3)}, "log_z": {"b": jnp.ones(2)}}
    state = optimizer.init(params)
    random = np.random.default_rng(0)
    for _ in range(4):
        grads = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), params)
        _, state = optimizer.update(grads, state, params)
    state = reset_moments(optimizer, state, params)
    kinds = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
    adams = [x for x in kinds if isinstance(x, optax.ScaleByAdamState)]
    assert len(adams) == 2
    assert all(not np.any(np.asarray(x, np.float32)) for x in jax.tree.leaves(adams))
    grads = {"policy": {"w": jnp.array([2.0, -0.5, 0.1])}, "log_z": {"b": jnp.array([1.0, -3.0])}}
    updates, _ = optimizer.update(grads, state, params)
    rate = float(make_schedule(config, 0.1, 10, 1)(4))
    assert rate < 0.1
    # Adam's first step is the gradient's sign.
    np.testing.assert_allclose(updates["policy"]["w"], -rate * np.array([1, -1, 1]), rtol=1e-5)
    np.testing.assert_allclose(updates["log_z"]["b"], -rate * np.array([1, -1]), rtol=1e-5)


def test_a_state_with_its_reference_gives_back_the_state():
    state = TrainState(*(jnp.full((), i) for i in range(4)))
    both = anchored(state, {"w": jnp.ones(2)})
    assert both.trained == state
    # As checkpoints name them: what reads a policy from one finds it at the same place.
    paths = [p for p, _ in jax.tree_util.tree_flatten_with_path(both)[0]]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    assert names == [field.name for field in dataclasses.fields(TrainState)] + ["reference/w"]


def test_metrics_of_evaluations_are_known_beforehand():
    names = metric_names(EvalConfig(k=4, samples=8))
    assert {"eval/pass_at_1", "eval/pass_at_4", "eval/mean_length"} <= set(names)
    check_metric(ReferenceConfig(), names)
    with pytest.raises(InputError, match="reference.metric='eval/pass_at_2': unknown; did you"):
        check_metric(ReferenceConfig(metric="eval/pass_at_2"), names)


def test_a_reset_needs_a_reference():
    with pytest.raises(InputError, match="the objective has no reference policy to reset"):
        tiny_run("dapo", reference__reset_every=5)
    assert tiny_run("prorl", reference__reset_every=5).reference.moves


@pytest.mark.parametrize("field", ["reset_every", "on_plateau"])
def test_wrong_settings(field):
    with pytest.raises(InputError, match=f"reference.{field}=-1 must not be negative"):
        ReferenceConfig(**{field: -1})
