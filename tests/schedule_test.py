"""Who decodes when: every row once, in its own shard, and slots that become fewer."""

import numpy as np
import pytest

from flowrl_jax.sampler.schedule import WORTH_SHRINKING, Schedule, column_sizes, slot_sizes


def play(schedule, lengths, width=4):
    """Decodes rows of given lengths; returns the order in which they ended and all steps' slots."""
    ended, steps, column, entered = [], [], width, []
    while schedule.busy:
        taken = schedule.shrink()
        assert taken is None or taken.shape == schedule.row.shape
        for refill in schedule.refill(column):
            entered.append(refill)
        floors, shrink = schedule.floors()
        row, drawn = schedule.row.ravel(), schedule.drawn.ravel().copy()
        active = row >= 0
        while True:  # as the device does
            drawn += active
            steps.append(active.size)
            column += 1
            active = active & (drawn < lengths[row])
            each = active.reshape(schedule.shards, -1).sum(1)
            if not ((each > floors).all() and each.max() > shrink):
                break
        ended += schedule.ended(active, drawn).tolist()
    return ended, steps, entered


@pytest.mark.parametrize("slots", [0, 1, 5, 8, 1000])
@pytest.mark.parametrize(("shards", "group"), [(1, 3), (2, 4), (4, 3), (8, 3)])
def test_every_row_decodes_once_in_its_shard(shards, group, slots):
    rows = 24
    lengths = np.random.default_rng(slots).integers(1, 40, rows)
    schedule = Schedule(rows, group, shards, slots, np.full(rows, 40), shrink=True)
    size = schedule.slots
    assert size * shards >= min(slots or rows, rows)
    ended, steps, entered = play(schedule, lengths)
    assert sorted(ended) == list(range(rows))
    each = rows // shards
    seen = set()
    for refill in entered:
        rows_of_chunk = schedule.chunk_rows(refill.chunk)
        for shard in range(shards):
            for i in range(refill.count[shard]):
                row = shard * each + refill.row[shard, i]
                assert refill.row[shard, i] < each and row not in seen
                seen.add(row)
                # The prompt that it gets is its own.
                read = shard * each + rows_of_chunk[shard, refill.prompt[shard, i]]
                assert read // group == row // group
    assert seen == set(range(rows))
    # Not more work than a batch that waits for its longest row, again and again.
    waves = -(-rows // (size * shards))
    assert len(steps) <= waves * lengths.max()


def test_one_long_row_does_not_keep_the_others_waiting():
    """256 rows, one of them 64 times as long: as many steps as it has itself, few slots at last."""
    lengths = np.full(256, 8)
    lengths[3] = 512
    schedule = Schedule(256, 8, 1, 32, np.full(256, 512), shrink=True)
    _, steps, _ = play(schedule, lengths)
    assert len(steps) == 512
    assert sum(steps) < 32 * 8 * 12 + 512 * 4 + 32 * 10
    assert steps[-1] == 4 == schedule.slots


def test_slots_stay_where_little_may_follow():
    lengths = np.array([1] * 15 + [WORTH_SHRINKING - 1])
    schedule = Schedule(16, 1, 1, 0, np.full(16, WORTH_SHRINKING), shrink=True)
    _, steps, _ = play(schedule, lengths)
    assert set(steps) == {16}


def test_sizes_are_known_in_advance():
    assert slot_sizes(32, shrink=True) == [32, 16, 8, 4]
    assert slot_sizes(3, shrink=True) == [3, 2, 1]
    assert slot_sizes(32, shrink=False) == [32]
    sizes = column_sizes(10, 64, 512, waiting=False, grow=True)
    assert sizes == [74, 106, 154, 226, 334, 496, 522]
    assert column_sizes(10, 64, 512, waiting=False, grow=False, multiple=128) == [640]
    assert column_sizes(10, 64, 512, waiting=True, grow=True)[-1] == 522 + 64
    assert column_sizes(10, 64, 5, waiting=False, grow=True) == [15]
    assert len(column_sizes(10, 64, 8192, waiting=False, grow=True)) == 13
