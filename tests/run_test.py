"""Whole runs of the commands: what they write and what they compile."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from configs import test_tiny
from flowrl_jax import sample
from flowrl_jax.checkpoint import restore_host
from flowrl_jax.config import Config, parse_config
from flowrl_jax.evaluate import evaluate
from flowrl_jax.metrics import read_metrics
from flowrl_jax.sft import sft
from flowrl_jax.train import train
from tests.tiny_runs import warmup


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


def tiny(data_dir: str, preset: str = "flowrl_per_token", **sections) -> Config:
    """The tiny config with changes, `tiny(data_dir, steps=3, rollout={"group_size": 2})`."""
    config = test_tiny.get_config(preset)
    config.data.data_dir = data_dir
    for name, value in sections.items():
        config[name].update(value) if isinstance(value, dict) else config.update({name: value})
    return parse_config(config)


def deterministic(workdir: Path) -> list[dict]:
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, loss",
    [
        ("flowrl_per_token", {}),
        ("flowrl_release", {}),
        ("flowrl_per_token", {"log_z": {"kind": "table"}}),
        ("flowrl_per_token", {"log_z": {"kind": "group"}}),
        ("grpo", {"kl_coef": 0.0}),
        ("gvpo", {}),
        ("gflowrl", {}),
    ],
)
def test_a_run_writes_its_metrics_and_compiles_nothing_late(data_dir, tmp_path, preset, loss):
    config = tiny(data_dir, preset, steps=4, checkpoint={"every": 0}, eval={"every": 0})
    values = dataclasses.asdict(config.loss)
    for name, value in loss.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    config = dataclasses.replace(config, loss=_rebuild(config.loss, values))
    train(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(np.isfinite(line["train/loss"]) for line in lines)
    # Old log-probabilities come from the trainer by default; the sampler's differ by rounding.
    assert all(line["rollout/sampler_logprob_diff_max"] < 1e-4 for line in lines)
    assert all(line["train/skipped_steps"] == 0 for line in lines)
    assert lines[-1]["time/compilations"] == lines[1]["time/compilations"]
    assert lines[-1]["data/position"] == 4 * config.rollout.prompts_per_step


@pytest.mark.slow
def test_sampling_one_step_ahead(data_dir, tmp_path):
    """The second rollout is of the policy that the first one is; the weights know it."""
    runs = {}
    for ahead in (False, True):
        config = tiny(
            data_dir, steps=3, checkpoint={"every": 0}, eval={"every": 0},
            rollout={"ahead": ahead}, optimizer={"learning_rate": 1e-2, "warmup_steps": 0},
            model={"start_from": str(warmup())},
        )  # fmt: skip
        train(config, tmp_path / f"{ahead}")
        runs[ahead] = deterministic(tmp_path / f"{ahead}")
        timed = read_metrics(tmp_path / f"{ahead}")[-1]
        assert timed["time/judging_waited"] >= 0 and timed["time/judging"] > 0
    plain, ahead = runs[False], runs[True]
    assert [line["rollout/age"] for line in plain] == [0, 0, 0]
    assert [line["rollout/age"] for line in ahead] == [0, 1, 1]
    assert plain[0] == ahead[0]
    for step in (1, 2):
        moved = "train/old_logprob_diff_max"  # by the policy that is about to learn
        assert plain[step][moved] < 1e-4 < 1e-3 < ahead[step][moved]
        # Old log-probabilities are of the policy that sampled, whenever it did.
        assert ahead[step]["rollout/sampler_logprob_diff_max"] < 1e-4


def _rebuild(loss, values):
    if "log_z" in values:
        values = values | {"log_z": type(loss.log_z)(**values["log_z"])}
    return type(loss)(**values)


@pytest.mark.slow
def test_cutting_the_rollout_changes_nothing(data_dir, tmp_path):
    quiet = {"steps": 2, "checkpoint": {"every": 0}, "eval": {"every": 0}}
    whole = tiny(data_dir, **quiet)
    size = whole.rollout.prompts_per_step // 2
    train(whole, tmp_path / "whole")
    train(tiny(data_dir, rollout={"prompts_per_batch": size}, **quiet), tmp_path / "cut")
    one, two = deterministic(tmp_path / "whole"), deterministic(tmp_path / "cut")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        # Another batch size may round logits otherwise: float32, sums of tens of terms.
        np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_samplers_logprobs_can_be_the_old_ones(data_dir, tmp_path):
    config = tiny(
        data_dir,
        steps=2,
        rollout={"old_logprobs": "sampler"},
        checkpoint={"every": 0},
        eval={"every": 0},
    )
    train(config, tmp_path / "run")
    for line in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        # At the first update the trainer's policy is the sampler's: float32 rounding remains.
        assert line["train/old_logprob_diff_max"] < 1e-4


@pytest.mark.slow
def test_warm_up_then_train_evaluate_and_sample(data_dir, tmp_path, monkeypatch, capsys):
    small = {"sft": {"steps": 3}, "steps": 2, "eval": {"every": 0}, "checkpoint": {"every": 0}}
    config = tiny(data_dir, **small)
    sft(config, tmp_path / "warmup")
    model = dataclasses.replace(config.model, start_from=str(tmp_path / "warmup"))
    config = dataclasses.replace(config, model=model)
    train(config, tmp_path / "run")
    assert restore_host(tmp_path / "run" / "checkpoints")[1] == 2
    summary = evaluate(config, tmp_path / "run", tmp_path / "samples.jsonl")
    assert {"pass_at_1", "effective_solutions", "mean_length", "kl_to_reference"} <= set(summary)
    record = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert len(record["responses"]) == config.eval.samples
    assert sample.main(["--help"]) == 0
