"""Folders appear whole or not at all: after exceptions, signals, kills and full disks."""

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from flowrl_jax.errors import InputError
from flowrl_jax.models.hf_save import write_tensors_file
from flowrl_jax.new_folder import check_new, in_first_process, new_folder

# Begins to write, says so, and never ends by itself.
WRITER = """
import sys, time
from flowrl_jax.new_folder import new_folder
with new_folder(sys.argv[1]) as folder:
    (folder / "half").write_text("x")
    print(folder, flush=True)
    while True:  # one long sleep would sleep on, had the signal come just before it
        time.sleep(0.05)
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Callable[[Path], subprocess.Popen]]:
    """Starts a process that is in the middle of making a folder."""
    started: list[subprocess.Popen] = []

    def start(target: Path) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        partial = Path(process.stdout.readline().strip())
        assert (partial / "half").is_file() and partial.parent == target.parent
        assert str(process.pid) in partial.name and not target.exists()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_at_the_end(tmp_path):
    with new_folder(tmp_path / "deep" / "a") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        assert not (tmp_path / "deep" / "a").exists()
    assert (tmp_path / "deep" / "a" / "inner" / "file").read_text() == "x"
    assert names(tmp_path / "deep") == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_leaves_nothing(error, tmp_path):
    with pytest.raises(error), new_folder(tmp_path / "a") as folder:
        (folder / "half").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_what_exists_is_refused_and_left_alone(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("full", "file"):
        with pytest.raises(InputError, match="exists already"), new_folder(tmp_path / name):
            pytest.fail("it may not begin")
    assert check_new(tmp_path / "link") == tmp_path / "empty"
    with new_folder(tmp_path / "link") as folder:
        (folder / "file").write_text("x")
    assert names(tmp_path / "empty") == ["file"]
    assert (tmp_path / "full" / "precious").read_text() == "x"


def test_what_came_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(InputError, match="cannot be written"), new_folder(tmp_path / "a"):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "precious").write_text("x")
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["precious"]


def test_no_folder_can_be_made_there(tmp_path):
    (tmp_path / "file").write_text("x")
    refused = pytest.raises(InputError, match="cannot be written")
    with refused as caught, new_folder(tmp_path / "file" / "a"):
        pytest.fail("it may not begin")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(b"x" * 10_000),
        lambda file: write_tensors_file(file, {"x": np.zeros(10_000)}),
    ],
    ids=["file", "safetensors"],
)
def test_full_disk_is_one_line_and_leaves_nothing(write, tmp_path):
    """A limit on the size of files stands in for the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        refused = pytest.raises(InputError, match="cannot be written")
        with refused as caught, new_folder(tmp_path / "a") as folder:
            write(folder / "large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value) and "large" in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_signal_leaves_nothing(number, writer, tmp_path):
    process = writer(tmp_path / "a")
    process.send_signal(number)
    code = process.wait(timeout=60)
    assert code == (128 + number if number == signal.SIGTERM else -number)
    assert names(tmp_path) == []


@pytest.mark.slow
def test_leftovers_of_killed_processes_are_removed_and_no_others(writer, tmp_path):
    killed = writer(tmp_path / "a")
    killed.kill()
    killed.wait()
    assert len(names(tmp_path)) == 1
    living = writer(tmp_path / "a")
    assert [str(living.pid) in name for name in names(tmp_path)] == [True]
    other = f".a.{socket.gethostname()}-2.{killed.pid}.partial"  # of another machine
    (tmp_path / other).mkdir()
    (tmp_path / f".b.{socket.gethostname()}.{killed.pid}.partial").mkdir()  # of another target
    (tmp_path / f".a.{socket.gethostname()}.{os.getpid()}.partial").mkdir()  # of this pid, once
    with new_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("x")
    left = names(tmp_path)
    assert names(tmp_path / "a") == ["file"]
    assert len(left) == 4 and "a" in left and other in left
    assert any(str(living.pid) in name for name in left)


def test_sigterm_is_left_to_whoever_handles_it(tmp_path):
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with new_folder(tmp_path / "a"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM] and (tmp_path / "a").is_dir()


def test_first_process_raises_what_was_raised():
    done: list[int] = []
    in_first_process(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        in_first_process(lambda: 1 / 0)


def test_tensors_file_is_readable_by_all(tmp_path):
    save_file({"x": np.zeros(2)}, tmp_path / "theirs")
    write_tensors_file(tmp_path / "ours", {"x": np.zeros(2)})
    assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o644
