"""The value head in the programs over a mesh: gradient, buckets, scores, state and optimiser."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowrl_jax.buckets import make_scores, make_update
from flowrl_jax.learner import Learner
from flowrl_jax.learning_batch import make_learning_batch
from flowrl_jax.models.transformer import Transformer
from flowrl_jax.models.value import ValueHead, init_value
from flowrl_jax.objectives.ppo import PPOConfig, ppo_advantages, ppo_returns
from flowrl_jax.objectives.presets import PRESETS
from flowrl_jax.objectives.subtb import SubTBConfig
from flowrl_jax.objectives.values import ValueConfig
from flowrl_jax.optimizer import OptimizerConfig, make_optimizer
from flowrl_jax.sharding import make_layout
from flowrl_jax.train_step import abstract_state, init_state, make_score, make_train_step
from flowrl_jax.types import Rollout
from tests.tiny import MESH_CONFIG, make_learner, make_state, teacher_forced, train_batch

SHARED = ValueConfig(detach=False, zero_init=False)
PPO = PPOConfig(value_coef=0.5, entropy_coef=0.01, value=SHARED)
SUBTB = SubTBConfig(lam=0.9, value=SHARED)
KEY = jax.random.key(5)
ROWS, LENGTH = 16, 7


def batch_for(objective) -> Any:
    """Rows with what the objective's advantages and returns would have been."""
    batch = train_batch(MESH_CONFIG, ROWS, 2, response=LENGTH)
    if isinstance(objective, SubTBConfig):
        return batch
    rng = np.random.default_rng(7)
    draw = lambda: rng.normal(0, 1, batch.response_mask.shape).astype(np.float32)  # noqa: E731
    return dataclasses.replace(batch, reward=draw(), old_values=draw(), returns=draw())


def learner_of(objective, mesh=(1, 1, 1), buckets=(), remat="none", **changes) -> Learner:
    config = dataclasses.replace(MESH_CONFIG, remat=remat)
    learner = make_learner(config, objective, mesh=mesh, **changes)
    layout = make_layout(learner.layout.mesh, {"kv_heads": config.num_kv_heads})
    settings = dataclasses.replace(learner.config, length_buckets=buckets)
    return dataclasses.replace(learner, layout=layout, config=settings)


def gradient(learner, batch=None) -> Any:
    """Gradient and metrics of one step, on the host."""
    batch = batch_for(learner.objective) if batch is None else batch
    lengths = np.asarray(batch.response_mask).sum(axis=1)
    batch = learner.layout.put_batch(batch)
    state, metrics = make_update(learner, 8)(make_state(learner), batch, lengths, KEY)
    return jax.device_get((state.opt_state, metrics))


@cache
def alone(objective):
    return gradient(learner_of(objective))


def assert_same(ours, other):
    """Gradients to 1e-5 of each parameter's largest, and every metric."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours[0]), jax.tree.leaves(other[0]), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert np.abs(b).max() > 0, name
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-8, err_msg=name)
    assert ours[1].keys() == other[1].keys()
    for name, value in other[1].items():
        np.testing.assert_allclose(ours[1][name], value, rtol=1e-5, atol=1e-5, err_msg=name)


CUTS = {
    "ppo over fsdp and tensor, added in place": (PPO, (2, 2, 2), {"remat": "full"}),
    "subtb over fsdp and tensor": (SUBTB, (1, 4, 2), {}),
    "ppo in buckets": (PPO, (1, 1, 1), {"buckets": (3, 5)}),
    "subtb in buckets over a mesh": (SUBTB, (1, 2, 1), {"buckets": (3, 5)}),
    "ppo over context": (PPO, (1, 2, 1, 2), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CUTS)
def test_the_step_does_not_depend_on_how_it_is_cut(name):
    objective, mesh, changes = CUTS[name]
    learner = learner_of(objective, mesh, micro_batch_size=8, **changes)
    assert_same(gradient(learner), alone(objective))


def textbook(params, batch, objective) -> Any:
    """PPO's loss from all logits and hidden states at once, as the docs write it."""
    mask, width = jnp.asarray(batch.response_mask), batch.prompt_mask.shape[1]
    both = np.concatenate([batch.prompt_mask, batch.response_mask], 1)
    model = Transformer(MESH_CONFIG)
    hidden: Any = model.apply({"params": params["policy"]}, batch.tokens, both)
    unembedding: Any = model.apply({"params": params["policy"]}, method="unembedding")
    logits = jax.nn.log_softmax(hidden[:, width - 1 : -1] @ unembedding / 0.9)
    logprobs = jnp.take_along_axis(logits, batch.tokens[:, width:, None], 2)[..., 0]
    head = params["value"]
    x = hidden[:, width - 1 : -1] @ head["hidden_0"]["kernel"] + head["hidden_0"]["bias"]
    x = jax.nn.gelu(x, approximate=False)
    values = (x @ head["output"]["kernel"] + head["output"]["bias"])[..., 0]
    rho = jnp.exp(logprobs - batch.old_logprobs)
    loss = jnp.maximum(-batch.reward * rho, -batch.reward * jnp.clip(rho, 0.8, 1.2))
    near = batch.old_values + jnp.clip(values - batch.old_values, -0.5, 0.5)
    square = jnp.maximum((values - batch.returns) ** 2, (near - batch.returns) ** 2)
    loss += 0.5 * objective.value_coef * square + objective.entropy_coef * logprobs**2 / 2
    return jnp.where(mask, loss, 0.0).sum() / mask.sum()


