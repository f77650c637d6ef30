"""The optimiser step: against the textbook, and what its result may not depend on."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowrl_jax.learner import check_batch
from flowrl_jax.models.log_z import LogZHead
from flowrl_jax.models.transformer import Transformer
from flowrl_jax.objectives.flowrl import FlowRLConfig
from flowrl_jax.objectives.grpo import GRPOConfig
from flowrl_jax.objectives.log_z import LogZConfig
from flowrl_jax.optimizer import OptimizerConfig, make_optimizer
from flowrl_jax.train_step import init_state, make_score, make_train_step
from tests.tiny import (
    compilations,
    full_logits,
    make_learner,
    make_state,
    teacher_forced,
    tiny_config,
    tiny_params,
    train_batch,
)

CONFIG = tiny_config()
BATCH = train_batch(CONFIG, 8, 2)
KEY = jax.random.key(5)
NO_DROPOUT = LogZConfig(dropout=0.0)

# Every way to a loss and to a log Z.
OBJECTIVES = {
    "two_sided head": FlowRLConfig(beta=2.0, weight="two_sided", log_z=LogZConfig(dropout=0.3)),
    "max table": FlowRLConfig(beta=2.0, weight="max", log_z=LogZConfig(kind="table")),
    "none group": FlowRLConfig(
        beta=2.0, weight="none", length_normalize=False, log_z=LogZConfig(kind="group")
    ),
    "grpo token": GRPOConfig(kl_coef=0.1, aggregation="token"),
    "grpo sequence": GRPOConfig(kl_coef=0.1),
    "unit zero": FlowRLConfig(beta=2.0, weight="unit", log_z=LogZConfig(kind="zero")),
    "jensen_shannon table": FlowRLConfig(
        beta=2.0, divergence="jensen_shannon", log_z=LogZConfig(kind="table")
    ),
    "gap group_old": FlowRLConfig(
        beta=2.0,
        divergence="forward_kl",
        gap_low=2.0,
        gap_high=2.0,
        log_z=LogZConfig(kind="group_old"),
    ),
}


@cache
def program(name):
    """The learner of an objective and its compiled step."""
    learner = make_learner(CONFIG, OBJECTIVES[name])
    return learner, make_train_step(learner, 8)


@cache
def whole_step(name):
    """State and metrics of a step over the whole batch; the optimiser's state is the gradient."""
    learner, run = program(name)
    return run(make_state(learner), BATCH, KEY)


