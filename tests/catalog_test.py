"""Public data sets: what becomes of their real files, and of what may be wrong with any file."""

import base64
import json
import pickle
import zlib

import pytest

from flowrl_jax import tasks
from flowrl_jax.datasets import catalog, files, rows
from flowrl_jax.datasets.pipeline import DataConfig, PromptSource
from flowrl_jax.errors import InputError


def source(data_dir, split="train", **options):
    config = DataConfig(
        builder="prompts", data_dir=str(data_dir), split=split, shuffle=False, options=options
    )
    return PromptSource(config)


# Name, file or folder, split, rows, fields besides prompt and answer, the first row's answer.
REAL = [
    ("gsm8k", "gsm8k", "train", 7473, {"solution"}, "72"),
    ("gsm8k", "gsm8k", "test", 1319, {"solution"}, "18"),
    ("math", "math_train_7474/train.json", "train", 7469, {"level", "subject"}, "0"),
    ("aime24", "aime24", "test", 30, {"solution"}, "204"),
    ("amc23", "amc23", "test", 40, set(), "27"),
    (
        "math500",
        "math500",
        "test",
        500,
        {"solution", "level", "subject", "task_id"},
        r"\left( 3, \frac{\pi}{2} \right)",
    ),
    ("olympiadbench", "olympiadbench", "test", 675, {"subject", "answer_type"}, "2"),
    ("humaneval", "humaneval/HumanEval.jsonl.gz", "test", 164, {"solution", "task_id"}, ""),
    (
        "humanevalplus",
        "humanevalplus/HumanEvalPlus-OriginFmt.jsonl.gz",
        "test",
        164,
        {"solution", "task_id"},
        "",
    ),
    ("mbpp", "mbpp/mbpp.jsonl", "test", 500, {"solution", "task_id"}, ""),
    ("mbpp", "mbpp/mbpp.jsonl", "train", 374, {"solution", "task_id"}, ""),
    ("codeforces", "codeforces_test/test.json", "test", 408, set(), ""),
    ("game24", "game24/24.csv", "test", 100, {"numbers", "target", "rank"}, ""),
    ("game24", "game24/24.csv", "train", 1262, {"numbers", "target", "rank"}, ""),
    ("countdown", "countdown", "train", 8001, {"numbers", "target"}, ""),
    ("countdown", "countdown", "test", 2001, {"numbers", "target"}, ""),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path", "split", "count", "extra", "answer"),
    REAL,
    ids=[f"{name}-{split}" for name, _, split, *_ in REAL],
)
def test_real_files(shared_data, tmp_path, name, path, split, count, extra, answer):
    options = {split: name, f"{split}_file": str(shared_data / path)}
    read = source(tmp_path, split, **options)
    assert len(read) == count
    found = read.rows(0, min(count, 700))
    assert [row["prompt_id"] for row in found] == list(range(len(found)))
    assert found[0]["answer"] == answer
    wanted = {"prompt", "answer", "data_source", "prompt_id", *extra}
    if "tests" in found[0]:
        wanted |= {"tests", "starter_code", "entry_point"}
    assert found[0].keys() == wanted
    for row in found:
        assert row["prompt"].strip() or row["numbers"]
        assert row["answer"].strip() or "tests" in row or "numbers" in row
        if "tests" in row:
            assert json.loads(row["tests"])
    # The file that the table downloads is this one.
    pinned = {file.sha256 for file in catalog.SOURCES[name].files[split]}
    assert {
        files.file_digest(p) for p in files.split_files(options[f"{split}_file"], split)
    } == pinned


def test_counts_of_what_real_files_lose(shared_data, tmp_path, capsys):
    path = str(shared_data / "math_train_7474" / "train.json")
    for _ in range(2):
        source(tmp_path, train="math", train_file=path)
        told = capsys.readouterr().err.splitlines()
        lines = [line for line in told if line.startswith("data:")]
        if _ == 0:
            assert lines == ["data: train: kept 7469 of 7474 rows (1 duplicate, 4 no answer)"]
        else:
            assert lines == []  # once, when the data are prepared


