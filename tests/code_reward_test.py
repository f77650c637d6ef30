"""The code reward: forms of tests, references and mutants of public problems, task and endpoint."""

import ast
import gzip
import http.server
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from flowrl_jax import tasks
from flowrl_jax.errors import InputError
from flowrl_jax.rewards import code, remote
from flowrl_jax.sandbox import codec, launcher
from flowrl_jax.sandbox.limits import Limits
from flowrl_jax.sandbox.runner import Sandbox
from flowrl_jax.tasks.program_form import canonical_program

LIMITS = Limits(seconds=30.0, memory_mb=4096)
# Three tests of HumanEval+ take half a minute of a quiet machine.
PATIENT = Limits(seconds=180.0, memory_mb=4096)
# The test of HumanEval+/32 calls its polynomial with the result where it wants two arguments: no
# program passes it.
KNOWN_BAD = {"HumanEval/32"}
SQUARE = "n = int(input())\nprint(n * n)"
FENCED = f"The square:\n```python\n{SQUARE}\n```\n"


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox("auto")
    except InputError as error:
        pytest.skip(str(error))


def build(**options):
    try:
        return tasks.build(tasks.TaskConfig("code", options))
    except InputError as error:
        if "namespaces" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\na = 1\n```", "a = 1\n"),
        ("```py\nfirst\n```\nbetter:\n```\nsecond\n```\nDone.", "second\n"),
        ("```python\nunclosed", None),
        ("no code at all", None),
        ("", None),
        ("```python\na = '`'\nb = ''\n```", "a = '`'\nb = ''\n"),
        ("```python\nfirst\n```\n```python\ncut off", "first\n"),
    ],
)
def test_the_last_fenced_block_is_the_program(response, program):
    assert code.extract(response) == program


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("\n 1 2 \n3  \n\n", "1 2\n3", True),
        ("1.0 2.50", "1 2.5", True),
        ("1e2", "100", True),
        ("1.0000001", "1", False),  # equal as decimals, not nearly equal
        ("1 2\n\n3", "1 2\n3", False),
        ("1 2 3", "1 2\n3", False),
        ("YES", "yes", False),
        ("nan", "nan", True),  # the same text
        ("", "", True),
        ("", "0", False),
        ("1e999999999 x", "1", False),
    ],
)
def test_output_is_compared_by_line_as_text_or_decimals(printed, expected, same):
    assert launcher.same_output(printed, expected) is same


VALUES = [
    *(None, True, 3, -(2**80), 1.5, float("inf"), "text", "\ud800", b"\xff", 2 + 1j, range(3), int),
    *([1, [2]], (1, (2,)), {1, 2}, frozenset("a"), {"a": (1,), 2: None}, [], (), set(), {}),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_data_comes_through_the_codec_as_it_was(value):
    found = codec.decode(json.loads(json.dumps(codec.encode(value))))
    assert found == value
    assert type(found) is type(value)


TACO = {"inputs": ["1\n", "22\n", "3\n"], "outputs": ["1\n", "484\n", "9\n"]}
CALLED = {"fn_name": "f", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]}
INTELLECT = [{"type": "function_call", "fn_name": "f", "input": [1, 2], "output": [3]}]
LIVE = [{"input": "4\n", "output": "16", "testtype": "stdin", "metadata": {}}]
LIVE_CALL = [
    {
        "input": "[1, 2]\n1",
        "output": "[2, 3]",
        "testtype": "functional",
        "metadata": {"func_name": "f"},
    }
]
HUMAN = {"test": "def check(candidate):\n    assert candidate(2) == 4\n", "entry_point": "f"}
ADD = "def f(a, b):\n    return a + b"
METHOD = "class Solution:\n    def f(self, x, n):\n        return tuple(v + n for v in x)"
FORMS = [
    ("taco", TACO, SQUARE, SQUARE.replace("* n", "+ n")),
    ("taco", CALLED, ADD, ADD.replace("+", "*")),
    ("primeintellect", INTELLECT, ADD, ADD.replace("+", "*")),
    ("livecodebench", LIVE, SQUARE, SQUARE.replace("* n", "+ n")),
    ("livecodebench", LIVE_CALL, METHOD, METHOD.replace("+ n", "- n")),
    ("humanevalplus", HUMAN, "def f(x):\n    return x * x", "def f(x):\n    return x + 3"),
    ("", HUMAN["test"] + "check(f)", "def f(x):\n    return x * x", "def f(x):\n    return x + 3"),
    ("mbpp", ["assert f(1, 2) == 3", "assert f(0, 0) == 0"], ADD, ADD.replace("+", "-")),
    ("codeforces", [{"input": "5\n", "output": "25\n"}], SQUARE, "print(5)"),
]


