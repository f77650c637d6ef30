"""Supervised fine-tuning: what a demonstration looks like as arrays, and that it is learned."""

import numpy as np
import pytest

from flowrl_jax import sft as module
from flowrl_jax.assembly import CHECKPOINTS, assemble
from flowrl_jax.checkpoint import saved_steps
from flowrl_jax.datasets.pipeline import PromptSource
from flowrl_jax.errors import InputError
from flowrl_jax.sft import demonstration_arrays, sft
from tests.tiny_runs import (
    final_state,
    metrics,
    one_device,
    scratch,
    tiny_arguments,
    tiny_run,
    warmup,
)

pytestmark = pytest.mark.slow  # each compiles a run of its own


@pytest.fixture(autouse=True)
def single():
    with one_device():
        yield


@pytest.fixture(scope="module")
def parts():
    folder = scratch() / "sft_test"
    folder.mkdir(exist_ok=True)
    with one_device():
        return assemble(tiny_run(), folder)


@pytest.fixture(scope="module")
def rows(parts):
    return PromptSource(parts.config.data).rows(0, 12)


def test_arrays_show_prompt_answer_and_end(parts, rows):
    arrays = demonstration_arrays(parts, rows, 0)
    width, length = 8, 10
    assert arrays["tokens"].shape == (12, width + length)
    for i, row in enumerate(rows):
        prompt_mask, mask = arrays["prompt_mask"][i], arrays["response_mask"][i]
        prompt = arrays["tokens"][i, :width][prompt_mask]
        shown = arrays["tokens"][i, width:][mask]
        assert parts.tokenizer.decode(prompt.tolist()) == parts.task.prompt(row)
        # The end is shown as well, or the policy would never learn to stop.
        assert shown[-1] == parts.eos_ids[0]
        assert parts.task.judge(parts.tokenizer.decode(shown[:-1].tolist()), row).reward == 1.0
        # Prompts end where responses begin.
        np.testing.assert_array_equal(prompt_mask, np.arange(width) >= width - len(prompt))
        np.testing.assert_array_equal(mask, np.arange(length) < len(shown))
        padding = np.concatenate([arrays["tokens"][i, :width][~prompt_mask],
                                  arrays["tokens"][i, width:][~mask]])  # fmt: skip
        assert (padding == parts.tokenizer.pad_id).all()
        assert arrays["prompt_id"][i] == row["prompt_id"]


def test_demonstration_depends_on_seed_and_position_alone(parts, rows):
    """So two hosts that share a batch show what one would."""
    whole = demonstration_arrays(parts, rows, 40)["tokens"]
    halves = [demonstration_arrays(parts, rows[i : i + 6], 40 + i)["tokens"] for i in (0, 6)]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
    # Later, another of a row's solutions is shown.
    assert (demonstration_arrays(parts, rows, 41)["tokens"] != whole).any()


def test_it_is_learned():
    records = metrics(warmup())
    assert [record["step"] for record in records] == list(range(1, 81))
    losses = [record["sft/loss"] for record in records]
    # From the entropy of 64 tokens to little more than the choice among solutions.
    assert np.mean(losses[:3]) > 2.5
    assert np.mean(losses[-5:]) < 0.9
    assert all(record["sft/skipped_steps"] == 0 for record in records)
    assert final_state(warmup())["host"] == {"position": 80 * 64}


def test_it_is_repeatable(tmp_path):
    settings = {"sft__steps": 3, "sft__batch_size": 16}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sft(tiny_run(seed=seed, **settings), tmp_path / name)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")
    assert final_state(tmp_path / "a") == final_state(tmp_path / "b")


def test_it_goes_on_from_another_run(tmp_path):
    """The loss starts where the other run's ended."""
    settings = {"sft__steps": 2, "sft__optimizer__learning_rate": 1e-6}
    sft(tiny_run(model__start_from=warmup(), **settings), tmp_path)
    ended = np.mean([record["sft/loss"] for record in metrics(warmup())[-5:]])
    assert metrics(tmp_path)[0]["sft/loss"] == pytest.approx(ended, abs=0.15)


def test_command(tmp_path, capsys):
    arguments = [*tiny_arguments(sft__steps=2, sft__batch_size=8), f"--workdir={tmp_path}/run"]
    assert module.main(arguments) == 0
    assert saved_steps(tmp_path / "run" / CHECKPOINTS) == [2]
    assert len(metrics(tmp_path / "run")) == 2
    capsys.readouterr()
    assert module.main(arguments) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_too_long_demonstrations(tmp_path):
    config = tiny_run(rollout__max_response_length=3)
    with pytest.raises(InputError, match="demonstration has .* more than rollout.max_response_le"):
        sft(config, tmp_path)
