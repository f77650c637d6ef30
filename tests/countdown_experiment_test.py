"""Objectives compared on Countdown through the trainer: arguments, tables, and a tiny run."""

import csv
import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

from flowrl_jax import train
from flowrl_jax.assembly import assemble, scoring_learner
from flowrl_jax.checkpoint import saved_steps
from flowrl_jax.experiments import countdown, scales
from flowrl_jax.experiments.arms import ARMS
from flowrl_jax.experiments.countdown_table import Curves, write_results
from flowrl_jax.train_step import abstract_policy
from tests.tiny_runs import REPOSITORY, one_device, scratch

CONFIG = str(REPOSITORY / "configs" / "quickstart.py")


def base(scale="tiny", steps=None, overrides=()):
    return scales.base_config(CONFIG, scale, steps, dict(overrides))


def test_an_arm_alone_has_its_usual_settings_or_its_first():
    assert countdown.arms_of("flowrl_paper,tb:beta=15,gvpo,tb:beta=15") == [
        ("flowrl_paper", "beta=15"),
        ("flowrl_paper", "beta=1"),
        ("tb", "beta=15"),
        ("gvpo", next(iter(ARMS["gvpo"].settings))),
    ]
    assert len(countdown.arms_of(",".join(countdown.DEFAULT_ARMS))) == 12


def test_runs_of_a_seed_differ_in_nothing_but_the_arm(tmp_path):
    arms = countdown.arms_of(",".join(countdown.DEFAULT_ARMS))
    warmup, *runs = countdown.runs_of(base(steps=9), 2, arms, tmp_path)
    assert len({run.name for run in (warmup, *runs)}) == len(arms) + 1
    for run in runs:
        assert run.config.seed == 2
        assert run.config.model.start_from == str(warmup.folder(tmp_path))
        assert run.config.loss == ARMS[run.arm].settings[run.setting]
        assert run.config.rollout.dynamic_sampling == (run.arm in ("dapo", "prorl"))
        assert run.config.reference.reset_every == (3 if run.arm == "prorl" else 0)
        same = dataclasses.replace(
            run.config,
            model=warmup.config.model,
            loss=warmup.config.loss,
            rollout=warmup.config.rollout,
            reference=warmup.config.reference,
        )
        assert same == warmup.config


def test_what_arms_set_for_the_exact_learner_is_set_here_too():
    known = {"only_varied", "reset_every"}
    assert {name for arm in ARMS.values() for name in arm.learning} <= known


def test_settings_count_more_than_the_scale_and_steps_more_than_both():
    config = base(overrides={"steps": "6", "eval.every": "3", "sft.steps": "7"})
    assert (config.steps, config.eval.every, config.sft.steps) == (6, 3, 7)
    assert base(steps=8, overrides={"steps": "6"}).steps == 8
    seeded = scales.seeded(config, 1)
    assert (seeded.seed, seeded.eval.every, seeded.checkpoint.every) == (1, 0, 3)


