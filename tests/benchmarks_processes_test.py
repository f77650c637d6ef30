"""Benchmarks evaluated by several processes are one evaluation, interrupted or not."""

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from flowrl_jax.graded import read_records
from tests.tiny_runs import finish, started_together, tiny_arguments

pytestmark = pytest.mark.slow


def words(out: Path) -> list[str]:
    """Of a command that evaluates the policy that training would start from."""
    return [
        *tiny_arguments(data__data_dir=out.parent / "data"),
        *("--benchmarks=countdown", "--samples=4", "--join_seconds=300"),
        *(f"--out={out}", f"--json={out}.json"),
    ]


def run_together(folder: Path, *runs: tuple[Path, int]) -> None:
    """Has processes with eight devices together evaluate into each folder; all must succeed."""
    with ExitStack() as stack:
        processes: list[subprocess.Popen] = []
        for out, count in runs:
            processes += stack.enter_context(
                started_together(
                    "evaluate", *words(out), count=count, devices=8 // count, cache_dir=folder
                )
            )
        for process, said in zip(processes, finish(processes), strict=True):
            assert process.returncode == 0, said


def test_processes_are_one_evaluation(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    run_together(tmp_path / "programs", (two, 2), (one, 1))
    file = two / "countdown.jsonl"
    records, alone = read_records(file), read_records(one / "countdown.jsonl")
    assert [record["prompt_id"] for record in records] == list(range(16))
    assert [record["settings"] for record in records] == [r["settings"] for r in alone]
    same = [
        ours == theirs
        for record, other in zip(records, alone, strict=True)
        for ours, theirs in zip(record["responses"], other["responses"], strict=True)
    ]
    # Another layout may take a sum in another order, and then a draw on an edge goes elsewhere.
    assert sum(same) >= 0.9 * len(same)
    assert len({text for record in records for text in record["responses"]}) > 16
    # Cut off in the second batch, and begun again.
    whole, table = file.read_bytes(), json.loads(two.with_suffix(".json").read_text())
    file.write_bytes(whole[: len(whole) * 3 // 4])
    run_together(tmp_path / "programs", (two, 2))
    assert file.read_bytes() == whole
    assert json.loads(two.with_suffix(".json").read_text()) == table
