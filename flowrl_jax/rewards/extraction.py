"""Where a response states its answer.

In this order: the last \\boxed or the last line that begins with "Answer:", whichever comes
later; "answer:" within a line; "the answer is ..."; the last formula or number. The whole response
is searched, as the paper's evaluation does, and one answer counts: a response cannot name several
and be right by one of them.
"""

from __future__ import annotations

import re

from flowrl_jax.rewards.answers import LONGEST, last_boxed

_LINE = re.compile(
    r"^[ \t]*(?:[#*>\-]{1,6}[ \t]*)?(?:(?:the|my|so|thus|hence)[ \t,]+)?(?:final[ \t]+)?"
    r"answer\W{0,4}:\**|^####",
    re.IGNORECASE | re.MULTILINE,
)
_IN_LABELS = ("nswer", "NSWER", "####")
_LABEL = re.compile(r"answer\W{0,4}:\**", re.IGNORECASE)
_IS = re.compile(r"\banswers?(?: is| are| must be| =)\s*:?\**", re.IGNORECASE)
_FORMULA = re.compile(
    r"\$\$([^$]{1,500})\$\$|(?<!\\)\$((?:[^$\n\\]|\\.){1,500})\$|\\\((.{1,500}?)\\\)|\\\[([^\]]{1,500})\\\]",
    re.DOTALL,
)
_NUMBER = re.compile(r"-?(?<![\w.])\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?(?:\\?%)?")
_SENTENCE = re.compile(r"\.(?=\s|\**$)|\n")
_TAIL = 4_000  # characters that are searched for what has no label


def extract(response: str) -> str | None:
    """Returns the answer that a response states, as written; None if it states none.

    Args:
        response: what the policy wrote.
    """
    boxed = last_boxed(response)
    labelled = _last(_LINE, response, _first_label(response))
    if labelled is None and boxed is None:
        labelled = _last(_LABEL, response)
    if labelled is not None and (boxed is None or labelled[0] > boxed[0]):
        return _first_line(labelled[1]) or (boxed[1] if boxed else None)
    if boxed is not None:
        return boxed[1].strip() or None
    tail = response[-_TAIL:]
    stated = _last(_IS, tail)
    if stated is not None:
        sentence = _SENTENCE.split(stated[1].lstrip(), maxsplit=1)[0]
        if sentence.strip():
            return _formula_of(sentence)
    return _last_formula(tail)


def _first_label(text: str) -> int:
    """Returns the start of the first line that may have a label: plain search is fast."""
    places = [place for name in _IN_LABELS if (place := text.find(name)) >= 0]
    return text.rfind("\n", 0, min(places)) + 1 if places else len(text)


def _last(label: re.Pattern[str], text: str, start: int = 0) -> tuple[int, str] | None:
    found = None
    for match in label.finditer(text, start):
        found = match
    return None if found is None else (found.start(), text[found.end() : found.end() + LONGEST + 2])


def _first_line(text: str) -> str | None:
    for line in text.splitlines():
        if line.strip(" *#:\t"):
            return _formula_of(line)
    return None


def _formula_of(line: str) -> str:
    """Returns the formula of a line that has one among words, else the line."""
    line = line.strip().removesuffix("**").strip()
    found = [next(filter(None, match.groups())) for match in _FORMULA.finditer(line)]
    words = re.findall(r"[A-Za-z]{2,}", _FORMULA.sub(" ", line))
    if len(found) == 1 and words:
        return found[0]
    return line


def _last_formula(text: str) -> str | None:
    place, found = -1, None
    for pattern in (_FORMULA, _NUMBER):
        for match in pattern.finditer(text):
            if match.end() > place:
                place = match.end()
                found = next(filter(None, match.groups()), None) if match.groups() else match[0]
    return found
