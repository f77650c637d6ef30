"""The Countdown task against brute force, random rewriting and garbage."""

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from flowrl_jax import tasks
from flowrl_jax.errors import InputError
from flowrl_jax.tasks import countdown, countdown_render
from flowrl_jax.tasks import countdown_solver as solver

# A reference tree is an int or (symbol, left, right). All below walks such trees directly and
# shares nothing with the solver.


def all_trees(numbers):
    """Every expression tree over every order of the numbers."""

    def over(order):
        if len(order) == 1:
            yield order[0]
        for cut in range(1, len(order)):
            for left, right in itertools.product(over(order[:cut]), over(order[cut:])):
                for symbol in "+-*/":
                    yield symbol, left, right

    for order in set(itertools.permutations(numbers)):
        yield from over(order)


def value(tree, values=None, results=None):
    """Exact value of a tree, with numbers replaced by `values`; every result goes to `results`."""
    if isinstance(tree, int):
        return Fraction(values[tree] if values else tree)
    left, right = value(tree[1], values, results), value(tree[2], values, results)
    result = {
        "+": lambda: left + right,
        "-": lambda: left - right,
        "*": lambda: left * right,
        "/": lambda: left / right,
    }[tree[0]]()
    if results is not None:
        results.append(result)
    return result


def value_or_none(tree, values=None, results=None):
    try:
        return value(tree, values, results)
    except ZeroDivisionError:
        return None


def written(tree):
    return (
        str(tree) if isinstance(tree, int) else f"({written(tree[1])}{tree[0]}{written(tree[2])})"
    )


def parsed_form(text):
    parsed = solver.parse(text)
    assert parsed is not None, text
    return parsed[0]


def canonical(text):
    return solver.render_canonical(parsed_form(text))


def rewrite(tree, rng):
    """The tree after one random step of commutation, association or sign moving, or itself."""
    if isinstance(tree, int):
        return tree
    symbol, left, right = tree
    inside = isinstance(right, tuple)
    choice = rng.integers(6)
    if choice == 0:
        return symbol, rewrite(left, rng), right
    if choice == 1:
        return symbol, left, rewrite(right, rng)
    if choice == 2 and symbol in "+*":
        return symbol, right, left
    if choice == 3 and inside and symbol in "+-" and right[0] in "+-":
        # a+(b±c) = (a+b)±c and a-(b±c) = (a-b)∓c
        turned = right[0] if symbol == "+" else "-+"["+-".index(right[0])]
        return turned, (symbol, left, right[1]), right[2]
    if choice == 4 and inside and symbol in "*/" and right[0] in "*/":
        turned = right[0] if symbol == "*" else "/*"["*/".index(right[0])]
        return turned, (symbol, left, right[1]), right[2]
    if choice == 5 and symbol in "+-" and inside and right[0] == "*":
        factor = right[2]
        if isinstance(factor, tuple) and factor[0] == "-":
            # x+y*(b-c) = x-y*(c-b)
            other = "-" if symbol == "+" else "+"
            return other, left, ("*", right[1], ("-", factor[2], factor[1]))
    return tree


@pytest.mark.parametrize(
    "numbers", [(5, 3, 2), (7, 4, 1), (0, 3, 8), (6, 2, 4), (1009, 4129, 8209)]
)
def test_forms_are_the_identities_of_rational_functions(numbers):
    """Two trees have one form exactly if they agree as functions of (distinct) numbers."""
    rng = np.random.default_rng(0)
    points = [{n: int(rng.integers(10**6, 10**7)) for n in numbers} for _ in range(2)]
    by_form, by_function = {}, {}
    for tree in all_trees(numbers):
        if value_or_none(tree) is None:
            assert solver.parse(written(tree)) is None
            continue
        function = tuple(value_or_none(tree, point) for point in points)
        form = canonical(written(tree))
        by_form.setdefault(form, set()).add(function)
        by_function.setdefault(function, set()).add(form)
    assert all(len(functions) == 1 for functions in by_form.values())
    assert all(len(forms) == 1 for forms in by_function.values())


@pytest.mark.parametrize(("count", "forms"), [(1, 1), (2, 6), (3, 68), (4, 1170)])
def test_number_of_forms_is_the_known_one(count, forms):
    numbers = (1009, 2063, 4129, 8209)[:count]
    values = (value_or_none(tree) for tree in all_trees(numbers))
    targets = {value for value in values if value is not None}
    found = solver.solve_all(numbers, targets, integer_only=False)
    assert sum(len(solutions) for solutions in found.values()) == forms


