"""The benchmarks: what they measure is the whole work, and their ratios are what they say."""

import dataclasses
import importlib.util
import json
import math
import os

import pytest

from benchmarks import (
    decode_floor,
    generate,
    import_checkpoint,
    overlap,
    prefill,
    rl_step,
    sampler,
    skewed,
    tpu_decode_bytes,
    train_step,
)
from benchmarks.common import MODELS, Child, Work, compare, main, share_of_even
from benchmarks.decode_floor import Speeds, floor
from benchmarks.ours import make_learner

TINY = [
    "--layers=1", "--width=16", "--mlp=16", "--heads=2", "--kv-heads=1", "--head-dim=8",
    "--vocab=64", "--prompts=2", "--group=2", "--prompt-length=4", "--response-length=6",
]  # fmt: skip


def result(seconds, memory):
    return {
        "seconds": seconds,
        "cpu_seconds": 2 * seconds,
        "tokens_per_second": 100 / seconds,
        "peak_rss_bytes": memory,
    }


def test_ratios_are_ours_over_the_peers():
    report = compare("sampler", {"ours": result(1.0, 300), "tunix": result(4.0, 400)})
    assert report["ratios"] == {
        "tunix": {
            "seconds": 0.25,
            "cpu_seconds": 0.25,
            "tokens_per_second": 4.0,
            "peak_rss_bytes": 0.75,
        }
    }
    assert report["ours"]["seconds"] == 1.0 and report["peers"]["tunix"]["seconds"] == 4.0


def test_tokens_of_a_repetition():
    work = Work(prompts=3, group=2, prompt_length=5, response_length=7)
    assert work.tokens("sampler") == work.tokens("rl_step") == 6 * 7
    assert work.tokens("train_step") == 6 * (5 + 7)


def test_equal_responses_are_as_long_as_asked():
    work = Work(response_length=7)
    assert set(work.lengths()) == {work.max_length} == {7}
    longer = dataclasses.replace(work, limit=56)
    assert set(longer.lengths()) == {7} and longer.max_length == 56


def test_skewed_responses_and_as_many_tokens_in_equal_ones():
    work = skewed.BENCHMARK.work
    lengths = work.lengths()
    assert lengths == work.lengths() and len(lengths) == work.rows
    assert min(lengths) >= 1 and max(lengths) <= work.limit == 4 * work.response_length
    assert max(lengths) > 2 * work.response_length > 4 * min(lengths)
    assert sum(lengths) / len(lengths) == pytest.approx(work.response_length, rel=0.2)
    same = skewed.equal(work)
    assert same.tokens("sampler") == pytest.approx(work.tokens("sampler"), rel=0.01)
    assert len(set(same.lengths())) == 1 and same.max_length == work.limit


def test_samplers_without_slots_take_batches():
    work = dataclasses.replace(skewed.BENCHMARK.work, prompts=10, group=4, slots=32)
    (first, longest), (second, _) = work.batches()
    lengths = work.lengths()
    assert lengths[first] + lengths[second] == lengths
    assert len(lengths[first]) == 32 and longest == max(lengths[first])
    ((everything, _),) = dataclasses.replace(work, slots=0).batches()
    assert lengths[everything] == lengths


def test_models_are_as_large_as_their_names_say():
    sizes = {
        name: make_learner(Work(**shape)).model.config.num_parameters
        for name, shape in MODELS.items()
    }
    assert sizes == {
        "5m": pytest.approx(5e6, rel=0.05),
        "25m": pytest.approx(25e6, rel=0.05),
        "260k": pytest.approx(260e3, rel=0.05),
    }


def test_floor_is_the_larger_of_operations_and_bytes():
    config = make_learner(Work()).model.config
    weights = config.num_parameters
    slow_memory = floor(config, rows=1, columns=0, speeds=Speeds(flops=math.inf, bandwidth=1.0))
    assert slow_memory == 4 * weights
    slow_cores = floor(config, rows=3, columns=0, speeds=Speeds(flops=1.0, bandwidth=math.inf))
    assert slow_cores == 3 * 2 * weights
    fast_cores = Speeds(math.inf, 1.0)
    with_cache = floor(config, rows=3, columns=10, speeds=fast_cores) - slow_memory
    column = 4 * 2 * config.num_layers * 2 * 64
    assert with_cache == 3 * 10 * column
    of_one_prompt = floor(config, rows=3, columns=10, speeds=fast_cores, shared=2 * 7)
    assert of_one_prompt == slow_memory + (3 * 3 + 7) * column


