"""The pool of worker processes: limits, deaths, restarts, and that nothing is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flowrl_jax.errors import InputError
from flowrl_jax.rewards.workers import Outcome, WorkerPool

EVAL = "builtins:eval"
STUCK = "9**9**9**9"  # one instruction of the interpreter: no signal handler and no thread gets in
PATIENCE = 20.0  # seconds for what should take a fraction of one; other people use the machine


@contextlib.contextmanager
def pool(function=EVAL, **settings):
    """A pool that is closed at the end."""
    made = WorkerPool(function, **{"limit": PATIENCE} | settings)
    try:
        yield made
    finally:
        made.close()


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition) -> bool:
    """Whether something becomes true soon."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_values_come_back():
    with pool() as workers:
        assert workers.pids() == []  # nothing runs before it is needed
        assert workers.call("1 + 1") == Outcome("ok", 2)
        assert workers.call("['\\ud800', None, 0.5]") == Outcome("ok", ["\ud800", None, 0.5])
        assert workers.call("len('" + "x" * 3_000_000 + "')") == Outcome("ok", 3_000_000)
        assert workers.call("'x' * 3_000_000").value == "x" * 3_000_000
        assert workers.restarts == 0


def test_a_worker_imports_the_function_and_not_jax():
    with pool() as workers:
        script = (
            "[n for n in __import__('sys').modules if n.startswith(('jax', 'numpy', 'flowrl'))]"
        )
        assert workers.call(script) == Outcome("ok", [])


def test_output_is_no_answer():
    with pool() as workers:
        assert workers.call("print('x' * 100000)") == Outcome("ok", None)


def test_error_is_one_line_and_leaves_the_worker():
    with pool() as workers:
        first = workers.call("__import__('os').getpid()")
        status, value = workers.call("[][1\n]")
        assert (status, value) == ("error", "IndexError: list index out of range")
        assert workers.call("lambda: 0").status == "error"  # nothing that JSON can hold
        assert workers.call("__import__('os').getpid()") == first


def test_stuck_item_is_killed_at_its_limit():
    with pool(limit=0.5) as workers:
        assert workers.call("0").status == "ok"
        (before,) = workers.pids()
        began = time.monotonic()
        status, _ = workers.call(STUCK)
        took = time.monotonic() - began
        assert status == "timeout"
        assert 0.4 < took < PATIENCE
        assert not alive(before)
        assert eventually(lambda: workers.pids() not in ([], [before]))  # without being asked
        assert workers.call("7") == Outcome("ok", 7)


@pytest.mark.parametrize(
    ("item", "how"),
    [
        ("__import__('os')._exit(3)", "exit code 3"),
        ("__import__('os').kill(__import__('os').getpid(), 11)", "killed by signal 11"),
        ("__import__('os').closerange(3, 100)", None),
    ],
)
def test_worker_that_dies_is_replaced(item, how):
    with pool() as workers:
        status, value = workers.call(item)
        assert status == "crash"
        assert how is None or value == how
        assert workers.call("7") == Outcome("ok", 7)
        assert workers.restarts >= 1


def test_worker_that_is_killed_while_idle_is_replaced():
    with pool() as workers:
        workers.call("0")
        (pid,) = workers.pids()
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not workers.pids())
        assert workers.call("7") == Outcome("ok", 7)


def test_memory_has_a_limit():
    with pool(memory=256 << 20) as workers:
        status, value = workers.call("len('x' * (1 << 30))")
        assert status == "error"
        assert "MemoryError" in value
        assert workers.call("7") == Outcome("ok", 7)
        assert workers.restarts == 1  # what is left of the memory is not known


def test_stuck_items_do_not_delay_others():
    with pool(workers=2, limit=PATIENCE) as workers:
        assert workers.call("0").status == "ok"
        with ThreadPoolExecutor(1) as thread:
            stuck = thread.submit(workers.call, "__import__('time').sleep(1.5)")
            time.sleep(0.1)
            assert [workers.call(str(n)).value for n in range(50)] == list(range(50))
            assert not stuck.done()