@pytest.mark.parametrize(("source", "truth", "right", "wrong"), FORMS)
def test_forms_of_ground_truth(sandbox, source, truth, right, wrong):
    text = truth if isinstance(truth, str) else json.dumps(truth)
    tests = code.parse(text, source)
    assert code.parse(code.dump(tests)) == tests
    assert tests.seconds == code.SECONDS.get(source, tests.seconds)
    found = code.run_tests(right, tests, sandbox=sandbox)
    assert (found.outcome, found.passed) == ("correct", found.total)
    assert code.run_tests(wrong, tests, sandbox=sandbox).outcome == "wrong"


def test_the_longest_inputs_count_where_the_release_says_so():
    truth = {"inputs": ["1" * (i % 20 + 1) for i in range(40)], "outputs": ["x"] * 40}
    for source, count in (("taco", 15), ("primeintellect", 15), ("livecodebench", 40)):
        cases = code.parse(truth, source).cases
        assert len(cases) == count
    lengths = sorted(len(given) for given, _ in code.parse(truth, "taco").cases)
    assert lengths == sorted(len(given) for given in truth["inputs"])[-15:]


@pytest.mark.parametrize(
    "truth",
    [
        "{",
        "[]",
        "{}",
        [],
        {"inputs": [], "outputs": []},
        [{"x": 1}],
        "3",
        {"kind": "x", "cases": []},
    ],
)
def test_rows_without_usable_tests_are_refused(truth):
    with pytest.raises(InputError):
        code.parse(truth)


def test_objects_of_the_program_can_be_handed_around(sandbox):
    program = "class Node:\n    def __init__(self, v):\n        self.v, self.next = v, None\n"
    program += "def total(n):\n    return n.v + (total(n.next) if n.next else 0)"
    setup = "a = Node(1)\na.next = Node(2)\nb = Node(5)"
    row = {"code": program, "test_list": ["assert total(a) == 3", "assert (total(b)) == 5"]}
    tests = code.mbpp({**row, "test_setup_code": setup})
    assert tests.function == "total"
    assert code.run_tests(program, tests, sandbox=sandbox).outcome == "correct"
    wrong = program.replace("self.v, self.next = v", "self.v, self.next = v + 1")
    assert code.run_tests(wrong, tests, sandbox=sandbox).outcome == "wrong"


def test_tests_that_cannot_run_are_refused_and_not_wrong(sandbox):
    for broken in ("assert f(", "import no_such_module_anywhere\nassert f(1)"):
        tests = code.Tests("assert", (broken,), "f")
        assert (
            code.run_tests("def f(x):\n    return 1", tests, sandbox=sandbox).outcome == "refused"
        )


def load(shared_data, name):
    if name == "mbpp":
        lines = (shared_data / "mbpp" / "mbpp.jsonl").read_text().splitlines()
        return [(str(r["task_id"]), r["code"], code.mbpp(r)) for r in map(json.loads, lines)]
    file = {"humaneval": "HumanEval.jsonl.gz", "humanevalplus": "HumanEvalPlus-OriginFmt.jsonl.gz"}
    with gzip.open(shared_data / name / file[name], "rt") as lines:
        rows = list(map(json.loads, lines))
    return [(r["task_id"], r["prompt"] + r["canonical_solution"], code.humaneval(r)) for r in rows]


