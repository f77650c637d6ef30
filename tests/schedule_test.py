"""Who decodes when: every row once, in its own shard, and slots that become fewer."""

import numpy as np
import pytest

from flowrl_jax.sampler.schedule import (
    WORTH_SHRINKING,
    Groups,
    Schedule,
    Waiting,
    growing,
    one_stage,
    short_before_long,
    slot_sizes,
)
from flowrl_jax.sampler.slots import Seen


def schedule_of(rows, group, shards, slots, limit):
    """A schedule of all rows, and the groups that they are in."""
    size = -(-min(slots or rows, rows) // shards)
    groups = Groups(rows, group, shards, size)
    return Schedule(groups.waiting(), size, np.full(rows, limit), shrink=True), groups


def play(schedule, lengths, *, queues):
    """Decodes rows of given lengths as the device does; returns the rows in the order in which they
    ended, the slots at every step, and who came in: chunk, shard, place and row."""
    ended, steps, entered, column = [], [], [], 4
    lengths = lengths.reshape(schedule.shards, -1)
    each = lengths.shape[1]

    def note(chunk, queue, first, count):
        for shard in range(schedule.shards):
            for i in range(first[shard], count[shard]):
                entered.append((chunk, shard, queue.place[shard, i], queue.row[shard, i]))

    while schedule.busy:
        taken = schedule.shrink()
        assert taken is None or taken.shape == schedule.row.shape
        none = np.zeros(schedule.shards, int)
        while (chunk := schedule.urgent_chunk(queues=queues)) is not None:
            queue = schedule.queue(chunk, now=True)
            note(chunk, queue, none, queue.count)
            assert queue.count.any()
            schedule.enter(queue.count, column)
        main = schedule.main_chunk()
        queue = schedule.queue(main)
        if not queues:
            assert not queue.count.any()
        floors, shrink = schedule.floors(queue if queues else None)
        row, first, drawn = schedule.row.copy(), schedule.first.copy(), schedule.drawn.copy()
        taken, step = none.copy(), 0
        while True:
            free = (row < 0).sum(1)
            rows = (row >= 0).sum(1) + np.minimum(free, queue.count - taken)
            if step and ((rows <= floors).any() or rows.max() <= shrink):
                break
            for shard in range(schedule.shards):
                for slot in np.flatnonzero(row[shard] < 0)[: queue.count[shard] - taken[shard]]:
                    row[shard, slot] = queue.row[shard, taken[shard]]
                    first[shard, slot], drawn[shard, slot] = column, 0
                    taken[shard] += 1
            drawn += row >= 0
            steps.append(row.size)
            column, step = column + 1, step + 1
            ends = (row >= 0) & (drawn >= np.take_along_axis(lengths, row, axis=1))
            ended += (row + np.arange(schedule.shards)[:, None] * each)[ends].tolist()
            row[ends] = -1
        note(main, queue, none, taken)
        at = np.array(column)
        schedule.follow(Seen(row.ravel(), first.ravel(), drawn.ravel(), at, taken, None))  # pyright: ignore[reportArgumentType]
    return ended, steps, entered


@pytest.mark.parametrize("slots", [0, 1, 5, 8, 1000])
@pytest.mark.parametrize(("shards", "group"), [(1, 3), (2, 4), (4, 3), (8, 3)])
def test_every_row_decodes_once_in_its_shard(shards, group, slots):
    rows = 24
    lengths = np.random.default_rng(slots).integers(1, 40, rows)
    schedule, groups = schedule_of(rows, group, shards, slots, 40)
    size = schedule.slots
    assert size * shards >= min(slots or rows, rows)
    ended, steps, entered = play(schedule, lengths, queues=size * shards < rows)
    assert sorted(ended) == list(range(rows))
    each = rows // shards
    seen = set()
    for chunk, shard, place, of in entered:
        row = shard * each + of
        assert of < each and row not in seen
        seen.add(row)
        # The prompt that it gets is its own.
        assert (shard * each + groups.rows(chunk)[shard, place]) // group == row // group
    assert seen == set(range(rows))
    # Not more work than a batch that waits for its longest row, again and again.
    waves = -(-rows // (size * shards))
    assert len(steps) <= waves * lengths.max()


def test_slots_are_never_empty_while_rows_of_the_chunk_wait():
    """One shard whose groups fill the slots: as many steps as rows that come in at once leave."""
    lengths = np.random.default_rng(0).integers(1, 60, 256)
    schedule, _ = schedule_of(256, 8, 1, 32, 60)
    _, steps, _ = play(schedule, lengths, queues=True)
    # A chunk's end waits for two free slots of 32; and the last rows end one by one.
    assert sum(steps) < 1.02 * lengths.sum() + 32 * 60


def test_a_shard_that_is_ahead_goes_on():
    """Its rows are much shorter, and of later chunks than the others': it ends first."""
    lengths = np.repeat([2, 40], 32)
    schedule, _ = schedule_of(64, 4, 2, 8, 40)
    ended, steps, _ = play(schedule, lengths, queues=True)
    assert max(ended.index(row) for row in range(32)) < min(
        ended.index(row) for row in range(32, 64)
    )
    assert len(steps) == 40 * 8


def test_one_long_row_does_not_keep_the_others_waiting():
    """256 rows, one of them 64 times as long: as many steps as it has itself, few slots at last."""
    lengths = np.full(256, 8)
    lengths[3] = 512
    schedule, _ = schedule_of(256, 8, 1, 32, 512)
    _, steps, _ = play(schedule, lengths, queues=True)
    assert len(steps) == 512
    assert sum(steps) < 32 * 8 * 12 + 512 * 4 + 32 * 10
    assert steps[-1] == 4 == schedule.slots


def test_slots_stay_where_little_may_follow():
    lengths = np.array([1] * 15 + [WORTH_SHRINKING - 1])
    schedule, _ = schedule_of(16, 1, 1, 0, WORTH_SHRINKING)
    _, steps, _ = play(schedule, lengths, queues=False)
    assert set(steps) == {16}


def test_sizes_are_known_in_advance():
    assert slot_sizes(32, shrink=True) == [32, 16, 8, 4]
    assert slot_sizes(3, shrink=True) == [3, 2, 1]
    assert slot_sizes(32, shrink=False) == [32]
    ((drawn, limit, sizes),) = growing(10, 64, 512, by=1.5)
    assert (drawn, limit, sizes) == (0, 512, (74, 106, 154, 226, 334, 496, 522))
    assert growing(10, 64, 5, by=1.5) == [(0, 5, (15,))]
    assert len(growing(10, 64, 8192, by=1.5)[0].columns) == 13
    assert growing(10, 1, 5, by=1.5) == [(0, 5, (11, 12, 13, 14, 15))]
    assert growing(10, 64, 512, by=4) == [(0, 512, (74, 266, 522))]
    assert one_stage(10, 512, waiting=False, multiple=128) == [(0, 512, (640,))]
    assert one_stage(10, 512, waiting=True, multiple=1) == [(0, 512, (522 + 32,))]
    assert short_before_long(10, 64, 200) == [
        (0, 64, (10 + 64 + 32,)),
        (64, 128, (10 + 128, 10 + 128 + 32)),
        (128, 200, (10 + 200, 10 + 200 + 32)),
    ]
    assert short_before_long(10, 64, 5) == [(0, 5, (10 + 5 + 5,))]


def test_few_rows_leave_once_none_waits():
    schedule, _ = schedule_of(8, 1, 2, 4, 8)
    schedule.enter(schedule.queue(0, now=True).count, 4)
    assert schedule.floors(None, leave=1)[1] == 0  # others wait
    queue = schedule.queue(1)
    assert queue.count.tolist() == [2, 2]
    floors, leave = schedule.floors(queue, leave=1)
    assert leave == 1 and floors.tolist() == [-1, -1]  # they come in by themselves
    assert schedule.floors(queue)[1] == 0


def test_rows_come_back_with_the_tokens_they_have():
    waiting = [[Waiting(3, 0, 0, 64), Waiting(1, 0, 1, 10)]]
    schedule = Schedule(waiting, 4, np.full(5, 128), shrink=True)
    assert schedule.slots == 2  # the smallest that holds them
    assert schedule.remaining() == 128 - 10
    queue = schedule.queue(0)  # as long as ever, for the programs to be the same
    assert queue.row.tolist() == [[3, 1, 0, 0]] and queue.place.tolist() == [[0, 1, 0, 0]]
    schedule.enter(queue.count, 74)
    assert schedule.drawn.tolist() == [[64, 10]]
    assert schedule.first.tolist() == [[10, 64]]
    assert schedule.oldest(80) == 74 - 64
