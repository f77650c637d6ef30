"""Length buckets: the step and the scores of whole rows, with fewer columns computed."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

from flowrl_jax.assembly import assemble
from flowrl_jax.buckets import (
    check_buckets,
    cut,
    make_lengths,
    make_scores,
    make_update,
    padding_saved,
)
from flowrl_jax.errors import InputError
from flowrl_jax.models.architecture import LoraConfig
from flowrl_jax.objectives.flowrl import FlowRLConfig
from flowrl_jax.objectives.grpo import GRPOConfig
from flowrl_jax.objectives.log_z import LogZConfig
from flowrl_jax.optimizer import OptimizerConfig, make_optimizer
from flowrl_jax.sharding import make_layout
from flowrl_jax.train import build_loop, train
from flowrl_jax.train_step import init_state, make_score, make_train_step
from tests.mesh_test import assert_same
from tests.tiny import (
    MESH_CONFIG,
    compilations,
    make_learner,
    make_state,
    tiny_config,
    tiny_params,
    train_batch,
)
from tests.tiny_runs import metrics, one_device, tiny_run

CONFIG = tiny_config(remat="full")  # layers add their gradient in place
BUCKETS = (2, 4)
TWO = (3,)  # fewer programs to compile
LIMIT = 7
KEY = jax.random.key(5)


def batch_of(lengths, config=CONFIG, seed=0):
    """A batch of groups of two whose responses have these lengths."""
    batch = train_batch(config, len(lengths), 2, response=LIMIT, seed=seed)
    mask = np.arange(LIMIT) < np.array(lengths)[:, None]
    fields = {
        name: np.where(mask, getattr(batch, name), 0.0).astype(np.float32)
        for name in ("old_logprobs", "ref_logprobs")
    }
    return batch.replace(response_mask=mask, **fields)


LENGTHS = [1, 5, 2, 3, 7, 1, 4, 2]
BATCH = batch_of(LENGTHS)


def bucketed(learner, buckets=BUCKETS):
    return dataclasses.replace(
        learner, config=dataclasses.replace(learner.config, length_buckets=buckets)
    )


def lengths_of(batch):
    return np.asarray(batch.response_mask).sum(axis=1)


def learner_of(objective, config=CONFIG, micro_batch_size=2, **changes):
    return make_learner(config, objective, micro_batch_size=micro_batch_size, **changes)


def by_buckets(learner, batch=BATCH, buckets=TWO):
    """Gradient or moments, log Z and metrics of a step in buckets, on the host."""
    state, found = make_update(bucketed(learner, buckets), 8)(
        make_state(learner), learner.layout.put_batch(batch), lengths_of(batch), KEY
    )
    return jax.device_get(((state.opt_state, state.params["log_z"], state.step), found))


def at_once(learner, batch=BATCH):
    """The same of the fused step."""
    step = make_train_step(learner, 8)
    state, found = step(make_state(learner), learner.layout.put_batch(batch), KEY)
    return jax.device_get(((state.opt_state, state.params["log_z"], state.step), found))


OBJECTIVES = {
    "head": FlowRLConfig(beta=2.0, log_z=LogZConfig(dropout=0.3)),
    "table": FlowRLConfig(beta=2.0, weight="max", log_z=LogZConfig(kind="table")),
    "group": FlowRLConfig(
        beta=2.0, weight="none", length_normalize=False, log_z=LogZConfig(kind="group")
    ),
    "zero": FlowRLConfig(beta=2.0, weight="unit", log_z=LogZConfig(kind="zero")),
    "grpo token": GRPOConfig(kl_coef=0.1, aggregation="token"),
    "grpo sequence": GRPOConfig(kl_coef=0.1),
}


@cache
def fused(name):
    return at_once(learner_of(OBJECTIVES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_step_is_the_fused_one(name):
    assert_same(by_buckets(learner_of(OBJECTIVES[name])), fused(name))


@pytest.mark.slow
def test_order_of_rows_and_size_of_micro_batches_do_not_matter():
    rows = np.random.default_rng(0).permutation(8)
    turned = jax.tree.map(lambda x: x[rows], BATCH)
    learner = learner_of(OBJECTIVES["head"], micro_batch_size=4)
    assert_same(by_buckets(learner, turned), fused("head"))


@pytest.mark.slow
def test_rows_may_go_all_at_once():
    learner = learner_of(OBJECTIVES["group"], micro_batch_size=0)
    short = batch_of([2, 1, 3, 4, 1, 1, 2, 3])
    assert_same(by_buckets(learner, short), at_once(learner, short))


MESHES = [
    (1, 2, 4),
    pytest.param((2, 2, 2), marks=pytest.mark.slow),
    pytest.param((1, 2, 1, 4), marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=lambda shape: "x".join(map(str, shape)))
def test_the_step_does_not_depend_on_the_mesh(mesh):
    """Micro-batches take rows from everywhere, and have rows on every shard."""
    config = dataclasses.replace(MESH_CONFIG, remat="full")
    batch = batch_of([1, 2, 7, 6, 1, 1, 3, 2, 2, 1, 5, 4, 1, 3, 2, 1], config)
    learner = learner_of(OBJECTIVES["head"], config, micro_batch_size=8, mesh=mesh)
    layout = make_layout(learner.layout.mesh, config.axis_sizes)
    learner = dataclasses.replace(learner, layout=layout)
    check_buckets(bucketed(learner, TWO), prompt_length=5)
    alone = learner_of(OBJECTIVES["head"], config, micro_batch_size=8)
    assert_same(by_buckets(learner, batch), at_once(alone, batch))


@pytest.mark.slow
def test_adapters():
    config = tiny_config(lora=LoraConfig(rank=3))
    learner = learner_of(OBJECTIVES["head"], config)
    results = []
    for program in (
        lambda *x: make_update(bucketed(learner, TWO), 8)(x[0], x[1], lengths_of(BATCH), *x[2:]),
        make_train_step(learner, 8),
    ):
        state, found = program(
            init_state(learner, 8, jax.random.key(0)), BATCH, KEY, tiny_params(config)
        )
        results.append(jax.device_get((state.opt_state, found)))
    assert np.abs(results[1][1]["policy_grad_norm"]) > 0.1
    assert_same(*results)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 8, 1)])
def test_scores_are_in_order(mesh):
    """Of a whole rollout, whose rows are no multiple of the micro-batch."""
    lengths = [1, 2, 7, 6, 1, 1, 3, 2] * (mesh[1] if mesh[1] > 1 else 1) + [5, 4, 1, 3] * 2
    batch = batch_of(lengths, MESH_CONFIG)
    learner = learner_of(GRPOConfig(), MESH_CONFIG, micro_batch_size=16, mesh=mesh)
    rows = learner.layout.put_batch((batch.tokens, batch.prompt_mask, batch.response_mask))
    params = make_state(learner).params["policy"]
    known = make_lengths(learner)(rows[2])
    np.testing.assert_array_equal(known, lengths)
    found = make_scores(bucketed(learner, TWO))(params, *rows, np.asarray(known))
    assert found.sharding.is_equivalent_to(learner.layout.batch, 2)
    # Float32 logits of a matrix product over other shapes.
    np.testing.assert_allclose(found, make_score(learner)(params, *rows), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def adam():
    """A learner that really moves, and its step in buckets."""
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), 10, 1, train_log_z=True)
    learner = bucketed(learner_of(OBJECTIVES["head"], optimizer=optimizer))
    return learner, make_update(learner, 8)


@pytest.mark.slow
def test_programs_are_as_many_as_lengths(adam):
    """One for each bucket that occurs, and two more; then none, whatever the lengths are."""
    learner, update = adam
    state, rng = make_state(learner), np.random.default_rng(0)
    batches = [batch_of(rng.integers(1, LIMIT + 1, 8), seed=i) for i in range(6)]
    with compilations() as compiled:
        state, _ = update(state, batch_of([2] * 8), np.full(8, 2), KEY)
        one = sum("backend_compile" in name for name in compiled)
        for batch in (BATCH, batches[0]):
            state, _ = update(state, batch, lengths_of(batch), KEY)
    assert one == 3
    assert sum("backend_compile" in name for name in compiled) == 5
    with compilations() as compiled:
        for batch in batches:
            state, _ = update(state, batch, lengths_of(batch), KEY)
        jax.block_until_ready(state)
    assert compiled == [] and state.step == 9


def test_the_state_is_donated(adam):
    learner, update = adam
    state = make_state(learner)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    new, _ = update(state, BATCH, lengths_of(BATCH), KEY)
    assert all(leaf.is_deleted() for leaf in leaves)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_a_step_that_is_not_finite_is_skipped(adam):
    learner, update = adam
    bad = BATCH.replace(reward=np.where(np.arange(8) == 3, np.nan, BATCH.reward))
    before = make_state(learner)
    state, _ = update(make_state(learner), bad, lengths_of(BATCH), KEY)
    assert state.step == 1 and state.skipped == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)


def test_cut_sorts_by_length():
    parts = cut(np.array(LENGTHS), 2, 1, BUCKETS, LIMIT)
    assert [part.rows.tolist() for part in parts] == [[4, 1], [6, 3], [2, 7], [0, 5]]
    assert [part.length for part in parts] == [7, 4, 2, 2]
    assert all(part.rows.dtype == np.int32 for part in parts)


def test_cut_keeps_groups_whole():
    parts = cut(np.array(LENGTHS), 2, 2, BUCKETS, LIMIT)
    assert [part.rows.tolist() for part in parts] == [[4, 5], [0, 1], [6, 7], [2, 3]]
    assert [part.length for part in parts] == [7, 7, 4, 4]


@pytest.mark.parametrize(("size", "unit"), [(1, 1), (6, 3), (24, 2), (4, 4)])
def test_cut_takes_every_row_once_and_cuts_none_short(size, unit):
    rng = np.random.default_rng(size)
    lengths = rng.integers(0, 101, 24)
    parts = cut(lengths, size, unit, (10, 50), 100)
    assert sorted(np.concatenate([part.rows for part in parts])) == list(range(24))
    for part in parts:
        longest = lengths[part.rows].max()
        assert part.length == min(n for n in (10, 50, 100) if n >= longest)
        assert (part.rows.reshape(-1, unit) // unit == part.rows[::unit, None] // unit).all()


def test_padding_saved():
    """Two steps of four rows: 7 + 7 + 4 + 4 and 4 x 2 of 56 columns are computed."""
    learner = learner_of(OBJECTIVES["zero"])
    lengths = np.array([[1, 5, 4, 3], [1, 2, 1, 1]])
    assert padding_saved(learner, lengths, LIMIT) == 0.0
    assert padding_saved(bucketed(learner), lengths, LIMIT) == pytest.approx(1 - (14 + 8 + 8) / 56)


@pytest.mark.slow
def test_a_run_in_buckets_is_the_run_without(tmp_path):
    """Of an objective whose first loss is not zero, although nobody earns a reward."""
    changes = {
        "steps": 2, "eval__every": 0, "checkpoint__every": 0, "rollout__prompts_per_step": 4,
        "train__updates_per_rollout": 2, "train__micro_batch_size": 2,
    }  # fmt: skip
    with one_device():
        train(tiny_run("flowrl_paper", **changes), tmp_path / "whole")
        train(tiny_run("flowrl_paper", **changes, train__length_buckets=(6,)), tmp_path / "cut")
    for whole, short in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "cut"), strict=True):
        assert whole.keys() == short.keys() and whole["train/loss"] > 0
        assert whole.pop("train/padding_saved") == 0.0
        assert 0.0 < short.pop("train/padding_saved") <= short["rollout/padding"]
        mean = short["rollout/length_mean"]
        assert short["rollout/padding"] == pytest.approx(1 - mean / 10, rel=1e-6)
        # Float32; Adam divides what is rounding by what is rounding where a gradient is none.
        for name, value in whole.items():
            np.testing.assert_allclose(short[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ((4, 2), r"train\.length_buckets=\(4, 2\) must be lengths .* greater"),
        ((2, 2), r"train\.length_buckets=\(2, 2\) must be"),
        ((0, 2), r"train\.length_buckets=\(0, 2\) must be lengths from 1"),
        ((2, 10), r"\(2, 10\) must lie below rollout\.max_response_length=10.* leave out"),
    ],
)
def test_wrong_buckets_are_refused(buckets, message):
    with pytest.raises(InputError, match=message) as caught:
        tiny_run(train__length_buckets=buckets)
    assert "\n" not in str(caught.value)


def test_buckets_divide_over_context(tmp_path):
    config = tiny_run(
        train__length_buckets=(4, 7), rollout__max_response_length=12, mesh__context=4,
        mesh__fsdp=2, rollout__tensor=1,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"7 and .*=8 are 15 tokens, .* mesh\.context=4: choose"):
        build_loop(assemble(config, tmp_path))