def test_the_large_scale_has_25_million_parameters(tmp_path):
    config = base("25m")
    with one_device():
        parts = assemble(config, tmp_path)
        policy = abstract_policy(scoring_learner(parts))
    assert sum(x.size for x in jax.tree.leaves(policy)) == pytest.approx(25e6, rel=0.05)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scale=smal"], "--scale=smal"),
        (["--arms=grpo,gsp"], "gsp is unknown"),
        (["--arms=grpo:beta=6"], "no setting 'beta=6'"),
        (["--arms=,"], "names none"),
        (["--seeds=0"], "--seeds=0"),
        (["--seeds=17"], "--seeds=17"),
        (["--level=1"], "--level=1"),
        (["--steps=0"], "steps=0"),
        (["--config=nowhere.py"], "nowhere.py"),
        (["--config.eval.samples=8"], "eval.samples=8"),
        (["--config.eval.every=0"], "eval.every=0"),
        (["--config.rollout.group_sise=1"], "group_sise"),
        (["--config.loss.beta=1"], "--config.loss.beta=1"),
        (["--config.rollout.ahead=True", "--arms=dapo"], "dynamic_sampling"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(flags, said, tmp_path, capsys):
    words = [f"--workdir={tmp_path / 'new'}", "--scale=tiny", f"--config={CONFIG}", *flags]
    assert countdown.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not (tmp_path / "new").exists()


SEEDS, PROMPTS = 3, 20


def pretend(arm, setting, distinct, *, ends=0.9, points=4, seeds=SEEDS):
    """Curves of runs that were not made: accuracy rises from 0.1, `distinct` stays."""
    rise = np.linspace(0.1, ends, points + 1)[1:] if arm != "warmup" else np.array([0.1])
    noise = np.random.default_rng(0).random((seeds, len(rise), PROMPTS))
    measured = {name: 1.0 + 0.1 * noise for name in countdown.MEASURES}
    measured["accuracy"] = np.broadcast_to(rise[:, None], noise.shape).copy()
    measured["distinct_16"] = distinct + 0.1 * noise
    steps = np.arange(1, len(rise) + 1) * 10 if arm != "warmup" else np.zeros(1, int)
    return Curves(arm, setting, steps, measured, drawn=640.0)


def test_the_table_compares_where_all_seeds_reach_the_level(tmp_path):
    curves = [
        pretend("warmup", "", 3.0),
        pretend("grpo", "kl_coef=0.01", 2.0),
        pretend("flowrl", "beta=6", 5.0),
        pretend("gspo", "kl_coef=0.01", 9.0, ends=0.4),
    ]
    write_results(tmp_path, "Pretended", curves, level=0.5)
    with (tmp_path / "countdown.csv").open(newline="") as lines:
        rows = {row["arm"]: row for row in csv.DictReader(lines)}
    assert set(rows) == {"warmup", "grpo", "flowrl", "gspo"}
    assert float(rows["flowrl"]["at_0.5_accuracy"]) == pytest.approx(0.5)
    assert float(rows["flowrl"]["at_0.5_distinct_16"]) == pytest.approx(5.05, abs=0.05)
    assert float(rows["grpo"]["ours_minus_it"]) == pytest.approx(3.0, abs=0.05)
    assert float(rows["grpo"]["p_holm"]) == pytest.approx(2 / 2**SEEDS)
    assert rows["gspo"]["at_0.5_distinct_16"] == "" == rows["gspo"]["ours_minus_it"]
    assert float(rows["gspo"]["end_accuracy"]) == pytest.approx(0.4)
    assert float(rows["warmup"]["end_accuracy"]) == pytest.approx(0.1)
    low, high = (float(rows["grpo"][f"end_distinct_16_{end}"]) for end in ("low", "high"))
    assert low < float(rows["grpo"]["end_distinct_16"]) < high

    text = (tmp_path / "table.md").read_text()
    assert "Pretended, 3 seeds" in text
    assert text.index("FlowRL, ours") < text.index("| GRPO |") < text.index("| GSPO |")
    figure = (tmp_path / "frontier.svg").read_text()
    assert figure.count("<polyline") == 3
    assert "distinct correct solutions in 16" in figure and "GRPO, kl_coef=0.01" in figure
    with (tmp_path / "curves.csv").open(newline="") as lines:
        points = list(csv.DictReader(lines))
    assert len(points) == 3 * SEEDS * 5
    first = [row for row in points if row["step"] == "0"]
    assert len(first) == 3 * SEEDS and {float(row["accuracy"]) for row in first} == {0.1}


def test_results_of_other_settings_are_refused(tmp_path, capsys):
    countdown._claim(tmp_path, base())
    countdown._claim(tmp_path, base())
    words = [f"--workdir={tmp_path}", "--scale=tiny", f"--config={CONFIG}", "--steps=5"]
    assert countdown.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "another steps" in error


class Terminated(train.Progress):
    """Tells the process to end after the first step of a run."""

    def update(self, count=1, **figures):
        super().update(count, **figures)
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_tiny_comparison_is_preempted_goes_on_and_is_made_once(tmp_path, capsys, monkeypatch):
    flags = [f"--workdir={tmp_path}", "--scale=tiny", f"--config={CONFIG}", "--seeds=1"]
    flags += ["--arms=flowrl,prorl", f"--config.data.data_dir={scratch() / 'data'}"]
    flags += ["--config.metrics.tensorboard=False"]
    names = ("warmup-seed0", "flowrl-beta15-seed0", "prorl-kl_coef0.01-seed0")
    with one_device():
        with monkeypatch.context() as patch:
            patch.setattr(train, "Progress", Terminated)
            assert countdown.main(flags) == 75
        assert saved_steps(tmp_path / "runs" / names[1] / "checkpoints") == [1]
        assert countdown.main(flags) == 0
    said = capsys.readouterr().out
    assert "[2/2] prorl-kl_coef0.01-seed0" in said and "FlowRL, ours" in said
    kept = [saved_steps(tmp_path / "runs" / name / "checkpoints") for name in names]
    assert kept == [[100], [4], [4]]
    with np.load(tmp_path / "results" / f"{names[0]}.npz") as start:
        assert start["accuracy"].shape == (1, 16) and not start["kl_to_reference"].any()
        assert start["accuracy"].mean() > 0.0
    for name in names[1:]:
        with np.load(tmp_path / "results" / f"{name}.npz") as end:
            assert end["steps"].tolist() == [2, 4]
            # A step takes 8 prompts; dynamic sampling may draw up to 24.
            assert end["drawn"] == 32 if name == names[1] else 32 <= end["drawn"] <= 96
            # Also where the reference was reset at steps 1 to 4: KL is against the warm-up.
            assert np.abs(end["kl_to_reference"][-1]).max() > 1e-3

    table = (tmp_path / "countdown.csv").read_bytes()
    monkeypatch.setattr(countdown, "perform", None)
    assert countdown.main(flags) == 0
    assert (tmp_path / "countdown.csv").read_bytes() == table
