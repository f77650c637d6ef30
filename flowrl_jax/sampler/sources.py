"""Where rows that wait for slots come from: prompts, or responses that were put aside."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from flowrl_jax.sampler.programs import Programs
from flowrl_jax.sampler.schedule import Groups, Waiting
from flowrl_jax.sampler.slots import Shelf, Shelved, Slots, Starts
from flowrl_jax.types import PromptBatch


class Source(Protocol):
    """Rows that wait, and what they enter slots with."""

    def waiting(self) -> list[list[Waiting]]:
        """Rows of each shard, in the order in which they are to enter."""
        ...

    def starts(self, chunk: int) -> Starts:
        """What the rows of a chunk enter with."""
        ...

    def forget(self, before: int | None) -> None:
        """Frees the chunks before one; all, if None."""
        ...


class ReadPrompts:
    """Prompts, read a chunk at a time, when its rows are the next to enter.

    Args:
        programs: that read.
        params: of the policy.
        prompts: of all rows.
        groups: which prompt is in which chunk.
        put: puts an array with the shards as its first axis where its parts belong.
    """

    def __init__(
        self,
        programs: Programs,
        params: Any,
        prompts: PromptBatch,
        groups: Groups,
        put: Callable[[np.ndarray], jax.Array],
    ):
        self._programs, self._params, self._prompts = programs, params, prompts
        self._groups, self._put = groups, put
        self._read: dict[int, Starts] = {}

    def waiting(self) -> list[list[Waiting]]:
        """As `Source`."""
        return self._groups.waiting()

    def starts(self, chunk: int) -> Starts:
        """As `Source`."""
        if chunk not in self._read:
            pick = self._put(self._groups.rows(chunk))
            self._read[chunk] = self._programs.prefill(self._params, self._prompts, pick)
        return self._read[chunk]

    def forget(self, before: int | None) -> None:
        """As `Source`."""
        self._read = _from(self._read, before)


class Aside:
    """Responses that wait for the next stage, on as many shelves as they need.

    Args:
        programs: that copy.
        shards: that rows are cut over.
        size: rows of a shard on a shelf.
        width: columns of each.
    """

    def __init__(self, programs: Programs, shards: int, size: int, width: int):
        self._programs, self._size, self._width = programs, size, width
        self._rows: list[list[Waiting]] = [[] for _ in range(shards)]
        self._kept: dict[int, Starts] = {}
        self._shelf: Shelf | None = None
        self._known = np.zeros(shards, int)

    def shelf(self, slots: Slots) -> Shelf:
        """The shelf that has room. Whoever takes it gives it back by `keep`.

        Args:
            slots: of whose shape its caches are.
        """
        shelf = self._shelf
        if shelf is None:
            places = len(self._rows) * self._size
            shelf = self._shelf = self._programs.shelf(slots, places, self._width)
        return shelf

    def keep(self, shelf: Shelf, shelved: Shelved) -> np.ndarray:
        """Takes note of the rows that were put on the shelf.

        Args:
            shelf: the one that was taken.
            shelved: what is on it, in numpy arrays.

        Returns:
            How many of each shard these were, `[D]`.
        """
        chunk, shards = len(self._kept), len(self._rows)
        row, drawn = shelved.row.reshape(shards, -1), shelved.drawn.reshape(shards, -1)
        for shard, rows in enumerate(self._rows):
            for place in range(self._known[shard], shelved.count[shard]):
                rows.append(Waiting(int(row[shard, place]), chunk, place, int(drawn[shard, place])))
        count = np.asarray(shelved.count)
        new = count - self._known
        self._shelf, self._known = shelf, count
        if count.max() == self._size:
            self.close()
        return new

    def close(self) -> None:
        """Nothing more comes to the present shelf."""
        if self._shelf is not None and self._known.any():
            self._kept[len(self._kept)] = self._shelf.starts
        self._shelf, self._known = None, np.zeros_like(self._known)

    def waiting(self) -> list[list[Waiting]]:
        """As `Source`."""
        return self._rows

    def starts(self, chunk: int) -> Starts:
        """As `Source`."""
        return self._kept[chunk]

    def forget(self, before: int | None) -> None:
        """As `Source`."""
        self._kept = _from(self._kept, before)


def _from(kept: dict[int, Starts], first: int | None) -> dict[int, Starts]:
    return {chunk: starts for chunk, starts in kept.items() if first is not None and chunk >= first}
