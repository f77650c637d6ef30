"""Rows of files of one's own: forms, columns, errors, what is left out, downloads."""

import contextlib
import gzip
import hashlib
import http.server
import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from flowrl_jax.datasets import catalog, cleaning, download
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
        {"prompt": f'Größe, "{i}"\r\nof x?', "answer": str(i), "level": f"l{i}"} for i in range(150)
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


def test_a_share_of_a_problem_counts():
    words = [f"w{i}" for i in range(32)]
    text = " ".join(words)  # 20 runs of 13 words
    for shared, dropped in ((22, True), (21, False), (12, False)):  # 10, 9 and no runs
        row = " ".join(["but", *words[:shared], "then"])
        evaluation = cleaning.Evaluation({"e": [text]}, ngram=13, overlap=0.5)
        assert (evaluation.found(row) is not None) == dropped
        one = cleaning.Evaluation({"e": [text]}, ngram=13, overlap=0.0)
        assert (one.found(row) is not None) == (shared > 12)
    # A problem of as many words as a run has is found within a longer one.
    evaluation = cleaning.Evaluation({"e": [" ".join(words[:13])]}, ngram=13, overlap=0.5)
    assert evaluation.found(f"now {text}") == "shares 13 words with e"


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

    def log_message(self, format, *args):
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


@pytest.mark.slow
def test_a_killed_preparation_leaves_nothing_half_written(web, tmp_path):
    def start(url):
        program = (
            "from tests.prompts_test import source\n"
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
