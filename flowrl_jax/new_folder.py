"""Folders that appear whole or not at all, whether one process writes them or several take part.

What is written lies beside its destination under a hidden name until it is complete. The name says
which process of which machine is writing, so that what a killed process left is known from what
another one is still writing.
"""

import contextlib
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from flowrl_jax.errors import InputError

_SUFFIX = ".partial"
_NAME_BYTES = 4096  # of a path, on Linux


def check_new(path: str | os.PathLike[str]) -> Path:
    """Checks that a folder may be made.

    Args:
        path: of the folder.

    Returns:
        The path, absolute and without links.

    Raises:
        InputError: there is a file, or a folder that holds something.
    """
    target = Path(os.path.realpath(path))
    try:
        used = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    except OSError as error:
        raise _refusal(target, error) from error
    if used:
        raise InputError(f"{target}: exists already; give a folder that is new or empty")
    return target


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes a folder: whole when the context ends, absent when it is left by an exception.

    SIGTERM counts as one, a SystemExit with the shell's code for it. What processes that were
    killed left of earlier attempts is removed; what another process is writing stays. Every process
    of the run takes part, and those on other machines must see the same files.

    Args:
        path: of the folder; one that holds something is never touched.

    Yields:
        The folder to write into, under the name that it has until it is complete; the same in
        every process.

    Raises:
        InputError: the folder holds something, or an OSError was raised: the disk is full, say.
    """
    target = check_new(path)
    partial = target.with_name(_partial_prefix(target) + f"{os.getpid()}{_SUFFIX}")
    partial = Path(_same_everywhere(str(partial)))
    with _exit_on_sigterm():
        try:
            in_first_process(lambda: _begin(target, partial))
            yield partial
            in_first_process(lambda: _finish(partial, target))
        except BaseException as error:
            if jax.process_index() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise _refusal(target, error) from error
            raise


def in_first_process(action: Callable[[], object]) -> None:
    """Does something in the first process, while the others wait.

    Args:
        action: what is done.

    Raises:
        InputError: in the other processes, where the action failed in the first.
        BaseException: in the first process, whatever the action raised.
    """
    fault: BaseException | None = None
    if jax.process_index() == 0:
        try:
            action()
        except BaseException as error:
            fault = error
    failed = fault is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.array(failed)))
    if fault is not None:
        raise fault
    if failed:
        raise InputError("process 0 has failed: see its message")


def _begin(target: Path, partial: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = _partial_prefix(target)
    for entry in target.parent.iterdir():
        writer = entry.name.removeprefix(prefix).removesuffix(_SUFFIX)
        if entry.name == f"{prefix}{writer}{_SUFFIX}" and writer.isdecimal() and _gone(int(writer)):
            shutil.rmtree(entry)
    partial.mkdir()


def _finish(partial: Path, target: Path) -> None:
    """Has everything on the disk before the folder gets its name."""
    for folder, _, files in os.walk(partial, topdown=False):
        for path in (*(Path(folder, name) for name in files), folder):
            _sync(path)
    os.rename(partial, target)
    _sync(target.parent)


def _sync(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial_prefix(target: Path) -> str:
    """What names of unfinished folders of this machine begin with; the process's id follows."""
    return f".{target.name}.{socket.gethostname()}."


def _gone(process: int) -> bool:
    """Whether a process of this machine has ended; our own id was an earlier process's too."""
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _same_everywhere(text: str) -> str:
    """The first process's text."""
    if jax.process_count() == 1:
        return text
    encoded = np.frombuffer(text.encode().ljust(_NAME_BYTES, b"\0"), np.uint8)
    shared = np.asarray(multihost_utils.broadcast_one_to_all(encoded), np.uint8)
    return shared.tobytes().rstrip(b"\0").decode()


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Lets SIGTERM, where it would end the process at once, raise SystemExit instead."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the cleaning up
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _refusal(target: Path, error: OSError) -> InputError:
    reason = " ".join((error.strerror or str(error)).split())
    return InputError(
        f"{target}: cannot be written ({reason}); make room there, or give a folder that can be"
        " written"
    )
