"""Writing a Countdown solution down: as an infix expression or step by step, in random order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from flowrl_jax.tasks import countdown_solver as solver
from flowrl_jax.tasks.countdown_solver import Form

_STEP = re.compile(r"\s*(-?[0-9]{1,9})\s*([-+*/])\s*(-?[0-9]{1,9})\s*=\s*(-?[0-9]{1,9})\s*")
_MAX_STEPS = 16
_STEP_ATTEMPTS = 32


def render_expression(form: Form, rng: np.random.Generator) -> str | None:
    """Writes a form as an infix expression with the terms and factors in random order.

    Only needed brackets are written. Where an order exists in which all results from left to right
    are whole and not negative, such an order is drawn.

    Args:
        form: the solution.
        rng: draws the order; its state advances.

    Returns:
        The expression, whose form is `form` again; None where a negative value cannot be written
        without a leading minus sign.
    """
    node = form.node if not form.sign else _turn(form.node)
    return None if node is None else _infix(node, rng)[0]


def render_steps(form: Form, numbers: Sequence[int], rng: np.random.Generator) -> str | None:
    """Writes a form as steps `3+5=8,8-5=3,8*3=24`, associated and ordered at random.

    Args:
        form: the solution.
        numbers: the given numbers of the problem.
        rng: draws the order; its state advances.

    Returns:
        The steps, which `parse_steps` reads as `form` again; None where the solution leaves the
        whole numbers >= 0, or where no drawn order reads back (see `parse_steps`).
    """
    if form.sign:
        return None
    for _ in range(_STEP_ATTEMPTS):
        tree = _random_tree(form.node, rng)
        if tree is None:
            continue
        text = ",".join(_linear_order(tree, rng))
        if parse_steps(text, numbers) == form:
            return text
    return None


def parse_steps(text: str, numbers: Sequence[int]) -> Form | None:
    """Checks a solution written step by step and rebuilds its expression.

    Every step takes two values that are still there, and puts its result back; the result must be
    whole and rightly computed. Where a value is there more than once, the given number is taken
    before a result, and an earlier result before a later one. Steps name values, not places, so
    about a tenth of the solutions share their text with another solution that this rule prefers:
    `3*5=15,15-7=8,8/8=1` is read as 8/(3*5-7), never as (3*5-7)/8.

    Args:
        text: `a+b=c,...` with + - * /; anything else is allowed and rejected.
        numbers: the given numbers of the problem.

    Returns:
        The form of the one value left at the end; None where the text breaks a rule.
    """
    if len(text) > solver.MAX_EXPRESSION_CHARS:
        return None
    steps = text.split(",")
    if len(steps) != len(numbers) - 1 or len(steps) > _MAX_STEPS:
        return None
    pool = [solver.number_form(int(number)) for number in numbers]
    for step in steps:
        match = _STEP.fullmatch(step)
        if match is None:
            return None
        operands = []
        for literal in (match.group(1), match.group(3)):
            index = next((i for i, f in enumerate(pool) if f.value == int(literal)), None)
            if index is None:
                return None
            operands.append(pool.pop(index))
        result = solver.OPERATIONS[match.group(2)](*operands)
        if result is None or result.value != int(match.group(4)):
            return None
        pool.append(result)
    return pool[0]


def random_steps(numbers: Sequence[int], rng: np.random.Generator, *, max_value: int = 100) -> str:
    """Plays by the rules without aiming: steps that combine the numbers at random.

    Args:
        numbers: the given numbers (>= 0).
        rng: draws the operands and operations; its state advances.
        max_value: the largest product allowed.

    Returns:
        Steps that are all rightly computed; their last result is whatever it is.
    """
    pool, steps = [int(number) for number in numbers], []
    while len(pool) > 1:
        a, b = (pool.pop(rng.integers(len(pool))) for _ in range(2))
        legal = {"+": a + b}
        if a >= b:
            legal["-"] = a - b
        if a * b <= max_value:
            legal["*"] = a * b
        if b and a % b == 0:
            legal["/"] = a // b
        symbol = list(legal)[rng.integers(len(legal))]
        steps.append(f"{a}{symbol}{b}={legal[symbol]}")
        pool.append(legal[symbol])
    return ",".join(steps)


class _Tree(NamedTuple):
    """A binary expression; a leaf has an empty symbol and no operands."""

    value: int
    symbol: str = ""
    left: _Tree | None = None
    right: _Tree | None = None


def _turn(node: tuple) -> tuple | None:
    """Minus the node, written without a leading minus sign."""
    if node[0] == solver.SUM:
        flipped = tuple((1 - flag, part) for flag, part in node[1])
        return (solver.SUM, flipped) if any(not flag for flag, _ in flipped) else None
    if node[0] == solver.PRODUCT:
        for i, (flag, factor) in enumerate(node[1]):
            turned = _turn(factor)
            if turned is not None:
                return (solver.PRODUCT, (*node[1][:i], (flag, turned), *node[1][i + 1 :]))
    return None


def _infix(node: tuple, rng: np.random.Generator) -> tuple[str, int | Fraction]:
    kind, parts = node
    if kind == solver.NUMBER:
        return str(parts), parts
    symbols = "+-" if kind == solver.SUM else "*/"
    left = []
    for flag, part in parts:
        text, value = _infix(part, rng)
        left.append((flag, f"({text})" if part[0] == solver.SUM else text, value))
    pieces: list[str] = []
    total: int | Fraction = 0
    while left:
        choices = _preferred(kind, total, left, first=not pieces)
        flag, text, value = left.pop(choices[rng.integers(len(choices))])
        pieces.append((symbols[flag] if pieces else "") + text)
        total = value if len(pieces) == 1 else _apply(symbols[flag], total, value)
    return "".join(pieces), total


def _preferred(
    kind: int, total: int | Fraction, left: list[tuple[int, str, int | Fraction]], *, first: bool
) -> list[int]:
    """The parts that may come next: those that keep the running value whole and not negative."""
    if first:
        return [i for i, (flag, _, _) in enumerate(left) if not flag]
    good = []
    for i, (flag, _, value) in enumerate(left):
        result = _apply(("+-" if kind == solver.SUM else "*/")[flag], total, value)
        if isinstance(result, int) and result >= 0:
            good.append(i)
    return good or list(range(len(left)))


def _apply(symbol: str, a: int | Fraction, b: int | Fraction) -> int | Fraction:
    if symbol == "/":
        result = Fraction(a) / b
    else:
        result = Fraction({"+": a + b, "-": a - b, "*": a * b}[symbol])
    return result.numerator if result.denominator == 1 else result


def _random_tree(node: tuple, rng: np.random.Generator) -> _Tree | None:
    """Associates a node at random, without leaving the whole numbers >= 0."""
    kind, parts = node
    if kind == solver.NUMBER:
        return _Tree(parts)
    items: list[tuple[int, _Tree]] = []
    for flag, part in parts:
        tree = _random_tree(part, rng)
        if tree is None:
            return None
        items.append((flag, tree))
    join = _join_terms if kind == solver.SUM else _join_factors
    while len(items) > 1:
        pairs = [(i, j) for i in range(len(items)) for j in range(i)]
        for k in rng.permutation(len(pairs)):
            i, j = pairs[k]
            # The draw decides which operand of a sum or product is written first.
            x, y = (items[i], items[j]) if rng.integers(2) else (items[j], items[i])
            joined = join(x, y)
            if joined is not None:
                items = [item for n, item in enumerate(items) if n not in (i, j)] + [joined]
                break
        else:
            return None
    flag, tree = items[0]
    return None if flag else tree


def _join_terms(x: tuple[int, _Tree], y: tuple[int, _Tree]) -> tuple[int, _Tree]:
    if x[0] == y[0]:
        return x[0], _Tree(x[1].value + y[1].value, "+", x[1], y[1])
    plus, minus = (x[1], y[1]) if not x[0] else (y[1], x[1])
    if plus.value >= minus.value:
        return 0, _Tree(plus.value - minus.value, "-", plus, minus)
    return 1, _Tree(minus.value - plus.value, "-", minus, plus)


def _join_factors(x: tuple[int, _Tree], y: tuple[int, _Tree]) -> tuple[int, _Tree] | None:
    if x[0] == y[0]:
        return x[0], _Tree(x[1].value * y[1].value, "*", x[1], y[1])
    over, under = (x[1], y[1]) if not x[0] else (y[1], x[1])
    if over.value % under.value == 0:
        return 0, _Tree(over.value // under.value, "/", over, under)
    if over.value and under.value % over.value == 0:
        return 1, _Tree(under.value // over.value, "/", under, over)
    return None


def _linear_order(tree: _Tree, rng: np.random.Generator) -> list[str]:
    """The steps of a tree, each after the steps it needs, independent branches interleaved."""
    if tree.left is None or tree.right is None:
        return []
    branches = [_linear_order(tree.left, rng), _linear_order(tree.right, rng)]
    turns = rng.permutation([0] * len(branches[0]) + [1] * len(branches[1]))
    steps = [branches[turn].pop(0) for turn in turns]
    step = f"{tree.left.value}{tree.symbol}{tree.right.value}={tree.value}"
    return [*steps, step]
