"""Several processes, one per host, as one run: how they meet, what they share, how they part.

A command joins before it touches a device. Whoever dies takes the others down: each process sends
heartbeats to process 0, and all end, with a message, once one has been silent for
--heartbeat_seconds. The supervisor (`launch/supervise.sh`) then starts them again.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from flowrl_jax.errors import InputError
from flowrl_jax.native import library
from flowrl_jax.sharding import Layout

AUTO, NONE = "auto", "none"
HEARTBEAT_SECONDS = 30  # silence that counts as death; all have ended well within a minute
JOIN_SECONDS = 45  # one that dies before they have met has the others end within a minute, too
PART_SECONDS = 10  # what others may take to leave with one that has failed
FINISH_SECONDS = 300  # what process 0 may take to write the last things while the others wait

_EXPLICIT = re.compile(r"(?P<address>[^,\s]+:\d+),(?P<count>\d+),(?P<index>\d+)")
# What errors say that have another process as their cause, by whom they pass through.
_LOSS = re.compile(
    r"Gloo|NCCL|heartbeat|coordination service|CoordinationService|Barrier (timed out|failed)"
)
_LAST_WORDS = (
    "error: this process of the run was killed, or ended by jaxlib. If jaxlib says above that tasks"
    " are unhealthy or that it cannot connect, another process has died, has not started or cannot"
    " be reached: its own output says why. Start all of them again (training with --resume)"
)
_all_is_well: int | None = None  # the pipe of `_speak_up`
_CPU_THREADS = 16
_ASKED_FOR = f"give {AUTO}, {NONE} or HOST:PORT,PROCESSES,INDEX, such as 10.0.0.2:8476,4,0"


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags that `join` reads to those of a command.

    Args:
        values: the command's flags, not parsed yet.
    """
    flags.DEFINE_string(
        "distributed",
        os.environ.get("FLOWRL_DISTRIBUTED", AUTO),
        f"the processes of this run: {AUTO} (what Cloud TPU, GKE or Slurm says), {NONE}, or"
        " HOST:PORT,PROCESSES,INDEX; default: FLOWRL_DISTRIBUTED in the environment, else auto",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "heartbeat_seconds",
        HEARTBEAT_SECONDS,
        "silence after which a process counts as dead and takes the others down",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "join_seconds",
        int(os.environ.get("FLOWRL_JOIN_SECONDS", JOIN_SECONDS)),
        "how long to wait for the other processes at the start; default: FLOWRL_JOIN_SECONDS in the"
        f" environment (the supervisor sets it to 300), else {JOIN_SECONDS}",
        flag_values=values,
    )


def join(values: flags.FlagValues) -> None:
    """Joins the other processes of the run, if there are any; call it before any use of a device.

    Args:
        values: parsed flags, with those of `define_flags`.

    Raises:
        InputError: a flag's value is malformed.
        SystemExit: process 0 cannot be found or its port is taken; exit code 1, worth another try.
            Where another process does not come in time, jaxlib aborts this one.
    """
    choice = str(values["distributed"].value)
    seconds = {name: int(str(values[name].value)) for name in ("heartbeat_seconds", "join_seconds")}
    for name, given in seconds.items():
        if given < 1:
            raise InputError(f"--{name}={given}: give one second or more")
    address = _parse(choice)
    if choice == NONE or (address is None and not _in_cluster(os.environ)):
        return
    _configure()
    coordinator, count, index = address or (None, None, None)
    patience = f"waiting up to {seconds['join_seconds']} s for the other processes"
    print(f"--distributed={choice}: {patience}", file=sys.stderr, flush=True)
    _speak_up()
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=seconds["join_seconds"],
            heartbeat_timeout_seconds=seconds["heartbeat_seconds"],
            shutdown_timeout_seconds=FINISH_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        _be_silent()
        if address is None and "coordinator_address" in str(error):
            return  # a TPU machine outside any cluster, such as a development board
        raise SystemExit(
            f"error: --distributed={choice}: the processes of the run did not meet"
            f" ({' '.join(str(error).split())}); see that all hosts run this same command and reach"
            " process 0's port"
        ) from error


