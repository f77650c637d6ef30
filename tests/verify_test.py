"""The semantic verifier: what it finds, what it takes for equal, what it survives."""

import itertools
import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flowrl_jax import tasks
from flowrl_jax.errors import InputError
from flowrl_jax.rewards.answers import compare, normal_form, plain_leaf
from flowrl_jax.rewards.extraction import extract
from flowrl_jax.rewards.numbers import read_number
from flowrl_jax.rewards.verify import Verifier, VerifierConfig

LIMIT = 2.0
SLACK = 60.0  # seconds: other people use the machine
WORK = 4.0  # seconds of this thread's own processor time


@pytest.fixture(scope="module")
def verifier():
    made = Verifier(VerifierConfig(limit=60.0, workers=1))
    yield made
    made.close()


@pytest.fixture(scope="module")
def hasty():
    """A verifier with a limit that tests wait for."""
    made = Verifier(VerifierConfig(limit=LIMIT, workers=2))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("so \\boxed{42}.", "42"),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\text{a {b} c}}", "\\text{a {b} c}"),
        ("\\fbox{7}", "7"),
        ("$\\boxed 7$", "7"),
        ("\\boxed{7", "7"),
        ("Answer: 42", "42"),
        ("**Answer:** 42", "42"),
        ("**Final Answer**: 42", "42"),
        ("Answer:\n\n$42$\nDone.", "$42$"),
        ("Answer: x is $42$.", "42"),
        ("Answer: $\\$5$", "$\\$5$"),
        ("steps\n#### 42", "42"),
        ("\\boxed{1}\nAnswer: 2", "2"),  # the later one
        ("Answer: 1\nor rather \\boxed{2}", "2"),
        ("\\boxed{1} and our answer: good", "1"),  # a line that begins otherwise is no label
        ("My answer: 5", "5"),
        ("we get the answer: 5", "5"),
        ("The answer is 5. Good.", "5"),
        ("The final answer is $\\frac{1}{2}$.", "$\\frac{1}{2}$"),
        ("It is $x=1$, thus $y=2$.", "y=2"),
        ("There are 12 of them, not 1,300.", "1,300"),
        ("", None),
        ("no idea", None),
        ("\\boxed{}", None),
    ],
)
def test_extract(response, found):
    assert extract(response) == found


