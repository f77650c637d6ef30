"""Metrics writer: one step late, exact on resume, valid JSON whatever the values."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.errors import InputError
from flowrl_jax.metric_sinks import Event, MetricsConfig, SessionLog
from flowrl_jax.metrics import CompileCounter, MetricWriter, read_metrics
from flowrl_jax.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
QUIET = MetricsConfig(tensorboard=False, table=False)


class FakeArray:
    """A scalar that counts how often somebody waits for its value."""

    shape = ()
    dtype = np.dtype(np.float32)

    def __init__(self, value: float) -> None:
        self.value, self.reads = value, 0

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self.reads += 1
        return np.asarray(self.value, dtype=self.dtype)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> list[Any]:
    """Events of all files of a run, in the order in which TensorBoard reads them."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_device_is_read_one_step_late_and_once(tmp_path) -> None:
    arrays = [FakeArray(float(i)) for i in range(4)]
    writer = MetricWriter(tmp_path, config=QUIET)
    for step, array in enumerate(arrays):
        writer.write(step, {"rollout/reward_mean": 0.5}, {"train/loss": cast(Any, array)})
        assert [a.reads for a in arrays] == [1] * step + [0] * (4 - step)
        assert [r["step"] for r in lines(tmp_path)] == list(range(step))
    writer.flush()
    assert [a.reads for a in arrays] == [1] * 4
    assert lines(tmp_path)[-1] == {"step": 3, "train/loss": 3.0, "rollout/reward_mean": 0.5}
    writer.close()


def test_all_pending_arrays_travel_in_one_transfer(tmp_path, monkeypatch) -> None:
    calls = []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: calls.append(sorted(x)) or real(x))
    with MetricWriter(tmp_path, config=QUIET) as writer:
        writer.write(1, {}, {"a": jnp.float32(1), "b": jnp.int32(2), "c": jnp.bfloat16(0.5)})
        assert calls == []
        writer.write(2, {"d": 1})
        assert calls == [["a", "b", "c"]]
    assert lines(tmp_path) == [{"step": 1, "a": 1.0, "b": 2, "c": 0.5}, {"step": 2, "d": 1}]


def test_floats_round_trip_and_keys_are_sorted(tmp_path) -> None:
    values = {"z": 0.1, "a": float(np.float32(0.1)), "m": 1e-310, "b": 1 / 3, "n": 2**60}
    with MetricWriter(tmp_path, config=QUIET) as writer:
        writer.write(0, values, {"k": jnp.float32(0.1)})
    (record,) = read_metrics(tmp_path)
    assert record == {"step": 0, **values, "k": float(np.float32(0.1))}
    text = (tmp_path / "metrics.jsonl").read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_nonfinite_values_stay_valid_json(tmp_path) -> None:
    with MetricWriter(tmp_path, config=MetricsConfig(table=False)) as writer:
        writer.write(0, {"x": float("nan"), "y": 1.0}, {"z": jnp.float32(-jnp.inf)})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(text, parse_constant=refuse)
    expected = {"x": None, "y": 1.0, "z": None, "nonfinite": {"x": "nan", "z": "-inf"}}
    assert record == {"step": 0, **expected}
    (back,) = read_metrics(tmp_path)
    assert np.isnan(back["x"]) and back["z"] == -np.inf and "nonfinite" not in back


def test_resume_gives_the_file_of_a_run_that_never_stopped(tmp_path) -> None:
    def run(folder: Path, steps: range, resume_step: int | None = None) -> None:
        with MetricWriter(folder, resume_step=resume_step, config=QUIET) as writer:
            for step in steps:
                writer.write(step, {"x": step / 7}, {"y": jnp.float32(step)})

    run(tmp_path / "whole", range(1, 10))
    run(tmp_path / "killed", range(1, 7))
    path = tmp_path / "killed" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 7, "x": 0.')  # what a kill in the middle of a write leaves
    run(tmp_path / "killed", range(5, 10), resume_step=4)
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ["metrics.jsonl"]


