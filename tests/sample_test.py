"""Sampling from the command line: what a line holds, and files that can be continued."""

import io
import json
import shutil

import jax
import numpy as np
import pytest

from flowrl_jax import sample as module
from flowrl_jax.assembly import assemble, load_run_policy, scoring_learner
from flowrl_jax.errors import InputError
from flowrl_jax.metrics import CompileCounter
from flowrl_jax.rollouts import encode_prompt
from flowrl_jax.sample import read_prompts
from flowrl_jax.train_step import make_score
from tests.tiny_runs import one_device, start, tiny_arguments, tiny_run, warmup

pytestmark = pytest.mark.slow  # each compiles a run of its own


PROMPTS = ["1,2,3=6:", "2,2,3=7:", "3,4,5=12:", "1,1,6=8:", "2,5,6=4:"]
FIELDS = {
    "prompt",
    "sample",
    "text",
    "tokens",
    "logprob",
    "logprobs",
    "policy_logprobs",
    "finish_reason",
}


@pytest.fixture(autouse=True)
def single():
    with one_device():
        yield


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def command(*words, **changes):
    return module.main([*tiny_arguments(**changes), f"--run={warmup()}", *map(str, words)])


def run(capsys, *words, **changes):
    """Runs the command and returns its lines."""
    capsys.readouterr()
    assert command(*words, **changes) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def lines(file, capsys):
    return run(capsys, f"--prompts={file}", "--n=3")


def test_lines(lines):
    parts = assemble(tiny_run(), warmup())
    assert [line["prompt"] for line in lines] == [p for p in PROMPTS for _ in range(3)]
    assert [line["sample"] for line in lines] == [0, 1, 2] * 5
    for line in lines:
        assert line.keys() == FIELDS
        ended = line["tokens"][-1] in parts.eos_ids
        assert line["finish_reason"] == ("stop" if ended else "length")
        assert ended or len(line["tokens"]) == 10
        body = line["tokens"][:-1] if ended else line["tokens"]
        assert line["text"] == parts.tokenizer.decode(body)
        assert len(line["logprobs"]) == len(line["tokens"])
        assert line["logprob"] == pytest.approx(sum(line["logprobs"]), abs=1e-5)
        assert line["logprob"] < 0.0
    assert len({tuple(line["tokens"]) for line in lines}) > 5


def test_logprobs_are_the_policys(lines):
    """Those that the trainer gives the same tokens after the same prompt."""
    parts = assemble(tiny_run(), warmup())
    policy = load_run_policy(parts, warmup())
    tokens = np.zeros((15, 18), np.int32)
    prompt_mask, response_mask = np.zeros((15, 8), bool), np.zeros((15, 10), bool)
    for i, line in enumerate(lines):
        prompt = encode_prompt(parts, line["prompt"])
        prompt_mask[i, 8 - len(prompt) :] = True
        response_mask[i, : len(line["tokens"])] = True
        tokens[i, 8 - len(prompt) : 8 + len(line["tokens"])] = prompt + line["tokens"]
    arrays = parts.layout.put_batch((tokens, prompt_mask, response_mask))
    score = np.asarray(make_score(scoring_learner(parts))(policy, *arrays))
    for row, line in zip(score, lines, strict=True):
        np.testing.assert_allclose(row[: len(line["tokens"])], line["logprobs"], atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 64])
def test_batches_do_not_matter(lines, file, size, capsys):
    same = run(capsys, f"--prompts={file}", "--n=3", eval__prompts_per_batch=size)
    for line, other in zip(lines, same, strict=True):
        for name in ("logprob", "logprobs", "policy_logprobs"):
            assert line.pop(name) == pytest.approx(other.pop(name), abs=1e-5)
        assert line == other


def test_no_program_for_the_last_batch(file, capsys):
    """Five prompts, two at a time: three batches of one program."""
    run(capsys, f"--prompts={file}", "--n=3", eval__prompts_per_batch=2)
    with CompileCounter() as compilations:
        jax.block_until_ready(jax.numpy.ones(3) * 2)
        once = compilations.count
        run(capsys, f"--prompts={file}", "--n=3", eval__prompts_per_batch=2)
    assert compilations.count - once == 0


