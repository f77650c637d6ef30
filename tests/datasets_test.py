"""Data sets: what the builders write, and the row sequence that comes out."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from flowrl_jax import tasks
from flowrl_jax.datasets import countdown, files, stories
from flowrl_jax.datasets.pipeline import DataConfig, PromptSource
from flowrl_jax.errors import InputError
from flowrl_jax.tasks import countdown_solver as solver

SMALL = {"number_max": 6, "target_max": 20, "train": 40, "test": 10, "sizes": [3]}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


def source(data_dir, **config):
    return PromptSource(DataConfig(data_dir=data_dir, **{"options": SMALL, **config}))


def test_rows_are_the_problems(data_dir):
    problems = countdown.problems(countdown.CountdownData(**{**SMALL, "sizes": (3,)}))
    assert {split: len(part) for split, part in problems.items()} == {"train": 40, "test": 10}
    for split, part in problems.items():
        rows = source(data_dir, split=split, shuffle=False).rows(0, len(part))
        for i, (row, problem) in enumerate(zip(rows, part, strict=True)):
            assert row == {
                "numbers": list(problem.numbers),
                "target": problem.target,
                "solutions": list(problem.solutions),
                "prompt": "",
                "prompt_id": i,
            }
            assert all(type(n) is int for n in [*row["numbers"], row["target"], row["prompt_id"]])
            assert all(type(text) is str for text in row["solutions"])


@pytest.mark.parametrize(
    "data",
    [
        countdown.CountdownData(train=300, test=100, min_solutions=3),
        countdown.CountdownData(sizes=(3, 4), number_min=2, train=300, test=100, seed=5),
        # Too many multisets to list: they are drawn one by one.
        countdown.CountdownData(number_max=100, target_min=10, target_max=99, train=200, test=50),
        countdown.CountdownData(max_value=60, train=300, test=100),
    ],
)
def test_generated_problems_keep_their_promises(data):
    splits = countdown.problems(data)
    assert countdown.problems(data) == splits
    seen = [(p.numbers, p.target) for part in splits.values() for p in part]
    assert len(set(seen)) == len(seen) == data.train + data.test
    assert (len(splits["train"]), len(splits["test"])) == (data.train, data.test)
    for problem in splits["test"]:
        assert len(problem.numbers) in data.sizes
        assert list(problem.numbers) == sorted(problem.numbers)
        assert data.number_min <= problem.numbers[0] <= problem.numbers[-1] <= data.number_max
        assert data.target_min <= problem.target <= data.target_max
        assert len(problem.solutions) >= data.min_solutions
        limit = data.max_value or None
        assert problem.solutions == solver.solve(problem.numbers, problem.target, max_value=limit)


def test_another_seed_gives_other_problems():
    first, second = (
        countdown.problems(countdown.CountdownData(train=100, test=20, seed=s)) for s in (0, 1)
    )
    assert first["test"] != second["test"]


def test_generation_is_fast_and_done_once(tmp_path):
    start = time.perf_counter()
    source(str(tmp_path), options={})
    first = time.perf_counter() - start
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.array_record*")}
    source(str(tmp_path), options={})
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.array_record*")} == files
    assert len(files) == 2 and first < 30


def test_each_epoch_is_another_permutation(data_dir):
    rows = source(data_dir, seed=3)
    size = len(rows)
    epochs = [[r["prompt_id"] for r in rows.rows(e * size, size)] for e in range(4)]
    assert all(sorted(ids) == list(range(size)) for ids in epochs)
    assert len({tuple(ids) for ids in epochs}) == 4
    assert all(ids != list(range(size)) for ids in epochs)


def test_rows_depend_on_seed_and_position_alone(data_dir):
    rows = source(data_dir, seed=3)
    sequence = rows.rows(0, 100)
    assert source(data_dir, seed=3).rows(0, 100) == sequence
    assert source(data_dir, seed=4).rows(0, 100) != sequence
    # Random access, in any order and any cut, is the sequence.
    for i in np.random.default_rng(0).permutation(100)[:20]:
        assert rows.rows(int(i), 1) == [sequence[i]]
    assert rows.rows(0, 7) + rows.rows(7, 50) + rows.rows(57, 43) == sequence
    # A new process that starts at 37, as after a resume, continues with row 37.
    assert source(data_dir, seed=3).rows(37, 63) == sequence[37:]
    # Two hosts that take turns read together what one host reads.
    together = []
    for step in range(5):
        for host in range(2):
            together += source(data_dir, seed=3).rows(step * 20 + host * 10, 10)
    assert together == sequence


def test_prompt_id_is_the_index_in_the_split(data_dir):
    ordered = source(data_dir, shuffle=False).rows(0, 40)
    assert [row["prompt_id"] for row in ordered] == list(range(40))
    for row in source(data_dir, seed=1).rows(0, 60):
        assert row == ordered[row["prompt_id"]]


def test_without_shuffle_the_order_repeats(data_dir):
    rows = source(data_dir, split="test", shuffle=False)
    assert rows.rows(7, 10) == rows.rows(0, 20)[7:17]
    assert rows.rows(10, 10) == rows.rows(0, 10)


def test_slices_of_a_split(data_dir):
    rows = source(data_dir, split="train[10:15]", shuffle=False)
    whole = source(data_dir, shuffle=False).rows(10, 5)
    assert len(rows) == 5
    assert [r["solutions"] for r in rows.rows(0, 5)] == [r["solutions"] for r in whole]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"split": "trian"}, "did you mean 'train'"),
        ({"split": "train[a:b]"}, "not a slice"),
        ({"split": "train[5:5]"}, "empty"),
        ({"builder": "countdow"}, "did you mean 'countdown'"),
        ({"options": {"trian": 5}}, "did you mean 'train'"),
        ({"options": {"train": "5"}}, "give a int"),
        ({"options": {"sizes": [1]}}, "sizes from 2 to 6"),
        ({"options": {"number_min": 5, "number_max": 4}}, "not a range"),
        ({"options": {"train": 0, "test": 0}}, "not both 0"),
        ({"options": {**SMALL, "train": 10**6}}, "problems exist; ask for fewer"),
        ({"seed": -1}, "from 0 to"),
        ({"builder": "prompts", "options": {}}, "give train_file or test_file"),
        ({"builder": "prompts", "options": {"train_file": "none.jsonl"}}, "no such file"),
        ({"builder": "stories", "options": {"words": 9}}, "give 1 to 4"),
        ({"builder": "stories", "options": {"train": 10**7}}, "rows exist; ask for fewer"),
    ],
)
def test_wrong_settings_are_one_clear_line(data_dir, config, message):
    with pytest.raises(InputError, match=message) as error:
        source(data_dir, **config)
    assert "\n" not in str(error.value)


def test_negative_position(data_dir):
    with pytest.raises(ValueError, match="position=-1"):
        source(data_dir).rows(-1, 1)


def test_a_failed_preparation_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputError):
        source(str(tmp_path), options={**SMALL, "train": 10**6})
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return str(path)


def test_own_jsonl(tmp_path):
    records = [
        {"prompt": "1+1?", "answer": "2", "level": 3, "tags": ["a", {"b": None}]},
        {"prompt": "Größe?", "answer": 5.5},
        {
            "prompt": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "you"}],
            "answer": ["x"],
        },
    ]
    path = write_jsonl(tmp_path / "mine.jsonl", records)
    options = {"train_file": path}
    rows = source(str(tmp_path), builder="prompts", options=options, shuffle=False).rows(0, 3)
    assert rows == [
        {**records[0], "prompt_id": 0},
        {"prompt": "Größe?", "answer": "5.5", "prompt_id": 1},
        {"prompt": "Hi\nyou", "answer": '["x"]', "prompt_id": 2},
    ]


def test_changed_file_is_read_again(tmp_path):
    for answer in ("first", "second"):
        path = write_jsonl(tmp_path / "mine.jsonl", [{"prompt": "p", "answer": answer}])
        rows = source(str(tmp_path), builder="prompts", options={"train_file": path})
        assert rows.rows(0, 1)[0]["answer"] == answer


def test_own_field_names_and_no_answers(tmp_path):
    path = write_jsonl(tmp_path / "m.jsonl", [{"q": "Why?", "words": ["a"]}])
    options = {"test_file": path, "prompt_field": "q", "answer_field": ""}
    row = source(str(tmp_path), builder="prompts", options=options, split="test").rows(0, 1)[0]
    assert row == {"prompt": "Why?", "answer": "", "words": ["a"], "prompt_id": 0}


def test_own_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["a", "b"], "answer": ["1", "2"], "n": [[1, 2], [3]]})
    pyarrow.parquet.write_table(table, tmp_path / "mine.parquet")
    options = {"train_file": str(tmp_path / "mine.parquet")}
    rows = source(str(tmp_path), builder="prompts", options=options, shuffle=False).rows(0, 2)
    assert rows[1] == {"prompt": "b", "answer": "2", "n": [3], "prompt_id": 1}
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="not a parquet file"):
        source(
            str(tmp_path), builder="prompts", options={"train_file": str(tmp_path / "bad.parquet")}
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"m\.jsonl: has no records"),
        ("\n\n", r"m\.jsonl: has no records"),
        ('{"prompt": "a", "answer": "1"}\n{"prompt": "b"', r"m\.jsonl line 2: not JSON"),
        ('{"prompt": "a", "answer": "1"}\n\n[1]\n', r"m\.jsonl line 3: a JSON list"),
        ('{"answer": "1"}\n', r"line 1: no field 'prompt' \(fields: answer\)"),
        ('{"prompt": "a"}\n', r"line 1: no field 'answer' \(fields: prompt\)"),
        ('{"prompt": "", "answer": "1"}\n', "line 1: 'prompt' is empty"),
        ('{"prompt": 3, "answer": "1"}\n', "neither text nor a list of messages"),
        ('{"prompt": "a", "answer": "1", "prompt_id": 4}\n', "'prompt_id' is taken"),
        (
            '{"prompt": "a", "answer": "\\ud800"}\n',
            "line 1: 'answer' has half a character .U.D800",
        ),
        (b'{"prompt": "\xff"}\n', "line 1: not JSON"),
    ],
)
def test_unusable_files(tmp_path, content, message):
    path = tmp_path / "m.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        source(str(tmp_path), builder="prompts", options={"train_file": str(path)})
    assert "\n" not in str(error.value)


def test_unknown_kind_of_file(tmp_path):
    (tmp_path / "m.txt").write_text("prompt,answer\n")
    with pytest.raises(InputError, match=r"give \.jsonl or \.parquet"):
        next(files.read_records(str(tmp_path / "m.txt")))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"nums": [1, 2]}, "line 1: no field 'target'"),
        ({"target": 3}, "line 1: no field 'numbers'"),
        ({"nums": [1, -2], "target": 3}, "integers >= 0"),
        ({"nums": [1, 2.5], "target": 3}, "integers >= 0"),
        ({"nums": [1], "target": 3}, "from 2 to 6"),
        ({"nums": [1, 2], "target": "3"}, "target='3'"),
    ],
)
def test_unusable_countdown_files(tmp_path, record, message):
    path = write_jsonl(tmp_path / "c.jsonl", [record])
    with pytest.raises(InputError, match=message):
        source(str(tmp_path), options={"train_file": path})


def test_overlapping_countdown_files(tmp_path):
    train = [{"nums": [2, 1], "target": 3}, {"nums": [4, 5], "target": 9}]
    train_file = write_jsonl(tmp_path / "train.jsonl", train)
    test_file = write_jsonl(tmp_path / "test.jsonl", [{"nums": [1, 2], "target": 3}])
    options = {"train_file": train_file, "test_file": test_file}
    with pytest.raises(InputError, match="1 problems of train are also in test"):
        source(str(tmp_path), options=options)
    rows = source(str(tmp_path), options={**options, "drop_overlap": True, "solve": True})
    assert len(rows) == 1
    assert rows.rows(0, 1)[0] == {
        "numbers": [4, 5],
        "target": 9,
        "solutions": ["4+5"],
        "prompt": "",
        "prompt_id": 0,
    }


def test_real_countdown_rows(shared_data, tmp_path):
    folder = shared_data / "countdown"
    options = {
        "train_file": str(folder / "train.parquet"),
        "test_file": str(folder / "test.parquet"),
        "drop_overlap": True,
    }
    train = source(str(tmp_path), options=options)
    # 8001 rows, of which 5 are also in test.
    assert len(train) == 7996
    assert len(source(str(tmp_path), options=options, split="test")) == 2001
    task = tasks.build(tasks.TaskConfig("countdown", {"prompt_style": "text"}))
    rng = np.random.default_rng(0)
    for row in train.rows(0, 50):
        assert (
            str(row["numbers"]) in task.prompt(row) and f"equals {row['target']}." in row["prompt"]
        )
        shown = task.demonstration(row, rng)
        assert task.judge(f"I think. </think> <answer> {shown} </answer>", row).reward == 1.0


def test_story_rows(tmp_path):
    splits = stories.rows(stories.StoriesData(train=50, test=20))
    seen = [(row["prompt"], tuple(row["words"])) for part in splits.values() for row in part]
    assert len(set(seen)) == 70
    rows = source(str(tmp_path), builder="stories", options={"train": 50, "test": 20})
    row = rows.rows(0, 1)[0]
    assert row == {**splits["train"][row["prompt_id"]], "prompt_id": row["prompt_id"]}
    task = tasks.build(tasks.TaskConfig("stories"))
    assert task.judge(" ".join(row["words"]) + ".", row).reward == 1.25


@pytest.mark.slow
def test_processes_may_prepare_at_once(tmp_path):
    # Imports come first and a line on stdin is the starting signal, so that they truly race.
    program = (
        "import sys, json, grain, flowrl_jax.datasets.countdown\n"
        "from flowrl_jax.datasets.pipeline import DataConfig, PromptSource\n"
        f"config = DataConfig(data_dir={str(tmp_path)!r}, options={SMALL!r})\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(json.dumps(PromptSource(config).rows(0, 5)))\n"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    results = [worker.communicate(timeout=60)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert results[0] == results[1] == results[2]
    assert json.loads(results[0]) == source(str(tmp_path)).rows(0, 5)
    assert not [p for p in tmp_path.rglob("*incomplete*")]


def test_importing_is_light():
    # Tasks and the pipeline module are imported by every entry point, data set tools only by use.
    program = (
        "import sys; import flowrl_jax.tasks, flowrl_jax.datasets.pipeline; "
        "print(*(m for m in ('tensorflow_datasets', 'grain', 'tensorflow', 'jax', 'pyarrow') "
        "if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr


def test_tensorflow_is_never_imported(data_dir):
    source(data_dir).rows(0, 2)
    assert "tensorflow" not in sys.modules