def _configure() -> None:
    """Settings that jax reads when it first touches a device."""
    # With it jaxlib catches SIGTERM and goes on; here whoever can save upon it says so.
    jax.config.update("jax_enable_preemption_service", False)
    # Gloo's collectives can deadlock where the CPU runs steps that were dispatched ahead, and
    # where each waits in a thread of a pool that has no more of them than the machine has cores.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    os.environ.setdefault("NPROC", str(max(_CPU_THREADS, os.cpu_count() or 1)))


def leave(code: int) -> int:
    """Ends this process's part in the run; a command calls it last.

    Args:
        code: the exit code.

    Returns:
        The code, if all processes leave. One that has failed while the others go on does not
        return but exits, which takes them down.
    """
    if not jax.distributed.is_initialized():
        return code
    # Whoever succeeds may have to wait for process 0, which has more to write.
    parting = threading.Thread(target=_part, daemon=True)
    parting.start()
    parting.join(PART_SECONDS if code else None)
    if parting.is_alive():
        _exit(code)
    _be_silent()
    return code


def leave_failed(error: BaseException) -> int:
    """Ends this process's part in the run after an error that nobody expected.

    Args:
        error: is raised again where this process is alone.

    Returns:
        The exit code, as `leave`.
    """
    if not jax.distributed.is_initialized():
        raise error
    if _is_loss(error):
        print(
            f"error: process {jax.process_index()} of {jax.process_count()}: another process of"
            f" the run has died or cannot be reached ({_one_line(error)[:300]}): see what the"
            " others say, and start all of them again (training with --resume)",
            file=sys.stderr,
        )
        _exit(1)
    if isinstance(error, SystemExit):
        return leave(error.code if isinstance(error.code, int) else 1)
    traceback.print_exception(error)
    return leave(1)


def _part() -> None:
    with contextlib.suppress(RuntimeError):  # somebody has died on the way out
        jax.distributed.shutdown()


def _exit(code: int) -> NoReturn:
    """Exits without waiting for anybody, which the interpreter's own way out would do."""
    _be_silent()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_loss(error: BaseException) -> bool:
    """Whether a collective failed because of another process."""
    return isinstance(error, RuntimeError | ValueError) and bool(_LOSS.search(str(error)))


def _speak_up() -> None:
    """Has something said should this process end without the chance to.

    jaxlib aborts from a thread of its own when another process is lost (the callback that it takes
    for the purpose fails with std::bad_cast in 0.10), and lack of memory kills without a word. So a
    shell waits at the end of a pipe, and speaks unless it is told that all is well.
    """
    global _all_is_well
    reader, _all_is_well = os.pipe()
    listen = 'trap "" TERM INT HUP; read -r line || echo "$0" >&2'
    command = ["/bin/sh", "-c", listen, _LAST_WORDS]
    subprocess.Popen(command, stdin=reader, stdout=subprocess.DEVNULL)
    os.close(reader)


def _be_silent() -> None:
    """Takes back `_speak_up`."""
    if _all_is_well is not None:
        with contextlib.suppress(OSError):
            os.write(_all_is_well, b"\n")