def test_sample_of_four_numbers_agrees_with_the_functions():
    rng = np.random.default_rng(1)
    numbers = (2, 3, 7, 9)
    points = [{n: int(rng.integers(10**6, 10**7)) for n in numbers} for _ in range(2)]
    by_form, by_function = {}, {}
    for tree in itertools.islice(all_trees(numbers), 0, None, 7):
        if value_or_none(tree) is None:
            continue
        function = tuple(value_or_none(tree, point) for point in points)
        form = canonical(written(tree))
        by_form.setdefault(form, set()).add(function)
        by_function.setdefault(function, set()).add(form)
    assert len(by_form) > 300
    assert all(len(functions) == 1 for functions in by_form.values())
    assert all(len(forms) == 1 for forms in by_function.values())


@pytest.mark.parametrize("numbers", [(3, 5, 8), (1, 2, 2), (4, 4, 4), (0, 2, 6), (2, 3, 3, 5)])
@pytest.mark.parametrize("integer_only", [True, False])
def test_solver_finds_what_brute_force_finds(numbers, integer_only):
    expected = {}
    for tree in all_trees(numbers):
        results = []
        total = value_or_none(tree, None, results)
        if total is None or total < 0 or total.denominator > 1:
            continue
        if integer_only and any(r < 0 or r.denominator > 1 for r in results):
            continue
        expected.setdefault(int(total), set()).add(canonical(written(tree)))
    targets = range(max(expected) + 2)
    found = solver.solve_all(numbers, targets, integer_only=integer_only)
    assert {t: set(forms) for t, forms in found.items() if forms} == expected
    assert all(list(forms) == sorted(set(forms)) for forms in found.values())


def test_max_value_bounds_the_intermediate_results():
    free, bounded = (set(solver.solve((3, 5, 7, 8), 24, max_value=limit)) for limit in (None, 29))
    # 5*7-3-8 and 8+3*7-5 pass 35 and 29 (or 21+3) on their best way; 3+7*(8-5) stays below.
    assert bounded < free
    assert free - bounded == {"5*7-3-8"}


@pytest.mark.parametrize("seed", range(3))
def test_rewriting_keeps_the_form(seed):
    rng = np.random.default_rng(seed)
    changed = 0
    for _ in range(150):
        numbers = [int(n) for n in rng.integers(1, 7, rng.integers(3, 6))]
        items: list[Any] = list(numbers)
        while len(items) > 1:
            left, right = (items.pop(rng.integers(len(items))) for _ in range(2))
            items.append(("+-*/"[rng.integers(4)], left, right))
        tree = items[0]
        if value_or_none(tree) is None:
            continue
        form = canonical(written(tree))
        for _ in range(12):
            moved = rewrite(tree, rng)
            if value_or_none(moved) is None:
                break
            assert canonical(written(moved)) == form, (written(tree), written(moved))
            changed += moved != tree
            tree = moved
    assert changed > 200


def test_equal_solutions_and_different_ones():
    def same(a, b):
        return canonical(a) == canonical(b)

    assert same("8-(5-3)", "8-5+3") and same("8-(5-3)", "3+8-5")
    assert same("8/(4/2)", "2*8/4")
    assert same("(3-5)*(2-8)", "(5-3)*(8-2)")
    assert same("9-(3-5)*2", "9+2*(5-3)")
    assert same("5-(3-3)*2", "5+(3-3)*2")
    assert same("(3-3)*(2-5)", "(3-3)*(5-2)")
    assert same("7+(5-3-2)*8", "7-(3+2-5)*8") and same("7-(5-3-2)*8", "7+8*(2+3-5)")
    assert not same("7+(5-3-2)*8", "7-(5-3-2)*8")
    assert not same("5*1", "5/1")
    assert not same("5+3-3", "5*3/3")
    assert not same("(2+3)*4", "2*4+3")
    assert canonical("3-8") == "-(8-3)" and canonical("(3-8)*2") == "-2*(8-3)"


def build(**options):
    return tasks.build(tasks.TaskConfig("countdown", options))


def row_of(*numbers, target):
    return {"numbers": list(numbers), "target": target}


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("(3+5)*(8-5)", True),
        ("  ( 3 + 5 ) * ( 8 - 5 ) ", True),
        ("(3+5)*(8-5)=24", True),
        ("(3+5)*(8-5) = 24", True),
        ("(3+5)*(8\u22125)", True),
        ("(3+5)\u00d7(8-5)", True),
        ("thinking 1+1 <answer>(3+5)*(8-5)</answer> done", True),
        ("<answer>1</answer><answer> (3+5)*(8-5) = 24 </answer>", True),
        ("(3+5)*(8-5)=25", False),
        ("(3+5)*(8-5)=24=24", False),
        ("(3+5)*(8-5)=", False),
        ("24=(3+5)*(8-5)", False),
        ("<answer>(3+5)*(8-5)</answer><answer>1</answer>", False),
        ("<answer>(3+5)*(8-5)", False),
        ("3*8", False),
        ("(3+5)*(8-5)*1", False),
        ("(3+5)*3", False),
        ("3*8+5-5", True),
        ("3*8*5/5", True),
        ("-5+5+3*8", False),
        ("+3*8+5-5", False),
        ("(3+5)(8-5)", False),
        ("3*8+5-5)", False),
        ("((3*8+5-5)", False),
        ("3**8+5-5", False),
        ("3*8+5-5;", False),
        ("3*8+(5-5)*__import__('os')", False),
        ("8/(5-5)+3", False),
        ("", False),
        ("()", False),
        ("24", False),
        ("٣*8+5-5", False),
    ],
)
def test_grade_of_expressions(response, right):
    task, row = build(reward_correct=2.0, reward_wrong=-1.0), row_of(3, 5, 5, 8, target=24)
    assert task.judge(response, row).reward == (2.0 if right else -1.0)
    assert (task.judge(response, row).form is not None) == right


