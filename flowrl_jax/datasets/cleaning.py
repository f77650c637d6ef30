"""Which rows of a training set are left out, and the counts of that by reason.

Decontamination compares runs of 13 words, as GPT-3 did (Brown et al. 2020, arXiv 2005.14165,
appendix C). There a single shared run was enough; here a training row has to have half of those of
an evaluation problem, since problems of one kind share long phrases: among 208 Codeforces problems
203 share a run with another 200, and none as many as half. Problems of fewer words are compared
whole.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flowrl_jax.errors import InputError

_WORD = re.compile(r"[^\W_]+")
_WHOLE = "\x00"  # before the words of a text that has fewer than an n-gram
_SPACE = re.compile(r"\s+")
# Mathematics is set between these; whether it is changes nothing about a problem.
_DELIMITERS = str.maketrans("", "", "$")


@dataclasses.dataclass(frozen=True)
class Cleaning:
    """What is left out of a training split.

    Attributes:
        deduplicate: fields that make two rows the same (texts are compared normalised); of
            duplicates the first stays. Empty: all stay.
        min_chars: shortest prompt, in characters.
        max_chars: longest prompt, in characters; 0 for any.
        ngram: words in a row that a training problem may not share with an evaluation problem.
        overlap: share of an evaluation problem's n-grams, above 0 and up to 1, from which on a row
            counts as contaminated; 0: a single shared one is enough.
    """

    deduplicate: tuple[str, ...] = ("prompt",)
    min_chars: int = 0
    max_chars: int = 0
    ngram: int = 13
    overlap: float = 0.5

    def __post_init__(self):
        if self.min_chars < 0 or 0 < self.max_chars < max(1, self.min_chars) or self.max_chars < 0:
            raise InputError(
                f"data min_chars={self.min_chars}, max_chars={self.max_chars}: not a range; give"
                " 0 <= min_chars <= max_chars, or max_chars=0 for no limit"
            )
        if self.ngram < 1:
            raise InputError(f"data ngram={self.ngram}: give 1 word or more; 13 is usual")
        if not 0.0 <= self.overlap <= 1.0:
            raise InputError(f"data overlap={self.overlap}: a share; give 0 to 1")


class Evaluation:
    """What is known of the problems that training rows must not hold.

    Args:
        problems: name of an evaluation set -> its problems.
        ngram: words in a row that count as shared.
        overlap: as in Cleaning.
    """

    def __init__(self, problems: Mapping[str, Iterable[str]], *, ngram: int, overlap: float):
        self._ngram, self._overlap = ngram, overlap
        self._exact: dict[str, str] = {}
        self._grams: dict[str, list[int]] = collections.defaultdict(list)
        self._sets: list[tuple[str, int]] = []  # of a problem: its set, its number of n-grams
        for name, texts in problems.items():
            for text in texts:
                if not normalized(text):
                    continue
                self._exact.setdefault(normalized(text), name)
                grams = set(ngrams(text, ngram))
                for gram in grams:
                    self._grams[gram].append(len(self._sets))
                self._sets.append((name, len(grams)))

    def found(self, text: str) -> str | None:
        """Returns the evaluation set that a text is contaminated by, with how it was found."""
        name = self._exact.get(normalized(text))
        if name is not None:
            return f"same as in {name}"
        shared: collections.Counter[int] = collections.Counter()
        grams = ngrams(text, self._ngram)
        for gram in set(grams):
            shared.update(self._grams.get(gram, ()))
        for problem, count in sorted(shared.items()):
            name, total = self._sets[problem]
            if count < self._overlap * total:
                continue
            short = grams[0].startswith(_WHOLE)
            how = "same words as in" if short else f"shares {self._ngram} words with"
            return f"{how} {name}"
        return None


class Cleaner:
    """Lets rows through and counts those that it does not.

    Args:
        config: the rules.
        evaluation: problems to keep out; None for none.

    Attributes:
        kept: rows let through.
        dropped: reason -> rows left out.
    """

    def __init__(self, config: Cleaning, evaluation: Evaluation | None = None):
        self.config = config
        self.kept = 0
        self.dropped: collections.Counter[str] = collections.Counter()
        self._evaluation = evaluation
        self._seen: dict[bytes, bytes] = {}  # of a problem: its first answer
        self._exact: set[bytes] = set()

    def clean(self, rows: Iterable[Mapping[str, Any] | str]) -> Iterator[Mapping[str, Any]]:
        """Yields the rows that stay; a row that is text is left out already, for this reason."""
        for row in rows:
            reason = row if isinstance(row, str) else self._reason(row)
            if reason is not None:
                self.dropped[reason] += 1
            elif not isinstance(row, str):
                self.kept += 1
                yield row

    def _reason(self, row: Mapping[str, Any]) -> str | None:
        prompt = row["prompt"]
        if self.config.deduplicate:
            # Digests, not texts, are remembered: 16 bytes a row, whatever its length.
            values = [row.get(name) for name in (*self.config.deduplicate, "answer")]
            exact = _digest(map(_plain, values))
            if exact in self._exact:  # normalising costs ten times as much
                return "duplicate"
            self._exact.add(exact)
            key, answer = _digest(map(_comparable, values[:-1])), _digest([_comparable(values[-1])])
            if key in self._seen:
                same = self._seen[key] == answer
                return "duplicate" if same else "duplicate with another answer"
            self._seen[key] = answer
        if len(prompt) < self.config.min_chars:
            return f"shorter than {self.config.min_chars} characters"
        if 0 < self.config.max_chars < len(prompt):
            return f"longer than {self.config.max_chars} characters"
        return self._evaluation.found(prompt) if self._evaluation and prompt else None


def normalized(text: str) -> str:
    """Returns a text as it is compared: NFKC, no case, no $, white space as single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(_DELIMITERS)
    return _SPACE.sub(" ", text).strip()


def ngrams(text: str, size: int) -> Sequence[str]:
    """Returns all runs of `size` words of a text, or its words as one where it has fewer."""
    words = _WORD.findall(normalized(text))
    if len(words) < size:
        return [_WHOLE + " ".join(words)] if words else []
    return [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _comparable(value: Any) -> str:
    return normalized(value) if isinstance(value, str) else _plain(value)


def _digest(texts: Iterable[str]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\x00")
    return digest.digest()
