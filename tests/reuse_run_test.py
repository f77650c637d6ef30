"""Runs that draw again, replay and reset their reference: what they learn from, and resuming."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from flowrl_jax import train as train_module
from flowrl_jax.assembly import CHECKPOINTS, assemble
from flowrl_jax.checkpoint import saved_steps
from flowrl_jax.config import Config
from flowrl_jax.datasets.pipeline import PromptSource
from flowrl_jax.errors import InputError
from flowrl_jax.rollouts import encode_prompt, response_text
from flowrl_jax.train import train
from tests.tiny_runs import final_state, metrics, one_device, tiny_run, warmup

pytestmark = pytest.mark.slow  # whole runs

QUIET = {"eval__every": 0, "metrics__table": False, "checkpoint__every": 0}
SAVED = QUIET | {"checkpoint__every": 2, "checkpoint__keep": 9}


def resumed(workdir: Path, copy: Path, step: int, config: Config) -> None:
    """Copies a run as if it had been stopped after the checkpoint of a step, and goes on."""
    shutil.copytree(workdir, copy)
    for later in saved_steps(copy / CHECKPOINTS):
        if later > step:
            shutil.rmtree(copy / CHECKPOINTS / str(later))
    train(config, copy, resume=True)


def assert_resumes(config: Config, folder: Path, *steps: int) -> list[dict]:
    """A run that is resumed after any of these steps is the run that was not; its metrics."""
    with one_device():
        train(config, folder / "whole")
        for step in steps:
            resumed(folder / "whole", folder / f"from_{step}", step, config)
            assert metrics(folder / f"from_{step}") == metrics(folder / "whole")
            assert final_state(folder / f"from_{step}") == final_state(folder / "whole")
    return metrics(folder / "whole")


def assert_judged_right(config: Config, lesson: tuple, folder: Path) -> None:
    """Each row's prompt and reward are those of its own prompt id and response."""
    rollout, reward, prompt_id = lesson
    parts = assemble(config, folder)
    source = PromptSource(config.data)
    rows = {row["prompt_id"]: row for row in source.rows(0, len(source))}
    width = rollout.prompt_mask.shape[1]
    for i, known in enumerate(prompt_id.tolist()):
        row, tokens = rows[known], rollout.tokens[i]
        prompt = encode_prompt(parts, parts.task.prompt(row))
        assert tokens[:width][rollout.prompt_mask[i]].tolist() == prompt
        response = tokens[width:][rollout.response_mask[i]].tolist()
        assert parts.task.judge(response_text(parts, response), row).reward == reward[i]
    groups = prompt_id.reshape(-1, config.rollout.group_size)
    assert (groups == groups[:, :1]).all()


