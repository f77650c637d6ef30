"""Where rows that wait for slots come from: prompts, or responses that were put aside."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from flowrl_jax.sampler.programs import Programs
from flowrl_jax.sampler.schedule import Groups, Waiting, lists
from flowrl_jax.sampler.slots import Slots, Starts
from flowrl_jax.types import PromptBatch


class Leaving(NamedTuple):
    """A row that is to be put aside.

    Attributes:
        shard: that it is in.
        slot: of the shard.
        end: the column that its newest token would be written to.
        row: among the shard's.
        drawn: tokens that it has.
    """

    shard: int
    slot: int
    end: int
    row: int
    drawn: int


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
    """Prompts, read a chunk at a time, when the first of its rows enters.

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
    """Responses that wait for the next stage.

    Args:
        programs: that copy.
        shards: that rows are cut over.
        size: rows of a shard in a chunk.
        width: columns of each.
    """

    def __init__(self, programs: Programs, shards: int, size: int, width: int):
        self._programs, self._size, self._width = programs, size, width
        self._rows: list[list[Waiting]] = [[] for _ in range(shards)]
        self._kept: dict[int, Starts] = {}

    def add(self, slots: Slots, entries: Iterable[Leaving]) -> None:
        """Copies rows out of slots.

        Args:
            slots: that they are in.
            entries: the rows.
        """
        found: dict[int, list[tuple[int, int, int, int]]] = {}
        for shard, slot, end, row, drawn in entries:
            chunk, place = divmod(len(self._rows[shard]), self._size)
            self._rows[shard].append(Waiting(row, chunk, place, drawn))
            found.setdefault(chunk, []).append((shard, slot, place, end))
        shards = len(self._rows)
        for chunk, rows in sorted(found.items()):
            if chunk not in self._kept:
                self._kept[chunk] = self._programs.room(slots, shards * self._size, self._width)
            arrays = lists((shards, self._size), rows)
            self._kept[chunk] = self._programs.put_aside(self._kept[chunk], slots, *arrays)

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