def test_half_written_line_of_a_kept_step_is_dropped_but_a_whole_one_is_kept(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')  # whole but for its newline
    MetricWriter(tmp_path, resume_step=2, config=QUIET).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_bytes(b'{"step": 1}\n{"step": 2, "a\xc3')
    MetricWriter(tmp_path, resume_step=2, config=QUIET).close()
    assert path.read_text() == '{"step": 1}\n'


def test_resume_before_the_first_checkpoint_keeps_nothing(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    MetricWriter(tmp_path, resume_step=-1, config=QUIET).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_damage_before_the_last_line_stops_and_changes_nothing(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged = '{"step": 1}\n{"st\n{"step": 3}\n'
    path.write_text(damaged)
    with pytest.raises(InputError, match="line 2 is not a metrics record"):
        MetricWriter(tmp_path, resume_step=3, config=QUIET)
    assert path.read_text() == damaged
    with pytest.raises(InputError, match="line 2"):
        read_metrics(path)


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path) -> None:
    with MetricWriter(tmp_path, config=QUIET) as writer:
        writer.write(1, {"x": 1})
    with pytest.raises(InputError, match="--resume"):
        MetricWriter(tmp_path, config=QUIET)
    assert lines(tmp_path) == [{"step": 1, "x": 1}]


def test_remote_workdir_and_missing_file_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="gs://bucket/run is remote"):
        MetricWriter("gs://bucket/run", config=QUIET)
    with pytest.raises(InputError, match="does not exist"):
        read_metrics(tmp_path)


def test_second_write_of_a_step_joins_its_line(tmp_path) -> None:
    with MetricWriter(tmp_path, config=QUIET) as writer:
        writer.write(1, {"a": 1}, {"b": jnp.float32(2)})
        writer.write(1, {"eval/pass_at_1": 0.5})
        with pytest.raises(ValueError, match=r"already has metrics \['b'\]"):
            writer.write(1, {"b": 3})
        writer.write(2, {"a": 2})
        with pytest.raises(ValueError, match="step 1 come after step 2"):
            writer.write(1, {"c": 2})
    assert lines(tmp_path)[0] == {"step": 1, "a": 1, "b": 2.0, "eval/pass_at_1": 0.5}


@pytest.mark.parametrize(
    ("host", "device", "message"),
    [
        ({"step": 1}, {}, "reserved"),
        ({}, {"nonfinite": jnp.float32(1)}, "reserved"),
        ({"a": 1}, {"a": jnp.float32(1)}, "on host and device"),
        ({}, {"a": jnp.ones(2)}, r"shape \(2,\)"),
    ],
)
def test_wrong_names_and_shapes_stop_at_once(tmp_path, host, device, message) -> None:
    writer = MetricWriter(tmp_path, config=QUIET)
    with pytest.raises(ValueError, match=message):
        writer.write(1, host, device)
    writer.close()
    assert lines(tmp_path) == []


def test_other_processes_write_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    array: Any = FakeArray(1.0)
    with MetricWriter(tmp_path / "run") as writer:
        writer.write(1, {"a": 1}, {"b": array})
        writer.write(2, {"a": 1}, {"b": array})
    assert array.reads == 0 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_flushed_lines_survive_a_kill(tmp_path) -> None:
    program = f"""
import os, signal
from flowrl_jax.metrics import MetricWriter
writer = MetricWriter({str(tmp_path)!r})
for step in range(5):
    writer.write(step, {{"x": step}})
writer.flush()
writer.write(5, {{"x": 5}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, cwd=ROOT)
    assert done.returncode == -9, done.stderr.decode()
    assert [r["step"] for r in lines(tmp_path)] == [0, 1, 2, 3, 4]
    assert [e.step for e in events(tmp_path) if e.HasField("summary")] == [0, 1, 2, 3, 4]


def test_tensorboard_purges_what_the_resume_repeats(tmp_path) -> None:
    config = MetricsConfig(table=False)
    for resume, steps in ((None, range(1, 7)), (4, range(5, 9))):
        with MetricWriter(tmp_path, resume_step=resume, config=config) as writer:
            for step in steps:
                writer.write(step, {"x": float(step)})
    shown: list[int] = []
    for event in events(tmp_path):
        assert event.wall_time > 1e9
        if event.session_log.status == SessionLog.START:  # what TensorBoard does with it
            shown = [step for step in shown if step < event.step]
        elif event.HasField("summary"):
            shown.append(event.step)
            assert event.summary.value[0].simple_value == event.step
    assert shown == list(range(1, 9))


def test_table_has_a_heading_and_one_row_per_step(tmp_path) -> None:
    printed: list[str] = []
    config = MetricsConfig(tensorboard=False)
    with MetricWriter(tmp_path, config=config, print_line=printed.append) as writer:
        writer.write(0, {"eval/pass_at_1": 0.25})
        for step in range(1, 4):
            writer.write(step, {"rollout/reward_mean": 0.5, "time/step": 1.25}, {})
    assert printed[0].split() == ["0", "evaluation", "pass_at_1", "0.25"]
    assert printed[1].split()[:3] == ["step", "loss", "reward"]
    assert [row.split()[0] for row in printed[2:]] == ["1", "2", "3"]
    assert printed[2].split()[1:3] == ["-", "0.5000"]
    assert len({len(row) for row in printed[1:]}) == 1


def test_error_of_the_loop_is_not_hidden_by_the_failed_fetch(tmp_path) -> None:
    class Broken(FakeArray):
        def __array__(self, dtype=None, copy=None) -> np.ndarray:
            raise RuntimeError("device lost")

    def loop(error: Exception | None) -> None:
        with MetricWriter(tmp_path, resume_step=-1, config=QUIET) as writer:
            writer.write(1, {}, {"a": cast(Any, Broken(1.0))})
            if error:
                raise error

    with pytest.raises(KeyError, match="the cause"):
        loop(KeyError("the cause"))
    with pytest.raises(RuntimeError, match="device lost"):
        loop(None)


def test_wandb_is_optional_and_continues_its_page(tmp_path, monkeypatch) -> None:
    config = MetricsConfig(tensorboard=False, table=False, wandb_project="demo")
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now fails
    with pytest.raises(InputError, match=r"pip install 'flowrl_jax\[wandb\]'"):
        MetricWriter(tmp_path, config=config)
    assert not (tmp_path / "metrics.jsonl").exists()

    starts, logged = [], []
    run = types.SimpleNamespace(log=lambda m, step: logged.append((step, m)), finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **kw: starts.append(kw) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume in (None, 1):
        with MetricWriter(
            tmp_path, config=config, resume_step=resume, settings={"seed": 3}
        ) as writer:
            writer.write(2 if resume else 1, {"x": 1})
    assert starts[0]["id"] == starts[1]["id"] and starts[0]["config"] == {"seed": 3}
    assert logged == [(1, {"x": 1}), (2, {"x": 1})]


def test_compile_counter_counts_new_programs_only() -> None:
    function = jax.jit(lambda x: x * 3 + 1)
    with CompileCounter() as counter:
        function(np.ones(3, np.float32)).block_until_ready()
        assert counter.count == 1 and counter.seconds > 0
        function(np.zeros(3, np.float32)).block_until_ready()
        assert counter.count == 1
        function(np.ones(4, np.float32)).block_until_ready()
        assert counter.count == 2
    function(np.ones(5, np.float32)).block_until_ready()
    assert counter.count == 2
    counter.close()


def test_progress_without_a_terminal_prints_plain_lines() -> None:
    stream = io.StringIO()
    with Progress(6, "flowrl", initial=2, stream=stream, interval=0.0) as bar:
        bar.update(reward=0.25)
        bar.update(3)
    text = stream.getvalue()
    assert "\r" not in text
    rows = text.splitlines()
    assert all(row.startswith("flowrl:") for row in rows)
    assert "3/6" in text and "reward=0.25" in text and "6/6" in rows[-1] and "step" in rows[-1]


def test_progress_without_a_terminal_is_quiet_between_intervals() -> None:
    stream = io.StringIO()
    with Progress(1000, "x", stream=stream) as bar:
        for _ in range(1000):
            bar.update()
    assert len(stream.getvalue().splitlines()) <= 2


def test_progress_redraws_one_line_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(3, "x", stream=stream, interval=0.0) as bar:
        for _ in range(3):
            bar.update()
    assert stream.getvalue().count("\r") >= 3 and stream.getvalue().count("\n") == 1
