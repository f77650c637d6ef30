"""Statistics of graded samples against brute force over all subsets and all resamples."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from flowrl_jax import evaluation
from flowrl_jax.errors import InputError
from flowrl_jax.evaluation import voting
from flowrl_jax.graded import Samples, read_records, samples_from_records, write_records


def make_samples(forms: list[list[str | None]], **changes: object) -> Samples:
    """Samples whose correct responses are those with a form."""
    form = np.empty((len(forms), len(forms[0])), dtype=object)
    for p, row in enumerate(forms):
        form[p, :] = row
    shape = form.shape
    fields: dict = {
        "prompt_id": np.arange(shape[0]),
        "correct": np.array([[f is not None for f in row] for row in forms]),
        "form": form,
        "length": np.arange(form.size).reshape(shape) + 1,
        "truncated": np.zeros(shape, bool),
        "kl": np.linspace(-1.0, 2.0, form.size).reshape(shape),
    }
    return Samples(**{**fields, **changes})


FORMS = [
    ["a", "a", "b", None, None, "c", "c"],
    [None, None, None, None, None, None, None],
    ["a", "a", "a", "a", "a", "a", "a"],
    [None, None, "z", None, None, None, None],
    ["a", "b", "c", "d", "e", "f", "g"],
]


@pytest.mark.parametrize("k", range(1, 8))
def test_pass_at_k_and_distinct_equal_the_mean_over_all_subsets(k: int) -> None:
    samples = make_samples(FORMS)
    values = evaluation.prompt_values(samples, k=k)
    for p, forms in enumerate(FORMS):
        subsets = [{f for f in chosen if f} for chosen in itertools.combinations(forms, k)]
        passed = sum(bool(found) for found in subsets) / len(subsets)
        distinct = sum(len(found) for found in subsets) / len(subsets)
        assert values[f"pass_at_{k}"][p] == pytest.approx(passed, abs=1e-12)
        assert values[f"distinct_correct_{k}"][p] == pytest.approx(distinct, abs=1e-12)


def test_miss_probability_is_exact_where_binomials_overflow_floats() -> None:
    n, k = 2000, 700
    got = evaluation.miss_probability(n, k)
    for m in (0, 1, 2, 50, 1300, 1301, 2000):
        exact = math.comb(n - m, k) / math.comb(n, k) if n - m >= k else 0.0
        assert got[m] == pytest.approx(exact, rel=1e-10, abs=1e-300)


def test_pass_at_k_is_unbiased() -> None:
    # All outcomes of n = 6 attempts with success probability 0.3, weighted by their probability.
    n, k, rate = 6, 4, 0.3
    outcomes = np.array(list(itertools.product([False, True], repeat=n)))
    weights = np.prod(np.where(outcomes, rate, 1 - rate), axis=1)
    assert weights @ evaluation.pass_at_k(outcomes, k) == pytest.approx(1 - (1 - rate) ** k)


@pytest.mark.parametrize("k", [0, -1, 8])
def test_k_outside_the_samples_is_refused(k: int) -> None:
    with pytest.raises(InputError, match=rf"k={k} .*number of samples, which is 7"):
        evaluation.summarize(make_samples(FORMS), k=k)


def test_effective_solutions_and_coverage_by_hand() -> None:
    values = evaluation.prompt_values(make_samples(FORMS), k=2, extra=True)
    p = np.array([2, 1, 2]) / 5
    expected = [math.exp(-sum(x * math.log(x) for x in p)), 0.0, 1.0, 1.0, 7.0]
    np.testing.assert_allclose(values["effective_solutions"], expected, rtol=1e-12)
    np.testing.assert_allclose(values["coverage"], [1 - 1 / 5, 0, 1, 0, 0], rtol=1e-12)


def test_form_of_an_incorrect_sample_is_ignored() -> None:
    samples = make_samples([["a", "b", "b"]], correct=np.array([[True, False, False]]))
    values = evaluation.prompt_values(samples, k=3)
    assert values["distinct_correct_3"][0] == 1.0
    assert values["effective_solutions"][0] == 1.0


def test_summarize_has_the_published_keys_and_means() -> None:
    samples = make_samples([row * 3 for row in FORMS])
    summary = evaluation.summarize(samples)
    assert list(summary) == [
        "pass_at_1",
        "pass_at_16",
        "distinct_correct_16",
        "effective_solutions",
        "mean_length",
        "kl_to_reference",
    ]
    assert summary["pass_at_1"]["mean"] == pytest.approx(samples.correct.mean())
    assert summary["mean_length"]["mean"] == pytest.approx(samples.length.mean())
    assert summary["kl_to_reference"]["mean"] == pytest.approx(samples.kl.mean())
    for interval in summary.values():
        assert interval["low"] <= interval["mean"] <= interval["high"]
    json.dumps(summary, allow_nan=False)


def test_bootstrap_equals_the_enumeration_of_all_resamples() -> None:
    values = np.array([0.0, 1.0, 5.0, 2.0])
    means = np.sort([np.mean(draw) for draw in itertools.product(values, repeat=4)])
    got = evaluation.bootstrap({"x": values}, resamples=40_000, level=0.8)["x"]
    assert got["mean"] == values.mean()
    assert got["low"] == pytest.approx(np.percentile(means, 10), abs=0.02)
    assert got["high"] == pytest.approx(np.percentile(means, 90), abs=0.02)


def test_bootstrap_depends_on_the_seed_alone_and_shares_draws_between_statistics() -> None:
    values = np.random.default_rng(3).normal(size=50)
    first = evaluation.bootstrap({"x": values, "twice": 2 * values}, seed=1)
    assert first == evaluation.bootstrap({"x": values, "twice": 2 * values}, seed=1)
    assert first["x"] != evaluation.bootstrap({"x": values}, seed=2)["x"]
    assert first["twice"]["low"] == pytest.approx(2 * first["x"]["low"])


def test_bootstrap_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        interval = evaluation.bootstrap({"x": rng.exponential(size=60)}, resamples=400)["x"]
        hits += interval["low"] <= 1.0 <= interval["high"]
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_refuses_no_prompts_and_unequal_prompts() -> None:
    with pytest.raises(InputError, match="at least one"):
        evaluation.bootstrap({"x": np.zeros(0)})
    with pytest.raises(InputError, match=r"\[2, 3\] prompts"):
        evaluation.bootstrap({"x": np.zeros(2), "y": np.zeros(3)})


def test_paired_difference_is_narrower_than_the_separate_intervals() -> None:
    rng = np.random.default_rng(5)
    skill = rng.uniform(size=(80, 1))
    better = rng.uniform(size=(80, 32)) < np.clip(skill + 0.1, 0, 1)
    worse = rng.uniform(size=(80, 32)) < skill
    pair = [make_samples([["s" if c else None for c in row] for row in x]) for x in (better, worse)]
    difference = evaluation.paired_difference(*pair)["pass_at_1"]
    assert difference["mean"] == pytest.approx(better.mean() - worse.mean())
    assert difference["low"] > 0
    separate = [evaluation.summarize(s)["pass_at_1"] for s in pair]
    assert separate[1]["high"] > separate[0]["low"]


def test_paired_difference_needs_the_same_prompts() -> None:
    first = make_samples(FORMS)
    with pytest.raises(InputError, match="different prompts"):
        evaluation.paired_difference(first, make_samples(FORMS[:4]), k=2)
    moved = make_samples(FORMS, prompt_id=np.array([1, 0, 2, 3, 4]))
    with pytest.raises(InputError, match="same order"):
        evaluation.paired_difference(first, moved, k=2)


def test_value_at_accuracy_takes_the_first_crossing() -> None:
    curve = [(0.1, 1.0), (0.3, 3.0), (0.2, 9.0), (0.5, 2.0)]
    assert evaluation.value_at_accuracy(curve, 0.2) == pytest.approx(2.0)
    assert evaluation.value_at_accuracy(curve, 0.1) == 1.0
    assert evaluation.value_at_accuracy(curve, 0.4) == pytest.approx(9.0 + (2 - 9) * 2 / 3)
    assert evaluation.value_at_accuracy(curve, 0.05) is None
    assert evaluation.value_at_accuracy(curve, 0.6) is None
    assert evaluation.value_at_accuracy([], 0.6) is None


def test_distinct_at_equal_accuracy_spans_the_common_range() -> None:
    first = [(0.1, 1.0), (0.5, 5.0), (0.9, 5.0)]
    second = [(0.2, 2.0), (0.6, 1.0)]
    got = evaluation.distinct_at_equal_accuracy(first, second, levels=5)
    assert got is not None
    np.testing.assert_allclose(got.accuracy, [0.2, 0.3, 0.4, 0.5, 0.6])
    np.testing.assert_allclose(got.first, [2.0, 3.0, 4.0, 5.0, 5.0])
    np.testing.assert_allclose(got.second, [2.0, 1.75, 1.5, 1.25, 1.0])
    assert evaluation.distinct_at_equal_accuracy(first, [(0.95, 1.0), (0.99, 1.0)]) is None
    assert evaluation.distinct_at_equal_accuracy(first, []) is None


def test_records_round_trip(tmp_path) -> None:
    records = [
        {
            "prompt_id": 7 + p,
            "prompt": "é \N{GREEK SMALL LETTER BETA}",
            "correct": [f is not None for f in row],
            "form": row,
            "length": [3] * 7,
            "truncated": [False] * 7,
            "kl": [0.1] * 7,
        }
        for p, row in enumerate(FORMS)
    ]
    write_records(tmp_path / "samples.jsonl", records)
    assert read_records(tmp_path / "samples.jsonl") == records
    assert [f.name for f in tmp_path.iterdir()] == ["samples.jsonl"]
    samples = samples_from_records(records)
    assert samples.prompt_id.tolist() == [7, 8, 9, 10, 11]
    assert samples.kl.dtype == np.float64 and samples.truncated.dtype == bool
    direct = evaluation.summarize(make_samples(FORMS), k=3)
    assert evaluation.summarize(samples, k=3)["distinct_correct_3"] == direct["distinct_correct_3"]


def test_wrong_samples_are_refused_with_the_place(tmp_path) -> None:
    record = {"prompt_id": 3, "correct": [True], "form": ["a"], "length": [1], "truncated": [False]}
    with pytest.raises(InputError, match="record 0 lacks kl"):
        samples_from_records([record])
    record["kl"] = [0.0]
    longer = {key: v * 2 if isinstance(v, list) else v for key, v in record.items()}
    with pytest.raises(InputError, match="1 to 2 samples"):
        samples_from_records([record, longer])
    with pytest.raises(InputError, match="not empty"):
        samples_from_records([])
    with pytest.raises(InputError, match=r"prompt 3, sample 0 .* None"):
        samples_from_records([{**record, "form": [None]}])
    with pytest.raises(InputError, match="prompt 3, sample 0 is not finite"):
        samples_from_records([{**record, "kl": [float("nan")]}])
    with pytest.raises(InputError, match=r"samples\.length has shape"):
        make_samples(FORMS, length=np.ones((5, 6), int))
    with pytest.raises(InputError, match="does not exist"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"prompt_id": 1}\n{"prom\n')
    with pytest.raises(InputError, match="line 2"):
        read_records(tmp_path / "bad.jsonl")


def brute_majority(answers, correct, k) -> float:
    """maj@k by looking at every subset."""
    values = []
    for chosen in itertools.combinations(range(len(answers)), k):
        votes = [answers[i] for i in chosen if answers[i] is not None]
        most = max(map(votes.count, votes), default=0)
        tied = [a for a in set(votes) if votes.count(a) == most]
        share = {a: np.mean([c for b, c in zip(answers, correct, strict=True) if b == a])
                 for a in tied}  # fmt: skip
        values.append(np.mean([share[a] for a in tied]) if tied else 0.0)
    return float(np.mean(values))


ANSWERS = [
    (["7", "7", "8", "9", "9", "9", None, "8"], "8"),
    (["7", "7", "8", "8", "9", "9", "1", "1"], "1"),
    ([None] * 8, "8"),
    (["a"] * 8, "a"),
    (list("abcdefgh"), "c"),
    (["a", None, None, None, None, None, None, None], "a"),
    (["a", "a", "a", "b", "b", "c", None, None], "c"),
]


@pytest.mark.parametrize("k", range(1, 9))
def test_majority_equals_the_mean_over_all_subsets(k: int) -> None:
    answers = [row for row, _ in ANSWERS]
    correct = np.array([[a == truth for a in row] for row, truth in ANSWERS])
    found = voting.maj_at_k(answers, correct, k)
    expected = [brute_majority(a, c.tolist(), k) for a, c in zip(answers, correct, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    if k == 1:
        np.testing.assert_allclose(found, correct.mean(axis=1))


def test_majority_of_answers_that_are_judged_differently() -> None:
    answers, correct = ["a", "a", "b", "b", "c"], [True, False, True, True, False]
    for k in range(1, 6):
        found = voting.maj_at_k([answers], np.array([correct]), k)[0]
        assert found == pytest.approx(brute_majority(answers, correct, k))


def test_majority_of_random_answers_and_any_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        n = int(rng.integers(1, 9))
        answers = [None if a == 0 else str(a) for a in rng.integers(0, 5, n)]
        correct = np.array([a == "1" for a in answers])
        k = int(rng.integers(1, n + 1))
        found = voting.maj_at_k([answers], correct[None], k)[0]
        assert found == pytest.approx(brute_majority(answers, correct.tolist(), k))
        order = rng.permutation(n)
        again = voting.maj_at_k([[answers[i] for i in order]], correct[None, order], k)[0]
        assert again == pytest.approx(found)


def test_majority_of_many_samples_is_finite() -> None:
    """C(1100, 550) is no float; a clear majority wins nearly always."""
    answers = ["a"] * 30 + ["b"] * 5 + [None] * 1065
    correct = np.array([[True] * 30 + [False] * 1070])
    assert 0.999 < voting.maj_at_k([answers], correct, 550)[0] <= 1.0


def test_majority_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="k=3"):
        voting.maj_at_k([["a", "b"]], np.zeros((1, 2), bool), 3)
    with pytest.raises(InputError, match="answer, or None"):
        voting.maj_at_k([["a"]], np.zeros((1, 2), bool), 1)


def test_curve_of_pass_at_k_rises_and_ends_at_all_samples() -> None:
    assert voting.curve_points(16) == [1, 2, 4, 8, 16]
    assert voting.curve_points(7) == [1, 2, 4, 7]
    samples = make_samples(FORMS)
    curve = voting.pass_at_k_curve(samples.correct)
    assert list(curve) == ["pass_at_1", "pass_at_2", "pass_at_4", "pass_at_7"]
    assert (np.diff(np.stack(list(curve.values())), axis=0) >= 0).all()
    np.testing.assert_array_equal(curve["pass_at_7"], samples.correct.any(axis=1))
    np.testing.assert_allclose(voting.avg_at_k(samples.correct), curve["pass_at_1"], atol=1e-12)


def test_macro_average_counts_sets_and_not_prompts() -> None:
    small, large = np.array([1.0, 1.0]), np.zeros(100)
    found = voting.macro_average([small, large])
    assert found == {"mean": 0.5, "low": 0.5, "high": 0.5}  # no spread within either
    rng = np.random.default_rng(0)
    sets = [rng.random(40), rng.random(400)]
    found = voting.macro_average(sets, resamples=4000)
    spread = 1.96 * np.sqrt(sum(v.var() / len(v) for v in sets)) / 2
    assert (found["high"] - found["low"]) / 2 == pytest.approx(spread, rel=0.1)
    one = voting.macro_average(sets[:1], seed=3)
    assert one == pytest.approx(evaluation.bootstrap({"x": sets[0]}, seed=3)["x"])
    with pytest.raises(InputError, match="a prompt in each"):
        voting.macro_average([small, np.zeros(0)])
