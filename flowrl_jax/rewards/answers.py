"""Answers as text: the form in which spelling does not count, and when two answers are equal.

Nothing here needs a computer algebra system. `compare` takes answers apart (lists, tuples,
intervals, matrices, either sign) and compares the pieces by a function of its caller: with
`plain_leaf`, which knows exact numbers and words, it is the fast path of the verifier; with one
that also asks sympy it is the rest.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

from flowrl_jax.rewards.numbers import read_number

LONGEST = 2_000
"""Characters of an answer; a longer one is not compared."""

Leaf = Callable[[str, str], bool | None]
"""Whether two answers without inner structure are equal; None where the function cannot say."""

_TEXT = r"\\(?:text(?:bf|it|rm|sf|normal)?|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname)"
_REWRITTEN = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\$|(?<!\\)\$|\\(?:displaystyle|textstyle|limits|bigl?|bigr|Bigl?|Bigr)\b", ""),
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"\\(?:left|right)(?![a-zA-Z])\.?", ""),
        (r"\*\*|(?<!\\)\\!|\{,\}(?=\d{3})", ""),
        (r"(?<!\\)\\[,;: ]|\\q?quad\b|~|\\(?:h|v)space\{[^{}]*\}", " "),
        (_TEXT + r"\{\s*,?\s*(?:and|or)\s*,?\s*\}|,?\s\b(?:and|or)\s", ","),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree\b|°", ""),
        (r"\\(?:leqslant|leq)(?![a-zA-Z])|≤", r"\\le "),
        (r"\\(?:geqslant|geq)(?![a-zA-Z])|≥", r"\\ge "),
        (r"\\log_\{?e\}?(?![a-zA-Z])", r"\\ln "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:vec|overline|mathbb|mathcal)\s*(?=[A-Za-z])", ""),
        (r"[\u2212\u2013]", "-"),
        (r"π", r"\\pi "),
        (r"∞", r"\\infty "),
        (r"\u222a", r"\\cup "),
        (r"²", "^2"),
        (r"³", "^3"),
        (r"½", r"\\frac{1}{2}"),
        (r"√\(([^()]{1,80})\)|√(\d+|\w)", r"\\sqrt{\1\2}"),
        (r"√(?=\{)", r"\\sqrt"),
        (r"\\(?:cdotp|cdot)(?![a-zA-Z])|\\ast\b|·", r"\\cdot "),
        (r"\u00d7", r"\\times "),
        (r"\\(?:lbrace|\{)", r"\\{"),
        (r"\\(?:rbrace|\})", r"\\}"),
        (r"\\emptyset|\\O(?![a-zA-Z])|∅", r"\\varnothing "),
        (r"\{(?:[bBp]|small)matrix\}", "{pmatrix}"),
        (r"(?<![\\a-zA-Z])(?:infinity|infty)\b", r"\\infty "),
        (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]{1,80})\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln)(?![a-zA-Z])", r"\\\1 "),
    )
)
# A unit closes an answer. What follows a number and is none of these words is taken for one.
_NO_UNITS = (
    "hundred thousand million billion trillion dozen dozens percent and or over out of to times"
    " plus minus pi sqrt half halves third thirds quarter quarters squared cubed factorial"
    " factorials not no none if for when where is are equals mod modulo"
)
_UNITS = (
    "cm mm km dm nm ft in yd mi kg mg lb lbs oz ml cl dl mph kph hr hrs min sec ms am pm hz khz mhz"
    " usd eur deg rad cal ev gev mev au ly erg pc mol atm bar psi ohm kj kw mw gb mb kb"
)
_NO_UNIT_WORDS, _UNIT_WORDS = frozenset(_NO_UNITS.split()), frozenset(_UNITS.split())
_UNIT = re.compile(
    rf"(?<=[\d}}a-z\)])\s*(?:{_TEXT}\s*\{{\s*(?P<text>[a-zA-Z°][^{{}}]*)\}}|\s(?P<words>[a-zA-Z]{{2,}}"
    r"(?:[ /]+[a-zA-Z]+){0,4}))(?:\s*\^\s*\{?-?[23]\}?)?\.?$"
)
_WRAPPED = re.compile(rf"{_TEXT}\s*\{{([^{{}}]*)\}}")
_PLAIN = re.compile(r"-?\d+")
_SPACE = re.compile(r"\s+")
_NEEDED = re.compile(r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])")
_SHORT = (
    (re.compile(r"\\frac(\d)(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac(\d)(?=\{)"), r"\\frac{\1}"),
    (re.compile(r"(\\frac\{[^{}]*\})(\w)"), r"\1{\2}"),
    (re.compile(r"\\sqrt(\w)"), r"\\sqrt{\1}"),
    (re.compile(r"([\^_])\{(\w)\}"), r"\1\2"),
    (re.compile(r"(?<![\d.])\.(?=\d)"), "0."),
    (re.compile(r"(?<=[\d)}])\*(?=[a-z\\(])"), ""),
)
_MIXED = re.compile(r"(?<![\d./^_])(?<!\d\s)(-?\d+)\s+(\d+)/(\d+)(?![\d.])")
# Digits with a space between them are one number if they are its groups of three, or decimals in
# groups; `\frac 1 2` has two arguments, and `\log_2 8` a subscript.
_GAP = re.compile(r"(?<=\d)(?<![_^]\d)\s+(?=\.?\d)")
_SPACED = re.compile(
    r"(?<![\d.])\d{1,3}(?:\s+\d{3})+(?!\d|\s+\.?\d)"
    r"|\.\d{3,}(?:\s+\d{2,})+(?!\d|\s+\.?\d)"
    r"|\\(?:frac|[dt]?binom)\s*\d\s+(?=\d)"
)
_GROUPED = re.compile(r"(?<![\d,.(\[{])(\d{1,3}(?:,\d{3})+)(?![\d,])")
_NAMED = re.compile(
    r"^((?:\\[a-zA-Z]+|[A-Za-z])(?:_(?:\w|\{[^{}]{1,8}\}))?(?:\([a-z](?:,[a-z])*\))?)(?:=|\\in)(?=[^=])"
)
_RELATIONS = re.compile(r"(<|>|=|\\(?:le|ge|ne|neq|in|equiv|approx)(?![a-zA-Z]))")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}")
_SHORT_WORDS = frozenset({"yes", "no", "odd"})
_BASE = re.compile(r"(\d+)_\{?(\d+|[a-z]+)\}?")
_MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}")


def normal_form(answer: str, *, grouped: bool = True) -> str:
    """Returns the form of an answer in which spelling, spaces, fonts and units do not count.

    Args:
        answer: LaTeX or plain text.
        grouped: read `1,234` as one number, not as two.
    """
    text = answer.strip()
    if _PLAIN.fullmatch(text):
        return text
    boxed = last_boxed(text)
    text = boxed[1] if boxed else text
    text = text.replace(",\\!", "")
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;:").strip()
    text = _MIXED.sub(_mixed, text)
    unit = _UNIT.search(text, max(0, len(text) - 80))
    if unit and _is_unit(unit["text"] or unit["words"], wrapped=unit["text"] is not None):
        text = text[: unit.start()]
    text = _WRAPPED.sub(r"\1", text)
    if grouped:
        text = _GROUPED.sub(lambda found: found[1].replace(",", ""), text)
    if _GAP.search(text):
        text = _GAP.sub("\0", _SPACED.sub(lambda found: _SPACE.sub("", found[0]), text))
    text = _SPACE.sub("", _NEEDED.sub("\\1\0", text)).replace("\0", " ")
    for pattern, replacement in _SHORT:
        text = pattern.sub(replacement, text)
    return text


def _mixed(found: re.Match[str]) -> str:
    """A mixed number; within more text only where its fraction is one below 1."""
    whole, top, bottom = found.groups()
    if int(top) >= int(bottom) and found[0] != found.string:
        return found[0]
    return f"{whole}\\frac{{{top}}}{{{bottom}}}"


def _is_unit(words: str, *, wrapped: bool) -> bool:
    found = re.findall(r"[a-zA-Z]+", words.lower())
    if not found or any(word in _NO_UNIT_WORDS for word in found):
        return False
    return wrapped or found[0] in _UNIT_WORDS or len(found[0]) >= 4


def compare(gold: str, found: str, leaf: Leaf) -> bool | None:
    """Returns whether two answers are equal; None where `leaf` cannot say.

    Args:
        gold: the reference answer.
        found: the one to judge.
        leaf: compares what has no inner structure, in normal form.
    """
    undecided: bool | None = False
    for left in _readings(gold):
        for right in _readings(found):
            verdict = _compare(left, right, leaf)
            if verdict:
                return True
            undecided = None if verdict is None else undecided
    return undecided


@functools.lru_cache(maxsize=1024)  # all responses to a prompt share its answer
def _readings(answer: str) -> tuple[str, ...]:
    one = normal_form(answer)
    other = normal_form(answer, grouped=False) if "," in answer else one
    return (one,) if one == other else (one, other)


def plain_leaf(gold: str, found: str) -> bool | None:
    """Compares exact numbers and words; None where it takes more than that."""
    if gold == found:
        return bool(gold)
    if not gold or not found:
        return False
    if _GAP.search(gold) or _GAP.search(found):
        return False  # several numbers without a sign between them: `2 5` is not 25
    left, right = read_number(gold), read_number(found)
    if left is not None and right is not None:
        return left.equals(right)
    based = _BASE.fullmatch(gold), _BASE.fullmatch(found)
    if based[0] and based[1]:
        return based[0].groups() == based[1].groups()
    for one, other in ((based[0], found), (based[1], gold)):
        if one and other.isdigit():
            return one[1] == other
    if {gold.casefold(), found.casefold()} & _SHORT_WORDS or _WORD.search(gold + " " + found):
        return gold.casefold() == found.casefold()
    if "\\infty" in gold + found and not _RELATIONS.search(gold + found):
        return gold.lstrip("+") == found.lstrip("+")
    if any(mark in gold + found for mark in (":", "\\ldots", "\\dots", "\\cdots", "...")):
        return False  # times of day, ratios and series: only their text says what they are
    return None


def _compare(gold: str, found: str, leaf: Leaf) -> bool | None:
    if gold == found:
        return bool(gold)
    gold, found = _without_names(gold, found)
    if "\\pm" in gold or "\\pm" in found:
        gold, found = _both_signs(gold), _both_signs(found)
    matrices = _MATRIX.fullmatch(gold), _MATRIX.fullmatch(found)
    if matrices[0] and matrices[1]:
        return _compare_matrices(matrices[0][1], matrices[1][1], leaf)
    unions = gold.split("\\cup"), found.split("\\cup")
    if len(unions[0]) > 1 or len(unions[1]) > 1:
        if len(unions[0]) != len(unions[1]):
            return leaf(gold, found)
        return _unordered(*unions, leaf=leaf)
    (kind, items), (found_kind, found_items) = _parts(gold), _parts(found)
    if not kind and not found_kind:
        return _compare_relations(items[0], found_items[0], leaf)
    if not kind or not found_kind:
        one = items[0] if not kind else found_items[0]
        return leaf(gold, found) if _RELATIONS.search(one) else False
    if len(items) != len(found_items):
        return False
    if {kind, found_kind} <= {"bare", "{}"}:
        return _unordered(items, found_items, leaf=leaf)
    if len(items) == 2 and kind != found_kind and "bare" not in (kind, found_kind):
        return False  # intervals with other ends
    return _ordered(items, found_items, leaf)


def _compare_relations(gold: str, found: str, leaf: Leaf) -> bool | None:
    """Compares sides where the relations are the same and all sides but one are."""
    sides = _sides(gold), _sides(found)
    if 1 < len(sides[0]) == len(sides[1]):
        other = [(a, b) for a, b in zip(*sides, strict=True) if a != b]
        if len(other) == 1 and not any(_RELATIONS.fullmatch(side) for side in other[0]):
            return leaf(*other[0])
    return leaf(gold, found)


def _sides(text: str) -> list[str]:
    """Splits at the relations that no brace encloses; they are kept between the sides."""
    sides: list[str] = []
    for piece in _RELATIONS.split(text):
        if sides and sides[-1].count("{") != sides[-1].count("}"):
            sides[-1] += piece
        elif len(sides) > 1 and "{" in sides[-2] and sides[-2].count("{") != sides[-2].count("}"):
            sides[-2] += sides.pop() + piece
        else:
            sides.append(piece)
    return sides


def _without_names(gold: str, found: str) -> tuple[str, str]:
    """Takes `x =` away where only one has it, or both the same."""
    names = [_NAMED.match(text) for text in (gold, found)]
    values = [
        text if name is None or _RELATIONS.search(text[name.end() :]) else text[name.end() :]
        for name, text in zip(names, (gold, found), strict=True)
    ]
    if any(_RELATIONS.search(value) for value in values):
        return gold, found
    if names[0] and names[1] and names[0][1] != names[1][1]:
        return gold, found
    return values[0], values[1]


def _both_signs(text: str) -> str:
    """Writes an answer with `\\pm` as the two it stands for."""
    if "\\pm" not in text:
        return text
    kind, items = _parts(text)
    if kind not in ("bare", "{}"):
        return _plus_and_minus(text)
    inner = ",".join(map(_plus_and_minus, items))  # The other items of a set stand in it once.
    return inner if kind == "bare" else f"\\{{{inner}\\}}"


def _plus_and_minus(text: str) -> str:
    if "\\pm" not in text:
        return text
    plus = text.replace("\\pm", "+").replace("\\mp", "-")
    minus = text.replace("\\pm", "-").replace("\\mp", "+")
    return f"{plus.removeprefix('+')},{minus.removeprefix('+')}"


def _parts(text: str) -> tuple[str, list[str]]:
    """Returns how an answer is bracketed ("", "bare", "()", "[)", "{}", ...) and its items."""
    if text.startswith("\\{") and text.endswith("\\}") and _wraps(text[1:]):
        return "{}", split(text[2:-2])
    kind, inner = "", text
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and _wraps(text):
        kind, inner = text[0] + text[-1], text[1:-1]
    items = split(inner)
    if len(items) == 1:
        return "", [inner if kind == "()" else text]
    return kind or "bare", items


def _wraps(text: str) -> bool:
    """Whether the first bracket of a text is closed by its last one."""
    depth = 0
    for place, mark in enumerate(text):
        depth += (mark in "([{") - (mark in ")]}")
        if depth == 0:
            return place == len(text) - 1
    return False


def split(text: str) -> list[str]:
    """Splits at the commas that no bracket encloses."""
    items, depth, start = [], 0, 0
    for place, mark in enumerate(text):
        depth += (mark in "([{") - (mark in ")]}")
        if mark in ",;" and depth == 0:
            items.append(text[start:place])
            start = place + 1
    items.append(text[start:])
    return [item for item in items if item] or [text]


def _ordered(gold: Sequence[str], found: Sequence[str], leaf: Leaf) -> bool | None:
    verdicts = [_compare(a, b, leaf) for a, b in zip(gold, found, strict=True)]
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _unordered(gold: Sequence[str], found: Sequence[str], *, leaf: Leaf) -> bool | None:
    """Finds for each item of `gold` another one of `found` that is equal."""
    if len(gold) > 32:
        return _ordered(gold, found, leaf)
    left, undecided = list(found), False
    for item in gold:
        verdicts = [_compare(item, other, leaf) for other in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            undecided = True
        else:
            return False
    return None if undecided else True


def _compare_matrices(gold: str, found: str, leaf: Leaf) -> bool | None:
    rows = [
        [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr", text) if row]
        for text in (gold, found)
    ]
    if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
        return False
    flat = [[cell for row in matrix for cell in row] for matrix in rows]
    return _ordered(flat[0], flat[1], leaf)


def last_boxed(text: str) -> tuple[int, str] | None:
    """Returns where the last \\boxed stands and what it holds; None if there is none."""
    place = max(text.rfind(name) for name in ("\\boxed", "\\fbox", "\\framebox"))
    if place < 0:
        return None
    start = place + len(re.match(r"\\[a-z]+", text[place : place + 12])[0])  # type: ignore[index]
    window = text[start : start + LONGEST + 2].lstrip()
    if not window.startswith("{"):
        word = re.match(r"[^\s${}]+", window)
        return (place, word[0]) if word else None
    depth = 0
    for end, mark in enumerate(window):
        depth += (mark == "{") - (mark == "}")
        if depth == 0:
            return place, window[1:end]
    return place, window[1:].split("\n")[0]
