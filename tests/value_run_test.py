"""Objectives with a value head: whole runs through `train`, and what `plan` makes of them."""

import jax
import numpy as np
import pytest

from flowrl_jax.assembly import CHECKPOINTS
from flowrl_jax.checkpoint import saved_steps
from flowrl_jax.loop import Loop
from flowrl_jax.planning.programs import planned_learner, programs
from flowrl_jax.train import train
from tests.tiny_runs import final_state, one_device, tiny_run, warmup
from tests.tiny_runs import metrics as read_metrics

SHORT = {
    "steps": 4, "checkpoint__every": 2, "eval__every": 0, "metrics__table": False,
    "optimizer__value_learning_rate": 1e-2, "rollout__correction__kind": "token",
}  # fmt: skip


@pytest.mark.slow
def test_ppo_goes_on_where_it_stopped(monkeypatch, tmp_path):
    """The head and its moments are in the checkpoint, values are those of the time of sampling."""
    config = tiny_run("ppo_trl", model__start_from=warmup(), **SHORT)
    plain = Loop.collect

    def fail_at_four(self, policy, step, *others, **named):
        if step == 4:
            raise RuntimeError("a fault")
        return plain(self, policy, step, *others, **named)

    with one_device():
        train(config, tmp_path / "whole")
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a fault"):
            patch.setattr(Loop, "collect", fail_at_four)
            train(config, tmp_path / "run")
        assert saved_steps(tmp_path / "run" / CHECKPOINTS) == [2]
        train(config, tmp_path / "run", resume=True)
    whole = read_metrics(tmp_path / "whole")
    assert read_metrics(tmp_path / "run") == whole
    state = final_state(tmp_path / "run")
    assert state == final_state(tmp_path / "whole")
    assert any("params/value/" in str(path) for path in state["leaves"])
    lines = [line for line in whole if line["step"]]
    assert len(lines) == 4 and lines[0]["value/mean"] == 0.0 and lines[-1]["value/mean"] != 0.0
    assert all(line["train/value_grad_norm"] > 0 for line in lines)
    assert all(line["value/explained_variance"] <= 1.0 for line in lines)


@pytest.mark.slow
def test_subtb_learns_ahead_and_in_buckets(tmp_path):
    config = tiny_run(
        "subtb", model__start_from=warmup(), train__length_buckets="(4,)", rollout__ahead=True,
        **SHORT | {"steps": 3, "rollout__correction__kind": "none"},
    )  # fmt: skip
    with one_device():
        train(config, tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if line["step"]]
    assert len(lines) == 3 and [line["rollout/age"] for line in lines] == [0, 1, 1]
    assert lines[-1]["log_z/mean"] != 0.0 and np.isfinite(lines[-1]["log_z/monte_carlo_mean"])
    assert all(line["train/skipped_steps"] == 0 for line in lines)
    assert "value/mean" not in lines[0]


@pytest.mark.parametrize(("preset", "scores"), [("ppo", 1), ("ppo_trl", 2), ("subtb", 2)])
def test_plan_knows_the_head(preset, scores):
    config = tiny_run(preset, mesh__fsdp=2)
    learner = planned_learner(config, jax.devices()[:2])
    found = {program.name: program for program in programs(config, learner)}
    assert found["score"].runs == scores
    make, arguments = found["train_step"].build()
    state, batch = arguments[0], arguments[1]
    assert "value" in state.params and (batch.returns is None) == (preset == "subtb")
    new, metrics = jax.eval_shape(make(), *arguments)
    assert new.params["value"].keys() == {"hidden_0", "output"}
    assert metrics["value_grad_norm"].shape == ()
