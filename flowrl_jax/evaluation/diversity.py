"""How different a prompt's responses are: n-grams, kernels, embeddings, answers.

Every function takes the n responses of one prompt and returns one number; `diversity_values` does
that for all prompts, ready for `evaluation.bootstrap`. All are the same in whatever order the
responses come. They look at all responses, right or wrong; the number of *correct* solutions is
`evaluation.distinct_correct`, by the canonical form of the task.

Embeddings are given, one vector per response, by whatever model made them; the policy's own hidden
states are no fair measure, because training changes the ruler together with what is measured.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from flowrl_jax.errors import InputError

Tokens = Sequence[Hashable]
Grams = Counter[tuple[Hashable, ...]]

_WORD = re.compile(r"\w+|[^\w\s]")
_SMOOTHED = 0.1  # matches counted where there are none, as Chen & Cherry 2014, method 1


def words(text: str) -> list[str]:
    """Words, numbers and single punctuation marks of a text, as they are written."""
    return _WORD.findall(text)


def ngrams(tokens: Tokens, n: int) -> Grams:
    """How often each run of n tokens occurs; none where there are fewer tokens."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def distinct_n(responses: Sequence[Tokens], n: int) -> float:
    """Different n-grams as a share of all n-grams (Li et al. 2016, arXiv 1510.03055, distinct-n).

    It falls with the length of the responses, whatever they say: compare it at equal lengths, or
    see `expectation_adjusted_distinct`.

    Args:
        responses: tokens of each response.
        n: length of the n-grams, >= 1.

    Returns:
        In (0, 1]; 1 / (number of responses) or less where all are the same; 0 without any n-gram.
    """
    counts = [ngrams(tokens, n) for tokens in responses]
    total = sum(c.total() for c in counts)
    return len(set().union(*counts)) / total if total else 0.0


def expectation_adjusted_distinct(responses: Sequence[Tokens], vocabulary: int) -> float:
    """Different tokens, as a share of those expected of as many tokens drawn evenly (EAD).

    N / (V (1 - ((V - 1) / V)^C)) with N different tokens of C from a vocabulary of V (Liu et al.
    2022, aclanthology.org/2022.acl-short.86, equation 3): unlike distinct-1, it does not fall with
    the length of the responses alone.

    Args:
        responses: tokens of each response.
        vocabulary: V, at least the number of different tokens; the same for what is compared.

    Returns:
        At least 0; 1 is what even draws would give on average, so that it may exceed 1.

    Raises:
        InputError: the vocabulary is smaller than the number of different tokens.
    """
    total = sum(len(tokens) for tokens in responses)
    different = len({token for tokens in responses for token in tokens})
    if vocabulary < max(different, 1):
        raise InputError(
            f"vocabulary={vocabulary} is smaller than the {different} different tokens of a"
            " prompt's responses: give the size of the tokenizer's vocabulary, or a larger number"
        )
    if vocabulary == 1:
        return float(different)
    missed = total * math.log1p(-1.0 / vocabulary)
    return different / (-vocabulary * math.expm1(missed)) if total else 0.0


def self_bleu(responses: Sequence[Tokens], order: int = 4) -> float:
    """Mean BLEU of each response against all others: 1 where all are the same (self-BLEU).

    Zhu et al. 2018, arXiv 1802.01886: a *high* value means little diversity. BLEU is that of
    Papineni et al. 2002 for one sentence: clipped n-gram precisions of orders 1..`order` with equal
    weights, times the brevity penalty against the reference nearest in length, the shorter one
    in a tie. An order without a match counts 0.1 matches (Chen & Cherry 2014, method 1), and
    orders longer than the response are left out.

    Args:
        responses: tokens of each response, at least two.
        order: longest n-gram.

    Returns:
        In [0, 1].

    Raises:
        InputError: there are fewer than two responses.
    """
    if len(responses) < 2:
        raise InputError(
            f"self-BLEU of {len(responses)} responses: it compares responses with each other; give"
            " at least 2 samples per prompt"
        )
    lengths = [len(tokens) for tokens in responses]
    logs = np.zeros(len(responses))
    for n in range(1, order + 1):
        counts = [ngrams(tokens, n) for tokens in responses]
        best = _two_largest(counts)
        for i, own in enumerate(counts):
            if own:
                matched = sum(min(c, best[gram].without(c)) for gram, c in own.items())
                logs[i] += math.log(max(matched, _SMOOTHED) / own.total())
    scores = []
    for i, length in enumerate(lengths):
        others = lengths[:i] + lengths[i + 1 :]
        nearest = min(others, key=lambda other: (abs(other - length), other))
        if not length:  # An empty response has no n-grams to compare.
            scores.append(float(nearest == 0))
            continue
        penalty = min(0.0, 1.0 - nearest / length)
        scores.append(math.exp(penalty + logs[i] / min(order, length)))
    return float(np.mean(scores))