def verdicts(sandbox, items, limits=LIMITS):
    run = lambda item: code.run_tests(item[1], item[2], sandbox=sandbox, limits=limits)  # noqa: E731
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, items))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "every"), [("mbpp", 12), ("humanevalplus", 20)])
def test_references_pass(sandbox, shared_data, name, every):
    items = [item for item in load(shared_data, name)[::every] if item[0] not in KNOWN_BAD]
    found = verdicts(sandbox, items)
    failed = {item[0]: r for item, r in zip(items, found, strict=True) if r.outcome != "correct"}
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "humanevalplus", "mbpp"])
def test_all_references_pass(sandbox, shared_data, name):
    items = load(shared_data, name)
    found = verdicts(sandbox, items, PATIENT)
    failed = {item[0] for item, r in zip(items, found, strict=True) if r.outcome != "correct"}
    assert failed <= KNOWN_BAD


class Mutate(ast.NodeTransformer):
    """Changes what a function returns; every mutant is wrong on any input."""

    def visit_Return(self, node):
        value = node.value or ast.Constant(None)
        return ast.Return(ast.Tuple([ast.Constant("mutant"), value], ast.Load()))


OPPOSITE = {
    **{ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.Eq: ast.NotEq, ast.In: ast.NotIn},
    **{ast.GtE: ast.Lt, ast.LtE: ast.Gt, ast.NotEq: ast.Eq, ast.NotIn: ast.In},
}


class Nudge(ast.NodeTransformer):
    """Changes the first comparison, or else the first number."""

    def __init__(self):
        self.done = False

    def visit_Compare(self, node):
        kind = OPPOSITE.get(type(node.ops[0]))
        if not self.done and kind:
            self.done, node.ops[0] = True, kind()
        return node

    def visit_Constant(self, node):
        if not self.done and type(node.value) is int:
            self.done, node.value = True, node.value + 1
        return node


@pytest.mark.slow
@pytest.mark.parametrize("name", ["humanevalplus", "mbpp"])
def test_mutants_fail(sandbox, shared_data, name):
    items = load(shared_data, name)[3 :: {"humanevalplus": 32, "mbpp": 60}[name]]
    mutants = []
    for task, program, tests in items:
        for mutation in (Mutate(), Nudge()):
            tree = ast.fix_missing_locations(mutation.visit(ast.parse(program)))
            if getattr(mutation, "done", True):
                mutants.append((task, ast.unparse(tree), tests, mutation))
    limits = Limits(seconds=5.0)
    with ThreadPoolExecutor(2) as threads:
        found = list(
            threads.map(
                lambda m: code.run_tests(m[1], m[2], sandbox=sandbox, limits=limits), mutants
            )
        )
    survived = [m[0] for m, r in zip(mutants, found, strict=True) if r.outcome == "correct"]
    returned = [m[0] for m in mutants if isinstance(m[3], Mutate)]
    assert len(returned) >= 5
    assert len(survived) <= 0.05 * len(mutants), survived  # a nudge may leave a function the same
    by_return = [m[0] for m, r in zip(mutants, found, strict=True)
                 if isinstance(m[3], Mutate) and r.outcome == "correct"]  # fmt: skip
    assert not by_return


ROW = {
    "prompt_id": 4,
    "prompt": "Print the square of n.",
    "tests": json.dumps(TACO),
    "data_source": "taco",
}


def test_the_task_asks_judges_and_counts():
    task = build(parallel=2, reward_wrong=-0.5)
    try:
        prompt = task.prompt(ROW)
        assert ROW["prompt"] in prompt and "standard input" in prompt
        assert "def f(a):" in task.prompt({**ROW, "starter_code": "def f(a):"})
        assert task.judge("no code", ROW) == (-0.5, None, "no_code")
        right = task.judge(FENCED, ROW)
        assert right == (1.0, canonical_program(SQUARE), "correct")
        assert task.judge("```python\nprint(1)\n```", ROW) == (-0.5, None, "wrong")
        assert task.judge("```python\n1 / 0\n```", ROW).outcome == "error"
        shown = task.demonstration({**ROW, "solution": SQUARE}, np.random.default_rng(0))
        assert task.judge(shown, ROW).outcome == "correct"
        with pytest.raises(InputError, match="prompt 4: no 'tests'"):
            task.prompt({**ROW, "tests": ""})
        with pytest.raises(InputError, match="prompt 4: no 'solution'"):
            task.demonstration(ROW, np.random.default_rng(0))
    finally:
        task.close()
    assert task.judge(FENCED, ROW).outcome == "refused"


