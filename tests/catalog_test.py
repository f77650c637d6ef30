"""Public data sets: what becomes of their real files, and of what may be wrong with any file."""

import base64
import contextlib
import gzip
import hashlib
import http.server
import json
import pickle
import signal
import subprocess
import sys
import threading
import time
import zlib

import pytest

from flowrl_jax import tasks
from flowrl_jax.datasets import catalog, cleaning, download, files, rows
from flowrl_jax.datasets.pipeline import DataConfig, PromptSource
from flowrl_jax.errors import InputError


def source(data_dir, split="train", **options):
    config = DataConfig(
        builder="prompts", data_dir=str(data_dir), split=split, shuffle=False, options=options
    )
    return PromptSource(config)


def all_rows(*arguments, **options):
    found = source(*arguments, **options)
    return found.rows(0, len(found))


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return str(path)


def numbered(count):
    return [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(count)]


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
            listed = json.loads(row["tests"])
            assert listed and {test["type"] for test in listed} <= {"stdin", "assert"}
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
    assert task.canonical("(10-6)*5+4", row) is not None
    assert task.canonical("(10-6)*5-4", row) is None


def run(program):
    """What a program's namespace holds in the end; of reference programs only."""
    names = {}
    exec(program, names)
    return names


@pytest.mark.parametrize(
    ("name", "path"), [("humaneval", "humaneval/HumanEval.jsonl.gz"), ("mbpp", "mbpp/mbpp.jsonl")]
)
def test_references_pass_their_tests(shared_data, tmp_path, name, path):
    found = all_rows(tmp_path, "test", test=name, test_file=str(shared_data / path))
    for row in found[:20]:
        names = run(row["solution"])
        assert callable(names[row["entry_point"]])
        for test in json.loads(row["tests"]):
            exec(test["code"], names)
        with pytest.raises(Exception):  # noqa: B017
            names[row["entry_point"]] = lambda *_: "no such result"
            for test in json.loads(row["tests"]):
                exec(test["code"], names)


def record(**fields):
    return files.Record("f.jsonl line 7", fields)


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
    "taco": (
        {"inputs": ["1\n", ["2", "3"]], "outputs": ["a\n", ["b", "c"]]},
        {},
        "",
        [("stdin", "1\n", "a\n"), ("stdin", "2\n3", "b\nc")],
    ),
    "taco call": (
        {"fn_name": "f", "inputs": [[1, [2]]], "outputs": [[3]]},
        {},
        "f",
        [("call", [1, [2]], 3)],
    ),
    "primeintellect": (
        [{"type": "stdin_stdout", "fn_name": None, "input": "1\n", "output": "2\n"}],
        {},
        "",
        [("stdin", "1\n", "2\n")],
    ),
    "primeintellect call": (
        [{"type": "function_call", "fn_name": "f", "input": [1, 2], "output": [3]}],
        {},
        "f",
        [("call", [1, 2], 3)],
    ),
    "livecodebench": (
        [{"testtype": "stdin", "input": "1", "output": "2"}],
        {"func_name": None},
        "",
        [("stdin", "1", "2")],
    ),
    "livecodebench call": (
        [{"testtype": "functional", "input": '"ab"\n[1, 2]', "output": "true"}],
        {"func_name": "solve"},
        "solve",
        [("call", ["ab", [1, 2]], True)],
    ),
}


@pytest.mark.parametrize("case", CONTESTS)
def test_every_source_of_deepcoder(case):
    tests, metadata, entry_point, wanted = CONTESTS[case]
    fields = {"problem": "p", "tests": json.dumps(tests), "metadata": json.dumps(metadata)}
    row = rows.contest("deepcoder")(record(**fields, starter_code="class Solution:"), "train")
    assert isinstance(row, dict)
    assert (row["data_source"], row["entry_point"]) == (case.split()[0], entry_point)
    assert row["starter_code"] == "class Solution:"
    found = [(test["type"], test["input"], test["output"]) for test in json.loads(row["tests"])]
    assert found == wanted


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("[", "line 7: 'tests' is not JSON"),
        ("3", "line 7: 'tests' is not a list"),
        ('{"inputs": [1], "outputs": []}', "inputs and outputs of one length"),
        ('[{"input": "1"}]', "no input or no output"),
        ('[{"testtype": "functional", "input": "1", "output": "1"}]', "that nothing names"),
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


