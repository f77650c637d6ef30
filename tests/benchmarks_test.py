"""The benchmarks: what they measure is the whole work, and their ratios are what they say."""

import json

import pytest

from benchmarks import import_checkpoint
from benchmarks.common import Child, Work, compare, main, share_of_even

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
    report = compare("sampler", {"ours": result(1.0, 300), "tunix_peer": result(4.0, 400)})
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


def test_reward_is_the_share_of_even_numbers():
    assert share_of_even("2 4 7 10") == 0.75
    assert share_of_even("") == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sampler", "train_step", "rl_step"])
def test_without_a_peer_ours_is_measured(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the tests' eight devices
    path = tmp_path / "new" / "out.json"
    assert main(kind, "", ["--peer-python=", f"--json={path}", "--repeats=2", *TINY]) == 0
    report = json.loads(path.read_text())
    assert report["benchmark"] == kind
    assert report["peers"] == {} and report["ratios"] == {}
    assert len(report["ours"]["all_seconds"]) == 2
    assert report["ours"]["tokens_per_second"] == pytest.approx(
        Work(**report["work"]).tokens(kind) / report["ours"]["seconds"]
    )
    # A process with jax in it has 100 MB at the least, and this test's own is no part of it.
    assert 1e8 < report["ours"]["peak_rss_bytes"] < 2e9
    assert "no peer" in capsys.readouterr().out


def test_a_dead_engine_is_named(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    child = Child("tunix_peer", str(python), "sampler", Work())
    with pytest.raises(SystemExit, match=r"benchmarks\.tunix_peer ended with exit code 3"):
        child.repeat()


def test_a_peer_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main("sampler", "", ["--peer-python=/nowhere/python"])
    assert stopped.value.code == 2
    assert "--peer-python=/nowhere/python does not exist" in capsys.readouterr().err


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
