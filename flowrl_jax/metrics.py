"""Metrics of a run: JSON lines, TensorBoard, a table on stdout and, on request, Weights & Biases.

`DIR/metrics.jsonl` is the record of a run: one JSON object per step, keys sorted, with "step" (int)
and one number per metric, written so that reading it back gives the same floats. Keys starting with
`time/` are the only ones that may differ between two identical runs. JSON has no NaN or infinity:
such a value is written as null and named in the line's "nonfinite" object, e.g. {"grad_norm": null,
"nonfinite": {"grad_norm": "inf"}}.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from flowrl_jax.alarm import Alarm
from flowrl_jax.errors import InputError
from flowrl_jax.log_z_points import LOG_Z_ROWS, LogZPoints
from flowrl_jax.metric_sinks import (
    FILE_NAME,
    JsonlSink,
    MetricsConfig,
    Number,
    Record,
    Sink,
    TableSink,
    TensorBoardSink,
    WandbSink,
    complete_lines,
    require_wandb,
)

RESERVED = ("step", "nonfinite")


class MetricWriter:
    """Writes the metrics of a run, one step late.

    A device array handed to `write` is a promise: reading it would stop the host until the device
    has finished the step, and leave the device idle while the host prepares the next one. So
    `write` keeps the arrays of the current step and fetches those of the step before, which are
    ready by then, in one transfer.

    Call `flush` before every checkpoint: a step that a checkpoint contains then has its line on
    disk, and a run resumed from it with `resume_step` continues the file without gap or repetition.
    Only process 0 writes.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        config: MetricsConfig | None = None,
        print_line: Callable[[str], None] = print,
        settings: Mapping[str, Any] | None = None,
        alarm: Alarm | None = None,
    ) -> None:
        """Opens the sinks.

        Args:
          workdir: local folder of the run; made if absent.
          resume_step: None for a new run; else the step of the checkpoint the run continues from,
            whose line is the last one kept (-1 keeps none: a run that was killed before its first
            checkpoint).
          config: which sinks, the defaults of `MetricsConfig` if None.
          print_line: prints a line of the table, e.g. `Progress.print` so as not to break the bar.
          settings: the run's configuration, shown by Weights & Biases.
          alarm: sees each step before it is written, and adds to it; the steps before `resume_step`
            first of all, from the file.

        Raises:
          InputError: workdir is remote, it already holds metrics and `resume_step` is None, its
            metrics file is damaged before its last line, or Weights & Biases is asked for and not
            installed.
        """
        config = config or MetricsConfig()
        self._sinks: list[Sink] = []
        self._pending: tuple[int, Record, dict[str, jax.Array]] | None = None
        self._last_step = -1 if resume_step is None else resume_step
        self._alarm = alarm
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        if "://" in os.fspath(workdir):
            raise InputError(
                f"workdir {os.fspath(workdir)} is remote; metrics are appended line by line, which"
                " needs a local or mounted folder: mount the bucket or name a local folder"
            )
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        if config.wandb_project is not None:
            require_wandb(config)  # before a resumed file is cut
        self._sinks.append(JsonlSink(folder / FILE_NAME, resume_step))
        self._points = LogZPoints(folder, resume_step)
        if alarm:
            for record in read_metrics(folder):
                alarm.see(record.pop("step"), record, quiet=True)
        if config.tensorboard:
            self._sinks.append(TensorBoardSink(folder / "tensorboard", resume_step))
        if config.wandb_project is not None:
            self._sinks.append(WandbSink(folder, config, settings or {}))
        if config.table:
            self._sinks.append(TableSink(print_line))

    @property
    def stop_reason(self) -> str | None:
        """Why the alarm wants the run stopped, if it does; known to the process that writes."""
        return self._alarm.reason if self._alarm else None

    def write(
        self,
        step: int,
        host_metrics: Mapping[str, Number],
        device_metrics: Mapping[str, jax.Array] | None = None,
    ) -> None:
        """Takes metrics of a step without waiting for the device.

        Writing again to the step of the last call adds to its line (an evaluation after the
        training step).

        Args:
          step: at least the step of the last call and above the step resumed from.
          host_metrics: name to number.
          device_metrics: name to scalar array, any real dtype; must not be donated before the next
            call. The one called `LOG_Z_ROWS` has rows, which go to `LogZPoints`.

        Raises:
          ValueError: the step is already written, or a name is reserved, repeated or not a scalar.
        """
        device_metrics = device_metrics or {}
        _check_names(step, host_metrics, device_metrics)
        if not self._writes:
            return
        if self._pending is not None and self._pending[0] == step:
            _, host, device = self._pending
            repeated = (host.keys() | device.keys()) & (host_metrics.keys() | device_metrics.keys())
            if repeated:
                raise ValueError(f"step {step} already has metrics {sorted(repeated)}")
            host.update(host_metrics)
            device.update(device_metrics)
            return
        if step <= self._last_step:
            raise ValueError(f"metrics of step {step} come after step {self._last_step}")
        previous, self._pending = self._pending, (step, dict(host_metrics), dict(device_metrics))
        self._last_step = step
        if previous is not None:
            self._emit(*previous)

    def flush(self) -> None:
        """Fetches what is pending, waiting for the device, and makes all steps so far durable."""
        if self._pending is not None:
            previous, self._pending = self._pending, None
            self._emit(*previous)
        for sink in self._sinks:
            sink.flush()
        if self._writes:
            self._points.flush()

    def close(self) -> None:
        """Flushes and closes every sink; the writer is of no use afterwards."""
        try:
            self.flush()
        finally:
            for sink in self._sinks:
                sink.close()
            self._sinks = []

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception:
            # Fetching the last step fails when its program did; that error must stay the one shown.
            if error is None:
                raise

    def _emit(self, step: int, host: Mapping[str, Number], device: dict[str, jax.Array]) -> None:
        fetched = jax.device_get(device)
        if (rows := fetched.pop(LOG_Z_ROWS, None)) is not None:
            self._points.write(step, rows)
        metrics = {name: _number(value) for name, value in {**host, **fetched}.items()}
        if self._alarm:
            metrics |= self._alarm.see(step, metrics)
        for sink in self._sinks:
            sink.write(step, metrics)


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """Reads a metrics file, non-finite values included.

    Args:
      path: a metrics.jsonl, or the run's folder.

    Returns:
      One dict per step, in file order: "step" and the metrics; no half-written last line.

    Raises:
      InputError: the file is absent or damaged before its last line.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path} does not exist; train a run there first or correct the path")
    records = []
    for _, record in complete_lines(path):
        for name, value in record.pop("nonfinite", {}).items():
            record[name] = float(value)
        records.append(record)
    return records


class CompileCounter:
    """Counts the programs XLA builds while it is open, to notice a step that compiles again.

    A program loaded from JAX's persistent compilation cache counts too: the host stopped for it.
    Use as a context manager, or call `close` when done.

    Attributes:
      count: programs so far.
      seconds: time spent building them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self._open = True
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.count += 1
            self.seconds += duration_secs

    def close(self) -> None:
        """Stops counting; further calls do nothing."""
        if self._open:
            self._open = False
            jax.monitoring.unregister_event_duration_listener(self._listen)

    def __enter__(self) -> CompileCounter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_names(step: int, host: Mapping[str, Any], device: Mapping[str, Any]) -> None:
    for name in (*host, *device):
        if name in RESERVED:
            raise ValueError(f"metric name {name!r} of step {step} is reserved")
    repeated = host.keys() & device.keys()
    if repeated:
        raise ValueError(f"step {step} has metrics {sorted(repeated)} on host and device")
    for name, array in device.items():
        # The shape is known without waiting for the value.
        if array.shape != () and name != LOG_Z_ROWS:
            raise ValueError(f"metric {name!r} of step {step} has shape {array.shape}; reduce it")


def _number(value: Any) -> Number:
    return int(value) if np.asarray(value).dtype.kind in "iub" else float(value)