@dataclasses.dataclass(frozen=True)
class RowShare:
    """Which rows of every batch a process holds: one of equal parts that follow one another.

    Where the mesh cuts heads over several processes, these hold the same rows; the first of them
    leads, and does what is done once for each row.

    Attributes:
        index: of this process's part.
        leaders: the leading process of each part.
    """

    index: int
    leaders: tuple[int, ...]

    @property
    def leads(self) -> bool:
        """Whether this process is the first that holds its rows."""
        return self.leaders[self.index] == jax.process_index()

    def part(self, size: int) -> slice:
        """This process's part of `size` rows or prompts.

        Raises:
            ValueError: they do not divide.
        """
        each, rest = divmod(size, len(self.leaders))
        if rest:
            raise ValueError(f"{size} do not divide over {len(self.leaders)} parts")
        return slice(self.index * each, (self.index + 1) * each)

    def gather(self, value: Any) -> list[Any]:
        """What the leaders know, in the order of rows; every process must ask at the same point.

        Args:
            value: JSON-serialisable; what those that do not lead pass is ignored.
        """
        values = _gather(value if self.leads else None)
        return [values[leader] for leader in self.leaders]

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all rows; every process must ask at the same point.

        Args:
            numbers: sums over this process's rows.
        """
        return [sum(parts) for parts in zip(*self.gather(list(numbers)), strict=True)]

    def count(self, found: Mapping[str, int]) -> dict[str, int]:
        """Sums of counts over all rows, by name; every process must ask at the same point.

        Args:
            found: of this process's rows.
        """
        counts: Counter[str] = Counter()
        for part in self.gather(dict(found)):
            counts.update(part)
        return dict(sorted(counts.items()))


def row_share(layout: Layout) -> RowShare:
    """Which rows this process holds.

    Args:
        layout: its mesh cuts the batch over the first axes.

    Raises:
        InputError: the processes do not hold equal parts of rows that follow one another.
    """
    shards = layout.mesh.devices.reshape(layout.batch_shards, -1)
    held: dict[int, list[int]] = {}
    for shard, devices in enumerate(shards):
        for process in sorted({device.process_index for device in devices}):
            held.setdefault(process, []).append(shard)
    parts: dict[tuple[int, ...], int] = {}
    for process in sorted(held):
        parts.setdefault(tuple(held[process]), process)
    in_order = sorted(parts)
    if [shard for part in in_order for shard in part] != list(range(len(shards))) or (
        len({len(part) for part in in_order}) > 1
    ):
        each = layout.mesh.devices.size // len(held)
        raise InputError(
            f"mesh {dict(layout.mesh.shape)} has {shards.shape[1]} devices for the same rows, which"
            f" should divide the {each} devices of a process or be a multiple of them: choose other"
            " sizes"
        )
    index = in_order.index(tuple(held[jax.process_index()]))
    return RowShare(index, tuple(parts[part] for part in in_order))


def _gather(value: Any) -> list[Any]:
    """What every process passes, in their order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size, np.int32))
    # Few lengths make few programs.
    room = 1 << max(10, (int(sizes.max()) - 1).bit_length())
    rows = multihost_utils.process_allgather(np.pad(data, (0, room - data.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def agree_on_kernels() -> None:
    """Has CPUs decode with kernels of their own only where every process of the run has the same.

    Otherwise their programs would not be alike, and would wait for each other for good. Every
    process must ask at the same point of its run.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    widths = set(_gather(0 if library.missing() else library.panel_columns()))
    if len(widths) > 1:
        others = "no kernels" if 0 in widths else "registers of another width"
        library.give_up(f"another process of this run has {others}")


def any_process(flag: bool) -> bool:
    """Whether a flag is set on any process; every process must ask at the same point of its run.

    Args:
        flag: of this process.
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def from_first(value: Any) -> Any:
    """What process 0 knows; every process must ask at the same point of its run.

    Args:
        value: JSON-serialisable; that of the other processes is ignored.
    """
    return _gather(value)[0]


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _parse(choice: str) -> tuple[str, int, int] | None:
    """Address of process 0, number of processes and index of this one, where they are given."""
    if choice in (AUTO, NONE):
        return None
    found = _EXPLICIT.fullmatch(choice)
    if not found:
        raise InputError(f"--distributed={choice} is not understood: {_ASKED_FOR}")
    count, index = int(found["count"]), int(found["index"])
    if not index < count:
        raise InputError(
            f"--distributed={choice}: process {index} is not one of {count}, which count from 0:"
            f" {_ASKED_FOR}"
        )
    return found["address"], count, index


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the surroundings say how many processes there are and which one this is.

    Cheap and silent where they do not: a run on one machine asks no network.
    """
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in environment:
        return True
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    chips = any(Path("/dev").glob("accel*")) or any(Path("/dev").glob("vfio/[0-9]*"))
    return chips and importlib.util.find_spec("libtpu") is not None
