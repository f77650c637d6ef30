"""Which row decodes in which slot: the host's side of continuous batching.

Rows lie over shards in equal runs, and so do slots; a row stays in its shard, so that nothing of it
crosses devices. All processes decide alike, from what they all see.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flowrl_jax.sampler.slots import Queue, Seen

# A program with fewer slots, and the copying of caches, are worth it for so many more tokens.
WORTH_SHRINKING = 64
_FIRST_TAKERS = 16  # with no rows queued, a shard is refilled when one slot in so many is free


class Waiting(NamedTuple):
    """A row that waits for a slot.

    Attributes:
        row: among the shard's.
        chunk: of the `Source` that it enters from.
        place: in the shard's part of the chunk.
        drawn: tokens that it has.
    """

    row: int
    chunk: int
    place: int
    drawn: int = 0


class Groups:
    """Prompts, each read once for its group, by chunks.

    Args:
        rows: in all.
        group_size: adjacent rows with the same prompt.
        shards: that the rows are cut over; divides them.
        slots: of a shard.

    Attributes:
        chunk_prompts: prompts of a shard that are read at one time.
    """

    def __init__(self, rows: int, group_size: int, shards: int, slots: int):
        self._per_shard, self._group_size, self._shards = rows // shards, group_size, shards
        first = np.arange(shards) * self._per_shard
        self._first_group = first // group_size
        last_group = (first + self._per_shard - 1) // group_size
        self._groups = last_group - self._first_group + 1
        whole = slots == self._per_shard
        self.chunk_prompts = int(self._groups.max()) if whole else max(1, slots // group_size)

    def rows(self, chunk: int) -> np.ndarray:
        """A row, among the shard's, of each prompt of a chunk: `[D, chunk_prompts]` int32."""
        place = chunk * self.chunk_prompts + np.arange(self.chunk_prompts)
        group = self._first_group[:, None] + np.minimum(place, self._groups[:, None] - 1)
        first = np.arange(self._shards)[:, None] * self._per_shard
        return np.maximum(group * self._group_size - first, 0).astype(np.int32)

    def waiting(self) -> list[list[Waiting]]:
        """All rows of each shard, in their order."""

        def one(shard, row):
            prompt = (shard * self._per_shard + row) // self._group_size - self._first_group[shard]
            return Waiting(row, *divmod(int(prompt), self.chunk_prompts))

        return [
            [one(shard, row) for row in range(self._per_shard)] for shard in range(self._shards)
        ]


