"""What the semantic verifier accepts: real answers in other words, and the same ones corrupted.

Every answer of a set is stated by responses in forms a model may write it in (fractions as
decimals, sets in another order, radicals rationalised, units, separators, ...), and by responses
with an error put in (a digit, a sign, a fraction upside down, a bracket, an item left out, ...).
Forms that take algebra are made by sympy from a reading of the answer that is not the verifier's.

python -m benchmarks.verifier_accuracy --data=FOLDER [--answers=1500] [--seed=0] [--list=FILE]
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import sympy
from sympy.parsing import sympy_parser

from benchmarks.common import write_report
from flowrl_jax.rewards.verify import Verifier, VerifierConfig

SETS = {
    "math500": "math500/test.jsonl",
    "math_train": "math_train_7474/train.json",
    "aime24": "aime24/test.jsonl",
    "amc23": "amc23/test.jsonl",
    "olympiadbench": "olympiadbench/test.jsonl",
    "gsm8k": "gsm8k/test.jsonl",
}
RIGHT_AT_LEAST, WRONG_AT_MOST = 0.995, 0.005
FORMS, CORRUPTIONS = 2, 2
"""Responses of either kind to each answer."""

STATED = (
    "Therefore the requested value is $\\boxed{%s}$.",
    "**Final Answer**\n\n\\[\n\\boxed{ %s }\n\\]",
    "Final answer: $%s$",
    "Answer: %s",
    "I first thought of $\\boxed{17}$, but that misses a case.\n\nAnswer: \\(%s\\)",
    "So the answer is \\( %s \\).",
    "Hence we conclude that the result is $\\boxed{\\displaystyle %s}$, as was to be shown.",
    "\\begin{align*}\n\\boxed{%s}.\n\\end{align*}\nA check with $n = 3$ agrees.",
    "This leaves one possibility.\n\n**Answer:** $%s$.",
    "The final answer is $\\boxed{%s}$. I hope it is correct.",
)
STEPS = (
    "Let $k = \\frac{3}{4}$ and note that $k^2 < 1$.\n",
    "There are 12 cases, of which 5 are alike; we treat them together.\n",
    "By symmetry, \\[ a + b + c = 2(a - b) + 7. \\]\n",
    "Substituting gives $t^2 - 5t + 6 = 0$, so (t - 2)(t - 3) = 0.\n",
)
_INTEGER = re.compile(r"-?\d+")
_DECIMAL = re.compile(r"-?\d+\.\d+")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_MIXED = re.compile(r"(\d+)\s*\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_UNIT = re.compile(r"\\(?:text|mbox|mathrm)\{.*|\^\{?\\circ|\\%|\\\$|_\{?\d")


class Item(NamedTuple):
    """A response to judge.

    Attributes:
        kind: of the form or corruption.
        right: whether it is to be accepted.
        answer: the reference.
        stated: what the response says.
        response: all of it.
    """

    kind: str
    right: bool
    answer: str
    stated: str
    response: str


def read_answers(path: Path) -> list[str]:
    """Returns the different reference answers in a file of records."""
    text = path.read_text("utf-8")
    rows = json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
    found = []
    for row in rows:
        answer = row["final_answer"][0] if row.get("final_answer") else row["answer"]
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)
        answer = str(answer).rpartition("####")[2].strip()
        plain = answer.strip("$")
        found.append(plain if "$" not in plain.replace("\\$", "") else answer)
    return list(dict.fromkeys(answer for answer in found if answer))


def value_of(answer: str) -> sympy.Expr | None:
    """Returns an expression in numbers, letters, fractions, roots and powers; None for others."""
    text = re.sub(r"\\left|\\right|\\[,;! ]|\\displaystyle", "", answer)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", text)
    inner = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
    for _ in range(6):
        text = re.sub(rf"\\frac\s*{inner}\s*{inner}", r"((\1)/(\2))", text)
        text = re.sub(rf"\\sqrt\s*{inner}", r" sqrt(\1)", text)
        text = re.sub(rf"\^\s*{inner}", r"**(\1)", text)
    text = text.replace("^", "**").replace("\\cdot", "*").replace("\\times", "*")
    text = text.replace("\\pi", " pi ")
    names = set(re.findall(r"[a-zA-Z]+", text)) - {"sqrt", "pi"}
    if any(len(name) > 4 for name in names) or re.search(r"[\\{}=<>,_!|\[\]:]", text):
        return None
    if max(map(int, re.findall(r"\d+", text) or ["0"])) > 10**12 or "i" in "".join(names):
        return None
    letters = {letter: sympy.Symbol(letter) for name in names for letter in name}
    text = re.sub(r"[a-zA-Z]+", lambda name: " ".join(_letters(name[0])), text)
    rules = (
        *sympy_parser.standard_transformations,
        sympy_parser.implicit_multiplication,
        sympy_parser.rationalize,
    )
    try:
        found = sympy_parser.parse_expr(text, letters, transformations=rules)
    except Exception:
        return None
    return found if isinstance(found, sympy.Expr) else None


def _letters(name: str) -> Sequence[str]:
    return [name] if name in ("sqrt", "pi") else name


def items(answer: str) -> tuple[str, list[str], str]:
    """Returns the brackets of a list and its items; one item for what is none."""
    text = re.sub(r"\\left|\\right|\\!", "", answer.strip())
    opening = next((mark for mark in ("\\{", "(", "[") if text.startswith(mark)), "")
    closing = next((mark for mark in ("\\}", ")", "]") if text.endswith(mark)), "")
    if bool(opening) != bool(closing):
        opening = closing = ""
    inner, depth, found = text[len(opening) : len(text) - len(closing)], 0, [""]
    for mark in inner:
        depth += (mark in "([{") - (mark in ")]}")
        if depth < 0:
            return "", [answer], ""
        if mark == "," and depth == 0:
            found.append("")
        else:
            found[-1] += mark
    grouped = re.fullmatch(r"-?\d{1,3}(,\s?\d{3})+", text)
    if len(found) == 1 or grouped or "text" in text or "$" in text or "=" in text:
        return "", [answer], ""
    return opening, [item.strip() for item in found], closing


# Forms: each returns an answer equal to the one given, or None where it does not apply.


def spaced(answer: str, rng: random.Random) -> str:
    """Spaces and sizes of brackets."""
    opening, parts, closing = items(answer)
    if len(parts) == 1:
        return f" {answer} "
    if opening and rng.random() < 0.5:
        opening, closing = f"\\left{opening}", f"\\right{closing}"
    return opening + rng.choice((",", ", ", ",\\ ", " , ")).join(parts) + closing


def fraction(answer: str, rng: random.Random) -> str | None:
    """Another way to write fractions."""
    answer = re.sub(r"\\[dt]?frac(\d)(\d)", r"\\frac{\1}{\2}", answer)
    if not re.search(r"\\[dt]?frac\{", answer):
        return None
    if (found := _FRACTION.fullmatch(answer)) and rng.random() < 0.5:
        return rng.choice(("%s%s/%s", "%s%s / %s", "\\frac{%s%s}{%s}")) % found.groups()
    return re.sub(r"\\[dt]?frac\{", rng.choice((r"\\dfrac{", r"\\tfrac{", r"\\frac {")), answer)


def number(answer: str, rng: random.Random) -> str | None:
    """Decimals for fractions that end, fractions for decimals and mixed numbers."""
    if found := _FRACTION.fullmatch(answer):
        value = Fraction(int(found[2]), int(found[3]))
        if 10**6 % value.denominator:
            return None
        return found[1] + f"{float(value):.6f}".rstrip("0").rstrip(".")
    if found := _MIXED.fullmatch(answer):
        top = int(found[1]) * int(found[3]) + int(found[2])
        return f"\\frac{{{top}}}{{{found[3]}}}"
    if _DECIMAL.fullmatch(answer):
        value = Fraction(answer)
        sign = "-" if value < 0 else ""
        if value.denominator == 1 or rng.random() < 0.3:
            return answer + "0"
        return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    if _INTEGER.fullmatch(answer):
        return answer + rng.choice((".0", ".00", ""))
    return None


def separated(answer: str, rng: random.Random) -> str | None:
    """Thousands."""
    if not _INTEGER.fullmatch(answer) or len(answer.lstrip("-")) < 4:
        return None
    return f"{int(answer):,}".replace(",", rng.choice((",", "{,}", ",\\!", "\\,")))


def reordered(answer: str, rng: random.Random) -> str | None:
    """Items of a set, or of a list without brackets, in another order."""
    opening, parts, closing = items(answer)
    if len(parts) < 2 or opening not in ("", "\\{") or "\\ldots" in answer:
        return None
    rng.shuffle(parts)
    if not opening and len(parts) == 2 and rng.random() < 0.3:
        return f"{parts[0]} \\text{{ and }} {parts[1]}"
    if not opening and rng.random() < 0.2:
        opening, closing = "\\{", "\\}"
    return opening + ", ".join(parts) + closing


def with_unit(answer: str, rng: random.Random) -> str | None:
    """A unit after a number, or none where there was one."""
    if found := re.fullmatch(
        r"(-?[\d.]+)\s*\\(?:text|mbox|mathrm)\{[a-z .]+\}(\^\{?[23]\}?)?", answer
    ):
        return found[1]
    if _INTEGER.fullmatch(answer) or _DECIMAL.fullmatch(answer):
        units = ("\\text{ cm}", "\\text{ units}", " \\text{ meters}", "\\,\\mathrm{km}")
        more = ("\\text{ square feet}", " \\text{ cm}^2", "\\text{ miles per hour}")
        return answer + rng.choice((*units, *more))
    return None


def named(answer: str, rng: random.Random) -> str | None:
    """The name of what is asked for, before it."""
    if re.search(r"=|text|\\le|\\ge|<|>|\\in\b|\\\$|[A-Z]", answer) or len(items(answer)[1]) > 1:
        return None
    name = rng.choice([one for one in ("x", "y", "k", "S", "m") if one not in answer] or [""])
    return f"{name} = {answer}" if name else None


def marked(answer: str, rng: random.Random) -> str | None:
    """Degrees, percent and money."""
    if found := re.fullmatch(r"(.*\S)\s*\^\s*\{?\s*\\circ\s*\}?", answer):
        return found[1] + rng.choice(("", "^\\circ", "^{\\circ}", "°", " \\text{ degrees}"))
    if found := re.fullmatch(r"(.*?)\s*\\%", answer):
        return found[1] + rng.choice(("\\%", "%", " \\%", "\\text{ percent}"))
    if found := re.fullmatch(r"\\\$\s*([\d.,]+)", answer):
        return rng.choice(("\\$", "", "\\text{\\$}")) + found[1]
    return None


def signs(answer: str, rng: random.Random) -> str | None:
    """Signs of Unicode for commands, products with a dot, fonts of words and of matrices."""
    known = (
        *(("\\pi", "π"), ("\\infty", "∞"), ("\\cup", "\u222a"), ("\\le ", "≤ "), ("\\ge ", "≥ ")),
        *(
            ("\\cdot", "\\times"),
            ("pmatrix", "bmatrix"),
            ("\\{", "\\lbrace "),
            ("\\}", "\\rbrace "),
        ),
        *(
            ("\\text{", "\\textbf{"),
            ("\\text{", "\\mathrm{"),
            ("-", "\u2212"),
            ("\\sqrt", "\\sqrt "),
        ),
    )
    usable = [(old, new) for old, new in known if old in answer]
    if re.search(r"\d\\sqrt", answer):
        usable.append(("\\sqrt", " \\cdot \\sqrt"))
        if rng.random() < 0.5:
            return re.sub(r"(?<=\d)\\sqrt", r" \\cdot \\sqrt", answer)
        return re.sub(r"\\sqrt\{(\d+)\}", r"√\1", answer) if "√" not in answer else None
    if not usable:
        return None
    old, new = rng.choice(usable)
    if old == "\\{" or old == "\\}":
        return answer.replace("\\{", "\\lbrace ").replace("\\}", "\\rbrace ")
    return re.sub(
        re.escape(old) + ("(?![a-z])" if old[-1].isalpha() else ""), lambda _: new, answer
    )


def rewritten(answer: str, rng: random.Random) -> str | None:
    """Algebra: expanded, factored, over one denominator, without roots in it."""
    value = value_of(answer)
    if value is None or value.is_Rational or value.is_Symbol:
        return None
    ways = [sympy.expand, sympy.together, sympy.factor, sympy.radsimp, sympy.nsimplify]
    ways.append(lambda one: sympy.Mul(sympy.Rational(1, 2), 2 * one, evaluate=False))
    written = sympy.latex(rng.choice(ways)(value))
    again = value_of(written)
    return written if again is not None and sympy.simplify(again - value) == 0 else None


RIGHT: tuple[Callable[[str, random.Random], str | None], ...] = (
    *(spaced, fraction, number, separated, reordered, with_unit, named, marked, signs, rewritten),
)

# Corruptions: each returns an answer that is not equal to the one given, or None.


def digit(answer: str, rng: random.Random) -> str | None:
    """One digit changed, not of a unit."""
    end = unit.start() if (unit := _UNIT.search(answer)) else len(answer)
    places = [found.start() for found in re.finditer(r"\d", answer[:end])]
    if not places:
        return None
    place = rng.choice(places)
    other = rng.choice([one for one in "123456789" if one != answer[place]])
    return answer[:place] + other + answer[place + 1 :]


def sign(answer: str, rng: random.Random) -> str | None:
    """A sign flipped."""
    places = [found.start() for found in re.finditer(r"[+-](?!\s*0(?![.\d]))", answer)]
    if places:
        place = rng.choice(places)
        flipped = {"+": "-", "-": "+"}[answer[place]]
        return (answer[:place] + flipped + answer[place + 1 :]).strip("+")
    number_like = re.fullmatch(r"\\\$?[\d.]+.*|[\d.]+.*|\\[dt]?frac.*|\\sqrt.*", answer)
    return f"-{answer}" if number_like and not re.match(r"0(?![.\d])", answer) else None


def upside_down(answer: str, rng: random.Random) -> str | None:
    """Numerator and denominator swapped."""
    del rng
    swapped = re.sub(r"(\\[dt]?frac)\{([^{}]+)\}\{([^{}]+)\}", r"\1{\3}{\2}", answer, count=1)
    return swapped if swapped != answer else None


def one_more(answer: str, rng: random.Random) -> str | None:
    """One more."""
    if _INTEGER.fullmatch(answer):
        return str(int(answer) + rng.choice((1, -1, 10)))
    value = value_of(answer)
    return None if value is None else f"{answer} + 1"


def bracket(answer: str, rng: random.Random) -> str | None:
    """An end of an interval changed."""
    found = re.fullmatch(r"(\\left)?([(\[])(.*)(\\right)?([)\]])", answer.strip())
    if not found or len(items(answer)[1]) != 2:
        return None
    sides = [found[2], found[5]]
    at = rng.randrange(2)
    inner = items(answer)[1][at]
    if "infty" in inner:
        return None
    sides[at] = {"(": "[", "[": "(", ")": "]", "]": ")"}[sides[at]]
    return sides[0] + re.sub(r"\\right$", "", found[3]) + sides[1]


def dropped(answer: str, rng: random.Random) -> str | None:
    """An item left out."""
    opening, parts, closing = items(answer)
    if len(parts) < 2:
        return None
    parts.pop(rng.randrange(len(parts)))
    return opening + ", ".join(parts) + closing


WRONG: tuple[Callable[[str, random.Random], str | None], ...] = (
    *(digit, sign, upside_down, one_more, bracket, dropped),
)


def differ(answer: str, other: str) -> bool:
    """Whether two answers are known not to be equal."""
    plain = [re.sub(r"\\left|\\right|\s|\\!|,", "", text) for text in (answer, other)]
    if plain[0] == plain[1]:
        return False
    parts = items(answer)[1], items(other)[1]
    if sorted(parts[0]) == sorted(parts[1]) and items(answer)[0] == items(other)[0]:
        return False
    values = [
        value_of(re.sub(r"\\%|\\\$|\^\{?\\circ\}?|\\text\{.*", "", t)) for t in (answer, other)
    ]
    if values[0] is None or values[1] is None:
        return True
    return sympy.simplify(values[0] - values[1]) != 0


def responses(answers: Sequence[str], rng: random.Random) -> Iterator[Item]:
    """Yields responses with the answers in other forms, and with corrupted ones."""

    def item(kind: str, right: bool, answer: str, stated: str) -> Item:
        steps = "".join(rng.choice(STEPS) for _ in range(rng.randint(1, 6)))
        pattern = rng.choice(STATED)
        if "%s" in stated or "$" in stated.replace("\\$", ""):
            pattern = "Answer: %s"
        return Item(kind, right, answer, stated, steps + pattern.replace("%s", stated))

    for answer in answers:
        forms = {way.__name__: form for way in RIGHT if (form := way(answer, rng))}
        for kind in rng.sample(sorted(forms), min(FORMS, len(forms))):
            yield item(kind, True, answer, forms[kind])
        wrong = {way.__name__: form for way in WRONG if (form := way(answer, rng))}
        wrong["another"] = rng.choice(answers)
        wrong = {kind: form for kind, form in wrong.items() if differ(answer, form)}
        for kind in rng.sample(sorted(wrong), min(CORRUPTIONS, len(wrong))):
            yield item(kind, False, answer, wrong[kind])


def measure(work: Sequence[Item], verifier: Verifier) -> tuple[dict[str, Any], list[Item]]:
    """Returns counts by kind, as [accepted, all], and what was judged wrongly."""
    with ThreadPoolExecutor(verifier.config.processes) as threads:
        judged = list(threads.map(lambda one: verifier.judge(one.response, one.answer), work))
    accepted = [judgement.outcome == "correct" for judgement in judged]
    counts = {}
    for right in (True, False):
        chosen = [
            (one.kind, yes) for one, yes in zip(work, accepted, strict=True) if one.right is right
        ]
        total, good = (
            Counter(kind for kind, _ in chosen),
            Counter(kind for kind, yes in chosen if yes),
        )
        counts["references" if right else "corruptions"] = {
            kind: [good[kind], total[kind]] for kind in sorted(total)
        }
    return counts, [one for one, yes in zip(work, accepted, strict=True) if yes is not one.right]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="What the semantic verifier accepts.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--answers", type=int, default=1_500, help="of each set, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", type=Path, help="file for what is judged wrongly, as JSONL")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    values = parser.parse_args(arguments)
    verifier = Verifier(VerifierConfig(workers=2, limit=30.0))
    report, faults = {}, []
    for name, path in SETS.items():
        rng = random.Random(f"{values.seed} {name}")
        answers = read_answers(values.data / path)
        chosen = rng.sample(answers, min(values.answers, len(answers)))
        report[name], missed = measure(list(responses(chosen, rng)), verifier)
        faults += [{"set": name, **one._asdict()} for one in missed]
        print(f"{name:14} {summary(report[name])}", flush=True)
    verifier.close()
    every = {
        right: {
            f"{name} {kind}": two for name in report for kind, two in report[name][right].items()
        }
        for right in ("references", "corruptions")
    }
    print(
        f"{'all':14} {summary(every)}; wanted: at least {RIGHT_AT_LEAST:.1%} of references, at most"
        f" {WRONG_AT_MOST:.1%} of corruptions"
    )
    if values.list:
        values.list.write_text("".join(json.dumps(one) + "\n" for one in faults), "utf-8")
    write_report(values.json, {"benchmark": "verifier_accuracy", "sets": report})
    return 0


def summary(counts: dict[str, dict[str, list[int]]]) -> str:
    """Returns a line with the accepted of either kind."""
    shown = []
    for kind, by_form in counts.items():
        accepted, total = (sum(two[i] for two in by_form.values()) for i in (0, 1))
        share = f" ({accepted / total:.2%})" if total else ""
        shown.append(f"{kind} {accepted:,} of {total:,} accepted{share}")
    return "; ".join(shown)


if __name__ == "__main__":
    sys.exit(main())
