"""Ratings: known ones are found again, and solving more never lowers them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from flowrl_jax.errors import InputError
from flowrl_jax.evaluation import rating as module
from flowrl_jax.evaluation.rating import Contest

PROBLEMS = {"A": 500.0, "B": 1000.0, "C": 1500.0, "D": 2000.0}


def contest(rng, problems=PROBLEMS, people=400, name="1"):
    ratings = rng.normal(1500, 350, people)
    # The difference of two Gumbel variables is logistic: Elo's probabilities hold exactly.
    points = ratings + rng.gumbel(0, 400 / math.log(10), people)
    return Contest(
        name=name, problems=problems, rating=ratings, points=points, penalty=np.zeros(people)
    )


def test_probability_is_elo():
    assert module.win_probability(1500, 1500) == 0.5
    assert module.win_probability(1900, 1500) == pytest.approx(10 / 11)
    assert module.win_probability(1500, 1900) == pytest.approx(1 / 11)
    assert module.win_probability(0, 1e6) == 0.0  # no overflow


@pytest.mark.parametrize("truth", [900.0, 1600.0, 2400.0])
def test_problem_rating_recovers_a_known_one(truth):
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(800, 3000, 20_000)
    solved = rng.random(20_000) < module.win_probability(truth, difficulty)
    assert module.problem_rating(difficulty, solved) == pytest.approx(truth, abs=20)


def test_problem_rating_is_the_greatest_likelihood():
    rng = np.random.default_rng(1)
    difficulty = rng.uniform(1000, 2000, 30)
    solved = rng.random(30) < 0.5
    grid = np.arange(0, 4000.5, 0.5)
    p = module.win_probability(grid[:, None], difficulty)
    likelihood = np.log(np.where(solved, p, 1 - p)).sum(axis=1)
    found = module.problem_rating(difficulty, solved)
    assert found == pytest.approx(grid[np.argmax(likelihood)], abs=0.6)


def test_solving_one_more_problem_raises_the_rating():
    rng = np.random.default_rng(2)
    difficulty = rng.uniform(1000, 2500, 40)
    ratings = [
        module.problem_rating(difficulty, np.arange(40) < count, low=-1e4, high=1e4)
        for count in range(41)
    ]
    assert (np.diff(ratings) > 0).all()
    assert ratings[0] == -1e4 and ratings[-1] == 1e4  # the likelihood has no maximum there
    assert module.problem_rating([1500.0], [0.5]) == pytest.approx(1500, abs=1e-2)


def test_results_of_contests_with_points():
    given = contest(np.random.default_rng(0))
    result = lambda **attempts: module.contest_result(given, attempts)  # noqa: E731
    assert result() == (0, 0)
    assert result(A=[True], B=[False, False, True, True], C=[False] * 16) == (500 + 900, 0)
    assert result(A=[False] * 15 + [True]) == (0, 0)  # 500 - 15 * 50 is less than nothing
    with pytest.raises(InputError, match="'Z' is not in contest '1'"):
        result(Z=[True])


def test_results_of_contests_that_count_problems():
    given = contest(np.random.default_rng(0), problems={"A": None, "B": None})
    assert module.contest_result(given, {"A": [False, True], "B": [False, False, True]}) == (2, 30)


def test_place_counts_better_ones_and_half_the_ties():
    given = Contest(
        name="1", problems=PROBLEMS, rating=np.full(5, 1500.0),
        points=np.array([3.0, 2.0, 2.0, 2.0, 1.0]), penalty=np.array([0.0, 10.0, 20.0, 20.0, 0.0]),
    )  # fmt: skip
    assert module.contest_place(given, 4, 0) == 1
    assert module.contest_place(given, 2, 20) == 1 + 2 + 1
    assert module.contest_place(given, 2, 15) == 3
    assert module.contest_place(given, 0, 0) == 6


@pytest.mark.parametrize("truth", [1100.0, 1500.0, 1900.0])
def test_contests_recover_a_known_rating(truth):
    """A participant of that rating, put in as one problem that is worth what it scored.

    Its mean place is that of its rating. A single contest's rating is noisy, and not straight in
    the place, so that the middle of many is only near.
    """
    rng = np.random.default_rng(3)
    ratings, gaps = [], []
    for _ in range(400):
        score = truth + rng.gumbel(0, 400 / math.log(10))
        given = contest(rng, problems={"A": score})
        ratings.append(module.contest_rating(given, {"A": [True]}, low=-2000, high=6000))
        gaps.append(module.contest_place(given, score, 0) - module.expected_place(given, truth))
    assert np.mean(gaps) == pytest.approx(0, abs=3 * np.std(gaps) / 20)
    assert np.std(gaps) > 20
    assert np.median(ratings) == pytest.approx(truth, abs=90)


def test_expected_place_of_the_rating_is_the_place():
    given = contest(np.random.default_rng(4))
    middle = float(np.median(given.points))
    single = Contest(name="1", problems={"A": middle}, rating=given.rating, points=given.points,
                     penalty=given.penalty)  # fmt: skip
    found = module.contest_rating(single, {"A": [True]})
    assert module.expected_place(single, found) == pytest.approx(
        module.contest_place(single, middle, 0), abs=0.01
    )
    assert module.expected_place(single, found + 100) < module.expected_place(single, found)


def test_solving_more_in_a_contest_never_lowers_the_rating():
    rng = np.random.default_rng(5)
    ratings = rng.normal(1500, 300, 200)
    given = Contest(
        name="1", problems=PROBLEMS, rating=ratings,
        points=np.clip(np.round(ratings / 100) * 100 + rng.normal(0, 300, 200) - 500, 0, 5000),
        penalty=np.zeros(200),
    )  # fmt: skip
    for _ in range(50):
        attempts = {name: (rng.random(4) < 0.3).tolist() for name in PROBLEMS}
        before = module.contest_rating(given, attempts)
        for name in PROBLEMS:
            better = {**attempts, name: [True]}
            assert module.contest_rating(given, better) >= before
    everything = module.contest_rating(given, {name: [True] for name in PROBLEMS})
    nothing = module.contest_rating(given, {})
    assert everything > nothing + 500
    assert everything <= ratings.max() + 100


def test_rating_and_percentile_over_contests():
    rng = np.random.default_rng(6)
    contests = [contest(rng, name=str(i)) for i in range(12)]
    attempts = {c.name: {"A": [bool(rng.integers(2))], "C": [True]} for c in contests}
    people = rng.normal(1500, 350, 5000)
    found = module.codeforces_rating(contests, attempts, ratings=people)
    each = [module.contest_rating(c, attempts[c.name]) for c in contests]
    assert found["rating"]["mean"] == pytest.approx(np.mean(each))
    for name in ("rating", "percentile"):
        assert found[name]["low"] < found[name]["mean"] < found[name]["high"]
    assert found["percentile"]["mean"] == pytest.approx(
        100 * np.mean(people < found["rating"]["mean"])
    )
    assert list(module.codeforces_rating(contests, attempts)) == ["rating"]
    del attempts["3"]
    with pytest.raises(InputError, match="differ in 3"):
        module.codeforces_rating(contests, attempts)


def test_percentile():
    assert module.percentile(2, np.array([1, 2, 3, 4])) == 37.5
    assert module.percentile(5, np.array([1, 2])) == 100
    with pytest.raises(InputError, match="empty"):
        module.percentile(5, np.array([]))


def test_wrong_results_are_refused():
    with pytest.raises(InputError, match="one result"):
        module.problem_rating(np.zeros(2), np.zeros(3))
    with pytest.raises(InputError, match="between 0 and 1"):
        module.problem_rating(np.zeros(2), np.array([0, 2]))


def test_contests_file(tmp_path):
    path = tmp_path / "contests.json"
    entry = {
        "contest": 1950, "problems": {"A": 500, "B": None},
        "standings": [{"rating": 1873, "points": 1456, "penalty": 5}, {"rating": 9, "points": 1}],
    }  # fmt: skip
    path.write_text(json.dumps([entry]))
    (found,) = module.load_contests(path)
    assert found.name == "1950" and found.problems == {"A": 500.0, "B": None}
    assert found.rating.tolist() == [1873, 9] and found.penalty.tolist() == [5, 0]
    for wrong, message in (
        ("{", "not JSON"),
        ("[]", "at least one"),
        ('[{"contest": 1}]', "entry 0 is no contest"),
        (json.dumps([{**entry, "standings": [{"rating": "x", "points": 1}]}]), "entry 0"),
        (json.dumps([{**entry, "standings": []}]), "lacks problems or standings"),
    ):
        path.write_text(wrong)
        with pytest.raises(InputError, match=message):
            module.load_contests(path)
    with pytest.raises(InputError, match="cannot be read"):
        module.load_contests(tmp_path / "none.json")