def test_sampling_settings(file, capsys):
    greedy = run(capsys, f"--prompts={file}", "--n=2", "--temperature=0")
    assert all(line["logprob"] == 0.0 for line in greedy)
    for first, second in zip(greedy[::2], greedy[1::2], strict=True):
        assert first["tokens"] == second["tokens"]
    best = run(capsys, f"--prompts={file}", "--n=2", "--top_k=1")
    assert [line["tokens"] for line in best] == [line["tokens"] for line in greedy]
    short = run(capsys, f"--prompts={file}", "--n=2", "--max_tokens=2", "--top_p=0.5")
    assert all(len(line["tokens"]) <= 2 for line in short)
    assert {line["finish_reason"] for line in short} == {"length"}
    # The config's own settings hold where the command line says nothing.
    assert run(capsys, f"--prompts={file}", "--n=2", eval__temperature=0.0) == greedy


def test_seed(lines, file, capsys):
    assert run(capsys, f"--prompts={file}", "--n=3") == lines
    assert run(capsys, f"--prompts={file}", "--n=3", seed=1) != lines


def test_the_starting_policy_where_no_run_is_named(lines, file, capsys):
    capsys.readouterr()
    words = [f"--prompts={file}", "--n=3"]
    assert module.main([*tiny_arguments(model__start_from=warmup()), *words]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines


def test_prompts_from_stdin_and_jsonl(lines, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS)))
    assert run(capsys, "--n=3") == lines
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "id": 1}) + "\n" for p in PROMPTS))
    assert run(capsys, f"--prompts={path}", "--n=3") == lines


def test_progress_tells_the_rate(file, capsys):
    assert command(f"--prompts={file}") == 0
    assert "tokens_per_second=" in capsys.readouterr().err


