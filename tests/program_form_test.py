"""Programs with one form differ in looks and names alone; those that compute otherwise do not."""

import contextlib
import gzip
import io
import json
import math
import random
import re

import pytest

from flowrl_jax.tasks.program_form import MAX_CHARACTERS, canonical_program

PROGRAM = '''
import math as m, os.path
from collections import defaultdict as dd

LIMIT = 10

def solve(xs, start):
    """Adds."""
    total = start  # of all
    for x in xs:
        total += m.sqrt(x)
    seen = dd(int)
    def inner(n):
        nonlocal total
        total = total + n
        return [y for y in xs if y > n and (last := y)]
    try:
        return max(inner(LIMIT)), os.path.join("a"), seen
    except ValueError as fault:
        print(fault)

class Counter:
    count = 0
    def add(self, by):
        self.count += by
        return lambda z: z + by

match input():
    case [first, *rest]:
        print(solve(rest, int(first)))
    case {"a": only, **others}:
        global_sum = sum(others)
print(f"{solve([1], 2)!r:>10}")
'''

RENAMED = '''
import math, os.path as p
from collections import defaultdict
BOUND: int = 10
def answer(values: list[int], a: float) -> float:
    s = a
    for v in values: s += math.sqrt(v)
    d = defaultdict(int)
    def g(k):
        nonlocal s
        s = (s + k)
        return [q for q in values if q > k and (w := q)]
    """a comment"""
    try:
        return max(g(BOUND)), p.join('a'), d
    except ValueError as e: print(e)
class Tally:
    """Counts."""
    count = 0
    def add(this, x):
        this.count += x
        return lambda t: t + x
match input():
    case [i, *j]: print(answer(j, int(i)))
    case {"a": k, **l}: z = sum(l)
print(f"{answer([1], 2)!r:>10}")
'''


def test_looks_and_names_do_not_matter():
    form = canonical_program(PROGRAM)
    assert form is not None
    # The two write an import differently, which is told apart: the rest is one text.
    assert form.replace("import math, os.path", "") == (canonical_program(RENAMED) or "").replace(
        "import math, os.path", ""
    )
    assert "solve" not in form and "total" not in form and "Adds" not in form
    for kept in ("sqrt", ".count", "sum", "ValueError", "input", "'a'"):
        assert kept in form