def test_grade_accepts_exact_rationals_and_nothing_nearly_right():
    task = build()
    assert task.judge("8/(3-8/3)", row_of(3, 3, 8, 8, target=24)).reward == 1.0
    assert task.judge("8/(3-8/3)", row_of(3, 3, 8, 8, target=24)).form == "8/(3-8/3)"
    # 10**8/3*3 in floating point would also round to the target below.
    big = row_of(99999999, 3, 3, 1, target=99999999)
    assert task.judge("99999999/3*3*1", big).reward == 1.0
    assert task.judge("99999999/3*3+1-1", big).reward == 0.0


def test_limits_of_the_parser():
    assert solver.parse("(" * 32 + "1" + ")" * 32) is not None
    assert solver.parse("(" * 33 + "1" + ")" * 33) is None
    assert solver.parse("1" * 9) is not None
    assert solver.parse("1" * 10) is None
    assert solver.parse("1" + "+1" * 127) is not None
    assert solver.parse("1" + "+1" * 128) is None


@pytest.mark.parametrize("style", countdown.STYLES)
def test_garbage_is_wrong_and_never_raises(style):
    task, rng = build(style=style), np.random.default_rng(0)
    row = row_of(3, 5, 5, 8, target=24)
    alphabets = [
        "0123456789+-*/()=, ",
        "358+-*/()",
        "3+5=8,-*24",
        "<answer>/3+5*8()",
        "\x00²①é\u2212x",
    ]
    good = ["(3+5)*(8-5)", "3+5=8,8-5=3,8*3=24"]
    for i in range(3000):
        alphabet = alphabets[i % len(alphabets)]
        text = "".join(rng.choice(list(alphabet), rng.integers(0, 40)))
        if i % 3 == 0:
            base = good[i % 2]
            cut = int(rng.integers(len(base) + 1))
            text = base[:cut] + text[:2] + base[cut + int(rng.integers(3)) :]
        reward, form, _ = task.judge(text, row)
        assert reward in (0.0, 1.0)
        assert (form is not None) == (reward == 1.0)
    for text in ("(" * 10**6, "1+" * 10**6, "9" * 10**6, "1+1=2," * 10**6, "<answer>" * 10**5):
        assert task.judge(text, row).reward == 0.0


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("3+5=8,8-5=3,8*3=24", True),
        ("3 + 5 = 8, 8 - 5 = 3, 8 * 3 = 24", True),
        ("<answer>3*8=24,5-5=0,24+0=24</answer>", True),
        ("3-5=-2,-2+5=3,3*8=24", True),
        ("3+5=8,8-5=3,8*3=25", False),
        ("3+5=9,8-5=3,8*3=24", False),
        ("3*8=24", False),
        ("3*8=24,5-5=0,24+0=24,24+0=24", False),
        ("3*8=24,5-5=0,24+1=24", False),
        ("3*8=24,5-5=0,24+24=48", False),
        ("3*8=24,3*8=24,5-5=0", False),
        ("5-5=0,8/0=0,3*8=24", False),
        ("3*8=24,5/5=1,24*1=24,", False),
        ("5/3=1,1+5=6,6*8=48", False),
        ("(3+5)*(8-5)", False),
        ("", False),
    ],
)
def test_grade_of_steps(response, right):
    task, row = build(style="steps"), row_of(3, 5, 5, 8, target=24)
    assert task.judge(response, row).reward == float(right)


def test_steps_must_use_every_number():
    # 24 is there from the start, and a 1 would be left over.
    row = row_of(24, 1, 1, target=24)
    assert build(style="steps").judge("1*1=1", row).reward == 0.0
    assert build(style="steps").judge("1*1=1,24*1=24", row).reward == 1.0


