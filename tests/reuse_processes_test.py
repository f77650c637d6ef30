"""Several processes draw again alike, and each replays what it has sampled."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from flowrl_jax.assembly import CHECKPOINTS
from tests.tiny_runs import (
    REPOSITORY,
    final_state,
    finish,
    metrics,
    scratch,
    started_together,
)

pytestmark = pytest.mark.slow

CONFIG = REPOSITORY / "tests" / "tally_config.py"
# Pairs of rewards of the tally are equal now and then.
SHORT = (
    "steps=4", "rollout.group_size=2", "rollout.dynamic_sampling=True", "rollout.max_batches=3",
    "eval.every=0", "checkpoint.every=2", "metrics.table=False",
)  # fmt: skip
REUSE = ("replay.fraction=0.5", "reference.reset_every=3")


def run(workdir: Path, settings: tuple[str, ...], count: int, *more: str) -> None:
    """A run of `count` processes on two devices, which must succeed."""
    notes = workdir.with_suffix(".notes")
    notes.mkdir(parents=True, exist_ok=True)
    own = (f"data.data_dir={scratch()}/data", f"task.options.notes={notes}")
    words = [f"--config.{setting}" for setting in (*SHORT, *settings, *own)]
    programs = scratch() / "reuse_processes_test"  # both tests sample four prompts at a time
    with started_together(
        "train", f"--config={CONFIG}", *words, f"--workdir={workdir}", *more,
        count=count, devices=2 // count, cache_dir=programs,
    ) as processes:  # fmt: skip
        errors = finish(processes, seconds=500)
        assert [process.returncode for process in processes] == [0] * count, errors


def test_processes_draw_again_alike(tmp_path):
    """Two processes are one, up to the order of sums."""
    run(tmp_path / "two", ("rollout.prompts_per_step=4",), 2)
    run(tmp_path / "one", ("rollout.prompts_per_step=4",), 1)
    two, one = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert [list(line) for line in two] == [list(line) for line in one]
    for line, other in zip(two, one, strict=True):
        for name, value in line.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert max(line["rollout/batches"] for line in two) > 1
    assert final_state(tmp_path / "two")["host"] == final_state(tmp_path / "one")["host"]


def test_processes_resume_with_their_own_buffers(tmp_path):
    run(tmp_path / "whole", REUSE, 2)
    lines = metrics(tmp_path / "whole")
    assert [line["replay/share"] for line in lines] == [0.0, 0.5, 0.5, 0.0]
    assert [line["replay/size"] for line in lines] == [4, 8, 12, 4]
    files = sorted(path.name for path in (tmp_path / "whole" / "replay").iterdir())
    assert files == ["2.0.npz", "2.1.npz", "4.0.npz", "4.1.npz"]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / CHECKPOINTS / "4")
    run(tmp_path / "again", REUSE, 2, "--resume")
    assert metrics(tmp_path / "again") == lines
    assert final_state(tmp_path / "again") == final_state(tmp_path / "whole")