# Where an interrupted command may have left off: 15 lines of 5 prompts.
CUTS = {
    "nothing": lambda data: b"",
    "within the first line": lambda data: data[:20],
    "between lines of a prompt": lambda data: b"".join(data.splitlines(True)[:4]),
    "between prompts": lambda data: b"".join(data.splitlines(True)[:6]),
    "within a later line": lambda data: data[: len(data) * 2 // 3],
    "before the last newline": lambda data: data[:-1],
    "complete": lambda data: data,
}


@pytest.mark.parametrize("cut", CUTS)
def test_an_interrupted_file_is_continued(cut, file, tmp_path, capsys):
    words = [f"--prompts={file}", "--n=3", f"--out={tmp_path}/deep/out.jsonl"]
    out = tmp_path / "deep" / "out.jsonl"
    assert command(*words, eval__prompts_per_batch=2) == 0
    whole = out.read_bytes()
    out.write_bytes(CUTS[cut](whole))
    assert command(*words, eval__prompts_per_batch=2) == 0
    found, wanted = (
        [json.loads(line) for line in x.splitlines()] for x in (out.read_bytes(), whole)
    )
    assert [line["tokens"] for line in found] == [line["tokens"] for line in wanted]
    assert [line["prompt"] for line in found] == [line["prompt"] for line in wanted]
    assert capsys.readouterr().out == ""


def test_a_complete_file_costs_no_policy(file, tmp_path, monkeypatch):
    words = [f"--prompts={file}", f"--out={tmp_path}/out.jsonl"]
    assert command(*words) == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.setattr(module, "load_run_policy", lambda *_: pytest.fail("not needed"))
    assert command(*words) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before


OTHER_FILES = {
    "other prompts": (lambda lines: lines, ["--n=1"], "line 2 is not sample 0 of prompt 2"),
    "more prompts": (lambda lines: lines * 2, ["--n=3"], "line 16 is not sample 0 of prompt 6"),
    "no json": (lambda lines: ["hello\n"], ["--n=3"], "line 1 is not sample 0 of prompt 1"),
    "no object": (lambda lines: ["3\n"], ["--n=3"], "line 1 is not sample 0 of prompt 1"),
    "no text": (lambda lines: [b"\xff\xfe\n"], ["--n=3"], "line 1 is not sample 0"),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_files_of_something_else_are_left_alone(case, lines, file, tmp_path, capsys):
    change, words, message = OTHER_FILES[case]
    out = tmp_path / "out.jsonl"
    content = change([json.dumps(line) + "\n" for line in lines])
    out.write_bytes(b"".join(x if isinstance(x, bytes) else x.encode() for x in content))
    before = out.read_bytes()
    capsys.readouterr()
    with CompileCounter() as compilations:
        assert command(f"--prompts={file}", f"--out={out}", *words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert out.read_bytes() == before
    assert compilations.count == 0


WRONG = {
    "no file": (["--prompts={tmp}/none.txt"], "no such file"),
    "no jsonl": (["--prompts={tmp}/none.jsonl"], "no such file"),
    "empty": (["--prompts={tmp}/empty.txt"], "empty.txt is empty"),
    "blank line": (["--prompts={tmp}/blank.txt"], "prompt 2 ('') has no tokens"),
    "too long": (["--prompts={tmp}/long.txt"], "prompt 1 ('1,2,3,4,5,6=7:') has 14 tokens"),
    "no field": (["--prompts={tmp}/field.jsonl"], "field.jsonl line 1: no field 'prompt'"),
    "no run": (["--prompts={tmp}/good.txt", "--run={tmp}/none"], "no such folder"),
    "empty run": (["--prompts={tmp}/good.txt", "--run={tmp}"], "holds no checkpoint"),
    "no samples": (["--prompts={tmp}/good.txt", "--n=0"], "group_size=0 must be at least 1"),
    "temperature": (["--prompts={tmp}/good.txt", "--temperature=-1"], "temperature=-1.0 must not"),
    "top_p": (["--prompts={tmp}/good.txt", "--top_p=2"], "top_p=2.0 must be in (0, 1]"),
    "no number": (["--prompts={tmp}/good.txt", "--n=x"], "flag --n=x"),
    "folder": (["--prompts={tmp}/good.txt", "--out={tmp}"], "cannot be written"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case, tmp_path, capsys):
    for name, text in {"good.txt": PROMPTS[0], "empty.txt": "", "blank.txt": "1,1=2:\n\n1,1=2:\n",
                       "long.txt": "1,2,3,4,5,6=7:\n", "field.jsonl": "{}\n"}.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    words, message = WRONG[case]
    words = [word.format(tmp=tmp_path) for word in words]
    warmup()
    capsys.readouterr()
    with CompileCounter() as compilations:
        assert command(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err and err.count("\n") == 1
    assert compilations.count == 0


def test_long_prompts_are_cut_on_request_and_counted(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("9,9,9,1,2,3=6:\n1,2,3=6:\n")
    capsys.readouterr()
    assert command(f"--prompts={tmp_path}/p.txt", rollout__long_prompts="truncate") == 0
    out, err = capsys.readouterr()
    assert "1 prompts are too long" in err
    assert len(out.splitlines()) == 2


def test_white_space_of_prompts_is_kept(tmp_path):
    (tmp_path / "p.txt").write_text(" a \n\tb\n")
    assert read_prompts(str(tmp_path / "p.txt")) == [" a ", "\tb"]
    with pytest.raises(InputError, match="no such file"):
        read_prompts(str(tmp_path / "none"))


def test_a_reader_that_has_seen_enough(file, tmp_path):
    """`... | head -1` ends quietly."""
    many = tmp_path / "many.txt"
    many.write_text("\n".join(PROMPTS * 40) + "\n")
    folder = shutil.copytree(warmup(), tmp_path / "run")
    process = start(
        "sample", *tiny_arguments(eval__prompts_per_batch=1), f"--run={folder}",
        f"--prompts={many}",
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    assert json.loads(process.stdout.readline())["prompt"] == PROMPTS[0]
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=300) == 0
    assert "Error" not in err