def test_math_problems_in_evaluation_sets(shared_data, tmp_path, capsys):
    math = {"train": "math", "train_file": str(shared_data / "math_train_7474" / "train.json")}
    sets = [f"{name}={shared_data / name}" for name in ("math500", "aime24", "olympiadbench")]
    found = source(tmp_path, **math, decontaminate=sets)
    assert len(found) == 7469 - 18
    assert "18 shares 13 words with math500" in capsys.readouterr().err


def test_game24_is_a_countdown_problem(shared_data, tmp_path):
    options = {"test": "game24", "test_file": str(shared_data / "game24" / "24.csv")}
    row = source(tmp_path, "test", **options).rows(0, 1)[0]
    assert (row["numbers"], row["target"]) == ([4, 5, 6, 10], 24)
    task = tasks.build(tasks.TaskConfig("countdown", {"prompt_style": "text"}))
    assert "4, 5, 6, 10" in task.prompt(row) and "24" in task.prompt(row)
    assert task.judge("(10-6)*5+4", row).form is not None
    assert task.judge("(10-6)*5-4", row).form is None


def run(program):
    """What a program's namespace holds in the end; of reference programs only."""
    names = {}
    exec(program, names)
    return names


def assertions(row):
    tests = json.loads(row["tests"])
    if "test" in tests:
        return [f"{tests['test']}\ncheck({tests['entry_point']})"]
    assert tests["function"] == row["entry_point"]
    return tests["cases"]


@pytest.mark.parametrize(
    ("name", "path"), [("humaneval", "humaneval/HumanEval.jsonl.gz"), ("mbpp", "mbpp/mbpp.jsonl")]
)
def test_references_pass_their_tests(shared_data, tmp_path, name, path):
    found = source(tmp_path, "test", test=name, test_file=str(shared_data / path)).rows(0, 100)
    for row in found:
        names = run(row["solution"])
        for test in assertions(row):
            exec(test, names)
        names[row["entry_point"]] = lambda *_: "no such result"
        with pytest.raises(Exception):  # noqa: B017
            for test in assertions(row):
                exec(test, names)


def record(**fields):
    return files.Record("f.jsonl line 7", fields)


def test_mbpp_names_the_function_that_is_tested():
    code = "def helper(x):\n    return x\ndef double(x):\n    return 2 * helper(x)"
    fields = {"task_id": 11, "text": "Double.", "code": code, "test_setup_code": "k = 4"}
    asserts = ["assert double(2) == k", "assert sum([double(1)]) == 2"]
    row = rows.mbpp(record(**fields, test_list=asserts), "test")
    assert isinstance(row, dict) and row["entry_point"] == "double"
    assert assertions(row) == [f"k = 4\n{line}" for line in asserts]
    assert all(line in row["prompt"] for line in asserts)
    assert isinstance(rows.mbpp(record(**fields, test_list=asserts), "train"), str)
    with pytest.raises(InputError, match="line 7: 'test_list' is not a list"):
        rows.mbpp(record(**fields, test_list="assert double(2) == 4"), "test")


WRAPPED = (
    "Do it. The last line has the form Answer: $Answer (without quotes).\n\nFind x.\n\nNow.\n\n"
    'Remember "Answer:".'
)


def test_dapo_problems_are_unwrapped():
    fields = {
        "prompt": [{"role": "user", "content": WRAPPED}],
        "reward_model": {"ground_truth": "34", "style": "rule"},
    }
    row = rows.dapo(record(**fields), "train")
    assert row == {"prompt": "Find x.\n\nNow.", "answer": "34", "data_source": "math_dapo"}
    with pytest.raises(InputError, match="line 7: 'prompt' is not wrapped"):
        rows.dapo(record(**fields | {"prompt": "Find x."}), "train")
    with pytest.raises(InputError, match=r"line 7: no field 'reward_model.ground_truth'"):
        rows.dapo(record(prompt=WRAPPED), "train")


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (27.0, "27"),
        (2.5, "2.5"),
        ("025", "25"),
        ("000", "0"),
        ("-07", "-07"),
        (["$2n$", "$3n$"], "$2n$"),
        (7, "7"),
    ],
)
def test_answers_become_text(value, answer):
    row = rows.problem("x")(record(problem="p", answer=value), "test")
    assert isinstance(row, dict) and row["answer"] == answer


