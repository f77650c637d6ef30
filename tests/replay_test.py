"""Replay: what the buffer keeps, draws and forgets, and runs that learn from it."""

import numpy as np
import pytest

from flowrl_jax.errors import InputError
from flowrl_jax.replay import REWARD, ReplayBuffer, ReplayConfig, mixed_places, prune


def groups(step: int, count: int = 4) -> dict[str, np.ndarray]:
    """Groups of two responses that can be told apart: 100 x step + place."""
    name = 100 * step + np.arange(count)
    reward = np.random.default_rng(step).random((count, 2)).astype(np.float32)
    return {"name": name, "tokens": np.repeat(name, 6).reshape(count, 2, 3), REWARD: reward}


def buffer(size: int = 100, **settings) -> ReplayBuffer:
    return ReplayBuffer(ReplayConfig(fraction=0.5, **settings), size, seed=7)


def replayed(mixed: dict[str, np.ndarray], step: int) -> list[int]:
    """Names of the groups of earlier steps."""
    return [int(name) for name in mixed["name"] if name // 100 != step]


def test_places_are_spread():
    assert mixed_places(3, 1).tolist() == [False, False, False, True]
    assert mixed_places(2, 0).tolist() == [False, False]
    for fresh, old, cuts in ((4, 4, 4), (6, 2, 2), (2, 6, 2), (12, 4, 4)):
        places = mixed_places(fresh, old).reshape(cuts, -1)
        assert places.sum(axis=1).tolist() == [old // cuts] * cuts


def test_fresh_groups_stand_in_where_nothing_is_kept():
    mixed, ages = buffer().mix(1, groups(1), 4)
    assert ages.size == 0
    assert sorted(mixed["name"]) == sorted([*range(100, 104)] * 2)
    assert mixed["name"][~mixed_places(4, 4)].tolist() == [*range(100, 104)]


def test_what_is_mixed_in_is_what_was_kept():
    held = buffer()
    for step in range(1, 6):
        mixed, ages = held.mix(step, groups(step), 4)
        old = replayed(mixed, step)
        assert len(set(old)) == len(old) == ages.size == (4 if step > 1 else 0)
        assert sorted(step - name // 100 for name in old) == sorted(ages)
        # All arrays of a group travel together.
        everything = {int(n): r for s in range(1, step + 1) for n, r in
                      zip(groups(s)["name"], groups(s)[REWARD], strict=True)}  # fmt: skip
        for name, tokens, reward in zip(*mixed.values(), strict=True):
            assert (tokens == name).all()
            np.testing.assert_array_equal(reward, everything[int(name)])
    assert len(held) == 20


def test_age_and_size_are_bounded():
    held = buffer(max_age=2)
    for step in range(1, 8):
        _, ages = held.mix(step, groups(step), 8)
        assert ages.size == min(4 * (step - 1), 8)
        assert ages.max(initial=0) <= 2
    held = buffer(size=6)
    seen: set[int] = set()
    for step in range(1, 30):
        mixed, ages = held.mix(step, groups(step), 6)
        newest = [100 * s + i for s in range(1, step) for i in range(4)][-6:]
        assert sorted(replayed(mixed, step)) == newest
        assert len(held) == min(4 * step, 6)
        seen |= set(ages.tolist())
    assert seen == {1, 2}
    held = buffer(size=3)  # of each step's four groups the last three
    held.mix(1, groups(1), 1)
    assert sorted(replayed(held.mix(2, groups(2), 3)[0], 2)) == [101, 102, 103]


def test_draws_depend_on_seed_step_and_part_alone():
    def names(part: int, seed: int = 7) -> list[list[int]]:
        held = ReplayBuffer(ReplayConfig(fraction=0.5), 100, seed, part)
        return [replayed(held.mix(step, groups(step), 2)[0], step) for step in range(1, 9)]

    assert names(0) == names(0)
    assert names(0) != names(1)
    assert names(0) != names(0, seed=8)


@pytest.mark.parametrize("priority", ["uniform", "reward", "variance"])
def test_priorities(priority):
    """How often each of five groups is drawn, one at a time, against 1 / rank by hand."""
    reward = np.array([[0, 1], [0, 0], [1, 1], [0.6, 0.2], [0, 0]], np.float32)
    value = {"uniform": lambda r: 0.0, "reward": np.mean, "variance": np.var}[priority]
    # The greatest value first, of equals the newest.
    order = sorted(range(5), key=lambda i: (-value(reward[i]), -i))
    weight = {place: 1 / rank for rank, place in enumerate(order, start=1)}
    if priority == "uniform":
        weight = dict.fromkeys(range(5), 1.0)
    counts = np.zeros(5)
    for seed in range(1500):
        held = ReplayBuffer(ReplayConfig(fraction=0.5, priority=priority), 100, seed)
        held.mix(1, {"name": np.arange(5), REWARD: reward}, 1)
        mixed, _ = held.mix(2, {"name": np.array([99]), REWARD: reward[:1]}, 1)
        counts[mixed["name"][mixed["name"] < 99]] += 1
    expected = np.array([weight[i] for i in range(5)]) / sum(weight.values())
    np.testing.assert_allclose(counts / 1500, expected, atol=0.045)  # 3.5 deviations


def test_a_buffer_that_was_saved_goes_on_as_it_was(tmp_path):
    one = buffer(size=10)
    for step in range(1, 7):  # the ring has gone round twice
        one.mix(step, groups(step), 4)
    digest = one.save(tmp_path / "6.0.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["6.0.npz"]
    two = buffer(size=10)
    two.load(tmp_path / "6.0.npz", digest)
    assert two.save(tmp_path / "again.npz") == digest
    for step in range(7, 12):
        mixed = [held.mix(step, groups(step), 4) for held in (one, two)]
        for name in mixed[0][0]:
            np.testing.assert_array_equal(mixed[0][0][name], mixed[1][0][name])
        np.testing.assert_array_equal(mixed[0][1], mixed[1][1])


def test_a_buffer_that_was_cleared_forgets_and_goes_on(tmp_path):
    held = buffer(size=10)
    for step in range(1, 5):
        held.mix(step, groups(step), 4)
    held.clear()
    assert len(held) == 0
    empty = buffer(size=10)
    empty.load(tmp_path / "4.0.npz", held.save(tmp_path / "4.0.npz"))
    for one in (held, empty):
        assert replayed(one.mix(5, groups(5), 2)[0], 5) == []
        assert {name // 100 for name in replayed(one.mix(6, groups(6), 4)[0], 6)} == {5}


def test_a_file_that_is_not_the_checkpoints_is_refused(tmp_path):
    held = buffer(size=10)
    held.mix(1, groups(1), 2)
    digest = held.save(tmp_path / "1.0.npz")
    with pytest.raises(InputError, match="missing"):
        held.load(tmp_path / "2.0.npz", digest)
    with pytest.raises(InputError, match="size keeps 12 prompts here, but .* keeps 10"):
        buffer(size=12).load(tmp_path / "1.0.npz", digest)
    (tmp_path / "1.0.npz").write_bytes(b"other")
    with pytest.raises(InputError, match="not the one of its checkpoint"):
        held.load(tmp_path / "1.0.npz", digest)
    other = {"name": np.zeros(4), "tokens": np.zeros((4, 2, 5)), REWARD: np.zeros((4, 2))}
    with pytest.raises(InputError, match=r"of shape \(2, 3\) a prompt, not \(2, 5\)"):
        held.mix(2, other, 2)


def test_files_of_checkpoints_that_are_gone_are_deleted(tmp_path):
    for name in ("2.0.npz", "4.0.npz", "4.1.npz", "6.0.npz"):
        (tmp_path / name).touch()
    prune(tmp_path, {4, 6})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4.0.npz", "4.1.npz", "6.0.npz"]


WRONG = {
    "all": ({"fraction": 1.0}, "replay.fraction=1.0 must be at least 0 and below 1"),
    "size": ({"size": 0}, "replay.size=0 and replay.max_age=16 must be at least 1"),
    "age": ({"max_age": 0}, "replay.max_age=0 must be at least 1"),
    "priority": ({"priority": "best"}, "replay.priority='best' is not known"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings(case):
    settings, message = WRONG[case]
    with pytest.raises(InputError) as caught:
        ReplayConfig(**settings)
    assert message in str(caught.value)
