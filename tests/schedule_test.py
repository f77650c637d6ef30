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


def schedule_of(rows, group, shards, slots, limit):
    """A schedule of all rows, and the groups that they are in."""
    size = -(-min(slots or rows, rows) // shards)
    groups = Groups(rows, group, shards, size)
    return Schedule(groups.waiting(), size, np.full(rows, limit), shrink=True), groups


def play(schedule, lengths, width=4):
    """Decodes rows of given lengths; returns the order in which they ended and all steps' slots."""
    ended, steps, column, entered = [], [], width, []
    while schedule.busy:
        taken = schedule.shrink()
        assert taken is None or taken.shape == schedule.row.shape
        for refill in schedule.refill(column):
            entered.append(refill)
        floors, shrink = schedule.floors()
        row, drawn = schedule.row.ravel().copy(), schedule.drawn.ravel().copy()
        active = row >= 0
        while True:  # as the device does
            drawn += active
            steps.append(active.size)
            column += 1
            active = active & (drawn < lengths[row])
            each = active.reshape(schedule.shards, -1).sum(1)
            if not ((each > floors).all() and each.max() > shrink):
                break
        ended += row[(row >= 0) & ~active].tolist()
        schedule.ended(active, drawn)
    return ended, steps, entered


@pytest.mark.parametrize("slots", [0, 1, 5, 8, 1000])
@pytest.mark.parametrize(("shards", "group"), [(1, 3), (2, 4), (4, 3), (8, 3)])
def test_every_row_decodes_once_in_its_shard(shards, group, slots):
    rows = 24
    lengths = np.random.default_rng(slots).integers(1, 40, rows)
    schedule, groups = schedule_of(rows, group, shards, slots, 40)
    size = schedule.slots
    assert size * shards >= min(slots or rows, rows)
    ended, steps, entered = play(schedule, lengths)
    assert sorted(ended) == list(range(rows))
    each = rows // shards
    seen = set()
    for refill in entered:
        rows_of_chunk = groups.rows(refill.chunk)
        for shard in range(shards):
            for i in range(refill.count[shard]):
                row = shard * each + refill.row[shard, i]
                assert refill.row[shard, i] < each and row not in seen
                seen.add(row)
                # The prompt that it gets is its own.
                read = shard * each + rows_of_chunk[shard, refill.place[shard, i]]
                assert read // group == row // group
    assert seen == set(range(rows))
    # Not more work than a batch that waits for its longest row, again and again.
    waves = -(-rows // (size * shards))
    assert len(steps) <= waves * lengths.max()


def test_one_long_row_does_not_keep_the_others_waiting():
    """256 rows, one of them 64 times as long: as many steps as it has itself, few slots at last."""
    lengths = np.full(256, 8)
    lengths[3] = 512
    schedule, _ = schedule_of(256, 8, 1, 32, 512)
    _, steps, _ = play(schedule, lengths)
    assert len(steps) == 512
    assert sum(steps) < 32 * 8 * 12 + 512 * 4 + 32 * 10
    assert steps[-1] == 4 == schedule.slots


def test_slots_stay_where_little_may_follow():
    lengths = np.array([1] * 15 + [WORTH_SHRINKING - 1])
    schedule, _ = schedule_of(16, 1, 1, 0, WORTH_SHRINKING)
    _, steps, _ = play(schedule, lengths)
    assert set(steps) == {16}


def test_sizes_are_known_in_advance():
    assert slot_sizes(32, shrink=True) == [32, 16, 8, 4]
    assert slot_sizes(3, shrink=True) == [3, 2, 1]
    assert slot_sizes(32, shrink=False) == [32]
    ((drawn, limit, sizes),) = growing(10, 64, 512)
    assert (drawn, limit, sizes) == (0, 512, (74, 106, 154, 226, 334, 496, 522))
    assert growing(10, 64, 5) == [(0, 5, (15,))]
    assert len(growing(10, 64, 8192)[0].columns) == 13
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
    schedule.refill(4)
    assert schedule.floors(leave=1)[1] == 0  # others wait
    for _ in range(2):
        schedule.ended(np.zeros(4, bool), np.ones(4))
        schedule.refill(6)
    assert schedule.floors(leave=1)[1] == 1
    assert schedule.floors()[1] == 0


def test_rows_come_back_with_the_tokens_they_have():
    waiting = [[Waiting(3, 0, 0, 64), Waiting(1, 0, 1, 10)]]
    schedule = Schedule(waiting, 4, np.full(5, 128), shrink=True)
    assert schedule.slots == 2  # the smallest that holds them
    assert schedule.remaining() == 128 - 10
    (refill,) = schedule.refill(74)
    assert refill.row.tolist() == [[3, 1]] and refill.place.tolist() == [[0, 1]]
    assert schedule.drawn.tolist() == [[64, 10]]
    assert schedule.oldest(80) == 74 - 64