SAME = {
    "loop variable": ("for i in x(): print(i)", "for j in x(): print(j)"),
    "parameter": ("def f(a): return a", "def f(b): return b"),
    "function": ("def f(): return f()", "def g(): return g()"),
    "shadowing": (
        "def f(a):\n  def g(a): return a\n  return g(a)",
        "def f(a):\n  def g(b): return b\n  return g(a)",
    ),
    "lambda": (
        "k = lambda a, *b, c=1, **d: (a, b, c, d)",
        "z = lambda q, *r, s=1, **t: (q, r, s, t)",
    ),
    "comprehension's own": (
        "i = 0\n[i for i in range(3)]\nprint(i)",
        "i = 0\n[j for j in range(3)]\nprint(i)",
    ),
    "reused in another function": (
        "def f(): i = 1; return i\ndef g(): i = 2; return i",
        "def f(): i = 1; return i\ndef g(): j = 2; return j",
    ),
    "annotations": ("x: int = 1", "x = 1"),
    "alias": ("import numpy as np\nnp.zeros(3)", "import numpy\nnumpy.zeros(3)"),
    "import from": ("from a import b as c\nc()", "from a import b\nb()"),
    "layout": ("if x:\n    y()", "if (x): y()  # z"),
    "global": (
        "n = 0\ndef f():\n  global n\n  n += 1",
        "m = 0\ndef f():\n  global m\n  m += 1",
    ),
    "comprehension": ("a = [b for c in d() for b in c]", "z = [y for x in d() for y in x]"),
    "class variable beside a global one": (
        "n = 1\nclass A:\n  n = 2\n  def f(self): return n",
        "k = 1\nclass A:\n  n = 2\n  def f(self): return k",
    ),
    "first iterable": (
        "def f(x): return [x for x in x]",
        "def f(y): return [x for x in y]",
    ),
    "deleted": ("a = 1\ndel a", "b = 1\ndel b"),
    "walrus": ("[(k := i) for i in f()]\nprint(k)", "[(z := j) for j in f()]\nprint(z)"),
    "with": ("with open(p()) as f: f.read()", "with open(p()) as g: g.read()"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_same_form(case):
    first, second = (canonical_program(source) for source in SAME[case])
    assert first is not None and first == second


OTHER = {
    "builtin shadowed": (
        "def f(): sum = 0; return sum\ndef g(x): return sum(x)",
        "def f(): max = 0; return max\ndef g(x): return max(x)",
    ),
    "which of two names": ("a, b = 1, 2\nprint(a)", "a, b = 1, 2\nprint(b)"),
    "captured or own": (
        "def f(a):\n  def g(b): return a\n  return g",
        "def f(a):\n  def g(b): return b\n  return g",
    ),
    "attribute": ("x.a()", "x.b()"),
    "constant": ("print(1)", "print(True)"),
    "method": ("class A:\n  def f(self): ...", "class A:\n  def g(self): ..."),
    "class variable or global": (
        "n = 1\nclass A:\n  n = 2\n  def f(self): return n",
        "n = 1\nclass A:\n  m = 2\n  def f(self): return m",
    ),
    "module": ("import a\na.f()", "import b\nb.f()"),
    "imported name": ("from a import b\nb()", "from a import c\nc()"),
    "global or local": (
        "n = 0\ndef f():\n  global n\n  n = 1",
        "n = 0\ndef f():\n  m = 1",
    ),
    "argument by name": (
        "def f(a, b): return a - b\nf(b=1, a=2)",
        "def f(b, a): return b - a\nf(b=1, a=2)",
    ),
    "import or assignment": ("import a as b\nb = 1\nb", "import a as c\nb = 1\nb"),
    "comprehension's own or outer": (
        "i = 0\n[i for j in range(3)]",
        "i = 0\n[j for j in range(3)]",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_form(case):
    first, second = (canonical_program(source) for source in OTHER[case])
    assert first is not None and second is not None and first != second


@pytest.mark.parametrize(
    "source",
    ["def f(:", "x = 1\n y", "\0", "print 1", "x" * (MAX_CHARACTERS + 1), "(" * 5000,
     "+".join(["x"] * 20000), "-" * 20000 + "1", "\ud800"],
)  # fmt: skip
def test_what_is_no_program_has_no_form(source):
    assert canonical_program(source) is None


def test_form_of_a_form_cannot_be_confused_with_a_program():
    form = canonical_program("def f(a): return a")
    assert form is not None and "$" in form
    assert canonical_program(form) is None


def test_an_empty_body_is_still_a_program():
    assert canonical_program('def f():\n    """Nothing."""') == canonical_program("def g(): pass")
    assert canonical_program("") == canonical_program("# nothing\n'text'") == ""


@pytest.fixture(scope="module")
def humaneval(shared_data):
    with gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def test_reference_solutions_have_forms_of_their_own(humaneval):
    forms = [canonical_program(row["prompt"] + row["canonical_solution"]) for row in humaneval]
    assert len(forms) == 164 and None not in forms
    assert len(set(forms)) == 164


def test_forms_of_reference_solutions_pass_their_tests(humaneval):
    """Naming things anew changes nothing that is computed."""
    for row in humaneval:
        parts = (row["prompt"], row["canonical_solution"], "\n", row["test"], "\n")
        form = canonical_program("".join(parts) + f"check({row['entry_point']})")
        assert form is not None
        with contextlib.redirect_stdout(io.StringIO()):
            # `from math import ceil` is spelled out in a form: its names need their modules.
            exec(re.sub(r"\$(\d)", r"name_\1", form), {"math": math, "random": random})