def assert_same_gradient(ours, other):
    """To 1e-5 of each parameter's largest gradient: float32 sums in another order."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(other), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(
            a, b, atol=1e-5 * np.abs(b).max() + 1e-8, err_msg=jax.tree_util.keystr(path)
        )


def assert_same(ours, other):
    """Gradient, parameters (a table moves) and every metric."""
    assert_same_gradient(ours[0].opt_state, other[0].opt_state)
    assert_same_gradient(ours[0].params["log_z"], other[0].params["log_z"])
    assert ours[1].keys() == other[1].keys()
    for name, value in other[1].items():
        np.testing.assert_allclose(ours[1][name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_do_not_matter(name):
    """A peer weighs every micro-batch by a wrong constant."""
    learner = make_learner(CONFIG, OBJECTIVES[name], micro_batch_size=2)
    cut = make_train_step(learner, 8)(make_state(learner), BATCH, KEY)
    assert_same(cut, whole_step(name))


@pytest.mark.slow
def test_micro_batches_do_not_matter_where_layers_add_in_place():
    config = dataclasses.replace(CONFIG, remat="full")
    learner = make_learner(config, OBJECTIVES["two_sided head"], micro_batch_size=2)
    cut = make_train_step(learner, 8)(make_state(learner), BATCH, KEY)
    assert_same(cut, whole_step("two_sided head"))


def textbook_loss(params, batch, objective):
    """Mean loss as the papers write it, from all logits at once."""
    mask = jnp.asarray(batch.response_mask)
    width = batch.prompt_mask.shape[1]
    both = np.concatenate([batch.prompt_mask, batch.response_mask], 1)
    logits = full_logits(CONFIG, params["policy"], batch.tokens, both)[:, width - 1 : -1]
    logits = jax.nn.log_softmax(logits / 0.9)
    logprobs = jnp.take_along_axis(logits, batch.tokens[:, width:, None], 2)[..., 0]
    total = lambda x: jnp.where(mask, x, 0.0).sum(1)  # noqa: E731
    n = mask.sum(1)
    ratio = jax.lax.stop_gradient(total(logprobs - batch.old_logprobs))
    hidden: Any = Transformer(CONFIG).apply({"params": params["policy"]}, batch.tokens, both)
    inner = batch.prompt_mask.copy()
    inner[:, -1] = False
    pooled = jnp.where(inner[..., None], hidden[:, :width], 0.0).sum(1)
    pooled /= np.maximum(inner.sum(1), 1)[:, None]
    log_z: Any = LogZHead(objective.log_z).apply({"params": params["log_z"]}, pooled)
    weight = jnp.clip(jnp.exp(ratio), 0.8, 1.2)
    residual = log_z + total(logprobs - batch.ref_logprobs) / n - objective.beta * batch.reward
    return jnp.mean(weight * residual**2), (log_z, residual, weight)


@pytest.fixture(scope="module")
def head_step():
    """A program for FlowRL with a head without dropout, to be run on several batches."""
    learner = make_learner(CONFIG, FlowRLConfig(beta=2.0, log_z=NO_DROPOUT))
    program = make_train_step(learner, 8)
    return lambda batch: program(make_state(learner), batch, KEY)


@pytest.mark.slow
def test_against_the_textbook(head_step):
    objective = FlowRLConfig(beta=2.0, log_z=NO_DROPOUT)
    params = make_state(make_learner(CONFIG, objective)).params
    (loss, (log_z, residual, weight)), grads = jax.jit(
        jax.value_and_grad(lambda p: textbook_loss(p, BATCH, objective), has_aux=True)
    )(params)
    state, metrics = head_step(BATCH)
    assert_same_gradient(state.opt_state, grads)
    assert 0 < (weight == 0.8).sum() < 8  # some weights are clipped
    expected = {
        "loss": loss,
        "log_z": log_z.mean(),
        "residual": residual.mean(),
        "importance_weight": weight.mean(),
        "importance_weight_max": weight.max(),
        "log_z_target": (log_z - residual).mean(),
        "grad_norm": optax.tree.norm(grads),
        "policy_grad_norm": optax.tree.norm(grads["policy"]),
        "log_z_grad_norm": optax.tree.norm(grads["log_z"]),
        "skipped_steps": 0.0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    assert state.step == 1 and state.skipped == 0


def test_order_of_rows_does_not_matter(head_step):
    rows = np.random.default_rng(0).permutation(8)
    assert_same(head_step(jax.tree.map(lambda x: x[rows], BATCH)), head_step(BATCH))


@pytest.mark.slow
def test_padding_does_not_matter(head_step):
    """Two more columns before the prompts and three after the responses."""
    width = BATCH.prompt_mask.shape[1]
    after = lambda x: np.pad(x, ((0, 0), (0, 3)))  # noqa: E731
    wider = BATCH.replace(
        tokens=np.pad(BATCH.tokens, ((0, 0), (2, 3))),
        prompt_mask=np.pad(BATCH.prompt_mask, ((0, 0), (2, 0))),
        response_mask=after(BATCH.response_mask),
        old_logprobs=after(BATCH.old_logprobs),
        ref_logprobs=after(BATCH.ref_logprobs),
    )
    expected = head_step(BATCH)
    assert_same(head_step(wider), expected)
    # What the padding holds does not matter either, not even NaN.
    mask = np.concatenate([BATCH.prompt_mask, BATCH.response_mask], 1)
    assert not mask[:, :width].all() and not mask[:, width:].all()
    poisoned = BATCH.replace(
        tokens=np.where(mask, BATCH.tokens, 7),
        old_logprobs=np.where(BATCH.response_mask, BATCH.old_logprobs, np.nan),
        ref_logprobs=np.where(BATCH.response_mask, BATCH.ref_logprobs, np.nan),
    )
    assert_same(head_step(poisoned), expected)


@pytest.fixture(scope="module")
def dropout_step():
    """A program for a head with dropout, to be run at several steps."""
    learner, step = program("two_sided head")

    def run(at, batch=BATCH, key=KEY):
        state = make_state(learner)
        return step(state.replace(step=state.step + at), batch, key)[1]["log_z"]

    return run


@pytest.mark.slow
def test_dropout_noise_changes_with_the_step_and_the_row(dropout_step):
    assert dropout_step(0) == dropout_step(0)
    others = [
        dropout_step(1),
        dropout_step(0, key=jax.random.key(6)),
        dropout_step(0, BATCH.replace(row_id=BATCH.row_id + 8)),
    ]
    assert len({float(x) for x in [dropout_step(0), *others]}) == 4
    # Rows without an id are known by their place.
    assert dropout_step(0, BATCH.replace(row_id=None)) == dropout_step(0)


def test_a_table_needs_to_know_its_prompts():
    learner, step = program("max table")
    with pytest.raises(ValueError, match="prompt_id"):
        step(make_state(learner), BATCH.replace(prompt_id=None), KEY)


def test_table_moves_to_the_targets():
    """Targets come from the loss' own residuals; the gradient leaves the table alone."""
    before = make_state(program("max table")[0]).params["log_z"]
    state, metrics = whole_step("max table")
    logprobs = teacher_forced(CONFIG, tiny_params(CONFIG), *_rows(BATCH), 0.9)
    n = BATCH.response_mask.sum(1)
    target = 2.0 * BATCH.reward - (logprobs - BATCH.ref_logprobs).sum(1) / n
    expected = np.array(before["value"])
    for prompt in range(4):
        rate = 0.3 if before["visits"][prompt] else 1.0
        mean = target[BATCH.prompt_id == prompt].mean()
        expected[prompt] += rate * (mean - expected[prompt])
    np.testing.assert_allclose(state.params["log_z"]["value"], expected, rtol=1e-5, atol=1e-6)
    visits = np.arange(8) % 2 + (np.arange(8) < 4)
    np.testing.assert_array_equal(state.params["log_z"]["visits"], visits)
    assert metrics["log_z_grad_norm"] == 0.0
    np.testing.assert_allclose(
        metrics["log_z"], np.asarray(before["value"])[BATCH.prompt_id].mean(), rtol=1e-5
    )