def test_many_threads():
    with pool(workers=2, waiting=2) as workers, ThreadPoolExecutor(16) as threads:
        items = [f"{n} * 3" if n % 100 else "__import__('os')._exit(1)" for n in range(400)]
        found = list(threads.map(workers.call, items))
        for n, outcome in enumerate(found):
            assert outcome == (("ok", n * 3) if n % 100 else ("crash", "exit code 1"))


@pytest.mark.slow
def test_calls_wait_to_be_let_in():
    with pool(waiting=1) as workers:
        workers.call("0")
        sleep = "__import__('time').sleep(0.8)"
        threads = [threading.Thread(target=workers.call, args=(sleep,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.4)
        assert workers._items.qsize() == 1  # one runs, one waits, two are not let in
        for thread in threads:
            thread.join()


def test_close_leaves_no_process():
    workers = WorkerPool(EVAL, workers=3, limit=60.0)
    with ThreadPoolExecutor(3) as threads:
        began = time.monotonic()
        stuck = [threads.submit(workers.call, STUCK) for _ in range(3)]
        assert eventually(lambda: len(workers.pids()) == 3)
        time.sleep(0.3)
        pids = workers.pids()
        workers.close()
        workers.close()
        for future in stuck:
            assert isinstance(future.exception(), RuntimeError) or future.result().status == "crash"
    assert time.monotonic() - began < PATIENCE
    assert not any(map(alive, pids))
    with pytest.raises(RuntimeError, match="closed"):
        workers.call("1")


def test_close_before_the_first_call():
    WorkerPool(EVAL).close()


def test_pool_that_is_forgotten_leaves_no_process():
    workers = WorkerPool(EVAL)
    workers.call("0")
    (pid,) = workers.pids()
    del workers
    assert eventually(lambda: not alive(pid))


def test_descriptors_are_closed():
    with pool() as workers:
        workers.call("0")
    before = len(os.listdir("/proc/self/fd"))
    with pool(limit=0.2) as workers:
        for item in ("__import__('os')._exit(1)", STUCK, "0"):
            workers.call(item)
    assert len(os.listdir("/proc/self/fd")) == before


PARENT = """
import sys, threading, time
from flowrl_jax.rewards.workers import WorkerPool
if __name__ == "__main__":
    workers = WorkerPool("builtins:eval", workers=2, limit=600.0)
    threading.Thread(target=workers.call, args=(sys.argv[1],), daemon=True).start()
    while len(workers.pids()) < 2:  # one may do both while the other has yet to look
        workers.call("0")
    time.sleep(0.5)
    print(*workers.pids(), flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("item", [STUCK, "__import__('time').sleep(600)"])
@pytest.mark.parametrize("killed", [True, False])
def test_nothing_outlives_the_parent(item, killed, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script), item, "600" if killed else "0"],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
    )
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        if killed:
            assert all(map(alive, pids))
            parent.kill()
        parent.wait(timeout=PATIENCE)
        assert eventually(lambda: not any(map(alive, pids)))
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.parametrize(
    ("function", "message"),
    [("no_such_module:f", "ModuleNotFoundError"), ("time:no_such_function", "AttributeError")],
)
def test_function_that_cannot_be_imported(function, message):
    with pool(function) as workers:
        for _ in range(2):
            with pytest.raises(InputError, match=f"{function} cannot run in a worker: {message}"):
                workers.call(0)


def test_workers_that_die_as_they_start(tmp_path, monkeypatch):
    (tmp_path / "dies_when_imported.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = "dies as it starts, with exit code 7"
    with pool("dies_when_imported:f") as workers, pytest.raises(InputError, match=message):
        workers.call("1")


@pytest.mark.parametrize("settings", [{"workers": 0}, {"limit": 0.0}])
def test_settings_are_checked(settings):
    with pytest.raises(InputError, match="more than 0"):
        WorkerPool(EVAL, **settings)