class _Largest:
    """The two largest counts of an n-gram among the responses."""

    __slots__ = ("first", "second")

    def __init__(self) -> None:
        self.first = self.second = 0

    def add(self, count: int) -> None:
        """Takes the count of one more response."""
        self.first, self.second, _ = sorted((self.first, self.second, count), reverse=True)

    def without(self, own: int) -> int:
        """The largest count among the other responses than one that has `own`."""
        return self.second if own == self.first else self.first


def _two_largest(counts: Sequence[Grams]) -> dict[tuple[Hashable, ...], _Largest]:
    best: dict[tuple[Hashable, ...], _Largest] = {}
    for own in counts:
        for gram, count in own.items():
            best.setdefault(gram, _Largest()).add(count)
    return best


def vendi_score(kernel: np.ndarray) -> float:
    """Effective number of different responses: exp of the entropy of K / n's eigenvalues.

    Friedman & Dieng 2022, arXiv 2210.02410, definition 1, with natural logarithms and 0 log 0 = 0.

    Args:
        kernel: [n, n] float, similarities: symmetric, positive semi-definite, 1 on the diagonal.

    Returns:
        In [1, n]: 1 where all are the same, n where no two have anything in common.

    Raises:
        InputError: the kernel is not such a matrix.
    """
    kernel = np.asarray(kernel, np.float64)
    n = len(kernel)
    if kernel.shape != (n, n) or not n or not np.allclose(kernel, kernel.T, atol=1e-8):
        raise InputError(
            f"a kernel of shape {kernel.shape} must be a symmetric [n, n] matrix with n >= 1: give"
            " the similarity of every pair of responses"
        )
    values = np.linalg.eigvalsh(kernel / n)
    if not np.allclose(np.diag(kernel), 1.0, atol=1e-8) or values[0] < -1e-8:
        raise InputError(
            f"a kernel with diagonal {kernel[0, 0]:.6g}... and least eigenvalue"
            f" {n * values[0]:.3g} is not positive semi-definite with 1 on the diagonal: normalise"
            " the similarities, such as cosines of vectors"
        )
    positive = values[values > 1e-12]
    return float(np.exp(-np.sum(positive * np.log(positive))))


def ngram_kernel(responses: Sequence[Tokens], order: int = 4) -> np.ndarray:
    """Similarities of responses: cosines of their n-gram counts, averaged over orders 1..`order`.

    A response of fewer than n tokens is one n-gram of its own length, so that equal responses have
    similarity 1 however short they are.

    Args:
        responses: tokens of each response.
        order: longest n-gram.

    Returns:
        [n, n] float64, a kernel as `vendi_score` takes it.
    """
    kernel = np.zeros((len(responses), len(responses)))
    for n in range(1, order + 1):
        counts = [ngrams(t, n) or Counter([tuple(t)]) for t in responses]
        norms = [math.sqrt(sum(c * c for c in own.values())) for own in counts]
        holders: dict[tuple[Hashable, ...], list[tuple[int, float]]] = {}
        for i, own in enumerate(counts):
            for gram, count in own.items():
                holders.setdefault(gram, []).append((i, count / norms[i]))
        # Most n-grams of long responses are one response's own: pairs are made of the others.
        for held in holders.values():
            for place, (i, x) in enumerate(held[1:], start=1):
                for j, y in held[:place]:
                    kernel[i, j] += x * y
    kernel += kernel.T
    np.fill_diagonal(kernel, order)
    return kernel / order