class Schedule:
    """Rows that wait, decode and have ended.

    Args:
        waiting: rows of each shard, of which all have equally many.
        slots: of a shard, at most.
        limits: `[rows]` int, tokens that each row may have.
        shrink: whether slots may become fewer once nothing waits.

    Attributes:
        row: `[D, s]` int, the row in each slot, counted over its shard; -1 where there is none.
        first: `[D, s]` int, the column of its first token, whether or not it is kept.
        drawn: `[D, s]` int, the tokens that it has.
    """

    def __init__(
        self,
        waiting: Sequence[Iterable[Waiting]],
        slots: int,
        limits: np.ndarray,
        *,
        shrink: bool,
    ):
        self._waiting = [deque(rows) for rows in waiting]
        self.shards = len(waiting)
        self._limits = limits.reshape(self.shards, -1)
        self._least = min((row.drawn for rows in self._waiting for row in rows), default=0)
        self._queue = slots
        most = max(len(rows) for rows in self._waiting)
        sizes = slot_sizes(slots, shrink)
        size = min((size for size in sizes if size >= most), default=slots)
        self._sizes = [other for other in sizes if other <= size]
        self.row = np.full((self.shards, size), -1)
        self.first = np.zeros((self.shards, size), int)
        self.drawn = np.zeros((self.shards, size), int)

    @property
    def slots(self) -> int:
        """Slots of a shard, at present."""
        return self.row.shape[1]

    @property
    def most(self) -> int:
        """Rows in the slots of the shard that has most."""
        return int((self.row >= 0).sum(axis=1).max())

    @property
    def busy(self) -> bool:
        """Whether a row decodes or waits."""
        return bool(self.most) or self.waits

    @property
    def waits(self) -> bool:
        """Whether a row waits."""
        return any(self._waiting)

    @property
    def _waits(self) -> np.ndarray:
        """Rows that wait in each shard."""
        return np.array([len(rows) for rows in self._waiting])

    def main_chunk(self) -> int | None:
        """The chunk that most rows are to enter from next; None where none waits."""
        heads = sorted({rows[0].chunk for rows in self._waiting if rows})
        return max(heads, key=lambda chunk: int(self.queue(chunk).count.sum()), default=None)

    def urgent_chunk(self, *, queues: bool) -> int | None:
        """A chunk that rows are to enter from before anything is decoded, None if there is none.

        Args:
            queues: whether the main chunk's come in by themselves.
        """
        main = self.main_chunk()
        if main is None:
            return None
        queued = self.queue(main).count if queues else 0
        free = (self.row < 0).sum(axis=1)
        short = (np.minimum(free, self._waits) > queued).nonzero()[0]
        return self._waiting[short[0]][0].chunk if short.size else None

    def queue(self, chunk: int | None, *, now: bool = False) -> Queue:
        """The rows at the head of each shard's line that are of one chunk.

        Args:
            chunk: of the `Source`.
            now: whether only as many as there are free slots.
        """
        room = (self.row < 0).sum(axis=1) if now else np.full(self.shards, self._queue)
        place, row = np.zeros((2, self.shards, self._queue), np.int32)
        count = np.zeros(self.shards, np.int32)
        for shard, rows in enumerate(self._waiting):
            of_chunk = itertools.takewhile(lambda waiting: waiting.chunk == chunk, rows)
            for i, waiting in enumerate(itertools.islice(of_chunk, int(room[shard]))):
                place[shard, i], row[shard, i] = waiting.place, waiting.row
                count[shard] = i + 1
        return Queue(place, row, count)

    def enter(self, count: np.ndarray, column: int) -> None:
        """Puts rows that wait into the first free slots.

        Args:
            count: `[D]` int, how many.
            column: that the next token of every slot is written to.
        """
        for shard, number in enumerate(count):
            for slot in np.flatnonzero(self.row[shard] < 0)[:number]:
                waiting = self._waiting[shard].popleft()
                self.row[shard, slot] = waiting.row
                self.first[shard, slot] = column - waiting.drawn
                self.drawn[shard, slot] = waiting.drawn

    def oldest_chunk(self) -> int | None:
        """The first chunk that a row still waits for; None where none waits."""
        return min((rows[0].chunk for rows in self._waiting if rows), default=None)

    def floors(self, queue: Queue | None, *, leave: int = 0) -> tuple[np.ndarray, int]:
        """When the host wants to be asked.

        Args:
            queue: rows that may come in before.
            leave: rows in a shard that are too few to go on with, once none waits.

        Returns:
            `[D]` int32, the number of rows in a shard, with those of the queue for which there are
            slots, at which it is to be refilled (-1: never), and the number in every shard at which
            slots become fewer, or rows leave (0: when all have ended).
        """
        queued = np.zeros(self.shards, int) if queue is None else queue.count
        rows = np.minimum((self.row >= 0).sum(axis=1) + queued, self.slots)
        step = max(1, self.slots // _FIRST_TAKERS)
        more = self._waits > queued
        refill = np.where(more, np.maximum(rows - step, 0), -1).astype(np.int32)
        fewer = [size for size in self._sizes if size < self.slots]
        shrink = fewer[0] if fewer and not more.any() and self._worthwhile() else 0
        return refill, max(shrink, 0 if more.any() else leave)

    def _worthwhile(self) -> bool:
        return self.remaining() >= WORTH_SHRINKING

    def remaining(self) -> int:
        """Tokens that a row that decodes or waits may still have."""
        if self.waits:
            return int(self._limits.max()) - self._least
        left = np.take_along_axis(self._limits, self.row, axis=1) - self.drawn
        return int(left[self.row >= 0].max(initial=0))

    def oldest(self, column: int) -> int:
        """The first column of a decoding response that is longest, or else the next column."""
        return int(self.first[self.row >= 0].min(initial=column))

    def follow(self, seen: Seen) -> None:
        """Takes note of what a segment did.

        Args:
            seen: with numpy arrays.
        """
        self.row, self.first, self.drawn = (
            np.array(x, int).reshape(self.row.shape) for x in (seen.index, seen.first, seen.drawn)
        )
        for rows, taken in zip(self._waiting, seen.taken, strict=True):
            for _ in range(taken):
                rows.popleft()

    def leave(self) -> None:
        """Frees all slots."""
        self.row[:] = -1

    def shrink(self) -> np.ndarray | None:
        """Makes slots fewer, where that is worth it.

        Returns:
            `[D, s]` int32, the slot that each slot was before; None where nothing changes.
        """
        if self.waits or not self._worthwhile():
            return None
        size = min(size for size in self._sizes if size >= self.most)
        if size >= self.slots:
            return None
        take = np.argsort(self.row < 0, axis=1, kind="stable")[:, :size].astype(np.int32)
        for name in ("row", "first", "drawn"):
            setattr(self, name, np.take_along_axis(getattr(self, name), take, axis=1))
        return take


def slot_sizes(size: int, shrink: bool) -> list[int]:
    """Numbers of slots in a shard that there are programs for, the largest first.

    Args:
        size: the largest.
        shrink: whether there are smaller ones: down to an eighth, by halves.
    """
    return sorted({-(-size // part) for part in ((1, 2, 4, 8) if shrink else (1,))}, reverse=True)


class Stage(NamedTuple):
    """Rows whose responses are about as long, decoded together.

    Attributes:
        drawn: tokens that their responses have when the stage begins.
        limit: tokens at which they are put aside for the next one.
        columns: numbers of columns that there are programs for, the smallest first.
    """

    drawn: int
    limit: int
    columns: tuple[int, ...]


def _largest(limit: int, *, waiting: bool) -> int:
    """Columns for `limit` tokens, and some more where rows come in later than others.

    When these are full the oldest columns are dropped, which copies what is left. With C columns
    that and reading the spare ones at each token cost least where about sqrt(2 C) are spare.
    """
    return limit + max(limit // 16, min(limit, 32)) * waiting


def one_stage(width: int, limit: int, *, waiting: bool, multiple: int) -> list[Stage]:
    """One number of columns for all.

    Args:
        width: of the prompts' caches.
        limit: tokens of a response, at most.
        waiting: whether rows come in later than others, so that columns are dropped.
        multiple: that columns are rounded up to.
    """
    columns = width + _largest(limit, waiting=waiting)
    return [Stage(0, limit, (-(-columns // multiple) * multiple,))]


def growing(width: int, first: int, limit: int, by: float) -> list[Stage]:
    """Columns become more as they are wanted: all rows begin together, none waits.

    Args:
        width: of the prompts' caches.
        first: response tokens that the smallest number has room for.
        limit: tokens of a response, at most.
        by: how many times as many each number has room for; more are copied less often.
    """
    sizes, size = [], min(first, limit)
    while size < limit:
        sizes.append(width + size)
        size = min(max(int(size * by), size + 1), limit)
    return [Stage(0, limit, (*sizes, width + limit))]


def short_before_long(width: int, first: int, limit: int) -> list[Stage]:
    """Rows that outgrow a stage wait for the next, so that those who attend to all columns there
    are do not pay for the longest row's. Limits double.

    Args:
        width: of the prompts' caches.
        first: response tokens of the first stage.
        limit: tokens of a response, at most.
    """
    stages, drawn = [], 0
    while drawn < limit:
        upto = min(max(2 * drawn, first), limit)
        # Without slack for the few that all begin together.
        sizes = (width + upto, width + drawn + _largest(upto - drawn, waiting=True))
        stages.append(Stage(drawn, upto, sizes if drawn else sizes[1:]))
        drawn = upto
    return stages
