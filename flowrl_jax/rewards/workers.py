"""A pool of processes that run one function, each item under a limit that nothing can evade.

A thread of this process owns each worker: it hands items over, waits for the reply as long as the
item may take, and otherwise kills the worker and has another made. Workers are forks of a small
program of their own (`worker_main`), not of a process in which jax runs threads, and hold no more
than the function needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from flowrl_jax.errors import InputError
from flowrl_jax.rewards import worker_main

START_LIMIT = 300.0
"""Seconds that importing the function may take."""
MOST_FAILED_STARTS = 3
"""Times in a row that the program may die before its function is imported."""


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
        self._end: Callable[[], Any] | None = None

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
        if self._end is not None:
            self._end()
        with contextlib.suppress(queue.Empty):
            while True:
                self._items.get_nowait()[1].set_exception(RuntimeError("the worker pool is closed"))

    def _start(self) -> None:
        with self._lock:
            if self._threads or self._closed.is_set():
                return
            nursery = _Nursery(self.function, self.memory)
            self._hosts = [_Host(nursery, self.limit) for _ in range(self._workers)]
            self._threads = [
                threading.Thread(target=_serve, args=(host, self._items, self._closed), daemon=True)
                for host in self._hosts
            ]
            for thread in self._threads:
                thread.start()
            # Nobody may leave workers behind: not a pool that is forgotten, nor the interpreter.
            self._end = weakref.finalize(
                self, _end, self._closed, self._hosts, self._threads, nursery
            )


def _end(
    closed: threading.Event,
    hosts: list[_Host],
    threads: list[threading.Thread],
    nursery: _Nursery,
) -> None:
    closed.set()
    for host in hosts:
        host.wake()
    nursery.give_up_starting()
    for thread in threads:
        thread.join()
    nursery.stop()


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

    def __init__(self, nursery: _Nursery, limit: float):
        self._nursery, self._limit = nursery, limit
        self.starts = 0
        self._pid: int | None = None
        self._requests = self._replies = -1
        self._wake_reader, self._wake_writer = os.pipe()
        self._woken = False

    @property
    def pid(self) -> int | None:
        """Of the worker, if it runs."""
        return self._pid if self._pid is not None and not self._ended() else None

    def wake(self) -> None:
        """Ends the wait for a reply."""
        if not self._woken:
            self._woken = True
            os.write(self._wake_writer, b"x")

    def run(self, item: Any) -> Outcome:
        """Returns the outcome of an item; leaves a worker that runs, or none."""
        body = worker_main.encode({"item": item, "limit": self._limit})
        self.start()
        deadline = time.monotonic() + self._limit
        try:
            self._send(body, deadline)
            reply = self._receive(deadline)
        except TimeoutError:
            self.stop()
            return Outcome("timeout", f"not done after {self._limit:g} s")
        except (OSError, EOFError, ValueError):
            return Outcome("crash", self._how_it_died())
        if reply["status"] == "error" and str(reply["value"]).startswith("MemoryError"):
            self.stop()
        return Outcome(reply["status"], reply["value"])

    def start(self) -> None:
        """Has a worker made unless one runs.

        Raises:
            InputError: the function cannot be imported, or the program for it does not start.
        """
        if self._pid is not None and self._ended():
            self.stop()  # it died while nobody asked it anything
        if self._pid is None:
            self._pid, self._requests, self._replies = self._nursery.worker()
            self.starts += 1

    def stop(self) -> None:
        """Kills the worker and all it has started."""
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._pid, signal.SIGKILL)
            self._nursery.exit_code(self._pid, seconds=5.0)
            self._forget()

    def _forget(self) -> None:
        self._pid = None
        for end in (self._requests, self._replies):
            os.close(end)

    def dispose(self) -> None:
        """Stops for good."""
        self.stop()
        self._woken = True
        for end in (self._wake_reader, self._wake_writer):
            os.close(end)

    def _ended(self) -> bool:
        poll = select.poll()
        poll.register(self._replies, 0)  # hanging up is reported whether asked for or not
        return bool(poll.poll(0))

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
        if self._pid is None or self._woken:
            self.stop()
            return "stopped"
        code = self._nursery.exit_code(self._pid, seconds=0.5)
        if code is None:
            self.stop()
            return "it closed its pipe"
        self._forget()
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


class _Nursery:
    """The program that workers are forked from, started when it is needed or has died."""

    def __init__(self, function: str, memory: int):
        self._function, self._memory = function, memory
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None
        self._starting = self._given_up = False

    def worker(self) -> tuple[int, int, int]:
        """Returns the process id of a new worker, and where to write items and read replies.

        Raises:
            InputError: as of `_Host.start`.
        """
        with self._lock:
            for _ in range(MOST_FAILED_STARTS):
                if self._control is None:
                    self._start()
                with contextlib.suppress(OSError, EOFError):
                    return self._fork()
                self._stop()
        raise InputError(f"rewards: no worker for {self._function} can be made; see the host's log")

    def exit_code(self, pid: int, *, seconds: float) -> int | None:
        """Waits for a worker's end and ends what it started; None if it goes on, or is unknown."""
        with self._lock:
            if self._control is not None:
                with contextlib.suppress(OSError, EOFError):
                    self._control.sendall(json.dumps([pid, seconds]).encode())
                    return self._answer()
        return None

    def give_up_starting(self) -> None:
        """Kills the program if it is not ready yet; it is not started again."""
        self._given_up = True
        if self._starting and self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """Ends the program and the workers that are left."""
        with self._lock:
            self._stop()

    def _fork(self) -> tuple[int, int, int]:
        assert self._control is not None
        child_requests, requests = os.pipe()
        replies, child_replies = os.pipe()
        try:
            socket.send_fds(self._control, [b"worker"], [child_requests, child_replies])
            pid = self._answer()
        except BaseException:
            os.close(requests)
            os.close(replies)
            raise
        finally:
            os.close(child_requests)
            os.close(child_replies)
        os.set_blocking(requests, False)
        return pid, requests, replies

    def _answer(self) -> Any:
        assert self._control is not None
        answer = self._control.recv(4096)
        if not answer:
            raise EOFError("the program ended")
        return json.loads(answer)

    def _start(self) -> None:
        how: int | None = None
        for _ in range(MOST_FAILED_STARTS):
            if self._given_up:
                raise RuntimeError("the worker pool is closed")
            self._starting = True
            self._control, child = socket.socketpair()
            begun = threading.Event()
            # The kernel kills the program with the thread that started it, so that thread waits.
            self._keeper = threading.Thread(target=self._keep, args=(child, begun), daemon=True)
            self._keeper.start()
            begun.wait()
            child.close()
            try:
                self._control.settimeout(START_LIMIT)
                failure = self._answer()
                self._control.settimeout(None)
            except (OSError, EOFError):
                how = self._stop()
                continue
            finally:
                self._starting = False
            if failure is None:
                return
            self._stop()
            raise InputError(f"rewards: {self._function} cannot run in a worker: {failure}")
        raise InputError(
            f"rewards: the program of the workers for {self._function} dies as it starts, with exit"
            f" code {how}; run python -c 'import {self._function.partition(':')[0]}' to see why"
        )

    def _keep(self, child: socket.socket, begun: threading.Event) -> None:
        settings = (child.fileno(), self._function, self._memory, os.getpid())
        # The modules that this process sees. Not through multiprocessing, which would run the main
        # one first, and with it jax; not with the program's own folder, which has a math.py.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, worker_main.__file__, *map(str, settings)],
                env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
                pass_fds=(child.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the run
            )
        finally:
            begun.set()
        self._process.wait()

    def _stop(self) -> int | None:
        if self._control is None:
            return None
        self._control.close()
        self._control = None
        process, keeper = self._process, self._keeper
        if process is None or keeper is None:
            return None
        keeper.join(timeout=5.0)  # it ends its workers and itself when the socket is closed
        if keeper.is_alive():
            process.kill()
            keeper.join()
        return process.returncode
