"""A pool of processes that run one function, each item under a limit that nothing can evade.

A thread of this process owns each worker: it hands items over, waits for the reply as long as the
item may take, and otherwise kills the worker and starts another. Workers are programs of their own
(`worker_main`), not forks of a process in which jax runs threads, and import no more than the
function needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future
from typing import Any, NamedTuple

from flowrl_jax.errors import InputError
from flowrl_jax.rewards import worker_main

START_LIMIT = 120.0
"""Seconds that a worker may take to import its function."""
MOST_FAILED_STARTS = 3
"""Workers in a row that may die before they are ready."""


class Outcome(NamedTuple):
    """What became of an item.

    Attributes:
        status: "ok"; "timeout", the limit passed and the worker was killed; "crash", the worker
            died; "error", the function raised.
        value: what the function returned, or a line about what happened.
    """

    status: str
    value: Any


class WorkerPool:
    """Runs a function on items, several at a time, each in a process with limits.

    The workers are started by the first call.

    Args:
        function: "module:name" of a function of one argument; argument and result are what JSON
            can hold.
        workers: processes.
        limit: seconds of wall-clock time for an item.
        memory: bytes of address space of a worker; 0 for no limit.
        waiting: items that may wait for a worker; further calls wait to be let in.
    """

    def __init__(
        self,
        function: str,
        *,
        workers: int = 1,
        limit: float = 5.0,
        memory: int = 2 << 30,
        waiting: int = 64,
    ):
        if workers < 1 or limit <= 0:
            raise InputError(f"workers={workers}, limit={limit}: both must be more than 0")
        self.function, self.limit, self.memory = function, limit, memory
        self._workers = workers
        self._items: queue.Queue[tuple[Any, Future[Outcome]]] = queue.Queue(max(waiting, 1))
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._hosts: list[_Host] = []

    def call(self, item: Any) -> Outcome:
        """Runs the function on an item and waits for the outcome; any thread may call.

        Raises:
            InputError: the function cannot be imported in a worker, or workers do not start.
            RuntimeError: the pool is closed.
        """
        self._start()
        future: Future[Outcome] = Future()
        while True:
            if self._closed.is_set():
                raise RuntimeError("the worker pool is closed")
            try:
                self._items.put((item, future), timeout=0.2)
                break
            except queue.Full:
                continue
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if self._closed.is_set() and not any(t.is_alive() for t in self._threads):
                    raise RuntimeError("the worker pool is closed") from None

    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [pid for host in self._hosts if (pid := host.pid) is not None]

    @property
    def restarts(self) -> int:
        """Workers that were started in the place of one that was killed or died."""
        return sum(max(host.starts - 1, 0) for host in self._hosts)

    def close(self) -> None:
        """Kills the workers; calls that still wait get an error. May be called again."""
        with self._lock:
            self._closed.set()
            threads, hosts = self._threads, self._hosts
        _end(self._closed, hosts, threads)
        with contextlib.suppress(queue.Empty):
            while True:
                self._items.get_nowait()[1].set_exception(RuntimeError("the worker pool is closed"))

    def _start(self) -> None:
        with self._lock:
            if self._threads or self._closed.is_set():
                return
            self._hosts = [
                _Host(self.function, self.limit, self.memory) for _ in range(self._workers)
            ]
            self._threads = [
                threading.Thread(target=_serve, args=(host, self._items, self._closed), daemon=True)
                for host in self._hosts
            ]
            for thread in self._threads:
                thread.start()
            # Nobody may leave workers behind: not a pool that is forgotten, nor the interpreter.
            weakref.finalize(self, _end, self._closed, self._hosts, self._threads)


def _end(closed: threading.Event, hosts: list[_Host], threads: list[threading.Thread]) -> None:
    closed.set()
    for host in hosts:
        host.wake()
    for thread in threads:
        thread.join()


def _serve(
    host: _Host,
    items: queue.Queue[tuple[Any, Future[Outcome]]],
    closed: threading.Event,
) -> None:
    """A worker's thread. It lives as long as the pool: the kernel kills the worker with it."""
    try:
        while not closed.is_set():
            try:
                item, future = items.get(timeout=0.2)
            except queue.Empty:
                continue
            try:
                future.set_result(host.run(item))
            except Exception as error:
                future.set_exception(error)
            with contextlib.suppress(InputError, RuntimeError, OSError):
                host.start()  # another one if it is gone, before the next item needs it
    finally:
        host.dispose()


