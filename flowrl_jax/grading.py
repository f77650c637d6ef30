"""Judging responses on the host while the device generates others."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from flowrl_jax.assembly import Parts
from flowrl_jax.errors import InputError
from flowrl_jax.rollouts import response_text
from flowrl_jax.sampler import Response
from flowrl_jax.tasks import Row


class Grading:
    """The rewards of a rollout, which become known one by one.

    A task's `grade` runs in a thread beside the one that feeds the device: Python code gives way to
    the device's dispatch, and whatever waits for a process or the network waits at no cost.

    Args:
        parts: of the run.
        rows: of the data set, `group_size` responses to each, adjacent.
        group_size: responses to a row.
    """

    def __init__(self, parts: Parts, rows: Sequence[Row], group_size: int):
        self._parts, self._rows, self._group_size = parts, rows, group_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grading")
        self._found: dict[int, Future[float]] = {}
        self._seconds = self._waited = 0.0

    def __call__(self, place: int, response: Response) -> None:
        """Judges a response.

        Args:
            place: among the responses.
            response: as the sampler has it.
        """
        # Here, not in the other thread: this one uses the tokenizer too.
        text = response_text(self._parts, response.tokens.tolist())
        self._found[place] = self._pool.submit(self._grade, place, text)

    def _grade(self, place: int, text: str) -> float:
        began = time.perf_counter()
        row = self._rows[place // self._group_size]
        reward = self._parts.task.grade(text, row)
        self._seconds += time.perf_counter() - began
        if not np.isfinite(reward):
            raise InputError(
                f"task {self._parts.task.name} gave the reward {reward} for a response to prompt"
                f" {row['prompt_id']}: rewards must be finite; mend the task's grade()"
            )
        return reward

    def rewards(self) -> np.ndarray:
        """Waits for the last one.

        Returns:
            `[rows x group_size]` float32.

        Raises:
            InputError: a reward is not a finite number.
        """
        began = time.perf_counter()
        count = len(self._rows) * self._group_size
        try:
            found = [self._found[place].result() for place in range(count)]
        finally:
            self.close()
        self._waited = time.perf_counter() - began
        return np.array(found, np.float32)

    def close(self) -> None:
        """Judges no more; what is being judged comes to its end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def metrics(self) -> dict[str, float]:
        """Seconds of judging, and those that nothing else went on in."""
        return {"time/judging": self._seconds, "time/judging_waited": self._waited}