@pytest.mark.parametrize("value", [None, "", []])
def test_rows_without_answer_are_counted(value):
    assert rows.problem("x")(record(problem="p", answer=value), "test") == rows.NO_ANSWER


CONTESTS = {
    "taco": ({"inputs": ["1\n", ["2", "3"]], "outputs": ["a\n", ["b", "c"]]}, {}, ""),
    "taco call": ({"fn_name": "f", "inputs": [[1, [2]]], "outputs": [[3]]}, None, "f"),
    "primeintellect": (
        [{"type": "stdin_stdout", "fn_name": None, "input": "1\n", "output": "2\n"}],
        {},
        "",
    ),
    "primeintellect call": (
        [{"type": "function_call", "fn_name": "f", "input": [1, 2], "output": [3]}],
        {},
        "f",
    ),
    "livecodebench": (
        [{"testtype": "stdin", "input": "1", "output": "2"}],
        {"func_name": None},
        "",
    ),
    "livecodebench call": (
        [{"testtype": "functional", "input": '"ab"\n[1, 2]', "output": "true"}],
        {"func_name": "solve"},
        "solve",
    ),
    "codeforces": ([{"input": "1", "output": "2"}], None, ""),
}


@pytest.mark.parametrize("case", CONTESTS)
def test_every_source_of_deepcoder(case):
    tests, metadata, entry_point = CONTESTS[case]
    fields = {"problem": "p", "tests": json.dumps(tests), "metadata": json.dumps(metadata)}
    row = rows.contest("codeforces")(record(**fields, starter_code="class Solution:"), "train")
    assert isinstance(row, dict)
    assert (row["data_source"], row["entry_point"]) == (case.split()[0], entry_point)
    assert row["starter_code"] == "class Solution:"
    found = json.loads(row["tests"])
    if case == "livecodebench call":
        # The name stands beside the tests in the file, and within them in the row.
        assert [test.pop("fn_name") for test in found] == ["solve"]
    assert found == tests


@pytest.mark.parametrize("tests", ["[]", '{"inputs": [], "outputs": [], "fn_name": "f"}'])
def test_problems_without_tests_are_counted(tests):
    assert rows.contest("x")(record(problem="p", tests=tests), "train") == rows.NO_TESTS


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("[", "line 7: 'tests' is not JSON"),
        ("3", "line 7: 'tests' is not a list"),
        ('{"inputs": [1], "outputs": []}', "inputs and outputs of one length"),
        ('[{"input": "1"}]', "not a list of tests with input and output"),
        ('[{"testtype": "functional", "input": "1", "output": "1"}]', "'metadata' does not name"),
    ],
)
def test_unusable_tests(tests, message):
    with pytest.raises(InputError, match=message):
        rows.contest("x")(record(problem="p", tests=tests), "train")


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def lcb(private):
    return record(
        question_content="p",
        question_id="abc_1",
        starter_code="",
        difficulty="easy",
        contest_date="2024-08-03T00:00:00",
        metadata="{}",
        public_test_cases=json.dumps([{"input": "1", "output": "2", "testtype": "stdin"}]),
        private_test_cases=private,
    )


def test_livecodebench_tests_are_unpacked():
    hidden = json.dumps([{"input": "3", "output": "4", "testtype": "stdin"}])
    for private in (hidden, packed(hidden)):
        row = rows.livecodebench(lcb(private), "test")
        assert isinstance(row, dict)
        assert [test["input"] for test in json.loads(row["tests"])] == ["1", "3"]
        assert (row["level"], row["task_id"]) == ("easy", "abc_1")


class _Evil:
    def __reduce__(self):
        return (print, ("a pickle ran a program",))


@pytest.mark.parametrize("private", [packed(_Evil()), "no base64", packed("no json"), packed([1])])
def test_a_pickle_runs_nothing(private, capsys):
    with pytest.raises(InputError, match="neither JSON nor packed"):
        rows.livecodebench(lcb(private), "test")
    assert "ran a program" not in capsys.readouterr().out
