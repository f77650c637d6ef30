"""Countdown arithmetic: canonical forms, the safe parser, and all solutions of a problem.

A *form* is an expression reduced to what it says apart from how it is written. Sums are flattened
into a multiset of signed terms, products into a multiset of factors with exponent +1 or -1, so
these rewritings do not change the form:

    commutation and association      a+b = b+a, (a*b)*c = a*(b*c)
    brackets after minus and divide  a-(b-c) = a-b+c, a/(b/c) = a*c/b
    the sign of a factor             a-(b-c)*d = a+(c-b)*d, (a-b)*(c-d) = (b-a)*(d-c)

Nothing else is identified: x*1 and x/1 are two forms, and so are x+0 and x-0. Equal numbers are
interchangeable. For numbers in general position these are exactly the identities of the field of
rational functions: 1, 6, 68 and 1170 forms for 1 to 4 numbers (OEIS A140606).

The canonical string of a form lists terms and factors in a fixed order and is itself an
expression of that form (with a leading minus sign where the value is negative).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

MAX_EXPRESSION_CHARS = 256
MAX_NESTING = 32
MAX_DIGITS = 9

NUMBER, SUM, PRODUCT = 0, 1, 2
_TOKEN = re.compile(r"\s*(?:([0-9]+)|([-+*/()]))")
_ALIASES = str.maketrans({"\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-"})


class Form(NamedTuple):
    """An expression: its value, and its sign and node with equal rewritings made equal.

    Attributes:
        value: the exact value, an int where it is whole.
        sign: 0, or 1 where the expression is minus the node.
        node: (0, number), (1, terms) or (2, factors); terms and factors are sorted tuples of
            (sign or exponent flag, node), where flag 1 means subtracted or divided by. A node's
            own value is never negative: a sum is turned round and `sign` says so.
    """

    value: int | Fraction
    sign: int
    node: tuple


def number_form(value: int) -> Form:
    """Returns the form of one given number (>= 0)."""
    return Form(value, 0, (NUMBER, value))


def add(left: Form, right: Form) -> Form:
    """Returns the form of left + right."""
    return _sum_form(left.value + right.value, _terms(left) + _terms(right))


def subtract(left: Form, right: Form) -> Form:
    """Returns the form of left - right."""
    return _sum_form(left.value - right.value, _terms(left) + _flip(_terms(right)))


def multiply(left: Form, right: Form) -> Form:
    """Returns the form of left * right."""
    factors = _factors(left.node) + _factors(right.node)
    return _product_form(left.value * right.value, left.sign ^ right.sign, factors)


def divide(left: Form, right: Form) -> Form | None:
    """Returns the form of left / right, or None where right is zero."""
    if right.value == 0:
        return None
    value = _whole(Fraction(left.value) / right.value)
    inverse = tuple((1 - flag, node) for flag, node in _factors(right.node))
    return _product_form(value, left.sign ^ right.sign, _factors(left.node) + inverse)


OPERATIONS = {"+": add, "-": subtract, "*": multiply, "/": divide}


def render_canonical(form: Form) -> str:
    """Returns the canonical string of a form."""
    text = _node_text(form.node)
    if not form.sign:
        return text
    return f"-({text})" if form.node[0] == SUM else f"-{text}"


def parse(text: str) -> tuple[Form, tuple[int, ...]] | None:
    """Reads an infix expression over + - * / and brackets, without evaluating any code.

    The signs ×, ·, ÷ and − of typeset text are read as * * / and -; there is no unary minus.

    Args:
        text: the expression; anything else is allowed and rejected.

    Returns:
        The form and the numbers in the order they appear; None where the text is no expression,
        divides by zero, or exceeds MAX_EXPRESSION_CHARS, MAX_NESTING or MAX_DIGITS.
    """
    if len(text) > MAX_EXPRESSION_CHARS:
        return None
    tokens = _tokenize(text.translate(_ALIASES))
    if not tokens:
        return None
    parser = _Parser(tokens)
    form = parser.sum(0)
    if form is None or parser.position != len(tokens):
        return None
    return form, tuple(int(token) for token in tokens if token.isdigit())


def solve(
    numbers: Sequence[int], target: int, *, integer_only: bool = True, max_value: int | None = None
) -> tuple[str, ...]:
    """Returns the canonical strings of all solutions of one problem, sorted.

    Args:
        numbers: the given numbers (>= 0), each to be used exactly once.
        target: the value to reach.
        integer_only: only solutions that can be worked out without leaving the whole numbers
            >= 0, which is how the game is played; else every exact rational one.
        max_value: with integer_only, the largest intermediate result allowed.
    """
    return solve_all(numbers, (target,), integer_only=integer_only, max_value=max_value)[target]


def solve_all(
    numbers: Sequence[int],
    targets: Collection[int | Fraction],
    *,
    integer_only: bool = True,
    max_value: int | None = None,
) -> dict[int | Fraction, tuple[str, ...]]:
    """Returns target -> canonical strings of all its solutions, sorted, for every given target.

    Arguments are as for `solve`. The forms of every part of the numbers are computed once and
    kept, so many problems over the same numbers share the work.
    """
    key = tuple(sorted(int(n) for n in numbers))
    wanted = {target: set[Form]() for target in targets}
    if len(key) == 1:
        for form in _forms(key, integer_only, max_value):
            if form.value in wanted:
                wanted[form.value].add(form)
    for left, right in _splits(key):
        for a in _forms(left, integer_only, max_value):
            for b in _forms(right, integer_only, max_value):
                for symbol, value in _values(a.value, b.value, integer_only):
                    if value in wanted:
                        x, y = (b, a) if symbol in _SWAPPED else (a, b)
                        form = OPERATIONS[_SWAPPED.get(symbol, symbol)](x, y)
                        wanted[value].add(form)
    return {
        target: tuple(sorted(render_canonical(form) for form in forms))
        for target, forms in wanted.items()
    }


# The two operations that do not commute, with their operands exchanged.
_SWAPPED = {"r-": "-", "r/": "/"}


@functools.lru_cache(maxsize=16384)
def _forms(numbers: tuple[int, ...], integer_only: bool, max_value: int | None) -> tuple[Form, ...]:
    """All forms that use each of the (sorted) numbers exactly once."""
    if len(numbers) == 1:
        return (number_form(numbers[0]),)
    found: set[Form] = set()
    for left, right in _splits(numbers):
        for a in _forms(left, integer_only, max_value):
            for b in _forms(right, integer_only, max_value):
                for symbol, value in _values(a.value, b.value, integer_only):
                    if integer_only and max_value is not None and value > max_value:
                        continue
                    x, y = (b, a) if symbol in _SWAPPED else (a, b)
                    form = OPERATIONS[_SWAPPED.get(symbol, symbol)](x, y)
                    if form is not None:
                        found.add(form)
    return tuple(sorted(found, key=lambda form: (form.value, form.sign, form.node)))


@functools.lru_cache(maxsize=16384)
def _splits(numbers: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """All ways to part a sorted multiset in two, each unordered pair once."""
    found = set()
    for bits in range(1, 1 << (len(numbers) - 1)):
        left = tuple(n for i, n in enumerate(numbers) if bits >> i & 1)
        right = tuple(n for i, n in enumerate(numbers) if not bits >> i & 1)
        found.add((min(left, right), max(left, right)))
    return tuple(sorted(found))


def _values(
    a: int | Fraction, b: int | Fraction, integer_only: bool
) -> Iterator[tuple[str, int | Fraction]]:
    """The results of every operation on two values in both orders, as (symbol, value)."""
    yield "+", a + b
    yield "*", a * b
    if integer_only:
        if a >= b:
            yield "-", a - b
        if b >= a:
            yield "r-", b - a
        if b and a % b == 0:
            yield "/", a // b
        if a and b % a == 0:
            yield "r/", b // a
        return
    yield "-", a - b
    yield "r-", b - a
    if b:
        yield "/", _whole(Fraction(a) / b)
    if a:
        yield "r/", _whole(Fraction(b) / a)


def _whole(value: Fraction) -> int | Fraction:
    return value.numerator if value.denominator == 1 else value


def _terms(form: Form) -> tuple:
    sign, node = form.sign, form.node
    if node[0] != SUM:
        return ((sign, node),)
    return _flip(node[1]) if sign else node[1]


def _flip(terms: tuple) -> tuple:
    return tuple((0 if _is_own_negative(node) else 1 - flag, node) for flag, node in terms)


def _factors(node: tuple) -> tuple:
    return node[1] if node[0] == PRODUCT else ((0, node),)


def _is_own_negative(node: tuple) -> bool:
    """Whether minus the node is the node, as for 3-3 and (3-3)*2, whose sign then says nothing."""
    if node[0] == NUMBER:
        return False
    if node[0] == SUM:
        return tuple(sorted(_flip(node[1]))) == node[1]
    return any(_is_own_negative(factor) for _, factor in node[1] if factor[0] == SUM)


def _sum_form(value: int | Fraction, terms: tuple) -> Form:
    terms = tuple(sorted(terms))
    if value > 0:
        return Form(value, 0, (SUM, terms))
    flipped = tuple(sorted(_flip(terms)))
    # A sum of value zero has no positive side: the smaller writing is taken, which, because flag
    # 0 sorts first, also never consists of subtracted terms alone.
    turn = value < 0 or flipped < terms
    return Form(value, int(turn), (SUM, flipped if turn else terms))


def _product_form(value: int | Fraction, sign: int, factors: tuple) -> Form:
    node = (PRODUCT, tuple(sorted(factors)))
    return Form(value, 0 if value == 0 and _is_own_negative(node) else sign, node)


def _node_text(node: tuple) -> str:
    kind, parts = node
    if kind == NUMBER:
        return str(parts)
    if kind == SUM:
        return "".join(
            ("-" if flag else "+" if i else "") + _node_text(part)
            for i, (flag, part) in enumerate(parts)
        )
    texts = [f"({_node_text(part)})" if part[0] == SUM else _node_text(part) for _, part in parts]
    return "".join(
        ("/" if flag else "*" if i else "") + text
        for i, ((flag, _), text) in enumerate(zip(parts, texts, strict=True))
    )


def _tokenize(text: str) -> list[str] | None:
    tokens: list[str] = []
    position, text = 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(match.group(1) or "") > MAX_DIGITS:
            return None
        tokens.append(match.group(1) or match.group(2))
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent over a token list; every method returns None for a malformed part."""

    def __init__(self, tokens: list[str]):
        self._tokens = tokens
        self.position = 0

    def sum(self, depth: int) -> Form | None:
        return self._chain("+-", lambda: self._product(depth))

    def _product(self, depth: int) -> Form | None:
        return self._chain("*/", lambda: self._atom(depth))

    def _chain(self, symbols: str, part: Callable[[], Form | None]) -> Form | None:
        form = part()
        while form is not None and self._peek() in tuple(symbols):
            symbol = self._take()
            right = part()
            form = None if right is None else OPERATIONS[symbol](form, right)
        return form

    def _atom(self, depth: int) -> Form | None:
        token = self._take()
        if token.isdigit():
            return number_form(int(token))
        if token != "(" or depth >= MAX_NESTING:
            return None
        form = self.sum(depth + 1)
        return form if form is not None and self._take() == ")" else None

    def _peek(self) -> str:
        return self._tokens[self.position] if self.position < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self.position += 1
        return token