def test_rows_rewards_and_prompts_stay_together(monkeypatch, tmp_path):
    """Drawn again and replayed at once, over eight devices, by a policy that stays as it is."""
    config = tiny_run(
        "dapo", steps=4, model__start_from=warmup(), rollout__dynamic_sampling=True,
        rollout__max_batches=3, replay__fraction=0.5, optimizer__learning_rate=0.0, **QUIET,
    )  # fmt: skip
    lessons = []
    plain = train_module.make_learning_batch

    def noting(learner):
        build = plain(learner)

        def note(rollout, *scored, reward, prompt_id, values):
            lessons.append(jax.device_get((rollout, reward, prompt_id)))
            return build(rollout, *scored, reward=reward, prompt_id=prompt_id, values=values)

        return note

    monkeypatch.setattr(train_module, "make_learning_batch", noting)
    train(config, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert len(lessons) == len(lines) == 4
    for lesson, line in zip(lessons, lines, strict=True):
        assert_judged_right(config, lesson, tmp_path / "run")
        reward = lesson[1].reshape(-1, config.rollout.group_size)
        varied = (reward != reward[:, :1]).any(axis=1)
        assert line["rollout/groups_with_signal"] == varied.mean()
        # The log-probabilities that were kept are of the same responses, and the same policy.
        assert line["train/old_logprob_diff_max"] < 1e-4
        assert line["rollout/sampler_logprob_diff_max"] < 1e-4
    assert [line["replay/share"] for line in lines] == [0.0, 0.5, 0.5, 0.5]
    assert max(line["rollout/batches"] for line in lines) > 1
    # Nothing comes twice but the first step's groups, which stand in for what is not kept yet.
    for lesson, count in zip(lessons, (4, 8, 8, 8), strict=True):
        tokens = lesson[0].tokens.reshape(8, -1)
        assert len({row.tobytes() for row in tokens}) == count


def test_dynamic_sampling_resumes(tmp_path):
    config = tiny_run(
        "dapo", steps=4, model__start_from=warmup(), rollout__dynamic_sampling=True,
        rollout__max_batches=4, **SAVED,
    )  # fmt: skip
    lines = assert_resumes(config, tmp_path, 2)
    batches = [line["rollout/batches"] for line in lines]
    assert np.cumsum(batches).tolist() == [line["data/position"] // 8 for line in lines]
    for line, count in zip(lines, batches, strict=True):
        assert line["rollout/resampled_prompts"] == 8 * (count - 1)
        # Each batch but the last was too few; all that vary are learnt from, but for eight.
        kept = 8 * line["rollout/groups_with_signal"]
        assert kept == min(8, 8 * count * line["rollout/drawn_with_signal"])
        assert kept == 8 or count == 4
    assert len(set(batches)) > 1


def test_replay_and_resets_resume(tmp_path):
    """Checkpoints before the reset, right at it and after it, with a buffer that it empties."""
    config = tiny_run(
        steps=8, model__start_from=warmup(), replay__fraction=0.5, replay__size=10,
        replay__max_age=3, replay__priority="reward", reference__reset_every=4, **SAVED,
    )  # fmt: skip
    lines = assert_resumes(config, tmp_path, 2, 4, 6)
    # After a reset the policy is its own reference, and nothing is kept that it has not scored.
    assert [line["reference/resets"] for line in lines] == [0] * 4 + [1] * 4
    kl = [line["rollout/kl_to_reference"] for line in lines]
    assert kl[0] == kl[4] == 0.0
    assert all(x != 0.0 for i, x in enumerate(kl) if i not in (0, 4))
    assert [line["replay/share"] for line in lines] == [0.0, 0.5, 0.5, 0.5] * 2
    assert [line["replay/size"] for line in lines] == [4, 8, 10, 10] * 2
    assert [line["data/position"] for line in lines] == [4 * step for step in range(1, 9)]
    assert lines[3]["replay/age_max"] > 1
    files = sorted(path.name for path in (tmp_path / "whole" / "replay").iterdir())
    assert files == ["2.0.npz", "4.0.npz", "6.0.npz", "8.0.npz"]
    (tmp_path / "whole" / "replay" / "8.0.npz").unlink()
    with pytest.raises(InputError, match="replay buffer is missing"), one_device():
        train(config, tmp_path / "whole", resume=True)


def test_adapters_can_be_the_reference(tmp_path):
    """Also of a rollout that was sampled, and scored, before the reset."""
    config = tiny_run(
        steps=5, model__start_from=warmup(), model__lora__rank=4, rollout__ahead=True,
        reference__reset_every=2, loss__log_z__kind="zero", train__updates_per_rollout=1,
        optimizer__learning_rate=1e-2, **(QUIET | {"checkpoint__every": 4, "eval__every": 2}),
    )  # fmt: skip
    with one_device():
        train(config, tmp_path / "run")
    lines = {line["step"]: line for line in metrics(tmp_path / "run")}
    assert [lines[step]["reference/resets"] for step in range(1, 6)] == [0, 0, 1, 1, 2]
    # The policy that learns at steps 1, 3 and 5 is its own reference, whoever sampled for them.
    ratio = {step: lines[step]["train/flow_abs"] for step in range(1, 6)}  # |d| / n
    assert max(ratio[1], ratio[3], ratio[5]) < 1e-6 < 1e-3 < min(ratio[2], ratio[4])
    # Evaluations at steps 2 and 4 are before the resets there.
    assert lines[0]["eval/kl_to_reference"] == 0.0
    assert lines[2]["eval/kl_to_reference"] > 0.0 < lines[4]["eval/kl_to_reference"]


def test_a_run_on_a_plateau_is_reset_and_resumes(tmp_path):
    """No policy of the tiny config answers in more than ten tokens, so its best comes soon."""
    config = tiny_run(
        "prorl", steps=6, model__start_from=warmup(), reference__on_plateau=2,
        reference__metric="eval/mean_length", optimizer__learning_rate=0.0,
        **(SAVED | {"eval__every": 1}),
    )  # fmt: skip
    lines = assert_resumes(config, tmp_path, 2, 4)
    # The first evaluation is the best; equal ones are none the better.
    assert [line["reference/resets"] for line in lines[1:]] == [0, 0, 1, 1, 2, 2]
