"""Several processes as one run, each with some of the devices: the run of one process with all.

The processes are real ones that meet over loopback. What they compile dominates the time, so few
runs serve all tests.
"""

import dataclasses
import json
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest

from flowrl_jax.assembly import CHECKPOINTS, assemble, scoring_learner
from flowrl_jax.checkpoint import restore_log_z, restore_policy, saved_steps
from flowrl_jax.cli import load_config
from flowrl_jax.config import parse_config
from flowrl_jax.graded import read_records
from flowrl_jax.train_step import abstract_policy
from tests.tiny_runs import (
    REPOSITORY,
    finish,
    metrics,
    one_device,
    scratch,
    started_together,
)

pytestmark = pytest.mark.slow

CONFIG = REPOSITORY / "tests" / "tally_config.py"
STEPS, EVERY = 12, 6  # as in the config
GROUP = 4
ROWS = 16  # of a process in a step: four prompts with four responses each
EVALUATED = 32  # responses, four to each of eight prompts, before the first step and after the last
# Another layout takes some sums in another order, which changes the last bits of float32, 1e-7;
# twelve steps make more of them. The figures are of the order of 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def words(workdir: Path, *more: str) -> list[str]:
    """The command line of a run; what its task notes lies beside its folder."""
    return [*settings(workdir), f"--workdir={workdir}", *more]


def settings(workdir: Path) -> list[str]:
    """Those of a run on its command line."""
    notes = workdir.with_suffix(".notes")
    notes.mkdir(parents=True, exist_ok=True)
    data, options = (
        f"--config.data.data_dir={scratch()}/data",
        f"--config.task.options.notes={notes}",
    )
    return [f"--config={CONFIG}", data, options]


def judged(workdir: Path) -> dict[int, list[int]]:
    """The prompts that each process of a run was asked to judge, once for each response.

    Those of the evaluation before the first step are left out.
    """
    notes = list(workdir.with_suffix(".notes").iterdir())
    first = EVALUATED // len(notes)
    return {int(file.name): [int(n) for n in file.read_text().split()][first:] for file in notes}


def assert_same_figures(records: list[dict], expected: list[dict]) -> None:
    """Metrics of every step are close."""
    assert [list(record) for record in records] == [list(record) for record in expected]
    for record, other in zip(records, expected, strict=True):
        for name, value in record.items():
            where = f"{name} of step {record['step']}"
            np.testing.assert_allclose(value, other[name], **CLOSE, err_msg=where)


def final_parameters(workdir: Path) -> dict:
    """The parameters of a run's latest checkpoint, on one device."""
    changes = {"data.data_dir": str(scratch() / "data"), "task.options.notes": str(workdir)}
    config = parse_config(load_config(str(CONFIG), changes))
    with one_device():
        abstract = abstract_policy(scoring_learner(assemble(config, workdir)))
        policy, _ = restore_policy(workdir / CHECKPOINTS, abstract)
        return {"policy": policy, "log_z": restore_log_z(workdir / CHECKPOINTS)[0]}


def assert_same_parameters(workdir: Path, other: Path) -> None:
    """Every final parameter is close."""
    close = lambda x, y: np.testing.assert_allclose(x, y, **CLOSE)  # noqa: E731
    jax.tree.map(close, final_parameters(workdir), final_parameters(other))


def rewound(workdir: Path, copy: Path, step: int) -> Path:
    """A copy of a run as if it had been stopped after the checkpoint of a step."""
    shutil.copytree(workdir, copy)
    for later in saved_steps(copy / CHECKPOINTS):
        if later > step:
            shutil.rmtree(copy / CHECKPOINTS / str(later))
    return copy


def succeed(processes: list[subprocess.Popen]) -> None:
    """Waits for processes, all of which must succeed."""
    errors = finish(processes)
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    assert not any("error:" in said for said in errors), errors


def run_all(folder: Path, *runs: tuple[str, list[str], int, int]) -> None:
    """Has runs at the same time, all of which must succeed.

    Args:
        folder: where their common cache is.
        runs: command, its words, how many processes, and devices of each.
    """
    with ExitStack() as stack:
        processes: list[subprocess.Popen] = []
        for command, arguments, count, devices in runs:
            together = started_together(
                command, *arguments, count=count, devices=devices, cache_dir=folder / "programs"
            )
            processes += stack.enter_context(together)
        succeed(processes)


