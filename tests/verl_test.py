"""Code problems in verl's form, as the released FlowRL's training data have them."""

import json

import pytest

from flowrl_jax import tasks
from flowrl_jax.datasets.pipeline import DataConfig, PromptSource
from flowrl_jax.errors import InputError


def source(data_dir, **options):
    config = DataConfig(builder="prompts", data_dir=str(data_dir), shuffle=False, options=options)
    return PromptSource(config)


def all_rows(data_dir, **options):
    found = source(data_dir, **options)
    return found.rows(0, len(found))


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


PAIRS = {"inputs": ["3\n", "4\n"], "outputs": ["9\n", "16\n"]}
CALLS = [{"input": "3", "output": "9", "testtype": "functional", "metadata": {"func_name": "f"}}]
SQUARE = "n = int(input())\nprint(n * n)"
FUNCTION = "def f(n):\n    return n * n"
IDLE = "def check(f):\n    assert f(1)"
ONLY_NAMED = (f"{IDLE}\n# check(f)", f'{IDLE}\nprint("check(f)")', f"{IDLE}\n    check(f)")
# What a ground truth may be, its source, and a program that passes it.
TRUTHS = {
    "pairs": (json.dumps(PAIRS), "taco", SQUARE),
    "calls": (json.dumps({"inputs": [[3]], "outputs": [[9]], "fn_name": "f"}), "taco", FUNCTION),
    "livecodebench": (json.dumps(CALLS), "livecodebench", FUNCTION),
    "assertions": (json.dumps(["assert f(3) == 9", "assert f(-1) == 1"]), "own", FUNCTION),
    "code": ("def check(g):\n    assert g(3) == 9\n\ncheck(f)\n", "humanevalplus", FUNCTION),
    "call within": (f"{IDLE} == 1\n\nfor g in (f,): check(g)\n", "humanevalplus", FUNCTION),
    "text of code": (json.dumps("assert f(3) == 9"), "humanevalplus", FUNCTION),
}


def verl_records():
    """Rows as the released FlowRL's files have them."""
    return [
        {
            "data_source": source,
            "prompt": [{"role": "user", "content": f"Write a program for {name}."}],
            "ability": "code",
            "reward_model": {"ground_truth": truth, "style": "rule"},
            "extra_info": {"index": number, "split": "train", "reference": None},
        }
        for number, (name, (truth, source, _)) in enumerate(TRUTHS.items())
    ]


def write_parquet(path, records):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)


def test_code_rows_in_verls_form(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", verl_records())
    found = all_rows(tmp_path, train="flowrl_code", train_file=path)
    assert [row["prompt"] for row in found] == [f"Write a program for {n}." for n in TRUTHS]
    task = tasks.build(tasks.TaskConfig("code", {"wrap": False}))
    try:
        for row, (truth, source, program) in zip(found, TRUTHS.values(), strict=True):
            assert row.keys() == {"prompt", "answer", "tests", "data_source", "prompt_id"}
            assert (row["tests"], row["data_source"], row["answer"]) == (truth, source, "")
            assert task.prompt(row) == row["prompt"]
            assert task.judge(f"```python\n{program}\n```", row).outcome == "correct"
            worse = program.replace("n * n", "n + n")
            assert task.judge(f"```python\n{worse}\n```", row).reward == 0.0
    finally:
        task.close()


def test_code_rows_by_other_names(tmp_path):
    records = [
        {"messages": r["prompt"], "origin": r["data_source"],
         "reward": {"tests": r["reward_model"]["ground_truth"], "style": "rule"}}
        for r in verl_records()
    ]  # fmt: skip
    path = write_parquet(tmp_path / "m.parquet", records)
    options = {"prompt_field": "messages", "columns": {"data_source": "origin"}}
    found = all_rows(tmp_path, train_file=path, tests_field="reward.tests", **options)
    named = write_parquet(tmp_path / "train.parquet", verl_records())
    expected = all_rows(tmp_path, train="flowrl_code", train_file=named)
    # What stood beside the tests stays, and the tests are there once.
    assert found == [{**row, "reward": {"style": "rule"}} for row in expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward_model": {"ground_truth": "{"}}, "'reward_model.ground_truth' holds no tests"),
        ({"reward_model": {"ground_truth": "[3]"}}, "'reward_model.ground_truth' holds no tests"),
        (
            {"reward_model": {"ground_truth": '{"inputs": [1], "outputs": []}'}},
            "'reward_model.ground_truth' holds no tests",
        ),
        (
            {"reward_model": {"ground_truth": json.dumps([{**CALLS[0], "metadata": {}}])}},
            "no metadata.func_name",
        ),
        *(
            ({"reward_model": {"ground_truth": truth}}, "do not call it")
            for truth in (IDLE, json.dumps([IDLE]), json.dumps({"test": IDLE}), *ONLY_NAMED)
        ),
        ({"reward_model": {"style": "rule"}}, "no field 'reward_model.ground_truth'"),
        ({"data_source": None}, "'data_source'=None"),
        ({"prompt": 3}, "'prompt' is neither text nor"),
        ({"prompt": []}, "'prompt' is empty"),
    ],
)  # fmt: skip
def test_unusable_code_rows_name_file_row_and_column(tmp_path, change, message):
    good = verl_records()[0]
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [good, {**good, **change}])
    with pytest.raises(InputError, match=message) as error:
        source(tmp_path / "d", train="flowrl_code", train_file=str(path))
    assert "train.jsonl line 2: " in str(error.value) and "\n" not in str(error.value)
    if "reward_model" in change:
        with pytest.raises(InputError, match=message):
            source(tmp_path / "d", train_file=str(path), tests_field="reward_model.ground_truth")


def test_code_rows_without_tests_are_counted(tmp_path, capsys):
    good = verl_records()[0]
    none = ("", "[]", '{"inputs": [], "outputs": []}', None)
    rows = [good, *({**good, "reward_model": {"ground_truth": truth}} for truth in none)]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    assert len(source(tmp_path / "d", train="flowrl_code", train_file=path)) == 1
    assert "kept 1 of 5 rows (4 no tests)" in capsys.readouterr().err