def forms(folder, records):
    """The same records as every kind of file."""
    import pyarrow
    import pyarrow.parquet

    columns = list(records[0])
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", records)
    (folder / "b.json").write_text(json.dumps(records, indent=2))
    (folder / "c.json").write_text("".join(json.dumps(r) + "\n" for r in records))
    quoted = [[str(r[c]).replace('"', '""') for c in columns] for r in records]
    lines = [columns, *quoted]
    (folder / "d.csv").write_text(
        "".join(",".join(f'"{v}"' for v in line) + "\n" for line in lines)
    )
    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, folder / "e.parquet", row_group_size=7)
    for path in list(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return sorted(folder.iterdir())


def test_rows_do_not_depend_on_the_form_of_the_file(tmp_path):
    records = [
        {"prompt": f'Größe, "{i}"\nof x?', "answer": str(i), "level": f"l{i}"} for i in range(150)
    ]
    paths = forms(tmp_path / "files", records)
    assert len(paths) == 10
    wanted = [{**r, "prompt_id": i} for i, r in enumerate(records)]
    for i, path in enumerate(paths):
        assert all_rows(tmp_path / str(i), train_file=str(path)) == wanted, path.name
    # A folder with a file of another name for each half.
    half = tmp_path / "halves"
    half.mkdir()
    write_jsonl(half / "my_train-2.jsonl", records[70:90])
    write_jsonl(half / "my_train-10.jsonl", records[90:])
    write_jsonl(half / "my_train-1.jsonl", records[:70])
    write_jsonl(half / "my_test.jsonl", numbered(3))
    (half / "README.md").write_text("train")
    assert all_rows(tmp_path / "h", train_file=str(half)) == wanted
    assert len(source(tmp_path / "h", "test", test_file=str(half))) == 3


def test_a_folder_without_the_split(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", numbered(2))
    with pytest.raises(InputError, match=r"no file for split train \(files: test.jsonl\)"):
        source(tmp_path / "d", train_file=str(tmp_path))


def test_columns_by_config(tmp_path):
    records = [{"q": "1+1?", "meta": {"gold": 2, "n": [1, 1]}, "left": "x", "id": "a"}]
    path = write_jsonl(tmp_path / "m.jsonl", records)
    options = {"prompt_field": "q", "answer_field": "meta.gold"}
    columns = {"numbers": "meta.n", "task_id": "id"}
    for given in (columns, tuple(columns.items())):
        row = all_rows(tmp_path, train_file=path, columns=given, **options)[0]
        assert row == {
            "prompt": "1+1?",
            "answer": "2",
            "numbers": [1, 1],
            "task_id": "a",
            "meta": records[0]["meta"],
            "left": "x",
            "prompt_id": 0,
        }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "prompt,answer\na,1\nb\n", "m.csv line 3: 1 values for 2 columns"),
        ("m.csv", "prompt,prompt\na,1\n", "m.csv line 1: a column is named twice"),
        ("m.csv", "question,answer\na,1\n", r"line 2: no field 'prompt' \(fields: question"),
        ("m.csv", 'prompt,answer\n"a,1\n', "m.csv line 2: not CSV"),
        ("m.csv", b"prompt,answer\n\xff\xff,1\n", "m.csv: not UTF-8"),
        ("m.json", '[{"prompt": "a", "answer": "1"}, 3]', "m.json row 1: a JSON int"),
        ("m.json", '[{"prompt": "a"}]', "m.json row 0: no field 'answer'"),
        ("m.json", '[{"prompt": "a"', "m.json: not JSON"),
        ("m.jsonl", '{"prompt": "a", "answer": null}\n', "line 1: 'answer' is null"),
        ("m.jsonl.gz", b"\x1f\x8b\x08 cut short", "m.jsonl.gz: cannot be read after row 0"),
        ("m.jsonl.gz", b"no gzip", "cannot be read after row 0"),
    ],
)
def test_errors_name_file_row_and_column(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        source(tmp_path / "d", train_file=str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "gsm9k"}, "did you mean 'gsm8k'"),
        ({"train": "aime24"}, "'aime24': has no split 'train'; it has test"),
        ({"train_file": "x.jsonl", "overlap": 2.0}, "a share"),
        ({"train_file": "x.jsonl", "ngram": 0}, "give 1 word or more"),
        ({"train_file": "x.jsonl", "min_chars": 5, "max_chars": 4}, "not a range"),
        ({"train_file": "x.jsonl", "columns": {"prompt": "q"}}, r"columns\['prompt'\] is taken"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        source(tmp_path, **options)


def test_wrong_evaluation_sets(tmp_path):
    path = write_jsonl(tmp_path / "m.jsonl", numbered(2))
    with pytest.raises(InputError, match="did you mean .aime2"):
        source(tmp_path, train_file=path, decontaminate=["aime42"])
    with pytest.raises(InputError, match="there is no split test"):
        source(tmp_path, train_file=path, decontaminate=["test"])


def test_planted_rows_are_dropped_and_counted(tmp_path, capsys):
    words = "a farmer who lives by the river sells seven brown hens and twelve grey geese to"
    train = [
        *numbered(20),
        {"prompt": "What  is 3 + 3? ", "answer": "6"},  # same but for white space
        {"prompt": "WHAT is $3 + 3$?", "answer": "7"},  # and case, with another answer
        {"prompt": "?", "answer": "1"},
        {"prompt": "x" * 500, "answer": "1"},
        {"prompt": "compute the SUM, of 17 and 4.", "answer": "21"},
        {"prompt": f"Long ago {words} his aunt. How many?", "answer": "19"},
        {"prompt": "A farmer who lives by the river sells seven hens to his aunt.", "answer": "7"},
    ]
    test = [
        {"prompt": "Compute the sum of 17 and 4.", "answer": "21"},
        {"prompt": f"{words} the mayor. How many animals?".capitalize(), "answer": "19"},
        *[{"prompt": "Same?", "answer": "y"}] * 2,
    ]
    options = {
        "train_file": write_jsonl(tmp_path / "train.jsonl", train),
        "test_file": write_jsonl(tmp_path / "test.jsonl", test),
        "decontaminate": ["test"],
        "min_chars": 3,
        "max_chars": 200,
        "overlap": 0.2,
    }
    found = all_rows(tmp_path, **options)
    assert [row["prompt"] for row in found] == [row["prompt"] for row in [*train[:20], train[-1]]]
    told = capsys.readouterr().err
    assert (
        "data: train: kept 21 of 27 rows (1 duplicate, 1 duplicate with another answer,"
        " 1 longer than 200 characters, 1 same words as in test, 1 shares 13 words with test,"
        " 1 shorter than 3 characters)"
    ) in told
    # The prepared data remember; nothing is left out of test.
    (meta,) = tmp_path.rglob("metadata.json")
    counts = json.loads(meta.read_text())
    assert counts["train"]["kept"] == 21 and sum(counts["train"]["dropped"].values()) == 6
    assert counts["test"] == {"kept": 4, "dropped": {}}
    # Each rule can be left out.
    kept = {"deduplicate": False, "decontaminate": [], "min_chars": 0, "max_chars": 0}
    assert len(source(tmp_path, **options | kept)) == len(train)


def test_nothing_left(tmp_path):
    path = write_jsonl(tmp_path / "m.jsonl", numbered(5))
    with pytest.raises(InputError, match=r"no row is left \(5 longer than 3 characters\)"):
        source(tmp_path, train_file=path, max_chars=3)


def test_duplicates_in_great_number():
    problems = [{"prompt": f"Problem {i} " + "x" * 300, "answer": "1"} for i in range(500)]
    cleaner = cleaning.Cleaner(cleaning.Cleaning())
    found = [row["prompt"] for row in cleaner.clean(problems[i % 500] for i in range(50_000))]
    assert found == [problem["prompt"] for problem in problems]
    assert (cleaner.kept, dict(cleaner.dropped)) == (500, {"duplicate": 49_500})


def test_short_problems_are_compared_whole():
    evaluation = cleaning.Evaluation({"e": ["Find 7!", ""]}, ngram=13, overlap=0.0)
    assert evaluation.found("find  $7!$") == "same as in e"
    assert evaluation.found("Find 7.") is not None
    assert evaluation.found("Find 7 and then 8.") is None
    assert evaluation.found("...") is None


class _Server(http.server.BaseHTTPRequestHandler):
    content = b""
    asked = 0

    def do_GET(self):
        type(self).asked += 1
        if "missing" in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        if "endless" not in self.path:
            self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        cut = len(self.content) // 2 if "cut" in self.path or "slow" in self.path else None
        self.wfile.write(self.content[:cut])
        if "slow" in self.path:
            self.wfile.flush()
            time.sleep(30)

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    server.daemon_threads = True
    _Server.content = "".join(json.dumps(row) + "\n" for row in numbered(200)).encode()
    _Server.asked = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_url_is_downloaded_once(web, tmp_path):
    digest = hashlib.sha256(_Server.content).hexdigest()
    options = {"train_file": f"{web}/d/m.jsonl?download=true", "train_sha256": digest}
    wanted = [{**row, "prompt_id": i} for i, row in enumerate(numbered(200))]
    assert all_rows(tmp_path, **options) == wanted
    assert all_rows(tmp_path, **options) == wanted
    assert _Server.asked == 1
    (path,) = (tmp_path / "downloads").rglob("*.jsonl")
    assert path.read_bytes() == _Server.content
    # Equal content has one name, from wherever it came.
    assert all_rows(tmp_path, train_file=str(path), train_sha256=digest) == wanted
    assert len(list((tmp_path / "prompts").iterdir())) == 1


@pytest.mark.parametrize(
    ("path", "sha256", "message"),
    [
        ("m.jsonl", "0" * 64, r"has sha256 \w+..., not 000000000000...: another file"),
        ("missing.jsonl", "", "404 .*; place the file at .*missing.jsonl"),
        ("cut.jsonl", "", "cannot be downloaded .*; place the file at .*cut.jsonl"),
        ("", "", "names no file"),
    ],
)
def test_failed_downloads_leave_nothing(web, tmp_path, path, sha256, message):
    with pytest.raises(InputError, match=message) as error:
        source(tmp_path, train_file=f"{web}/{path}", train_sha256=sha256)
    assert "\n" not in str(error.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_no_network(tmp_path):
    with pytest.raises(InputError, match=r"cannot be downloaded .*refused.*place the file at") as e:
        source(tmp_path, train_file="http://127.0.0.1:9/m.jsonl")
    assert "\n" not in str(e.value)


def test_a_placed_file_counts_as_downloaded(shared_data, tmp_path):
    folder = tmp_path / "downloads" / "aime24"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_bytes((shared_data / "aime24" / "test.jsonl").read_bytes())
    assert len(source(tmp_path, "test", test="aime24")) == 30
    (folder / "test.jsonl").write_text('{"problem": "p", "answer": "1"}\n')
    with pytest.raises(InputError, match="is not the file its sha256 af2b8bd2aa91"):
        download.fetched(
            catalog.SOURCES["aime24"].files["test"][0].url, folder, sha256="af2b8bd2aa91"
        )
    # What was prepared stays usable without the file.
    (folder / "test.jsonl").unlink()
    assert len(source(tmp_path, "test", test="aime24")) == 30


def test_a_killed_preparation_leaves_nothing_half_written(web, tmp_path):
    def start(url):
        program = (
            "from tests.catalog_test import source\n"
            f"source({str(tmp_path)!r}, train_file={url!r})\n"
        )
        return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)

    process = start(f"{web}/slow/m.jsonl")
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (partial,) = tmp_path.rglob("*.partial")
    folder = partial.parent
    assert not (folder / "m.jsonl").exists()
    # The next attempt starts anew and clears away what the killed one left.
    with contextlib.suppress(InputError):
        download.fetched(f"{web}/missing/m.jsonl", folder)
    assert list(folder.iterdir()) == []
    download.fetched(f"{web}/m.jsonl", folder)
    assert [p.name for p in folder.iterdir()] == ["m.jsonl"]
    assert (folder / "m.jsonl").read_bytes() == _Server.content