@pytest.mark.slow
def test_against_the_textbook():
    state, batch = make_state(learner_of(PPO)), batch_for(PPO)
    run = jax.jit(jax.value_and_grad(lambda params: textbook(params, batch, PPO)))
    loss, grads = run(state.params)
    found, metrics = alone(PPO)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["value_grad_norm"], optax.tree.norm(grads["value"]), rtol=1e-4
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max() + 1e-8)


@pytest.mark.slow
def test_a_detached_head_leaves_the_policy_alone():
    """Other returns move the head and not the policy; what lies in the padding moves neither."""
    detached = dataclasses.replace(PPO, value=ValueConfig())
    batch = batch_for(PPO)
    outside = ~batch.response_mask
    names = ("old_logprobs", "ref_logprobs", "reward", "old_values", "returns")
    noise = {k: np.where(outside, np.nan, getattr(batch, k)) for k in names}
    learner = learner_of(detached)
    step = make_train_step(learner, 8)
    run = lambda batch: jax.device_get(step(make_state(learner), batch, KEY)[0].opt_state)  # noqa: E731
    found, padded = run(batch), run(dataclasses.replace(batch, **noise))
    jax.tree.map(np.testing.assert_array_equal, padded, found)
    other = run(dataclasses.replace(batch, returns=batch.returns + 1.0))
    jax.tree.map(np.testing.assert_array_equal, other["policy"], found["policy"])
    assert np.abs(other["value"]["output"]["bias"] - found["value"]["output"]["bias"]) > 0.01
    theirs = alone(PPO)[0]["policy"]["final_norm"]["scale"]
    assert np.abs(theirs - found["policy"]["final_norm"]["scale"]).max() > 1e-3


@pytest.mark.slow
def test_scores_give_both_in_order():
    """Whole, in micro-batches over a mesh, and in buckets."""
    learner = learner_of(PPO, (1, 2, 1), micro_batch_size=4)
    batch, state = batch_for(PPO), make_state(learner)
    given = (batch.tokens, batch.prompt_mask, batch.response_mask)
    policy, head = state.params["policy"], state.params["value"]
    logprobs, values = make_score(learner)(policy, *given, head)
    expected = teacher_forced(MESH_CONFIG, policy, *given, 0.9)
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)
    both = np.concatenate(given[1:], 1)
    hidden: Any = Transformer(MESH_CONFIG).apply({"params": policy}, batch.tokens, both)
    every: Any = ValueHead(SHARED).apply({"params": head}, hidden)
    width = batch.prompt_mask.shape[1]
    for i, t in np.argwhere(batch.response_mask):
        np.testing.assert_allclose(values[i, t], every[i, width - 1 + t], atol=1e-5)
    assert not np.asarray(values)[~batch.response_mask].any()
    lengths = batch.response_mask.sum(axis=1)
    cut = make_scores(learner_of(PPO, (1, 2, 1), buckets=(3, 5), micro_batch_size=4))
    short = cut(policy, *given, lengths, head)
    np.testing.assert_allclose(short[0], logprobs, atol=1e-5)
    np.testing.assert_allclose(short[1], values, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "subtb"])
