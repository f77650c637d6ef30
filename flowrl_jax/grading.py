"""Judging responses on the host while the device generates others."""

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from flowrl_jax.assembly import Parts
from flowrl_jax.distributed import RowShare
from flowrl_jax.errors import InputError
from flowrl_jax.rollouts import response_text
from flowrl_jax.sampler import Response
from flowrl_jax.tasks import Row, Verdict


def response_metrics(
    share: RowShare, correct: np.ndarray | None, lengths: np.ndarray, group_size: int
) -> dict[str, float]:
    """What right and wrong responses look like, over all processes, who must all ask.

    Args:
        share: which rows this process holds.
        correct: `[B]` bool of this process's responses, those to a prompt adjacent; None where
            another process judges them.
        lengths: `[B]` int, their tokens.
        group_size: responses to a prompt.

    Returns:
        Mean tokens of correct responses and of all others, absent where there are none; the shares
        of groups whose responses are all correct, and none of them.
    """
    if correct is None:
        correct = np.zeros(lengths.shape, bool)
    groups = correct.reshape(-1, group_size)
    right, right_tokens, all_right, none_right, responses, tokens = share.total(
        [
            int(correct.sum()),
            int(lengths[correct].sum()),
            int(groups.all(axis=1).sum()),
            int((~groups).all(axis=1).sum()),
            correct.size,
            int(lengths.sum()),
        ]
    )
    found = {
        "rollout/groups_all_correct": all_right * group_size / responses,
        "rollout/groups_none_correct": none_right * group_size / responses,
    }
    if right:
        found["rollout/length_correct"] = right_tokens / right
    if right < responses:
        found["rollout/length_wrong"] = (tokens - right_tokens) / (responses - right)
    return found


class Grading:
    """The verdicts on a rollout, which become known one by one.

    A task's `judge` runs in threads beside the one that feeds the device: Python code gives way to
    the device's dispatch, and whatever waits for a process or the network waits at no cost.

    Args:
        parts: of the run.
        rows: of the data set, `group_size` responses to each, adjacent.
        group_size: responses to a row.
    """

    def __init__(self, parts: Parts, rows: Sequence[Row], group_size: int):
        self._parts, self._rows, self._group_size = parts, rows, group_size
        self._pool = ThreadPoolExecutor(parts.task.parallel, thread_name_prefix="grading")
        self._found: dict[int, Future[tuple[Verdict, float]]] = {}
        self._texts: dict[int, str] = {}
        self._waited = 0.0

    def __call__(self, place: int, response: Response) -> None:
        """Judges a response.

        Args:
            place: among the responses.
            response: as the sampler has it.
        """
        # Here, not in the other thread: this one uses the tokenizer too.
        text = response_text(self._parts, response.tokens.tolist())
        self._texts[place] = text
        self._found[place] = self._pool.submit(self._judge, place, text)

    def _judge(self, place: int, text: str) -> tuple[Verdict, float]:
        began = time.perf_counter()
        row = self._rows[place // self._group_size]
        verdict = self._parts.task.judge(text, row)
        if not np.isfinite(verdict.reward):
            raise InputError(
                f"task {self._parts.task.name} gave the reward {verdict.reward} for a response to"
                f" prompt {row['prompt_id']}: rewards must be finite; mend the task's judge()"
            )
        return verdict, time.perf_counter() - began

    def verdicts(self) -> list[Verdict]:
        """Waits for the last one.

        Returns:
            One a response, in the responses' order.

        Raises:
            InputError: a reward is not a finite number.
        """
        began = time.perf_counter()
        try:
            found = [self._found[place].result()[0] for place in range(self._count)]
        finally:
            self.close()
        self._waited += time.perf_counter() - began
        return found

    def rewards(self) -> np.ndarray:
        """The rewards, as `verdicts` waits for them.

        Returns:
            `[rows x group_size]` float32.

        Raises:
            InputError: a reward is not a finite number.
        """
        return np.array([verdict.reward for verdict in self.verdicts()], np.float32)

    def texts(self) -> list[str]:
        """The responses, in their order."""
        return [self._texts[place] for place in range(self._count)]

    def close(self) -> None:
        """Judges no more; what is being judged comes to its end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def metrics(self) -> dict[str, float]:
        """Seconds of judging, and those that nothing else went on in."""
        judging = sum(future.result()[1] for future in self._found.values())
        return {"time/judging": judging, "time/judging_waited": self._waited}

    def outcomes(self) -> dict[str, int]:
        """How many responses had each outcome."""
        return dict(Counter(future.result()[0].outcome for future in self._found.values()))

    def correct(self) -> np.ndarray:
        """Which responses are, `[rows x group_size]` bool, in their order."""
        outcomes = [self._found[place].result()[0].outcome for place in range(self._count)]
        return np.array([outcome == "correct" for outcome in outcomes], bool)

    @property
    def _count(self) -> int:
        return len(self._rows) * self._group_size
