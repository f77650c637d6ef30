"""Evaluation on benchmarks: what an interruption leaves is gone on with, to the same bytes."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from flowrl_jax import benchmarking
from flowrl_jax import evaluate as command
from flowrl_jax.errors import InputError
from flowrl_jax.evaluation import results
from flowrl_jax.evaluation.benchmarks import BENCHMARKS, Benchmark, Sampling
from flowrl_jax.evaluation.paper_table import TABLES
from tests.tiny_runs import one_device, tiny_arguments, tiny_run, warmup

SMALL = Benchmark(dataset="countdown", task="countdown", sampling=Sampling(samples=4))


def record(prompt, rng, samples=4, answers=True):
    correct = (rng.random(samples) < 0.4).tolist()
    forms = [f"way {int(rng.integers(3))}" if right else None for right in correct]
    return {
        "prompt_id": prompt,
        "prompt": f"question {prompt}",
        "responses": [f"Reply {int(rng.integers(9))} \N{GREEK SMALL LETTER PI}" for _ in correct],
        "correct": correct,
        "form": forms,
        "reward": [1.0 if right else -1.0 for right in correct],
        "outcome": ["correct" if right else "wrong" for right in correct],
        "length": rng.integers(1, 9, samples).tolist(),
        "truncated": [False] * samples,
        "kl": [0.0] * samples,
        "answer": [(form or "none of these") if answers else None for form in forms],
    }


class FakeEvaluator:
    """Gives records without a policy; `stop` batches after its start it is interrupted."""

    batch_size, num_prompts, stop = 4, 10, 99

    def __init__(self, parts, config):
        self.parts, self.config = parts, config
        self.rows = [{"prompt_id": i} for i in range(self.num_prompts)]

    def records(self, policy, reference, progress, *, done, write):
        assert done % self.batch_size == 0
        for batch, start in enumerate(range(done, self.num_prompts, self.batch_size)):
            if batch == self.stop:
                raise KeyboardInterrupt
            rows = range(start, min(start + self.batch_size, self.num_prompts))
            write([record(i, np.random.default_rng(i)) for i in rows])


@dataclasses.dataclass
class FakeParts:
    config: object
    task: object = None


@pytest.fixture
def fake(monkeypatch):
    loaded = []
    monkeypatch.setattr(benchmarking, "assemble", lambda config, _: FakeParts(config))
    monkeypatch.setattr(benchmarking, "load_run_policy", lambda *_: loaded.append(1))
    monkeypatch.setattr(benchmarking, "build", lambda _: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(benchmarking, "Evaluator", FakeEvaluator)
    return loaded


def run(out, **changes):
    chosen = {name: dataclasses.replace(SMALL, **changes) for name in ("first", "second")}
    return benchmarking.run_benchmarks(tiny_run(), "", chosen, out)


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_an_interruption_anywhere_changes_nothing(fake, tmp_path, monkeypatch):
    expected = run(tmp_path / "whole")
    whole = files(tmp_path / "whole")
    assert set(whole) == {"first.jsonl", "second.jsonl"}
    assert [r["prompt_id"] for r in expected["second"]] == list(range(10))
    out = tmp_path / "cut"
    for stop in (0, 1, 2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(FakeEvaluator, "stop", stop)
            run(out)
        assert run(out) == expected and files(out) == whole
        for path in out.iterdir():
            path.unlink()
    text = whole["first.jsonl"]
    lines = text.splitlines(keepends=True)
    for size in [0, 1, 100, *(sum(map(len, lines[:n])) + extra for n in (1, 4, 7, 9, 10)
                              for extra in (-1, 0, 1))]:  # fmt: skip
        (out / "first.jsonl").write_bytes(text[:size])
        assert run(out) == expected and files(out) == whole, size


def test_what_is_complete_is_not_sampled_again(fake, tmp_path):
    expected = run(tmp_path)
    fake.clear()
    assert run(tmp_path) == expected
    assert not fake, "the policy was loaded"


def test_files_of_another_evaluation_are_refused(fake, tmp_path):
    run(tmp_path)
    before = files(tmp_path)
    with pytest.raises(InputError, match="first.jsonl line 1 has temperature=0.6, not 0.7"):
        run(tmp_path, sampling=Sampling(samples=4, temperature=0.7))
    assert files(tmp_path) == before
    (tmp_path / "first.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="another evaluation"):
        run(tmp_path)
    lines = before["first.jsonl"].splitlines(keepends=True)
    (tmp_path / "first.jsonl").write_bytes(lines[0] + lines[2])
    with pytest.raises(InputError, match="line 2 has prompt_id=2, not 1"):
        run(tmp_path)


def test_settings_of_a_benchmark():
    config = benchmarking.benchmark_config(tiny_run(), BENCHMARKS["math500"])
    assert (config.data.builder, config.eval.split, config.task.name) == ("prompts", "test", "math")
    assert dict(config.data.options) == {"test": "math500"}  # those of Countdown are not its own
    assert config.task.options["verifier"] == "semantic"
    assert (config.eval.samples, config.eval.k) == (16, 16)
    assert (config.eval.temperature, config.eval.top_p, config.eval.top_k) == (0.6, 0.95, 0)
    own = benchmarking.benchmark_config(tiny_run(), SMALL)
    assert own.data.options == tiny_run().data.options


def many(names, prompts=6, samples=16):
    rng = np.random.default_rng(0)
    return {name: [record(i, rng, samples) for i in range(prompts)] for name in names}


def values(records):
    return {name: results.benchmark_values(found) for name, found in records.items()}


def test_figures_of_benchmarks():
    records = many(["aime24", "amc23"])
    summary = results.summarize_benchmarks(values(records))
    for name, found in records.items():
        mean = np.mean([r["correct"] for r in found])
        assert summary[name]["avg_at_16"]["mean"] == pytest.approx(mean)
        assert summary[name]["pass_at_1"]["mean"] == pytest.approx(mean)
        assert summary[name]["outcome/correct"]["mean"] == pytest.approx(mean)
        assert summary[name]["reward"]["mean"] == pytest.approx(2 * mean - 1)
        assert {f"maj_at_{k}" for k in (1, 2, 4, 8, 16)} <= summary[name].keys()
        assert {"self_bleu", "vendi", "answer_entropy"} <= summary[name].keys()
    both = [summary[name]["avg_at_16"]["mean"] for name in records]
    assert summary["average"]["avg_at_16"]["mean"] == pytest.approx(np.mean(both))
    json.dumps(summary, allow_nan=False)
    without = {"aime24": [record(0, np.random.default_rng(0), answers=False)]}
    assert not any(
        "maj" in name for name in results.summarize_benchmarks(values(without))["aime24"]
    )


def test_the_papers_average_needs_all_six():
    columns = TABLES["math_7b"].columns
    records = values(many(columns[:-1]))
    ours = results.paper_columns(records, columns)
    assert list(ours) == list(columns)
    each = [ours[name]["mean"] for name in columns[:-1]]
    assert ours["average"]["mean"] == pytest.approx(np.mean(each))
    del records["minerva"]
    assert "average" not in results.paper_columns(records, columns)
    assert "35.63" in results.render_benchmarks(records, "ours")
    assert results.render_benchmarks(values(many(["gsm8k"])), "ours") == ""
    code = results.paper_columns(values(many(["livecodebench"])), TABLES["code_7b"].columns)
    assert list(code) == ["livecodebench", "livecodebench_pass_at_16"]
    assert code["livecodebench_pass_at_16"]["mean"] > code["livecodebench"]["mean"]


def test_wrong_words(tmp_path, capsys):
    words = tiny_arguments()
    for more, message in (
        (["--benchmarks=aime2"], "did you mean"),
        (["--benchmarks=aime24"], "--out is missing"),
        (["--benchmarks=aime24", f"--out={tmp_path}/a.jsonl"], "it is a folder"),
        (["--temperature=0"], "goes with --benchmarks"),
    ):
        if "--out" not in " ".join(more) and "aime2'" in message:
            continue
        out = [] if "missing" in message or "--out" in more[-1] else [f"--out={tmp_path}/x"]
        assert command.main([*words, *more, *out]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_command_evaluates_a_policy(tmp_path, capsys):
    with one_device():
        words = [*tiny_arguments(), f"--run={warmup()}", "--benchmarks=countdown", "--samples=4",
                 f"--json={tmp_path}/a.json", f"--out={tmp_path}/a"]  # fmt: skip
        assert command.main(words) == 0
        table = capsys.readouterr().out
        whole = (tmp_path / "a" / "countdown.jsonl").read_bytes()
        (tmp_path / "a" / "countdown.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
        before = (tmp_path / "a.json").read_bytes()
        assert command.main(words) == 0
    assert capsys.readouterr().out == table and "Avg@4" in table
    assert (tmp_path / "a" / "countdown.jsonl").read_bytes() == whole
    assert (tmp_path / "a.json").read_bytes() == before
    summary = json.loads(before)["benchmarks"]["countdown"]
    assert 0 < summary["avg_at_4"]["mean"] < 1