def test_steps_take_given_numbers_before_results():
    # After 3+5=8 there are two eights; 8-5 takes the given one, so the result is (3+5)*(8-5).
    task, row = build(style="steps"), row_of(3, 5, 5, 8, target=24)
    assert task.judge("3+5=8,8-5=3,8*3=24", row).form == "(3+5)*(8-5)"


@pytest.mark.parametrize("style", countdown.STYLES)
def test_demonstrations_are_right_and_cover_all_solutions(style):
    task, rng = build(style=style), np.random.default_rng(0)
    row = row_of(3, 5, 5, 8, target=24)
    row["solutions"] = solver.solve(row["numbers"], 24)
    counts = dict.fromkeys(row["solutions"], 0)
    texts = set()
    for _ in range(600):
        text = task.demonstration(row, rng)
        assert task.judge(text, row).reward == 1.0
        counts[str(task.judge(text, row).form)] += 1
        texts.add(text)
    # 600 draws over 5 solutions: 120 expected, standard deviation 10.
    assert len(counts) == 5 and all(70 < count < 170 for count in counts.values()), counts
    assert len(texts) > 25


@pytest.mark.parametrize("style", countdown.STYLES)
def test_demonstrations_of_random_problems(style):
    task, rng = build(style=style), np.random.default_rng(7)
    seen = 0
    for _ in range(60):
        numbers = sorted(int(n) for n in rng.integers(1, 11, 4))
        for target, forms in solver.solve_all(numbers, range(1, 51, 7)).items():
            for form in forms:
                row = {"numbers": numbers, "target": target, "solutions": [form]}
                try:
                    text = task.demonstration(row, rng)
                except InputError:
                    assert style == "steps"
                    continue
                seen += 1
                assert task.judge(text, row).form == form
                if style == "steps":
                    assert "=-" not in text and ",-" not in text
    assert seen > 500


def test_most_solutions_can_be_written_as_steps():
    # The others share their only text with another solution: 15-7=8,8/8=1 is (3*5-7)/8 and
    # 8/(3*5-7).
    rng, written_, total = np.random.default_rng(3), 0, 0
    for _ in range(60):
        numbers = sorted(int(n) for n in rng.integers(1, 11, 4))
        for forms in solver.solve_all(numbers, range(1, 51, 7)).values():
            for text in forms:
                form = parsed_form(text)
                written_ += countdown_render.render_steps(form, numbers, rng) is not None
                total += 1
    assert 0.85 < written_ / total < 1


def test_infix_demonstrations_stay_whole_and_not_negative_from_left_to_right():
    rng = np.random.default_rng(0)
    form = parsed_form("6*10/4/15")
    texts = {countdown_render.render_expression(form, rng) for _ in range(200)}
    assert "6*10/4/15" in texts
    assert texts == {"6*10/4/15", "10*6/4/15", "6*10/15/4", "10*6/15/4"}
    sums = {countdown_render.render_expression(parsed_form("9+2-8"), rng) for _ in range(200)}
    assert sums == {"9+2-8", "2+9-8", "9-8+2"}


def test_problem_without_solution_has_no_demonstration():
    with pytest.raises(InputError, match=r"\[1, 1\] = 5: no solution"):
        build().demonstration(row_of(1, 1, target=5), np.random.default_rng(0))


def test_prompts():
    row = row_of(3, 5, 8, target=24)
    assert build().prompt(row) == "3,5,8=24:"
    assert "numbers 3, 5, 8," in build(prompt_style="text").prompt(row)
    assert "equals 24" in build(prompt_style="text").prompt(row)
    assert build(prompt_style="text").prompt(row | {"prompt": "Mine?"}) == "Mine?"
    assert build(prompt_style="compact").prompt(row | {"prompt": "Mine?"}) == "3,5,8=24:"


def test_symbols_are_the_alphabet():
    known = countdown.symbols(50)
    assert len(known) == len(set(known)) == 51 + 9
    assert {"0", "50", "+", "-", "*", "/", "(", ")", "=", ",", ":"} <= set(known)
    with pytest.raises(InputError, match="give 9 or more"):
        countdown.symbols(8)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("countdwon", {}, "did you mean 'countdown'"),
        ("countdown", {"stlye": "steps"}, "did you mean 'style'"),
        ("countdown", {"style": "stepps"}, "give one of expression, steps"),
        ("countdown", {"reward_correct": "1"}, "give a float"),
    ],
)
def test_wrong_settings(name, options, message):
    with pytest.raises(InputError, match=message):
        tasks.build(tasks.TaskConfig(name, options))


def test_options_convert_where_nothing_is_lost():
    row = row_of(3, 5, target=8)
    task = build(reward_correct=3, reward_wrong=-1)
    assert (task.judge("3+5", row).reward, task.judge("3-5", row).reward) == (3.0, -1.0)
    assert type(task.judge("3+5", row).reward) is float
