"""Judging many responses at one time, where each waits for a process or the network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from flowrl_jax.errors import require

Item = TypeVar("Item")
Found = TypeVar("Found")


class Pool(Generic[Item, Found]):
    """Threads that judge, and no more that wait than agreed.

    A judgement that takes long holds one thread and nothing else: the others go on, and their
    results are there when they are done.

    Args:
        judge: what to do with an item; it has its own limit of time.
        parallel: threads.
        waiting: items that may wait for a thread; `submit` blocks while there are more.
    """

    def __init__(self, judge: Callable[[Item], Found], parallel: int, waiting: int = 0):
        require(parallel >= 1, f"parallel={parallel}: nobody would judge; give 1 or more")
        require(waiting >= 0, f"waiting={waiting}: a count; give 0 or more")
        self._judge = judge
        self._places = threading.BoundedSemaphore(parallel + waiting)
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="judging")

    def submit(self, item: Item) -> Future[Found]:
        """Hands over an item; waits for a place while too many are in work or wait.

        Args:
            item: to judge.

        Returns:
            What `judge` will return, or raise.
        """
        self._places.acquire()
        try:
            future = self._threads.submit(self._judge, item)
        except RuntimeError:
            self._places.release()
            raise
        future.add_done_callback(lambda _: self._places.release())
        return future

    def map(self, items: Iterable[Item]) -> Iterator[Found]:
        """Yields the results in the order of the items, which are drawn as places become free."""
        futures = [self.submit(item) for item in items]
        return (future.result() for future in futures)

    def close(self) -> None:
        """Starts no more; what is in work comes to its end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