RIGHT = [
    ("42", "42.0"),
    ("1234567", "1,234,567"),
    ("\\frac12", "0.5"),
    ("\\frac{3}{4}", "3/4"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("3\\frac12", "3 1/2"),
    ("\\frac13", "0.333333"),
    ("12\\%", "0.12"),
    ("12\\%", "12"),
    ("1.5\\times10^{8}", "1.5e8"),
    ("7 \\cdot 10^5", "700000"),
    ("\\$5.00", "5"),
    ("45^\\circ", "45"),
    ("3\\text{ cm}^2", "3"),
    ("18", "18 dollars per day"),
    ("x=5", "5"),
    ("5", "k = 5"),
    ("2516_8", "2516"),
    ("(1,2)", "\\left( 1, 2.0 \\right)"),
    ("1,2", "2 \\text{ and } 1"),
    ("\\{1,2,3\\}", "3, 2, 1"),
    ("100, 200", "100,200"),
    ("\\pm 2", "2, -2"),
    ("\\{\\pm 3, 7\\}", "7, -3, 3"),
    ("\\pm 3, 7", "\\{7, \\pm 3\\}"),
    ("\\frac{1}{2}, 3", "3, ½"),
    ("(-\\infty, 3] \\cup [4, 5)", "[4, 5) \u222a (-∞, 3]"),
    ("\\frac{4\\sqrt{35}}{35} x^2", "\\frac{4√35}{35} x²"),
    ("\\text{Evelyn}", "evelyn"),
    ("\\text{(A)}", "A"),
    ("\\text{Yes}", "yes"),
    ("[0,1)\\cup(2,3)", "(2,3)\\cup[0,1)"),
    ("25000", "25 000"),
    ("25000.5", "25\\,000.5"),
    ("1234567", "1 234 567"),
    ("0.333333", "0.333 333"),
    ("\\frac12", "\\frac 1 2"),
    ("\\frac52", "x = 2 1/2"),
    ("\\frac52, 3", "2 1/2, 3"),
    ("2 5", "2 \\; 5"),
    ("\\begin{pmatrix} 1/2 \\\\ 2 \\end{pmatrix}", "\\begin{bmatrix} 0.5 \\\\ 2 \\end{bmatrix}"),
]
RIGHT_BY_ALGEBRA = [
    ("x+1", "1+x"),
    ("\\sqrt{8}", "2\\sqrt2"),
    ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt2}{2}"),
    ("(x-1)(x+2)", "x^2+x-2"),
    ("\\frac{n(n+1)}{2}", "n(n+1)/2"),
    ("2^{1009}", "2*2^{1008}"),
    ("5!", "120"),
    ("\\binom{5}{2}", "10"),
    ("\\log_2 8", "3"),
    ("10\\sqrt{3}", "17.320508"),
    ("2\\pi", "2pi"),
    ("e^{i\\pi}", "-1"),
    ("y=2x+3", "2x-y+3=0"),
    ("x+y=4", "y=4-x"),
    ("1<x<2", "(1,2)"),
    ("x>2", "(2,\\infty)"),
    ("[0,\\infty)", "x \\ge 0"),
    ("3 \\ge x", "x \\le 3"),
    ("1 \\pm \\sqrt{2}", "1+\\sqrt2, 1-\\sqrt2"),
    ("(\\sqrt{4},\\frac{\\pi}{2})", "(2,\\pi/2)"),
    ("|x|", "\\sqrt{x^2}"),
    ("x_0 \\cos(\\omega t)", "x_{0} \\cos (\\omega t)"),
    ("\\cos^2 x", "1-\\sin^2 x"),
]
# Among them those that issues of math-verify list as taken for equal.
WRONG = [
    ("25", "2 5"),
    ("25", "2\\,5"),
    ("2 5", "25"),
    ("125", "1 2 5"),
    ("2.5", "2 .5"),
    ("2505", "25 05"),
    ("123456", "123 45 6"),
    ("\\frac{21}{2}", "2 1/2 inches"),
    ("\\frac{21}{2}", "x = 2 1/2"),
    ("x<25", "x<2 5"),
    ("10", "2 5"),
    ("5", "6"),
    ("5", "-5"),
    ("1000000007", "1000000008"),
    ("0.5", "0.50001"),
    ("\\frac13", "0.33"),
    ("\\frac23", "\\frac32"),
    ("1e-7", "2e-7"),
    ("5", "5 million"),
    ("1", "1,2"),
    ("1,2", "1"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("[0,1)", "[0,1]"),
    ("\\pm 2021", "2021"),
    ("\\{\\pm 3, 7\\}", "\\pm 3"),
    ("\\{\\pm 3, 7\\}", "\\pm 3, -7"),
    ("\\{1\\}, \\{2\\}", "\\{1, 2\\}"),
    ("12:00", "1:00"),
    ("1:2", "2:1"),
    ("1,2,\\ldots,n", "1,3,5,\\ldots,2n-1"),
    ("19, 46, \\text{ and } 82", "21, 36, and 82"),
    ("40_9", "40_6"),
    ("\\text{even}", "\\text{odd}"),
    ("\\infty", "-\\infty"),
    ("(a,b)", "(a,b)+1"),
    ("5", ""),
]
WRONG_BY_ALGEBRA = [
    ("x", "y"),
    ("x^2", "x^3"),
    ("p-q", "q-p"),
    ("x=5", "t=5"),
    ("|x|", "x"),
    ("\\sqrt{x^2}", "x"),
    ("\\sqrt{2}", "1.41"),
    ("2\\pi", "2"),
    ("x>2", "x<2"),
    ("x>2", "x \\ge 2"),
    ("2^{1009}", "2^{1009}+1"),
    ("10^{40}\\sqrt2", "10^{40}\\sqrt2+1"),
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
    ("1-\\frac{1}{\\mathrm{e}}", "1+\\frac{1}{\\mathrm{e}}"),
    ("3x-1y+13=0", "3x+4y+14=0"),
    ("\\lfloor\\frac{2n-1}{5}\\rfloor", "\\lfloor\\frac{3n-1}{5}\\rfloor"),
    ("F_n = \\sum_{k=0}^{n-1} F_k F_{n-k-1}", "F_n = \\sum_{k=0}^{n-2} F_k F_{n-k-2}"),
    ("(0,\\sqrt{1})\\cup(2,3)", "(0,1)\\cup(2,4)"),
]


@pytest.mark.parametrize("pair", RIGHT)
def test_equal_without_algebra(pair):
    assert compare(*pair, plain_leaf) is True
    assert compare(*reversed(pair), plain_leaf) is True


@pytest.mark.parametrize("pair", WRONG)
def test_different_without_algebra(pair):
    assert compare(*pair, plain_leaf) is False
    assert compare(*reversed(pair), plain_leaf) is False


@pytest.mark.parametrize("pair", RIGHT_BY_ALGEBRA)
def test_equal_by_algebra(pair, verifier):
    for gold, found in (pair, pair[::-1]):
        outcome, form, _ = verifier.judge(f"So $\\boxed{{{found}}}$", gold)
        assert (outcome, form) == ("correct", normal_form(gold))


@pytest.mark.parametrize("pair", WRONG_BY_ALGEBRA)
def test_different_by_algebra(pair, verifier):
    for gold, found in (pair, pair[::-1]):
        judgement = verifier.judge(f"So $\\boxed{{{found}}}$", gold)
        assert (judgement.outcome, judgement.form) == ("wrong", None)


def _spellings(top: int, bottom: int) -> list[str]:
    sign = "-" if top < 0 else ""
    return [
        f"{top}/{bottom}",
        f"\\frac{{{top}}}{{{bottom}}}",
        f"{sign}\\dfrac{{{abs(top)}}}{{{bottom}}}",
        f"$\\tfrac{{{3 * top}}}{{{3 * bottom}}}$",
        f"x = {sign}\\frac {{{abs(top)}}} {{{bottom}}}",
        f"\\boxed{{{top}/{bottom}}}.",
    ]


def test_fractions_are_equal_exactly_where_their_values_are():
    rng = random.Random(0)
    pairs = [(rng.randint(-40, 40), rng.randint(1, 40)) for _ in range(25)]
    for (a, b), (c, d) in itertools.pairwise(pairs + pairs[:1]):
        for one, other in itertools.product(_spellings(a, b), _spellings(a, b)):
            assert compare(one, other, plain_leaf) is True, (one, other)
        for one, other in zip(_spellings(a, b), _spellings(c, d), strict=True):
            assert compare(one, other, plain_leaf) is (a * d == b * c), (one, other)


def test_a_decimal_stands_for_a_fraction_from_six_digits_on():
    third = read_number("\\frac{1}{3}")
    assert third is not None
    for digits in range(1, 12):
        number = read_number("0." + "3" * digits)
        assert number is not None
        assert third.equals(number) is number.equals(third) is (digits >= 6)
    off = read_number("0.3333343")
    assert off is not None and not third.equals(off)


def test_normal_form_is_stable():
    for gold, _ in RIGHT + RIGHT_BY_ALGEBRA + WRONG + WRONG_BY_ALGEBRA:
        form = normal_form(gold)
        assert normal_form(form, grouped=False) == form
        assert compare(gold, form, plain_leaf) is bool(form)


PIECES = (
    *(
        "$",
        "\\$",
        "=",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "\\{",
        "\\}",
        "\\text{",
        "\\boxed{",
        "\\",
        "&",
    ),
    *("\\frac", "\\frac1", "\\sqrt", "\\pm", "\\cup", "\\infty", "\\begin{pmatrix}", "\\\\", ","),
    *("\\end{pmatrix}", "1", "23", ".", "-", "x", "and", "%", "\\%", "^", "_", "e", "10", "/", ":"),
    *("Answer:", "the answer is ", "####", "\n", " ", "\t", "\x00", "\u2212", "\u0663", "\ud800"),
)


def test_fuzz_never_raises():
    rng = random.Random(0)
    for _ in range(200):
        response = "".join(rng.choices(PIECES, k=rng.randint(0, 50)))
        gold = "".join(rng.choices(PIECES, k=rng.randint(1, 8)))
        found = extract(response)
        for one, other in ((gold, found or ""), (gold, gold)):
            verdict = compare(one, other, plain_leaf)
            assert verdict in (True, False, None)
            assert (
                normal_form(one) != normal_form(other)
                or verdict is not False
                or not one.strip()
                or not normal_form(one)
            )


HOSTILE = {
    "giant power": "9^{9^{9^{9}}}",
    "factorial tower": "((((10!)!)!)!)!",
    "factorial": "10000000!",
    "parentheses": "(" * 900 + "x" + ")" * 900,
    "fractions": "\\frac{1}{" * 150 + "2" + "}" * 150,
    "braces": "{" * 1900,
    "endless sum": "\\sum_{n=1}^{10^{12}} \\frac{1}{n^{n}}",
    "polynomial": "(x+y+z+1)^{3000}",
    "product": "\\prod_{k=1}^{100000} (x+k)",
    "spaces": " " * 1990 + "x",
    "letters": "a" * 1900,
    "backslashes": "\\" * 1900,
    "equations": "x=" * 990,
    "numbers": "111," * 490 + "11",
    "matrix": "\\begin{pmatrix}" + "1&" * 300 + "\\end{pmatrix}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answer_costs_no_more_than_the_limit(name, hasty):
    hasty.judge("\\boxed{x+1}", "1+x")  # the workers run
    for gold in ("12", "(x,y)"):
        began, worked = time.monotonic(), time.thread_time()
        judgement = hasty.judge(f"\\boxed{{{HOSTILE[name]}}}", gold)
        assert time.thread_time() - worked < WORK
        assert time.monotonic() - began < LIMIT + SLACK
        assert judgement.outcome in ("wrong", "timeout", "crash", "error")
        assert judgement.form is None
    assert hasty.judge("\\boxed{x+1}", "1+x").outcome in ("correct", "timeout")  # at 2 s


GIGANTIC, LARGE = 200_000, 25_000  # characters


def work(responses):
    """Seconds of this thread's own work on responses, the least of three times."""
    spent = []
    for _ in range(3):
        began = time.thread_time()
        for response in responses:
            found = extract(response)
            if found is not None and len(found) <= 2_000:
                compare("(1,x)", found, plain_leaf)
        spent.append(time.thread_time() - began)
    return min(spent)


@pytest.mark.parametrize("name", HOSTILE)
def test_gigantic_response(name, verifier):
    def text(size):
        return (HOSTILE[name] + " ") * (size // len(HOSTILE[name]) + 1)

    for form in ("{}", "\\boxed{{{}}}", "Answer: {}", "the answer is {}"):
        large, gigantic = (form.format(text(size)) for size in (LARGE, GIGANTIC))
        assert extract(f"{gigantic}\nAnswer: 5") == "5"
        least, most = (work([stated, f"{stated}\nAnswer: 5"]) for stated in (large, gigantic))
        # 8 times the characters are 8 times the work; quadratic work would be 64 times. The ratio
        # of a thread's own times is the same on a slow machine and on a busy one.
        assert most < 20 * least + 0.01, (form, least, most)
    judgement = verifier.judge(f"\\boxed{{{text(GIGANTIC)}}}", "5")
    # Spaces alone are no long answer and reach the worker, which a busy machine may keep waiting.
    assert judgement.outcome in (("wrong", "timeout") if name == "spaces" else ("limit",))


def test_stuck_answers_do_not_delay_others(hasty):
    hasty.judge("\\boxed{x+1}", "1+x")
    with ThreadPoolExecutor(1) as thread:
        stuck = thread.submit(hasty.judge, "\\boxed{9^{9^{9^{9}}}}", "x")
        time.sleep(0.1)
        for _ in range(3):
            assert hasty.judge("\\boxed{x+1}", "1+x").form is not None
        assert not stuck.done()
        assert stuck.result().outcome == "timeout"


def test_task():
    task = tasks.build(tasks.TaskConfig("math", {"verifier": "semantic", "workers": 1}))
    row = {"prompt_id": 3, "prompt": "?", "answer": "$\\frac12$", "solution": "A half."}
    try:
        assert task.parallel == 2
        forms = {task.judge(f"Answer: {a}", row) for a in ("0.5", "1/2", "\\boxed{2/4}")}
        assert forms == {(1.0, "\\frac{1}{2}", "correct")}
        assert task.judge("Answer: 0.25", row) == (-1.0, None, "wrong")
        assert task.judge("I do not know", row) == (-1.0, None, "no_answer")
        assert task.demonstration(row, None) == "A half.\nAnswer: $\\frac12$"
        with pytest.raises(InputError, match="answer_field"):
            task.judge("Answer: 1", {"prompt": "?"})
    finally:
        task.close()


def _real(folder: Path) -> list[tuple[str, str]]:
    """Reference answers, and a solution that states each, or ""."""

    def lines(name):
        return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]

    gsm8k = [
        (r["answer"].rpartition("####")[2].strip(), r["answer"]) for r in lines("gsm8k/test.jsonl")
    ]
    math = [(r["answer"], r["solution"]) for r in lines("math500/test.jsonl")]
    aime = [(str(r["answer"]), r["solution"]) for r in lines("aime24/test.jsonl")]
    olympiad = [(r["final_answer"][0], "") for r in lines("olympiadbench/test.jsonl")]
    train = json.loads((folder / "math_train_7474" / "train.json").read_text("utf-8"))
    return [*gsm8k, *math, *aime, *olympiad, *((r["answer"], "") for r in train if r["answer"])]


STATED = (
    "So we get it.\n\\[ \\boxed{%s} \\]",
    "First 3, then 7.\n**Answer:** $%s$",
    "Therefore the answer is $%s$.",
    "Answer: %s",
)


def test_real_answers_are_accepted(shared_data, verifier):
    real = _real(shared_data)
    sample = random.Random(0).sample(real, 600)
    refused = [
        (answer, response)
        for answer, solution in sample
        for response in [*(form % answer for form in STATED), *([solution] if solution else [])]
        if verifier.judge(response, answer).outcome != "correct"
    ]
    assert len(refused) <= 0.005 * len(sample), refused


def _corrupted(answer: str, rng: random.Random) -> list[str]:
    digits = list(re.finditer(r"\d", answer))
    found = []
    if digits:
        digit = rng.choice(digits)
        other = str((int(digit[0]) + rng.randint(1, 9)) % 10)
        found.append(answer[: digit.start()] + other + answer[digit.end() :])
    if answer.startswith("-"):
        found.append(answer[1:])
    elif re.fullmatch(r"[\d.,]*[1-9][\d.,]*|\\frac\{\w+\}\{\w+\}", answer):
        found.append(f"-{answer}")
    if fraction := re.fullmatch(r"\\frac\{(\w+)\}\{(\w+)\}", answer):
        found.append(f"\\frac{{{fraction[2]}}}{{{fraction[1]}}}")
    return [other for other in found if other != answer]


def test_real_answers_with_a_change_are_refused(shared_data, verifier):
    rng = random.Random(1)
    sample = rng.sample(_real(shared_data), 150)
    changed = [(answer, other) for answer, _ in sample for other in _corrupted(answer, rng)]
    assert len(changed) > 150
    accepted = [
        pair
        for pair in changed
        if verifier.judge(f"\\boxed{{{pair[1]}}}", pair[0]).form is not None
    ]
    assert len(accepted) <= 0.005 * len(changed), accepted
