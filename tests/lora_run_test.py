"""Whole runs that train adapters: resumed, evaluated, and taken elsewhere."""

import json

import jax
import numpy as np
import pytest

from flowrl_jax.assembly import CHECKPOINTS, assemble, load_run_policy, reference_of
from flowrl_jax.checkpoint import saved_steps
from flowrl_jax.convert import export_run
from flowrl_jax.evaluate import evaluate
from flowrl_jax.models.hf import load_policy
from flowrl_jax.models.lora import merged, without_adapters
from flowrl_jax.sft import sft
from flowrl_jax.train import train
from tests.tiny import full_logits
from tests.tiny_runs import final_state, metrics, one_device, scratch, tiny_run, warmup

pytestmark = pytest.mark.slow

SETTINGS = {
    "steps": 6, "checkpoint__every": 3, "eval__every": 6, "metrics__table": False,
    "model__lora__rank": 2, "optimizer__learning_rate": 1e-2,
}  # fmt: skip


def adapted_run(**changes):
    return tiny_run(model__start_from=warmup(), **(SETTINGS | changes))


@pytest.fixture(scope="module")
def run():
    workdir = scratch() / "lora_run"
    with one_device():
        train(adapted_run(), workdir)
    return workdir


def test_adapters_alone_are_learned_and_saved(run):
    records = metrics(run)
    # On the first step the policy is the reference: its adapters add nothing yet.
    assert records[1]["rollout/kl_to_reference"] == 0.0
    assert abs(records[6]["rollout/kl_to_reference"]) > 0.0
    assert all(np.isfinite(record["train/loss"]) for record in records[1:])
    leaves = final_state(run)["leaves"]
    policy = {path for path in leaves if path.startswith("params/policy/")}
    assert len(policy) == 14 and all(path.endswith(("_lora_a", "_lora_b")) for path in policy)


def test_a_resumed_run_is_the_same(run, tmp_path):
    with one_device():
        train(adapted_run(steps=3, eval__every=0), tmp_path / "run")
        assert saved_steps(tmp_path / "run" / CHECKPOINTS) == [3]
        train(adapted_run(), tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run")[-3:] == metrics(run)[-3:]
    assert final_state(tmp_path / "run") == final_state(run)


def test_policy_and_reference_of_a_run(run, tmp_path):
    with one_device():
        parts = assemble(adapted_run(), run)
        policy = load_run_policy(parts, run)
        reference = reference_of(parts, policy)
        start = load_run_policy(assemble(tiny_run(), warmup()), warmup())
        jax.tree.map(np.testing.assert_array_equal, reference, start)
        summary = evaluate(adapted_run(), run, tmp_path / "samples.jsonl")
    assert 0.0 <= summary["pass_at_1"]["mean"] <= 1.0


def test_exported_policy_has_the_adapters_in_it(run, tmp_path):
    with one_device():
        parts = assemble(adapted_run(), run)
        policy = load_run_policy(parts, run)
        export_run(adapted_run(), run, tmp_path / "whole")
        export_run(adapted_run(), run, tmp_path / "adapter", adapter=True)
    config, params = load_policy(tmp_path / "whole")
    expected = merged(policy, parts.model.config.lora)
    rows = config.vocab_size
    np.testing.assert_array_equal(
        params["embedding"]["tokens"], expected["embedding"]["tokens"][:rows]
    )
    jax.tree.map(np.testing.assert_array_equal, params["layers"], expected["layers"])
    tokens = np.arange(4, 10, dtype=np.int32)[None]
    ours = full_logits(parts.model.config, policy, tokens)[..., :rows]
    np.testing.assert_allclose(full_logits(config, params, tokens), ours, atol=1e-4)
    base = full_logits(parts.model.config, without_adapters(policy), tokens)[..., :rows]
    assert np.abs(base - ours).max() > 1e-3
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 2 and (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


def test_demonstrations_train_adapters_too(tmp_path):
    config = tiny_run(model__lora__rank=2, sft__steps=3)
    with one_device():
        sft(config, tmp_path / "run")
    policy = {p for p in final_state(tmp_path / "run")["leaves"] if p.startswith("params/policy/")}
    assert all("lora" in path for path in policy)