def test_reward_is_the_share_of_even_numbers():
    assert share_of_even("2 4 7 10") == 0.75
    assert share_of_even("") == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", [sampler, generate, skewed, train_step, rl_step], ids=lambda m: m.BENCHMARK.name
)
def test_without_a_peer_ours_is_measured(module, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the tests' eight devices
    path, benchmark = tmp_path / "new" / "out.json", module.BENCHMARK
    without = [f"--{peer}-python=" for peer in benchmark.peers]
    few = ["--limit=12", "--slots=2"] if benchmark.work.slots else []
    assert main(benchmark, [*without, f"--json={path}", "--repeats=2", *TINY, *few]) == 0
    report = json.loads(path.read_text())
    assert report["benchmark"] == benchmark.name
    assert report["peers"].keys() == report["ratios"].keys() == benchmark.variants.keys()
    assert len(report["ours"]["all_seconds"]) == 2
    assert report["ours"]["tokens_per_second"] == pytest.approx(
        Work(**report["work"]).tokens(benchmark.kind) / report["ours"]["seconds"]
    )
    # A process with jax in it has 100 MB at the least, and this test's own is no part of it.
    assert 1e8 < report["ours"]["peak_rss_bytes"] < 2e9
    assert f"without {benchmark.peers[0]}" in capsys.readouterr().out


def test_a_dead_engine_is_named(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    child = Child("tunix_peer", str(python), "sampler", Work())
    with pytest.raises(SystemExit, match=r"benchmarks\.tunix_peer ended with exit code 3"):
        child.repeat()


def test_a_peer_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(sampler.BENCHMARK, ["--tunix-python=/nowhere/python"])
    assert stopped.value.code == 2
    assert "--tunix-python=/nowhere/python is no interpreter with tunix" in capsys.readouterr().err


@pytest.mark.slow
def test_a_groups_prompt_is_read_once(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert prefill.main(["--prompts=8", "--group=8", "--prompt-length=64", f"--json={path}"]) == 0
    assert json.loads(path.read_text())["ratio"] < 1 / 6
    assert "wanted at most 0.167" in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_of_decoding_has_a_floor(tmp_path, capsys):
    path = tmp_path / "out.json"
    flags = ["--model=260k", "--batches=8", "--repeats=1", "--steps=8", f"--json={path}"]
    assert decode_floor.main(flags) == 0
    (step,) = json.loads(path.read_text())["steps"]
    assert step["rows"] == 8 and 0 < step["floor"] < 1
    assert 1e9 < step["flops"] < 1e14 and 1e8 < step["bandwidth"] < 1e13
    assert "wanted" in capsys.readouterr().out


@pytest.mark.slow
def test_a_judge_that_waits_is_waited_for_less(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert overlap.main(["--judge=0.005", "--steps=2", f"--json={path}"]) == 0
    found = json.loads(path.read_text())
    assert found["judging"] == pytest.approx(0.005 * 512 / 8)
    # A wait that is not covered is in the step; how much is covered is the benchmark's to say.
    for name in ("while sampling", "ahead"):
        assert 0 <= found[name]["time/judging_waited"] < found[name]["time/step"]
    assert "of judging hidden" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ,
    reason="needs the TPU compiler: pip install libtpu, or TPU_LIBRARY_PATH=.../libtpu.so",
)
def test_a_tpu_reads_weights_and_cache_at_least(tmp_path):
    config = tpu_decode_bytes.make_config(rows=8, prompt_length=128, response_length=128)
    small = dataclasses.replace(config.model, num_layers=2, vocab_size=4096)
    found = tpu_decode_bytes.measure(dataclasses.replace(config, model=small), "v5e:1x1")
    caches = 2 * 2 * 8 * 2 * 256 * 128 * 2
    assert caches <= found["cache"] < caches + 8 * 64  # and what is known of each slot
    assert 1.0 < found["ratio"] < 3.0


@pytest.mark.slow
def test_two_hosts_read_what_their_devices_hold(tmp_path):
    """Loading a checkpoint over loopback: each host reads its half, and the norms."""
    total = import_checkpoint.write_checkpoint(tmp_path / "model", "tiny")
    hosts = import_checkpoint.measure(tmp_path / "model", hosts=2, devices=2)
    assert [host["host"] for host in hosts] == [0, 1]
    for host in hosts:
        # Norms are held whole by every device; all else is cut in four.
        assert total / 2 <= host["read_bytes"] < 0.51 * total
        assert host["read_bytes"] <= host["held_bytes"] < 0.52 * total
