"""The alarm in a whole run: it is printed, stops the run with a checkpoint, and lets it go on."""

import json

import pytest

from flowrl_jax import report
from flowrl_jax import train as train_module
from flowrl_jax.checkpoint import saved_steps
from flowrl_jax.metrics import read_metrics
from tests.tiny_runs import one_device, tiny_arguments


@pytest.mark.slow
def test_an_alarm_stops_the_run_and_resuming_goes_on(tmp_path, capsys):
    """A policy of random weights solves nothing, so that its reward stands still."""
    arguments = [
        *tiny_arguments(
            steps=5, alarm__stop=True, alarm__window=2, alarm__groups=0, alarm__truncated=0,
            eval__every=3, checkpoint__every=0,
        ),
        f"--workdir={tmp_path}/run",
    ]  # fmt: skip
    with one_device():
        assert train_module.main(arguments) == 3
        said = capsys.readouterr()
        seen = "alarm at step 2: reward: rollout/reward_mean has been 0 for 2 steps"
        assert seen in said.out and said.err.strip().splitlines()[-1].startswith(f"stopped: {seen}")
        # The metrics of a step are known while the next one runs.
        assert saved_steps(tmp_path / "run" / "checkpoints") == [3]
        assert train_module.main([*arguments, "--resume"]) == 0
    assert seen not in capsys.readouterr().out
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5]
    assert [record.get("alarm/reward") for record in records] == [None, None, 1, 1, 1, 1]
    _diagnostics(records)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log_z.jsonl").open("rb")]
    assert steps == [1, 2, 3, 4, 5]
    shown = report.load_run(tmp_path / "run")
    assert shown.alarms == [("reward", 2, 5)] and shown.log_z_points
    curve = shown.curves["pass_at_1"]
    assert len(curve.low) == len(curve.high) == len(curve.values)


def _diagnostics(records):
    """What every step of a run says of itself."""
    for record in records[1:]:
        assert record["log_z/gap"] == record["log_z/gap"]  # a number
        assert (
            0.0 < record["train/ratio_ess"] <= 1.0001 and 0 < record["train/weight_ess"] <= 1.0001
        )
        assert record["rollout/groups_all_correct"] == 0.0
        assert record["rollout/groups_none_correct"] == 1.0
        assert record["rollout/length_wrong"] == record["rollout/length_mean"]
        assert "rollout/length_correct" not in record
        assert {"train/flow_to_reward", "rollout/kl_to_reference_token"} <= record.keys()
    evaluated = records[3]
    low, high = evaluated["eval/mean_length_low"], evaluated["eval/mean_length_high"]
    assert low < evaluated["eval/mean_length"] < high
