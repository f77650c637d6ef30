"""Diversity statistics: by hand, by slow loops of their own, and by what must not change them."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from flowrl_jax.errors import InputError
from flowrl_jax.evaluation import diversity

SAME = [["a", "b", "c", "d", "e"]] * 4
DIFFERENT = [[f"{i}{j}" for j in range(5)] for i in range(4)]
MIXED = [
    ["the", "cat", "sat", "on", "the", "mat"],
    ["the", "cat", "sat", "on", "a", "mat", "and", "sat"],
    ["a", "dog", "ran"],
    ["the"],
    [],
]


def statistics(responses):
    kernel = diversity.ngram_kernel(responses)
    return {
        **{f"distinct_{n}": diversity.distinct_n(responses, n) for n in (1, 2, 3)},
        "ead": diversity.expectation_adjusted_distinct(responses, 1000),
        "self_bleu": diversity.self_bleu(responses),
        "vendi": diversity.vendi_score(kernel),
        "similarity": diversity.mean_similarity(kernel),
    }


def test_order_of_responses_does_not_matter():
    expected = statistics(MIXED)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(MIXED))
        assert statistics([MIXED[i] for i in order]) == pytest.approx(expected)


def test_names_of_tokens_do_not_matter():
    names = {token: i for i, token in enumerate(sorted({t for r in MIXED for t in r}))}
    renamed = [[names[t] for t in r] for r in MIXED]
    assert statistics(renamed) == pytest.approx(statistics(MIXED))


def test_all_same_and_all_different():
    same, different = statistics(SAME), statistics(DIFFERENT)
    assert same["vendi"] == pytest.approx(1.0) and different["vendi"] == pytest.approx(4.0)
    assert same["self_bleu"] == pytest.approx(1.0) and different["self_bleu"] < 0.05
    assert same["similarity"] == pytest.approx(1.0) and different["similarity"] == 0.0
    assert same["distinct_1"] == 5 / 20 and different["distinct_1"] == 1.0
    assert same["ead"] == pytest.approx(different["ead"] / 4)
    assert diversity.answer_entropy(["a"] * 4) == 0.0
    assert diversity.answer_entropy(list("abcd")) == pytest.approx(math.log(4))
    for short in ([["x"]] * 3, [[]] * 3):
        assert diversity.self_bleu(short) == pytest.approx(1.0)
        assert diversity.vendi_score(diversity.ngram_kernel(short)) == pytest.approx(1.0)


def test_duplicating_every_response():
    twice = [r for r in MIXED for _ in range(2)]
    assert statistics(twice)["vendi"] == pytest.approx(statistics(MIXED)["vendi"])
    assert diversity.distinct_n(twice, 2) == pytest.approx(diversity.distinct_n(MIXED, 2) / 2)
    assert diversity.self_bleu(twice) == pytest.approx(1.0)  # each finds its copy
    answers = ["a", "b", "b", "c"]
    assert diversity.answer_entropy(answers * 2) == pytest.approx(diversity.answer_entropy(answers))


def test_one_more_duplicate_is_less_diverse():
    more = [*DIFFERENT, DIFFERENT[0]]
    assert statistics(more)["vendi"] / 5 < 1.0
    assert statistics(more)["self_bleu"] > statistics(DIFFERENT)["self_bleu"]
    assert statistics(more)["distinct_2"] < statistics(DIFFERENT)["distinct_2"]


def test_distinct_by_hand():
    responses = [["a", "a", "b"], ["a", "b"]]
    assert diversity.distinct_n(responses, 1) == 2 / 5
    assert diversity.distinct_n(responses, 2) == 2 / 3  # aa, ab | ab
    assert diversity.distinct_n(responses, 3) == 1.0
    assert diversity.distinct_n(responses, 4) == 0.0


def test_ead_is_distinct_over_its_expectation():
    """Even draws have EAD 1 at every length, where distinct-1 falls to nothing."""
    rng = np.random.default_rng(0)
    vocabulary = 50
    for length in (10, 100, 1000):
        draws = [[rng.integers(0, vocabulary, length).tolist()] for _ in range(400)]
        values = [diversity.expectation_adjusted_distinct(d, vocabulary) for d in draws]
        assert np.mean(values) == pytest.approx(1.0, abs=0.02)
    by_hand = 2 / (10 * (1 - (9 / 10) ** 5))
    found = diversity.expectation_adjusted_distinct([["a", "a", "b"], ["a", "b"]], 10)
    assert found == pytest.approx(by_hand)
    assert diversity.expectation_adjusted_distinct([["a"], ["a"]], 1) == 1.0
    assert diversity.expectation_adjusted_distinct([[], []], 10) == 0.0
    with pytest.raises(InputError, match="2 different tokens"):
        diversity.expectation_adjusted_distinct([["a", "b"]], 1)


def slow_bleu(hypothesis, references, order=4):
    """BLEU of a sentence as it is defined, n-gram by n-gram."""
    product, orders = 1.0, 0
    for n in range(1, order + 1):
        grams = [tuple(hypothesis[i : i + n]) for i in range(len(hypothesis) - n + 1)]
        if not grams:
            continue
        matched = 0
        for gram in set(grams):
            seen = [
                sum(tuple(r[i : i + n]) == gram for i in range(len(r) - n + 1)) for r in references
            ]
            matched += min(grams.count(gram), max(seen))
        product *= (matched or 0.1) / len(grams)
        orders += 1
    nearest = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    if not hypothesis:
        return 1.0 if nearest == 0 else 0.0
    brevity = 1.0 if len(hypothesis) >= nearest else math.exp(1 - nearest / len(hypothesis))
    return brevity * product ** (1 / orders)


def test_self_bleu_equals_a_slow_loop():
    rng = np.random.default_rng(1)
    for _ in range(60):
        responses = [
            rng.integers(0, 4, int(rng.integers(0, 12))).tolist()
            for _ in range(int(rng.integers(2, 6)))
        ]
        slow = [
            slow_bleu(response, responses[:i] + responses[i + 1 :])
            for i, response in enumerate(responses)
        ]
        assert diversity.self_bleu(responses) == pytest.approx(np.mean(slow))


def test_bleu_of_the_textbook():
    """Papineni et al. 2002, example 2: seven times "the" matches two."""
    hypothesis = ["the"] * 7
    references = list(map(diversity.words, ("the cat is on the mat", "there is a cat on the mat")))
    found = diversity.self_bleu([hypothesis, *references], order=1)
    slow = [
        slow_bleu(hypothesis, references, 1),
        slow_bleu(references[0], [hypothesis, references[1]], 1),
        slow_bleu(references[1], [hypothesis, references[0]], 1),
    ]
    assert slow[0] == pytest.approx(2 / 7)
    assert found == pytest.approx(np.mean(slow))


def test_ngram_kernel_equals_cosines_of_dense_counts():
    kernel = np.zeros((len(MIXED), len(MIXED)))
    for n in (1, 2, 3, 4):
        grams = []
        for r in MIXED:
            own = [tuple(r[i : i + n]) for i in range(len(r) - n + 1)]
            grams.append(Counter(own or [tuple(r)]))
        names = sorted({g for own in grams for g in own})
        dense = np.array([[own[g] for g in names] for own in grams], float)
        dense /= np.linalg.norm(dense, axis=1, keepdims=True)
        kernel += dense @ dense.T / 4
    np.testing.assert_allclose(diversity.ngram_kernel(MIXED), kernel, atol=1e-12)


def test_vendi_of_groups_is_their_effective_number():
    """Groups of equal responses without anything in common: exp of the entropy of their sizes."""
    labels = np.repeat([0, 1, 2], [5, 2, 1])
    kernel = (labels[:, None] == labels[None, :]).astype(float)
    p = np.array([5, 2, 1]) / 8
    assert diversity.vendi_score(kernel) == pytest.approx(np.exp(-np.sum(p * np.log(p))))


def test_vendi_refuses_what_is_no_kernel():
    with pytest.raises(InputError, match="symmetric"):
        diversity.vendi_score(np.array([[1.0, 0.5], [0.2, 1.0]]))
    with pytest.raises(InputError, match="semi-definite"):
        diversity.vendi_score(np.array([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(InputError, match="diagonal"):
        diversity.vendi_score(2 * np.eye(2))
    with pytest.raises(InputError, match="symmetric"):
        diversity.vendi_score(np.zeros((0, 0)))


def test_embeddings_by_direction_alone():
    vectors = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    kernel = diversity.embedding_kernel(vectors)
    assert diversity.mean_similarity(kernel) == pytest.approx(1 / 3)
    assert diversity.vendi_score(kernel) == pytest.approx(
        math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    )
    spun = vectors @ np.array([[0.6, 0.8], [-0.8, 0.6]]) * 5
    np.testing.assert_allclose(diversity.embedding_kernel(spun), kernel, atol=1e-12)
    for bad in (np.zeros((2, 3)), np.full((2, 3), np.nan), np.ones(3)):
        with pytest.raises(InputError, match="embed every response again"):
            diversity.embedding_kernel(bad)


def test_one_response_has_nothing_to_be_compared_with():
    with pytest.raises(InputError, match="at least 2 samples"):
        diversity.self_bleu([["a"]])
    with pytest.raises(InputError, match="at least 2 samples"):
        diversity.mean_similarity(np.ones((1, 1)))


def test_answers_that_are_missing_are_left_out():
    assert diversity.answer_entropy(["a", None, "b"]) == pytest.approx(math.log(2))
    assert diversity.answer_entropy([None, None]) == 0.0


def test_words_keep_digits_and_signs():
    assert diversity.words("x_1 = -3.5,\n(é)") == [
        "x_1",
        "=",
        "-",
        "3",
        ".",
        "5",
        ",",
        "(",
        "é",
        ")",
    ]


def test_values_of_all_prompts():
    texts = [[" ".join(r) for r in MIXED], [" ".join(r) for r in SAME[:1] * 5]]
    values = diversity.diversity_values(
        texts,
        answers=[["1", "1", None, "2", "3"], [None] * 5],
        embeddings=[np.eye(5), np.ones((5, 3))],
        vocabulary=1000,
    )
    one = statistics(MIXED)
    for name in ("distinct_1", "distinct_2", "distinct_3", "self_bleu", "vendi", "ead"):
        assert values[name][0] == pytest.approx(one[name])
    assert values["vendi"][1] == pytest.approx(1.0)
    assert values["answered"].tolist() == [0.8, 0.0]
    assert values["embedding_vendi"].tolist() == pytest.approx([5.0, 1.0])
    assert values["embedding_cosine"].tolist() == pytest.approx([0.0, 1.0])
    assert {v.shape for v in values.values()} == {(2,)}
