"""Several processes, one per host, as one run: the flag --distributed and what they agree on.

A command joins before it touches a device. Whoever dies takes the others down: each process sends
heartbeats to process 0, and all end, with a message, once one has been silent for
--heartbeat_seconds. The supervisor (`launch/supervise.sh`) then starts them again.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from flowrl_jax.errors import InputError

AUTO, NONE = "auto", "none"
HEARTBEAT_SECONDS = 30  # silence that counts as death; all have ended well within a minute
JOIN_SECONDS = 300  # hosts of one pod finish their installation at different times

_EXPLICIT = re.compile(r"(?P<address>[^,\s]+:\d+),(?P<count>\d+),(?P<index>\d+)")
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


def join(values: flags.FlagValues) -> None:
    """Joins the other processes of the run, if there are any; call it before any use of a device.

    Args:
        values: parsed flags, with those of `define_flags`.

    Raises:
        InputError: a flag's value is malformed.
        SystemExit: process 0 cannot be found or its port is taken; exit code 1, worth another try.
            Where another process does not come in time, jaxlib aborts this one.
    """
    choice, seconds = str(values["distributed"].value), int(str(values["heartbeat_seconds"].value))
    if seconds < 1:
        raise InputError(f"--heartbeat_seconds={seconds}: give one second or more")
    address = _parse(choice)
    if choice == NONE or (address is None and not _in_cluster(os.environ)):
        return
    # Gloo's collectives can deadlock where the CPU runs steps that were dispatched ahead.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    coordinator, count, index = address or (None, None, None)
    # Said beforehand: where a process is missing, jaxlib ends this one without a way to intervene.
    print(
        f"--distributed={choice}: waiting for the other processes; if this one ends now, one of"
        f" them was not there within {JOIN_SECONDS} s: run the same command on all hosts, and they"
        " must reach process 0's port",
        file=sys.stderr,
        flush=True,
    )
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=seconds,
            # One that fails must not wait long for the others to end as it does.
            shutdown_timeout_seconds=seconds,
        )
    except (RuntimeError, ValueError) as error:
        if address is None and "coordinator_address" in str(error):
            return  # a TPU machine outside any cluster, such as a development board
        reason = " ".join(str(error).split())
        raise SystemExit(
            f"error: --distributed={choice}: the processes of the run did not meet ({reason});"
            " see that all hosts run this same command and reach process 0's port"
        ) from error


def any_process(flag: bool) -> bool:
    """Whether a flag is set on any process; every process must ask at the same point of its run.

    Args:
        flag: of this process.
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


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
