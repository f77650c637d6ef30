"""Several processes as one run, each with some of the devices: the run of one process with all.

The processes are real ones that meet over loopback. What they compile dominates the time, so few
runs serve all tests.
"""

import json
import shutil
import signal
import subprocess
import time
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
    final_state,
    finish,
    metrics,
    one_device,
    scratch,
    started_together,
)

pytestmark = pytest.mark.slow

CONFIG = REPOSITORY / "tests" / "tally_config.py"
STEPS, EVERY = 12, 4  # as in the config
ROWS = 16  # of a process in a step: four prompts with four responses each
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
    """The prompts that each process of a run was asked to judge, once for each response."""
    notes = workdir.with_suffix(".notes")
    return {int(file.name): [int(n) for n in file.read_text().split()] for file in notes.iterdir()}


def assert_same_figures(workdir: Path, other: Path, first: int = 0) -> None:
    """Metrics of every step from `first` on are close."""
    records, others = ([r for r in metrics(d) if r["step"] >= first] for d in (workdir, other))
    assert [r["step"] for r in records] == [r["step"] for r in others] == [*range(first, STEPS + 1)]
    for record, expected in zip(records, others, strict=True):
        assert record.keys() == expected.keys()
        for name, value in record.items():
            where = f"{name} of step {record['step']}"
            np.testing.assert_allclose(value, expected[name], **CLOSE, err_msg=where)


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs; `programs` in it is a cache that no process which is to be killed may use."""
    return tmp_path_factory.mktemp("multihost")


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


@pytest.fixture(scope="module")
def runs(folder: Path) -> tuple[Path, Path]:
    """The same run by one process with 8 devices and by two with 4 each."""
    alone, pair = folder / "alone", folder / "pair"
    run_all(folder, ("train", words(alone), 1, 8), ("train", words(pair), 2, 4))
    return alone, pair


def test_two_processes_are_one_run(runs: tuple[Path, Path]) -> None:
    alone, pair = runs
    assert_same_figures(pair, alone)
    assert_same_parameters(pair, alone)
    rewards = [record["rollout/reward_mean"] for record in metrics(pair)[1:]]
    assert len(set(rewards)) > 6 and 0.3 < np.mean(rewards) < 0.7


def test_each_process_judges_its_own_rows(runs: tuple[Path, Path]) -> None:
    """Half of the prompts each, and together those that a process alone judges."""
    alone, pair = map(judged, runs)
    assert (len(pair[0]), len(pair[1]), len(alone[0])) == (STEPS * ROWS,) * 2 + (STEPS * 2 * ROWS,)
    steps = [slice(step * ROWS, (step + 1) * ROWS) for step in range(STEPS)]
    assert alone[0] == [prompt for step in steps for host in (0, 1) for prompt in pair[host][step]]


def test_checkpoints_go_from_one_layout_to_another(runs: tuple[Path, Path], folder: Path) -> None:
    """Two processes go on with what one wrote; one, with another mesh, with what two wrote."""
    alone, pair = runs
    in_two = rewound(alone, folder / "in_two", EVERY)
    in_one = rewound(pair, folder / "in_one", EVERY)
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=2")
    run_all(
        folder,
        ("train", words(in_two, "--resume"), 2, 4),
        ("train", words(in_one, "--resume", *mesh), 1, 4),
    )
    for workdir in (in_two, in_one):
        assert_same_figures(workdir, alone, first=EVERY + 1)
        assert_same_parameters(workdir, alone)


def test_other_commands_join_too(runs: tuple[Path, Path], folder: Path) -> None:
    """Two processes evaluate what training evaluated, and fine-tune as one does."""
    _, pair = runs
    summary, samples = folder / "summary.json", folder / "samples.jsonl"
    given = [f"--run={pair}", f"--json={summary}", f"--out={samples}"]
    in_two, in_one = folder / "sft_in_two", folder / "sft_in_one"
    run_all(
        folder,
        ("evaluate", settings(pair) + given, 2, 4),
        ("sft", words(in_two), 2, 4),
        ("sft", words(in_one), 1, 8),
    )
    trained = metrics(pair)[-1]
    for name, figure in json.loads(summary.read_text()).items():
        np.testing.assert_allclose(figure["mean"], trained[f"eval/{name}"], **CLOSE)
    assert [record["prompt_id"] for record in read_records(samples)] == list(range(8))
    for record, expected in zip(metrics(in_two), metrics(in_one), strict=True):
        np.testing.assert_allclose(list(record.values()), list(expected.values()), **CLOSE)
    assert_same_parameters(in_two, in_one)


def wait_for_steps(processes: list[subprocess.Popen], workdir: Path, count: int) -> None:
    """Waits until the second process has judged the responses of some more steps."""
    notes = workdir.with_suffix(".notes") / "1"
    size = notes.stat().st_size if notes.exists() else 0
    while (notes.read_bytes()[size:] if notes.exists() else b"").count(b"\n") < ROWS * count:
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def test_a_run_survives_what_happens_to_its_processes(
    runs: tuple[Path, Path], folder: Path
) -> None:
    """One is killed, which takes down the other; one is told to stop, and both save that step."""
    _, pair = runs
    workdir = folder / "survivor"

    def again(number: int):
        # A process that is killed may leave half an entry in its cache.
        programs = folder / f"programs_{number}"
        shutil.copytree(folder / "programs", programs)
        arguments = words(workdir, "--resume", "--heartbeat_seconds=5")
        return started_together("train", *arguments, count=2, devices=4, cache_dir=programs)

    with again(0) as processes:
        wait_for_steps(processes, workdir, EVERY + 2)
        processes[1].kill()
        began = time.monotonic()
        (said, _), codes = finish(processes, 60), [process.returncode for process in processes]
    assert time.monotonic() - began < 30
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 2, 75)
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and "another process" in last and "--resume" in last

    with again(1) as processes:
        wait_for_steps(processes, workdir, 1)
        processes[1].terminate()
        errors = finish(processes)
        assert [process.returncode for process in processes] == [75, 75], errors
    assert all("start again with --resume" in said.splitlines()[-1] for said in errors)
    assert len({said.splitlines()[-1] for said in errors}) == 1  # the same step

    with again(2) as processes:
        succeed(processes)
    assert metrics(workdir) == metrics(pair)
    assert final_state(workdir) == final_state(pair)
