"""Where metrics go: the JSON-lines file, TensorBoard, a table on stdout, Weights & Biases."""

from __future__ import annotations

import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from flowrl_jax.errors import InputError

FILE_NAME = "metrics.jsonl"

# protobuf makes these classes when the modules are imported, so a type checker cannot see them.
Event: Any = vars(event_pb2)["Event"]
SessionLog: Any = vars(event_pb2)["SessionLog"]
TensorBoardSummary: Any = vars(summary_pb2)["Summary"]

Number = int | float
Record = dict[str, Any]

# The stdout table: (metric, heading, format). A metric the run does not have shows as a dash.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("train/loss", "loss", "9.4f"),
    ("rollout/reward_mean", "reward", "8.4f"),
    ("rollout/length_mean", "length", "8.1f"),
    ("rollout/entropy", "entropy", "8.4f"),
    ("train/grad_norm", "grad", "8.3f"),
    ("log_z/mean", "log_z", "8.3f"),
    ("time/step", "s/step", "7.2f"),
)
HEADER_EVERY = 20  # rows between two headings
FLUSH_SECONDS = 10.0  # how far TensorBoard may lag behind a run one is watching


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics go besides `metrics.jsonl`.

    Attributes:
      tensorboard: write event files to DIR/tensorboard.
      table: print one line per step on stdout.
      wandb_project: Weights & Biases project, or None for no upload; needs the extra
        `flowrl_jax[wandb]`.
      wandb_name: name of the run there, None lets the service choose.
    """

    tensorboard: bool = True
    table: bool = True
    wandb_project: str | None = None
    wandb_name: str | None = None


class Sink(Protocol):
    """One destination of finished steps."""

    def write(self, step: int, metrics: Mapping[str, Number]) -> None:
        """Takes the metrics of one step; steps arrive in increasing order, each once."""
        ...

    def flush(self) -> None:
        """Makes everything written so far survive the death of the process."""
        ...

    def close(self) -> None:
        """Flushes and lets go of files and connections."""
        ...


def require_wandb(config: MetricsConfig) -> Any:
    """The wandb module; raises InputError if it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise InputError(
            f"metrics.wandb_project={config.wandb_project} needs the package wandb, which is not"
            " installed: pip install 'flowrl_jax[wandb]' or set it to None"
        ) from error


def complete_lines(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Yields (line, object) of a metrics file; a last line cut off by a kill is left out."""
    number, broken = 0, None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if broken is not None:
                break
            try:
                record = json.loads(line)
            except ValueError:  # not JSON, or not even text
                record = None
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line.rstrip(b"\n") + b"\n", record
            else:
                broken = number
    if broken is not None and broken != number:
        raise InputError(
            f"{path} line {broken} is not a metrics record; only the last line may be incomplete:"
            " mend or delete that line"
        )


def truncate_lines(path: Path, last_step: int) -> None:
    """Keeps the lines of steps up to `last_step`; a kill leaves the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        for line, record in complete_lines(path):
            if record["step"] <= last_step:
                file.write(line)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class JsonlSink:
    """One JSON object per step, on disk as soon as it is written."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        if path.exists():
            if resume_step is not None:
                truncate_lines(path, resume_step)
            elif path.stat().st_size > 0:
                raise InputError(
                    f"{path} already holds the metrics of a run; continue it with --resume or name"
                    " another --workdir"
                )
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, metrics: Mapping[str, Number]) -> None:
        record: Record = {"step": step}
        nonfinite: dict[str, str] = {}
        for name, value in metrics.items():
            finite = math.isfinite(value)
            record[name] = value if finite else None
            if not finite:
                nonfinite[name] = str(value)
        if nonfinite:
            record["nonfinite"] = nonfinite
        self._file.write(json.dumps(record, sort_keys=True, allow_nan=False) + "\n")

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Event files written in the calling thread, one event per step.

    tensorboardX's SummaryWriter queues events for a background thread and cannot tell when they
    have reached the file; its event-file layer can, which `flush` before a checkpoint needs.
    """

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        first = 0 if resume_step is None else resume_step + 1
        # Names carry whole seconds: without the suffix a run restarted at once overwrites its file.
        self._writer = EventsWriter(str(folder / "events"), f".{first:09d}.{os.getpid()}")
        if resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            # Hides the steps at and after `first` that the earlier process wrote.
            self._writer.write_event(Event(wall_time=time.time(), step=first, session_log=start))
        self._flushed = time.monotonic()

    def write(self, step: int, metrics: Mapping[str, Number]) -> None:
        make = TensorBoardSummary.Value
        values = [make(tag=name, simple_value=value) for name, value in sorted(metrics.items())]
        summary = TensorBoardSummary(value=values)
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


class TableSink:
    """One line of the main figures per step, and one of each evaluation, for a human."""

    def __init__(
        self,
        print_line: Callable[[str], None],
        columns: Sequence[tuple[str, str, str]] = COLUMNS,
    ) -> None:
        self._print = print_line
        self._columns = columns
        self._rows = 0

    def write(self, step: int, metrics: Mapping[str, Number]) -> None:
        widths = [int(form.split(".")[0]) for _, _, form in self._columns]
        row = [
            format(metrics[name], form) if name in metrics else "-".rjust(width)
            for (name, _, form), width in zip(self._columns, widths, strict=True)
        ]
        if any(name in metrics for name, _, _ in self._columns):
            if self._rows % HEADER_EVERY == 0:
                heads = [
                    head.rjust(w) for (_, head, _), w in zip(self._columns, widths, strict=True)
                ]
                self._print("    step " + " ".join(heads))
            self._rows += 1
            self._print(f"{step:8d} " + " ".join(row))
        evaluated = {
            k: v
            for k, v in sorted(metrics.items())
            if k.startswith("eval/") and not k.endswith(("_low", "_high"))
        }
        if evaluated:
            figures = "  ".join(f"{k.removeprefix('eval/')} {v:.4g}" for k, v in evaluated.items())
            self._print(f"{step:8d} evaluation  {figures}")

    def flush(self) -> None:
        return None

    def close(self) -> None:
        return None


class WandbSink:
    """Weights & Biases; a resumed run continues its page, found by the id kept in the workdir."""

    def __init__(self, folder: Path, config: MetricsConfig, settings: Mapping[str, Any]) -> None:
        wandb = require_wandb(config)
        id_file = folder / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )

    def write(self, step: int, metrics: Mapping[str, Number]) -> None:
        self._run.log(dict(metrics), step=step)

    def flush(self) -> None:
        return None  # the client uploads on its own; metrics.jsonl is the record

    def close(self) -> None:
        self._run.finish()