@dataclasses.dataclass
class Story:
    """What happened to a run that was begun by two processes and finished by one.

    Attributes:
        run: its folder.
        codes: of the two processes, the second of which was killed.
        said: by the first on stderr.
        seconds: that the first lived on.
        judged: prompts that each had judged by then.
        figures: metrics that it had written by then.
        stopped: exit codes after it was resumed, and the second was told to stop.
        stopped_saying: the last line of each.
        saved: the latest checkpoint then.
    """

    run: Path
    codes: list[int]
    said: str
    seconds: float
    judged: dict[int, list[int]]
    figures: list[dict]
    stopped: list[int] = dataclasses.field(default_factory=list)
    stopped_saying: list[str] = dataclasses.field(default_factory=list)
    saved: int = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs and the programs that they compile."""
    return tmp_path_factory.mktemp("multihost")


@pytest.fixture(scope="module")
def runs(folder: Path) -> tuple[Path, Story]:
    """A run that one process with 8 devices does alone; and one that has seen more."""
    alone, run = folder / "alone", folder / "run"
    cache = folder / "programs"
    with started_together("train", *words(alone), count=1, devices=8, cache_dir=cache) as single:
        story = killed(run, cache)
        told_to_stop(story, cache)
        succeed(single)
    return alone, story


def killed(run: Path, cache: Path) -> Story:
    """Begins a run in two processes, and kills one between two checkpoints."""
    short = words(run, "--heartbeat_seconds=5")
    with started_together("train", *short, count=2, devices=4, cache_dir=cache) as processes:
        wait_for_steps(processes, run, EVERY + 3)
        processes[1].kill()
        began = time.monotonic()
        said = finish(processes)[0]
    codes, seconds = [process.returncode for process in processes], time.monotonic() - began
    return Story(run, codes, said, seconds, judged(run), metrics(run))


def told_to_stop(story: Story, cache: Path) -> None:
    """Resumes a run in two processes, and tells one of them to stop."""
    again = words(story.run, "--resume")
    with started_together("train", *again, count=2, devices=4, cache_dir=cache) as processes:
        wait_for_steps(processes, story.run, 3)
        processes[1].terminate()
        story.stopped_saying = [said.splitlines()[-1] for said in finish(processes)]
    story.stopped = [process.returncode for process in processes]
    story.saved = saved_steps(story.run / CHECKPOINTS)[-1]


def wait_for_steps(processes: list[subprocess.Popen], run: Path, count: int) -> None:
    """Waits until the second process has judged the responses of some more steps."""
    notes = run.with_suffix(".notes") / "1"
    size = notes.stat().st_size if notes.exists() else 0
    wanted = ROWS * count + (0 if size else EVALUATED // 2)
    while (notes.read_bytes()[size:] if notes.exists() else b"").count(b"\n") < wanted:
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def test_two_processes_are_one_run(runs: tuple[Path, Story]) -> None:
    alone, story = runs
    expected = metrics(alone)
    assert [record["step"] for record in expected] == list(range(STEPS + 1))
    assert len(story.figures) > EVERY + 1
    assert_same_figures(story.figures, expected[: len(story.figures)])
    rewards = [record["rollout/reward_mean"] for record in expected[1:]]
    assert len(set(rewards)) > STEPS // 2 and 0.3 < np.mean(rewards) < 0.7


def test_each_process_judges_its_own_rows(runs: tuple[Path, Story]) -> None:
    """Half of the prompts each, as they end, and together those that a process alone judges."""
    alone, story = runs
    whole = judged(alone)
    assert set(whole) == {0} and len(whole[0]) == STEPS * 2 * ROWS + EVALUATED
    assert set(story.judged) == {0, 1}
    for step in range(EVERY + 3):
        here = [story.judged[process][step * ROWS : (step + 1) * ROWS] for process in (0, 1)]
        both = whole[0][step * 2 * ROWS : (step + 1) * 2 * ROWS]
        assert sorted(here[0] + here[1]) == sorted(both)
        assert all(count % GROUP == 0 for prompts in here for count in Counter(prompts).values())


def test_a_killed_process_takes_the_other_down(runs: tuple[Path, Story]) -> None:
    _, story = runs
    assert story.codes[1] == -signal.SIGKILL and story.codes[0] not in (0, 2, 75)
    assert story.seconds < 30
    last = story.said.strip().splitlines()[-1]
    assert last.startswith("error: ") and "another process" in last and "--resume" in last


def test_resumed_after_the_kill_bit_for_bit(runs: tuple[Path, Story]) -> None:
    _, story = runs
    before, after = (
        {record["step"]: record for record in r} for r in (story.figures, metrics(story.run))
    )
    again = [step for step in before if EVERY < step < story.saved]
    assert again
    assert [before[step] for step in again] == [after[step] for step in again]


def test_told_to_stop_both_save_the_same_step(runs: tuple[Path, Story]) -> None:
    _, story = runs
    assert story.stopped == [75, 75]
    last = f"preempted: saved step {story.saved}; start again with --resume"
    assert story.stopped_saying == [last, last]


def test_checkpoints_go_from_one_layout_to_another(runs: tuple[Path, Story], folder: Path) -> None:
    """One process, with another mesh, goes on with what two wrote; four with what one wrote."""
    alone, story = runs
    in_four = rewound(alone, folder / "in_four", EVERY)
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=2")
    run_all(
        folder,
        ("train", words(story.run, "--resume", *mesh), 1, 4),
        ("train", words(in_four, "--resume"), 4, 2),
    )
    for run in (story.run, in_four):
        assert_same_figures(metrics(run), metrics(alone))
        assert_same_parameters(run, alone)


def test_other_commands_join_too(runs: tuple[Path, Story], folder: Path) -> None:
    """Two processes evaluate what one has trained as it did, and fine-tune as it does."""
    alone, _ = runs
    summary, samples = folder / "summary.json", folder / "samples.jsonl"
    given = [f"--run={alone}", f"--json={summary}", f"--out={samples}"]
    in_two, in_one = folder / "sft_in_two", folder / "sft_in_one"
    run_all(
        folder,
        ("evaluate", settings(alone) + given, 2, 4),
        ("sft", words(in_two), 2, 4),
        ("sft", words(in_one), 1, 8),
    )
    trained = metrics(alone)[-1]
    for name, figure in json.loads(summary.read_text()).items():
        np.testing.assert_allclose(figure["mean"], trained[f"eval/{name}"], **CLOSE)
    assert [record["prompt_id"] for record in read_records(samples)] == list(range(8))
    assert_same_figures(metrics(in_two), metrics(in_one))
    assert_same_parameters(in_two, in_one)