class _Host:
    """One worker process, and another one when it is gone."""

    def __init__(self, function: str, limit: float, memory: int):
        self.function, self.limit, self.memory = function, limit, memory
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._requests = self._replies = -1
        self._wake_reader, self._wake_writer = os.pipe()
        self._woken = False

    @property
    def pid(self) -> int | None:
        """Of the worker, if it runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def wake(self) -> None:
        """Ends the wait for a reply."""
        if not self._woken:
            self._woken = True
            os.write(self._wake_writer, b"x")

    def run(self, item: Any) -> Outcome:
        """Returns the outcome of an item; leaves a worker that runs, or none."""
        body = worker_main.encode({"item": item, "limit": self.limit})
        self.start()
        deadline = time.monotonic() + self.limit
        try:
            self._send(body, deadline)
            reply = self._receive(deadline)
        except TimeoutError:
            self.stop()
            return Outcome("timeout", f"not done after {self.limit:g} s")
        except (OSError, EOFError, ValueError):
            return Outcome("crash", self._how_it_died())
        if reply["status"] == "error" and str(reply["value"]).startswith("MemoryError"):
            self.stop()
        return Outcome(reply["status"], reply["value"])

    def stop(self) -> None:
        """Kills the worker and all it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for end in (self._requests, self._replies):
            os.close(end)

    def dispose(self) -> None:
        """Stops for good."""
        self.stop()
        self._woken = True
        for end in (self._wake_reader, self._wake_writer):
            os.close(end)

    def start(self) -> None:
        """Starts a worker unless one runs.

        Raises:
            InputError: the function cannot be imported, or several workers died as they started.
        """
        if self._process is not None and self._process.poll() is not None:
            self.stop()  # it died while nobody asked it anything
        if self._process is not None:
            return
        how = ""
        for _ in range(MOST_FAILED_STARTS):
            self._spawn()
            try:
                reply = self._receive(time.monotonic() + START_LIMIT)
            except (OSError, EOFError, ValueError, TimeoutError):
                how = self._how_it_died()
                if self._woken:
                    raise RuntimeError("the worker pool is closed") from None
                continue
            if reply["status"] == "ready":
                return
            self.stop()
            raise InputError(f"rewards: {self.function} cannot run in a worker: {reply['value']}")
        raise InputError(
            f"rewards: workers for {self.function} die as they start ({how}); a larger memory"
            f" limit than {self.memory} bytes may help"
        )

    def _spawn(self) -> None:
        child_requests, self._requests = os.pipe()
        self._replies, child_replies = os.pipe()
        os.set_blocking(self._requests, False)
        settings = (child_requests, child_replies, self.function, self.memory, os.getpid())
        # The modules that this process sees. Not through multiprocessing, which would run the main
        # one first, and with it jax; not with the program's own folder, which has a math.py.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, worker_main.__file__, *map(str, settings)],
            env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            pass_fds=(child_requests, child_replies),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run; and all it starts can be killed
        )
        self.starts += 1
        os.close(child_requests)
        os.close(child_replies)

    def _send(self, body: bytes, deadline: float) -> None:
        view = memoryview(body)
        while view:
            self._wait(select.POLLOUT, self._requests, deadline)
            view = view[os.write(self._requests, view[: 1 << 16]) :]

    def _receive(self, deadline: float) -> dict[str, Any]:
        size = int.from_bytes(self._read(worker_main.HEADER, deadline), "big")
        return json.loads(self._read(size, deadline))

    def _read(self, count: int, deadline: float) -> bytes:
        read = bytearray()
        while len(read) < count:
            self._wait(select.POLLIN, self._replies, deadline)
            piece = os.read(self._replies, min(count - len(read), 1 << 20))
            if not piece:
                raise EOFError("the worker closed its end")
            read += piece
        return bytes(read)

    def _wait(self, event: int, descriptor: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        poll.register(self._wake_reader, select.POLLIN)
        ready = poll.poll(max(deadline - time.monotonic(), 0.0) * 1000)
        if not ready:
            raise TimeoutError
        if any(fd == self._wake_reader for fd, _ in ready):
            raise EOFError("the pool is closed")

    def _how_it_died(self) -> str:
        """Stops what is left of a worker and returns a few words on its end."""
        process = self._process
        if process is None or self._woken:
            self.stop()
            return "stopped"
        try:
            code = process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            code = None
        self.stop()
        if code is None:
            return "it closed its pipe"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