def test_the_learning_batch(name):
    config = dataclasses.replace(PRESETS["ppo_trl"]) if name == "ppo" else PRESETS[name]
    learner = learner_of(config, (1, 2, 1))
    batch, rng = batch_for(SUBTB), np.random.default_rng(2)
    mask = batch.response_mask
    rollout = Rollout(
        tokens=batch.tokens,
        prompt_mask=batch.prompt_mask,
        response_mask=mask,
        sampler_logprobs=batch.old_logprobs,
        policy_logprobs=batch.old_logprobs,
        truncated=np.zeros(ROWS, bool),
    )
    values = np.where(mask, rng.normal(0, 1, mask.shape), 0.0).astype(np.float32)
    sampled = (batch.old_logprobs, batch.ref_logprobs, batch.reward, batch.prompt_id)
    build = make_learning_batch(learner)
    made, metrics = build(rollout, *sampled, values if name == "ppo" else None)
    if name == "subtb":
        assert made.old_values is None and made.returns is None
        np.testing.assert_array_equal(made.reward, batch.reward)
        d = (batch.old_logprobs - batch.ref_logprobs).sum(axis=1)
        target = np.mean(config.beta * batch.reward - d)
        np.testing.assert_allclose(metrics["log_z/monte_carlo_mean"], target, rtol=1e-5)
        return
    given = {"old_logprobs": batch.old_logprobs, "ref_logprobs": batch.ref_logprobs}
    given |= {"mask": jnp.asarray(mask), "values": jnp.asarray(values)}
    reward = jnp.asarray(batch.reward)
    returns = np.asarray(ppo_returns(config, reward, **given))
    np.testing.assert_allclose(made.returns, returns, atol=1e-5)
    np.testing.assert_allclose(made.reward, ppo_advantages(config, reward, **given)[0], atol=1e-4)
    np.testing.assert_array_equal(made.old_values, values)
    explained = 1 - (returns - values)[mask].var() / returns[mask].var()
    np.testing.assert_allclose(metrics["value/explained_variance"], explained, rtol=1e-4)
    np.testing.assert_allclose(metrics["value/mean"], values[mask].mean(), rtol=1e-4)
    # One response a prompt is enough here, and its reward never differs from its group's.
    assert "rollout/groups_with_signal" in metrics
    alone = make_learning_batch(dataclasses.replace(learner, group_size=1))
    seen = jax.eval_shape(alone, rollout, *sampled, values)[1]
    assert seen.keys() == metrics.keys() - {"rollout/groups_with_signal"}


def test_the_state_has_a_head_only_where_it_is_needed():
    plain = abstract_state(learner_of(PRESETS["grpo"]), 8)[0]
    assert plain.params.keys() == {"policy", "log_z"}
    state = abstract_state(learner_of(PRESETS["ppo"], (1, 2, 1)), 8)[0]
    assert state.params["value"]["hidden_0"]["kernel"].shape == (16, 16)
    assert state.params["value"]["output"]["kernel"].sharding.is_fully_replicated
    wide = ValueConfig(num_layers=1, zero_init=False)
    assert not any(
        jax.tree.leaves(jax.tree.map(np.any, init_value(ValueConfig(), 4, KEY)["output"]))
    )
    assert init_value(wide, 4, KEY).keys() == {"output"}
    assert init_value(wide, 4, KEY)["output"]["kernel"].any()


def test_the_head_has_a_learning_rate_of_its_own():
    params = {"policy": jnp.ones(2), "log_z": {}, "value": jnp.ones(2)}
    moved = {}
    for rate in (0.0, 0.5):
        config = OptimizerConfig(
            learning_rate=0.1, value_learning_rate=rate, warmup_steps=0, weight_decay=0.0
        )
        optimizer = make_optimizer(config, 10, 1, train_log_z=False, train_value=True)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        moved[rate] = jax.tree.map(lambda x: float(x[0]), updates)
    assert moved[0.0]["value"] == moved[0.0]["policy"] == moved[0.5]["policy"]
    np.testing.assert_allclose(moved[0.5]["value"], 5 * moved[0.5]["policy"], rtol=1e-5)


@pytest.mark.slow
def test_training_fits_the_returns():
    """A few steps on the same rows: the head learns what it is told, and the policy stays."""
    config = OptimizerConfig(
        learning_rate=1e-9, value_learning_rate=3e-2, warmup_steps=0, clip_jointly=False
    )
    optimizer = make_optimizer(config, 100, 1, train_log_z=False, train_value=True)
    learner = learner_of(PRESETS["ppo"], optimizer=optimizer)
    step = make_train_step(learner, 8)
    batch = dataclasses.replace(
        batch_for(PPO), returns=np.full((ROWS, LENGTH), 0.4, np.float32),
        old_values=np.full((ROWS, LENGTH), 0.3, np.float32),
    )  # fmt: skip
    state, losses = init_state(learner, 8, KEY), []
    for _ in range(30):
        state, metrics = step(state, batch, KEY)
        losses.append(float(metrics["value_loss"]))
    assert losses[0] == pytest.approx(0.08) and losses[-1] < 0.005
