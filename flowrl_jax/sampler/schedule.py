"""Which row decodes in which slot: the host's side of continuous batching.

Rows lie over shards in equal runs, and so do slots; a row stays in its shard, so that nothing of it
crosses devices. All processes decide alike, from what they all see.
"""

import dataclasses

import numpy as np

# A program with fewer slots, and the copying of caches, are worth it for so many more tokens.
WORTH_SHRINKING = 64
_FIRST_TAKERS = 16  # a shard is refilled when one slot in so many is free


@dataclasses.dataclass(frozen=True)
class Refill:
    """Rows that enter slots, all of one chunk of prompts.

    Attributes:
        chunk: of the prompts.
        slot: `[D, s]` int32, slots of each shard, the first `count` of them.
        prompt: `[D, s]` int32, places of their prompts in the shard's part of the chunk.
        row: `[D, s]` int32, their rows among the shard's.
        count: `[D]` int32.
    """

    chunk: int
    slot: np.ndarray
    prompt: np.ndarray
    row: np.ndarray
    count: np.ndarray


class Schedule:
    """Rows that wait, decode and have ended.

    Args:
        rows: in all.
        group_size: adjacent rows with the same prompt.
        shards: that the rows are cut over; divides them.
        slots: rows decoded at one time; 0 means all.
        limits: `[rows]` int, tokens that each row may have.
        shrink: whether slots may become fewer once nothing waits.

    Attributes:
        row: `[D, s]` int, the row in each slot, counted over all; -1 where there is none.
        entered: `[D, s]` int, the column at which it came in.
    """

    def __init__(
        self, rows: int, group_size: int, shards: int, slots: int, limits: np.ndarray, shrink: bool
    ):
        self.shards = shards
        self.per_shard = rows // shards
        self.group_size = group_size
        self._limits = limits
        self._next = np.zeros(shards, int)
        self._sizes = slot_sizes(-(-min(slots or rows, rows) // shards), shrink)
        size = self._sizes[0]
        self.row = np.full((shards, size), -1)
        self.entered = np.zeros((shards, size), int)
        self.drawn = np.zeros((shards, size), int)
        first = np.arange(shards) * self.per_shard
        self._first_group = first // group_size
        last_group = (first + self.per_shard - 1) // group_size
        self._groups = last_group - self._first_group + 1
        whole = size == self.per_shard
        self.chunk_prompts = int(self._groups.max()) if whole else max(1, size // group_size)

    @property
    def slots(self) -> int:
        """Slots of a shard, at present."""
        return self.row.shape[1]

    @property
    def busy(self) -> bool:
        """Whether a row decodes or waits."""
        return bool((self.row >= 0).any()) or bool(self._waiting.any())

    @property
    def _waiting(self) -> np.ndarray:
        return self.per_shard - self._next

    def chunk_rows(self, chunk: int) -> np.ndarray:
        """A row, among the shard's, of each prompt of a chunk: `[D, chunk_prompts]` int32."""
        place = chunk * self.chunk_prompts + np.arange(self.chunk_prompts)
        group = self._first_group[:, None] + np.minimum(place, self._groups[:, None] - 1)
        first = np.arange(self.shards)[:, None] * self.per_shard
        return np.maximum(group * self.group_size - first, 0).astype(np.int32)

    def refill(self, column: int) -> list[Refill]:
        """Puts waiting rows into free slots.

        Args:
            column: that the next token of every slot is written to.
        """
        found: dict[int, list[tuple[int, int, int, int]]] = {}
        for shard, slot in zip(*np.nonzero(self.row < 0), strict=True):
            row = int(self._next[shard])
            if row == self.per_shard:
                continue
            self._next[shard] += 1
            whole = shard * self.per_shard + row
            self.row[shard, slot] = whole
            self.entered[shard, slot] = column
            self.drawn[shard, slot] = 0
            prompt = whole // self.group_size - self._first_group[shard]
            chunk, place = divmod(int(prompt), self.chunk_prompts)
            found.setdefault(chunk, []).append((shard, slot, place, row))
        return [self._refill(chunk, entries) for chunk, entries in sorted(found.items())]

    def _refill(self, chunk: int, entries: list[tuple[int, int, int, int]]) -> Refill:
        arrays = np.zeros((3, *self.row.shape), np.int32)
        count = np.zeros(self.shards, np.int32)
        for shard, *values in entries:
            arrays[:, shard, count[shard]] = values
            count[shard] += 1
        return Refill(chunk, *arrays, count=count)

    def oldest_chunk(self) -> int:
        """The first chunk of prompts that a row still waits for; later ones have not been read."""
        waiting = np.nonzero(self._waiting)[0]
        if not waiting.size:
            return int(self._groups.max())
        row = waiting * self.per_shard + self._next[waiting]
        prompt = row // self.group_size - self._first_group[waiting]
        return int(prompt.min()) // self.chunk_prompts

    def floors(self) -> tuple[np.ndarray, int]:
        """When the host wants to be asked.

        Returns:
            `[D]` int32, the number of rows in a shard at which it is to be refilled (-1: never),
            and the number in all shards at which slots become fewer (0: when all have ended).
        """
        active = (self.row >= 0).sum(axis=1)
        step = max(1, self.slots // _FIRST_TAKERS)
        refill = np.where(self._waiting > 0, np.maximum(active - step, 0), -1).astype(np.int32)
        fewer = [size for size in self._sizes if size < self.slots]
        shrink = fewer[0] if fewer and not self._waiting.any() and self._worthwhile() else 0
        return refill, shrink

    def _worthwhile(self) -> bool:
        return self.remaining() >= WORTH_SHRINKING

    def remaining(self) -> int:
        """Tokens that a row that decodes or waits may still have."""
        if self._waiting.any():
            return int(self._limits.max())
        active = self.row >= 0
        return int((self._limits[self.row] - self.drawn)[active].max(initial=0))

    def oldest(self, column: int) -> int:
        """The column at which the longest of the decoding rows came in, or else the next one."""
        return int(self.entered[self.row >= 0].min(initial=column))

    def ended(self, active: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Takes note of what a segment did.

        Args:
            active: `[D * s]` bool.
            drawn: `[D * s]` int32, response tokens of each slot's row.

        Returns:
            Rows that have ended, counted over all.
        """
        self.drawn = drawn.reshape(self.row.shape).astype(int)
        done = (self.row >= 0) & ~active.reshape(self.row.shape)
        rows = self.row[done]
        self.row[done] = -1
        return rows

    def shrink(self) -> np.ndarray | None:
        """Makes slots fewer, where that is worth it.

        Returns:
            `[D, s]` int32, the slot that each slot was before; None where nothing changes.
        """
        if self._waiting.any() or not self._worthwhile():
            return None
        active = (self.row >= 0).sum(axis=1).max()
        size = min(size for size in self._sizes if size >= active)
        if size >= self.slots:
            return None
        take = np.argsort(self.row < 0, axis=1, kind="stable")[:, :size].astype(np.int32)
        for name in ("row", "entered", "drawn"):
            setattr(self, name, np.take_along_axis(getattr(self, name), take, axis=1))
        return take


def slot_sizes(size: int, shrink: bool) -> list[int]:
    """Numbers of slots in a shard that there are programs for, the largest first.

    Args:
        size: the largest.
        shrink: whether there are smaller ones: down to an eighth, by halves.
    """
    return sorted({-(-size // part) for part in ((1, 2, 4, 8) if shrink else (1,))}, reverse=True)


def column_sizes(
    width: int, first: int, limit: int, *, waiting: bool, grow: bool, multiple: int = 1
) -> list[int]:
    """Numbers of columns that there are programs for, the smallest first.

    Args:
        width: of the prompts' caches.
        first: response tokens that the smallest has room for.
        limit: tokens of a response, at most.
        waiting: whether rows come in later than others, so that a cache is moved along.
        grow: whether there are smaller ones than the largest.
        multiple: that the numbers are rounded up to.
    """
    # Caches are moved once in so many tokens: little beside reading them at each.
    largest = limit + max(limit // 16, min(limit, 64)) * waiting
    sizes, size = [], min(first, largest)
    while grow and size < largest:
        sizes.append(width + size)
        size = min(size + max(size // 2, 1), largest)
    return [-(-size // multiple) * multiple for size in (*sizes, width + largest)]
