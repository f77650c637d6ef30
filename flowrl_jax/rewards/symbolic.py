"""Whether two answers are equal as mathematics, by math-verify and sympy. Runs in workers only.

math-verify (https://github.com/huggingface/Math-Verify) reads the LaTeX. Its time limits are alarm
signals, which are switched off: the pool kills a worker that takes too long. It gets an answer's
pieces one by one, as `answers.compare` takes them apart. Two expressions are compared by their
values at random points, which tells `1/2004!` from `1/2006!` where math-verify calls both 0, and
takes no luck with simplification; math-verify's own comparison is for what has no value at a point:
equations, inequalities, sets, functions.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Sequence
from typing import Any

import sympy
from math_verify import parse, verify

from flowrl_jax.rewards.answers import compare, plain_leaf

logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)

DIGITS = 30
"""Decimal digits of a value; sympy works with more until it has as many of a difference."""
EQUAL, DIFFERENT = 1e-50, 1e-12
"""Relative differences up to which values are equal, and from which on they are not."""
ROUNDED = 1e-6
"""Both of these where one side is written as a decimal."""
STEPS = (sympy.floor, sympy.ceiling, sympy.Mod, sympy.Function("mod"))
"""Functions whose values at some points say little about those at others."""


def equal(item: Sequence[str]) -> bool:
    """Returns whether two answers are equal.

    Args:
        item: the reference answer and the one to judge.
    """
    gold, found = item
    return bool(compare(gold, found, leaf))


def leaf(gold: str, found: str) -> bool | None:
    """Compares two answers without inner structure; never None."""
    known = plain_leaf(gold, found)
    if known is not None:
        return known
    left, right = read(gold), read(found)
    if left is None or right is None:
        return False
    known = equal_values(left, right)
    if known is None:
        known = verify(left, right, allow_set_relation_comp=True, timeout_seconds=None)
    return bool(known)


@functools.lru_cache(maxsize=256)
def read(answer: str) -> Any:
    """Returns the sympy object that an answer in normal form stands for; None if it is none."""
    found = parse(f"\\boxed{{{answer}}}", fallback_mode="no_fallback", parsing_timeout=0)
    return found[0] if found else None


def equal_values(left: Any, right: Any) -> bool | None:
    """Returns whether two expressions have the same values; None where they have none.

    Values at points of either sign decide. If only those at positive points agree, as those of
    `\\sqrt{x^2}` and `x` do, nothing is said.
    """
    if not (isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)):
        return None
    names = sorted((left.free_symbols | right.free_symbols), key=str)
    if names and (left.has(*STEPS) or right.has(*STEPS)):
        return None
    if isinstance(left, sympy.Symbol) != isinstance(right, sympy.Symbol) and len(names) > 1:
        return None  # a word against a product of letters
    rng = random.Random(0)
    for low in (0, -3) if names else (0,):
        for _ in range(3 if names else 1):
            point = {name: _coordinate(name, rng, low) for name in names}
            agreed = _agree(left, right, point)
            if agreed is not True:
                return False if low == 0 and agreed is False else None
    return True


def _warm_up() -> None:
    """Fills the parser's and sympy's tables, which every worker that is forked then has."""
    for gold, found in (
        ("\\frac{\\sqrt{3}x+1}{2}", "(1+x\\sqrt3)/2"),
        ("x^2-y_1", "-y_1+x\\cdot x"),
        ("y=2x+3", "2x-y+3=0"),
        ("-2\\le x<\\pi", "[-2,\\pi)"),
        ("\\log_2 8-\\sin(\\theta)", "3-\\sin\\theta"),
        ("\\binom{5}{2}e^{2i}", "10 \\cdot e^{2i}"),
    ):
        equal((gold, found))


def _coordinate(name: Any, rng: random.Random, low: int) -> Any:
    if str(name) == "i":
        return sympy.I
    return sympy.Rational(rng.randint(low * 1000 + 137, 3000), 1009)


def _agree(left: Any, right: Any, point: dict[Any, Any]) -> bool | None:
    try:
        left, right = (side.subs(point).doit() for side in (left, right))
        if left.is_Rational and right.is_Rational:
            return bool(left == right)
        values = left.evalf(DIGITS), right.evalf(DIGITS)
        if not all(value.is_number and value.is_finite for value in values):
            return None
        size = max(abs(value) for value in values)
        if left.has(sympy.Float) or right.has(sympy.Float):
            return bool(abs(values[0] - values[1]) <= ROUNDED * size)
        difference = abs((left - right).evalf(DIGITS))
        if difference <= EQUAL * size:
            return True
        return False if difference >= DIFFERENT * size else None
    except MemoryError:
        raise
    except Exception:
        return None


_warm_up()
