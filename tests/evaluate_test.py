"""Evaluation: the same prompts with the same noise, whoever asks and however they are batched."""

import json

import jax
import numpy as np
import pytest

from flowrl_jax import evaluate as module
from flowrl_jax.assembly import assemble, load_run_policy
from flowrl_jax.evaluate import Evaluator, evaluate
from flowrl_jax.graded import read_records
from flowrl_jax.metrics import CompileCounter
from flowrl_jax.train import train
from tests.tiny_runs import metrics, one_device, tiny_arguments, tiny_run, warmup

pytestmark = pytest.mark.slow  # each compiles a run of its own


@pytest.fixture(autouse=True)
def single():
    with one_device():
        yield


@pytest.fixture(scope="module")
def parts():
    with one_device():
        return assemble(tiny_run(model__start_from=warmup()), warmup())


@pytest.fixture(scope="module")
def policy(parts):
    return load_run_policy(parts, warmup())


@pytest.fixture(scope="module")
def records(parts, policy):
    return Evaluator(parts, parts.config.eval).records(policy)


def evaluator(parts, **changes):
    return Evaluator(parts, tiny_run(**{f"eval__{k}": v for k, v in changes.items()}).eval)


def test_records_are_judged_samples(parts, records):
    assert [record["prompt_id"] for record in records] == list(range(16))
    assert any(any(record["correct"]) for record in records)
    for record in records:
        assert len(record["responses"]) == 4
        assert len(set(map(tuple, record["responses"]))) > 1 or len(record["responses"][0]) < 3
        for response, correct, form, length, truncated in zip(
            *(record[k] for k in ("responses", "correct", "form", "length", "truncated")),
            strict=True,
        ):
            assert correct == (form is not None)
            # A token a character in this vocabulary but for numbers from 10, and the end.
            assert 1 <= length <= min(len(response) + 1, 10)
            assert not truncated or length == 10
        assert record["kl"] == [0.0] * 4  # no reference was given


@pytest.mark.parametrize("size", [16, 5])
def test_batches_do_not_matter(size, parts, policy, records):
    """Five does not divide the sixteen prompts: the last batch is filled up, and cut."""
    assert evaluator(parts, prompts_per_batch=size).records(policy) == records


def test_fewer_prompts_are_the_first_ones(parts, policy, records):
    assert evaluator(parts, prompts=3).records(policy) == records[:3]


def test_no_program_for_the_last_batch(parts, policy):
    evaluator(parts, prompts=5, prompts_per_batch=5).records(policy)
    with CompileCounter() as compilations:
        assert len(evaluator(parts, prompts=8, prompts_per_batch=5).records(policy)) == 8
    assert compilations.count == 0


def test_greedy_samples_are_all_the_same(parts, policy, records):
    """Temperature 0 with top_p 1, which makes a peer divide by zero; KL is still finite."""
    other = jax.tree.map(lambda x: 1.1 * x, policy)
    found = evaluator(parts, temperature=0).records(policy, other)
    assert all(len(set(record["responses"])) == 1 for record in found)
    assert [record["responses"][0] for record in found] != [r["responses"][0] for r in records]
    assert np.isfinite([record["kl"] for record in found]).all()


def test_kl_is_measured_against_the_reference(parts, policy):
    own = Evaluator(parts, parts.config.eval)
    assert all(record["kl"] == [0.0] * 4 for record in own.records(policy, policy))
    other = jax.tree.map(lambda x: 1.1 * x, policy)
    kl = np.array([record["kl"] for record in own.records(policy, other)])
    back = np.array([record["kl"] for record in own.records(other, policy)])
    # Of single samples it has either sign; its mean is positive.
    assert kl.mean() > 0.0 and back.mean() > 0.0 and (kl < 0).any()


def test_training_reports_what_the_command_reports(tmp_path):
    config = tiny_run(
        model__start_from=warmup(), steps=2, eval__every=2, checkpoint__every=0,
        metrics__table=False,
    )  # fmt: skip
    train(config, tmp_path / "run")
    recorded = {
        name.removeprefix("eval/"): value
        for name, value in metrics(tmp_path / "run")[-1].items()
        if name.startswith("eval/")
    }
    summary = evaluate(config, tmp_path / "run")
    ends = {"": "mean", "_low": "low", "_high": "high"}
    assert recorded == {
        f"{name}{end}": pytest.approx(value[field])
        for name, value in summary.items()
        for end, field in ends.items()
    }
    assert recorded["mean_length_low"] < recorded["mean_length"] < recorded["mean_length_high"]
    assert recorded["kl_to_reference"] != 0.0


def test_command_writes_samples_and_summary(tmp_path, capsys, records):
    arguments = [
        *tiny_arguments(model__start_from=warmup()), f"--run={warmup()}",
        f"--out={tmp_path}/deep/samples.jsonl", f"--json={tmp_path}/summary.json",
    ]  # fmt: skip
    assert module.main(arguments) == 0
    table = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "warmup" in table and f"{summary['pass_at_1']['mean']:.3f}" in table
    assert all(v["low"] <= v["mean"] <= v["high"] for v in summary.values())
    assert read_records(tmp_path / "deep" / "samples.jsonl") == records


def test_without_a_run_the_starting_policy_is_evaluated(tmp_path, monkeypatch):
    """Random weights or those of model.start_from; no folder of ours is left behind."""
    monkeypatch.chdir(tmp_path)
    started = evaluate(tiny_run(model__start_from=warmup()), "")
    assert started == evaluate(tiny_run(model__start_from=warmup()), warmup())
    fresh = evaluate(tiny_run(), "")
    assert fresh != started
    assert fresh["kl_to_reference"]["mean"] == 0.0
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_random_weights_knows_its_reference():
    """KL is to the weights that the seed gives, though no file holds them."""
    assert evaluate(tiny_run(), warmup())["kl_to_reference"]["mean"] > 1.0


def test_samples_that_do_not_divide_over_the_devices(parts, tmp_path):
    """Eight devices, 5 prompts of 4 samples at a time: batches are rounded up to 6."""
    layout = assemble(tiny_run(), tmp_path).layout
    assert layout.batch_shards == 1
    assert parts.round_up_prompts(5, 4) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(parts.layout), "batch_shards", property(lambda self: 8))
        assert [parts.round_up_prompts(5, n) for n in (1, 2, 3, 4, 8)] == [8, 8, 8, 6, 5]
