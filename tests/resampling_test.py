"""Dynamic sampling: which groups are kept, and runs that draw again."""

import jax
import numpy as np
import pytest

from flowrl_jax.resampling import Groups, draw_until_varied, keep_groups
from flowrl_jax.types import Rollout


def by_hand(varied: list[bool], count: int) -> list[int]:
    """The first ones that vary, then the first others, in the order drawn."""
    chosen: list[int] = []
    for wanted in (True, False):
        for place, found in enumerate(varied):
            if found == wanted and len(chosen) < count:
                chosen.append(place)
    return sorted(chosen)


def test_the_first_groups_that_vary_are_kept():
    random = np.random.default_rng(0)
    for _ in range(200):
        size = int(random.integers(1, 12))
        varied = random.random(size) < random.random()
        count = int(random.integers(1, size + 1))
        assert keep_groups(varied, count).tolist() == by_hand(varied.tolist(), count)


def test_groups_vary_where_any_reward_differs():
    reward = np.array([[0, 0, 0], [1, 1, 1], [0, 0, 1], [0.5, 0.25, 0.5]], np.float32)
    groups = Groups(np.arange(4, dtype=np.int32), reward)
    assert groups.varied.tolist() == [False, False, True, True]


def batches(rewards: np.ndarray):
    """Batches of groups with these rewards `[batches, N, G]`; a row's tokens are its number."""
    number, count, _ = rewards.shape
    rows = np.arange(rewards.size, dtype=np.int32).reshape(number, -1)
    prompt_id = np.arange(number * count, dtype=np.int32).reshape(number, -1)
    drawn: list[int] = []

    def draw(i: int):
        drawn.append(i)
        x = rows[i]
        return Rollout(x[:, None], x, x, x, x, x), Groups(prompt_id[i], rewards[i])

    return draw, drawn


def take(held: Rollout, new: Rollout, rows: np.ndarray) -> Rollout:
    """`make_take`'s function in numpy."""
    return jax.tree.map(lambda *both: np.concatenate(both)[rows], held, new)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_batches_are_drawn_until_enough_vary(share):
    """Against a plain loop over all that might be drawn."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        rewards = np.zeros((4, 3, 2), np.float32)
        rewards[..., 0] = random.random((4, 3)) < share
        draw, drawn = batches(rewards)
        rollout, groups, varied = draw_until_varied(draw, take, 4)

        differs = [bool(x[0] != x[1]) for batch in rewards for x in batch]
        needed = next((n for n in range(1, 4) if sum(differs[: 3 * n]) >= 3), 4)
        assert drawn == list(range(needed))
        assert varied == sum(differs[: 3 * needed])
        kept = by_hand(differs[: 3 * needed], 3)
        assert groups.prompt_id.tolist() == kept
        np.testing.assert_array_equal(groups.reward, rewards.reshape(-1, 2)[kept])
        # Rows stay with their groups, and groups stay whole.
        rows = [2 * group + sample for group in kept for sample in range(2)]
        assert rollout.tokens[:, 0].tolist() == rollout.truncated.tolist() == rows


def test_no_more_than_the_first_batch_is_drawn_where_all_vary():
    draw, drawn = batches(np.arange(6, dtype=np.float32).reshape(1, 3, 2))
    rollout, _, varied = draw_until_varied(draw, take, 10)
    assert (drawn, varied) == ([0], 3)
    assert rollout.tokens[:, 0].tolist() == list(range(6))