def _rows(batch):
    return batch.tokens, batch.prompt_mask, batch.response_mask


OPTIMIZER = OptimizerConfig(learning_rate=1e-2, log_z_learning_rate=5e-2, warmup_steps=0)


@pytest.fixture(scope="module")
def adam():
    """A learner that really moves, and its program."""
    optimizer = make_optimizer(OPTIMIZER, 10, 1, train_log_z=True)
    learner = make_learner(CONFIG, FlowRLConfig(beta=2.0, log_z=NO_DROPOUT), optimizer=optimizer)
    return learner, make_train_step(learner, 8)


@pytest.mark.slow
def test_golden_step(adam):
    """One step of a tiny model, to the last digits that another machine would give.

    If these numbers change, the result of training changes for every user. If that is what a
    change is for, say so in its description and put the new numbers here.
    """
    learner, program = adam
    state, metrics = program(make_state(learner), BATCH, KEY)
    size = lambda tree: sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tree))  # noqa: E731
    found = {
        "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]),
        "log_z": float(metrics["log_z"]),
        "log_z_target": float(metrics["log_z_target"]),
        "policy": size(state.params["policy"]),
        "head": size(state.params["log_z"]),
    }
    expected = {
        "loss": 2.539532,
        "grad_norm": 46.84798,
        "log_z": -1.446377,
        "log_z_target": -0.6916456,
        "policy": 1069.610,
        "head": 141.5807,
    }
    assert found == pytest.approx(expected, rel=2e-5), "see this test's docstring"


def test_state_is_donated(adam):
    learner, program = adam
    state = make_state(learner)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    new_state, _ = program(state, BATCH, KEY)
    assert all(leaf.is_deleted() for leaf in leaves)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new_state))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value"), [("reward", np.nan), ("reward", np.inf), ("old_logprobs", np.nan),
                         ("ref_logprobs", -np.inf)],
)  # fmt: skip
def test_a_step_that_is_not_finite_is_skipped(adam, field, value):
    """One bad number in one row: counted, nothing moves, and the next step is as if first."""
    learner, program = adam
    bad = np.array(getattr(BATCH, field))
    bad[(3,) if bad.ndim == 1 else (3, 0)] = value
    before = make_state(learner)
    state, metrics = program(make_state(learner), BATCH.replace(**{field: bad}), KEY)
    assert state.step == 1 and state.skipped == metrics["skipped_steps"] == 1
    for ours, old in ((state.params, before.params), (state.opt_state, before.opt_state)):
        jax.tree.map(np.testing.assert_array_equal, ours, old)
    after, metrics = program(state, BATCH, KEY)
    expected, _ = program(make_state(learner), BATCH, KEY)
    jax.tree.map(np.testing.assert_array_equal, after.params, expected.params)
    assert after.step == 2 and after.skipped == metrics["skipped_steps"] == 1