def embedding_kernel(vectors: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of vectors.

    Args:
        vectors: [n, d] float, one embedding per response.

    Returns:
        [n, n] float64, a kernel as `vendi_score` takes it.

    Raises:
        InputError: a vector is zero or not finite.
    """
    vectors = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if vectors.ndim != 2 or not np.isfinite(norms).all() or not (norms > 0).all():
        raise InputError(
            f"embeddings of shape {vectors.shape} must be [responses, size], finite and not zero:"
            " embed every response again"
        )
    unit = vectors / norms
    kernel = unit @ unit.T
    np.fill_diagonal(kernel, 1.0)
    return kernel


def mean_similarity(kernel: np.ndarray) -> float:
    """Mean over all pairs of different responses; of `embedding_kernel`, the mean cosine.

    Args:
        kernel: [n, n] float, n >= 2.

    Returns:
        1 where all are the same; high means little diversity.

    Raises:
        InputError: there are fewer than two responses.
    """
    n = len(kernel)
    if n < 2:
        raise InputError(
            f"similarity within {n} responses: it is one of pairs; give at least 2 samples per"
            " prompt"
        )
    return float((np.sum(kernel) - np.trace(kernel)) / (n * (n - 1)))


def answer_entropy(answers: Sequence[str | None]) -> float:
    """Entropy of a prompt's answers in nats, -sum p log p, by their shares of the responses.

    0 where all answers are the same, log n where all differ. Responses without an answer (None) are
    left out; `diversity_values` reports how many answered. Too small by about (number of answers -
    1) / (2 n) nats, as `evaluation.effective_solutions` is.

    Args:
        answers: what each response answers, right or wrong, in a form that equal ones share.
    """
    counts = np.array(list(Counter(a for a in answers if a is not None).values()), np.float64)
    p = counts / counts.sum()
    return float(-np.sum(p * np.log(p))) + 0.0


def diversity_values(
    responses: Sequence[Sequence[str]],
    *,
    answers: Sequence[Sequence[str | None]] | None = None,
    embeddings: Sequence[np.ndarray] | None = None,
    vocabulary: int | None = None,
    order: int = 4,
) -> dict[str, np.ndarray]:
    """All of the above for every prompt, over `words` of the texts.

    Args:
        responses: [P][n] texts, n >= 2.
        answers: [P][n], as `answer_entropy` takes them; adds answer_entropy and answered.
        embeddings: [P] of [n, d]; adds embedding_cosine and embedding_vendi.
        vocabulary: as `expectation_adjusted_distinct` takes it; adds ead.
        order: longest n-gram.

    Returns:
        Name -> [P] float64: distinct_1 .. distinct_{order}, self_bleu, vendi and what was asked
        for.

    Raises:
        InputError: a prompt has fewer than two responses, or as the statistics say.
    """
    tokens = [[words(text) for text in texts] for texts in responses]
    columns: dict[str, list[float]] = {
        f"distinct_{n}": [distinct_n(texts, n) for texts in tokens] for n in range(1, order + 1)
    }
    columns["self_bleu"] = [self_bleu(texts, order) for texts in tokens]
    columns["vendi"] = [vendi_score(ngram_kernel(texts, order)) for texts in tokens]
    if vocabulary is not None:
        columns["ead"] = [expectation_adjusted_distinct(texts, vocabulary) for texts in tokens]
    if answers is not None:
        columns["answer_entropy"] = [answer_entropy(row) for row in answers]
        columns["answered"] = [sum(a is not None for a in row) / len(row) for row in answers]
    if embeddings is not None:
        kernels = [embedding_kernel(vectors) for vectors in embeddings]
        columns["embedding_cosine"] = [mean_similarity(kernel) for kernel in kernels]
        columns["embedding_vendi"] = [vendi_score(kernel) for kernel in kernels]
    return {name: np.array(values, np.float64) for name, values in columns.items()}