def test_options_of_the_task_are_checked():
    for options in ({"parallel": 0}, {"isolation": "some"}, {"memory_mb": 1}, {"unavailable": "x"},
                    {"reward_wrong": float("nan")}, {"endpoint": "ftp://x"}):  # fmt: skip
        with pytest.raises(InputError):
            tasks.build(tasks.TaskConfig("code", options))


class Replies(http.server.BaseHTTPRequestHandler):
    """Answers with what the server's list says, then with success."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((json.loads(body), self.headers.get("Authorization")))
        status, reply, wait = (self.server.replies or [(200, {"outcome": "correct"}, 0)]).pop(0)
        time.sleep(wait)
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        try:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Replies)
    server.replies, server.asked = [], []
    server.url = f"http://127.0.0.1:{server.server_port}/judge"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def endpoint(server, **settings):
    values = {"pause": 0.01, "seconds": 0.3, "retries": 2, **settings}
    return remote.Endpoint(remote.EndpointConfig(url=server.url, **values))


def test_an_endpoint_is_asked_again_where_that_may_help(server, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "abc")
    server.replies[:] = [(503, {}, 0), (200, b"no json", 0)]
    assert endpoint(server, token_env="JUDGE_TOKEN").ask({"q": 1}) == {"outcome": "correct"}
    assert server.asked == [({"q": 1}, "Bearer abc")] * 3
    server.replies[:] = [(200, {}, 1.0)]  # too slow once
    assert endpoint(server).ask({}) == {"outcome": "correct"}
    server.asked.clear()
    server.replies[:] = [(400, {}, 0)]
    with pytest.raises(remote.Unavailable, match="status 400"):
        endpoint(server).ask({})
    assert len(server.asked) == 1


def test_an_endpoint_gives_up_in_time(server):
    server.replies[:] = [(500, {}, 0)] * 99
    with pytest.raises(remote.Unavailable, match="status 500"):
        endpoint(server).ask({})
    assert len(server.asked) == 3
    began = time.monotonic()
    with pytest.raises(remote.Unavailable):
        endpoint(server, retries=999, total_seconds=0.5).ask({})
    assert time.monotonic() - began < 60  # 999 attempts would take hours


def test_a_circuit_opens_and_closes(server):
    broken = endpoint(server, retries=0, failures=2, open_seconds=0.3)
    server.replies[:] = [(500, {}, 0)] * 2
    for _ in range(2):
        with pytest.raises(remote.Unavailable, match="status 500"):
            broken.ask({})
    with pytest.raises(remote.Unavailable, match="2 times in a row"):
        broken.ask({})
    assert len(server.asked) == 2
    time.sleep(0.35)
    assert broken.ask({}) == {"outcome": "correct"}
    assert broken.ask({}) == {"outcome": "correct"}


def test_a_task_with_an_endpoint(server):
    options = {"endpoint": server.url, "endpoint_seconds": 0.5}
    task = build(**options)
    assert task.judge(FENCED, ROW).outcome == "correct"
    asked = server.asked[0][0]
    assert asked["program"].strip() == SQUARE
    assert code.parse(asked["tests"]) == code.parse(ROW["tests"], "taco")
    server.replies[:] = [(200, {"outcome": "timeout"}, 0), (404, {}, 0), (404, {}, 0)]
    assert task.judge(FENCED, ROW) == (0.0, None, "timeout")
    with pytest.raises(InputError, match="no verdict .*404"):
        task.judge(FENCED, ROW)
    assert build(**options, unavailable="wrong").judge(FENCED, ROW) == (0.0, None, "refused")