def test_repeated_steps_compile_nothing(adam):
    learner, program = adam
    state, _ = program(make_state(learner), BATCH, KEY)
    state, _ = program(state, BATCH, jax.random.key(9))
    with compilations() as compiled:
        for _ in range(2):
            state, _ = program(state, BATCH, KEY)
        jax.block_until_ready(state)
    assert compiled == []


def test_steps_descend(adam):
    learner, program = adam
    state, losses = make_state(learner), []
    for _ in range(8):
        state, metrics = program(state, BATCH, KEY)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_bfloat16_compute_keeps_float32_masters():
    """An update of 1e-6 of a weight of 0.3 would vanish in bfloat16, whose steps are 1e-3."""
    config = tiny_config(dtype=jnp.bfloat16)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=1e-6, warmup_steps=0), 10, 1, train_log_z=True
    )
    learner = make_learner(
        config,
        FlowRLConfig(log_z=LogZConfig(kind="zero")),
        optimizer=optimizer,
        micro_batch_size=4,
    )
    before = make_state(learner).params
    state, metrics = make_train_step(learner, 8)(make_state(learner), BATCH, KEY)
    for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(before), strict=True):
        assert new.dtype == jnp.float32
        assert (new != old).mean() > 0.5
    assert all(value.dtype == jnp.float32 for value in metrics.values())
    assert state.skipped == 0


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size, rows_per_update", [(0, 0), (2, 0), (0, 4)])
def test_score_is_the_teacher_forced_logprobs(micro_batch_size, rows_per_update):
    learner = make_learner(CONFIG, GRPOConfig(), micro_batch_size=micro_batch_size)
    params = tiny_params(CONFIG)
    score = make_score(learner, rows_per_update)
    rows = BATCH.reward.shape[0]
    held = micro_batch_size or rows_per_update or rows  # what the program computes at one time
    shape = f"{held},{BATCH.tokens.shape[1]},{CONFIG.embed_dim}"
    assert shape in str(jax.make_jaxpr(score)(params, *_rows(BATCH)))
    logprobs = score(params, *_rows(BATCH))
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(
        logprobs, teacher_forced(CONFIG, params, *_rows(BATCH), 0.9), rtol=1e-5, atol=1e-5
    )


def test_given_policy_is_copied(adam):
    """The state is donated at every step; the caller's parameters (the reference) are not."""
    learner, run = adam
    reference = tiny_params(CONFIG)
    state = init_state(learner, 8, jax.random.key(0), policy=reference)
    jax.tree.map(np.testing.assert_array_equal, state.params["policy"], reference)
    assert state.step == state.skipped == 0
    run(state, BATCH, KEY)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(reference))


@pytest.mark.parametrize(
    ("rows", "micro", "mesh", "kind", "match"),
    [
        (8, 3, (1, 1, 1), "head", "micro_batch_size=3 does not divide the 8"),
        (8, 2, (1, 4, 1), "head", "2 responses .* 4 batch shards"),
        (6, 0, (2, 2, 2), "head", "6 responses .* 4 batch shards"),
        (8, 2, (1, 1, 1), "group", "micro_batch_size=2 cuts groups of 4"),
    ],
)
def test_sizes_that_do_not_divide(rows, micro, mesh, kind, match):
    objective = FlowRLConfig(log_z=LogZConfig(kind=kind))
    learner = make_learner(CONFIG, objective, mesh=mesh, micro_batch_size=micro, group_size=4)
    with pytest.raises(ValueError, match=match):
        check_batch(learner, rows)


def test_sizes_that_divide():
    for micro, mesh, kind in (
        (2, (1, 2, 4), "head"), (4, (2, 2, 2), "group"), (0, (1, 8, 1), "zero")
    ):  # fmt: skip
        objective = FlowRLConfig(log_z=LogZConfig(kind=kind))
        learner = make_learner(CONFIG, objective, mesh=mesh, micro_batch_size=micro, group_size=4)
        check_batch(learner, 8)
