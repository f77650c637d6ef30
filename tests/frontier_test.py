"""The comparison of objectives: its statistics, its trials and what it writes."""

import csv
import dataclasses
import itertools
import math

import numpy as np
import pytest

from flowrl_jax.exact.measures import measure
from flowrl_jax.experiments import analysis, frontier, trials
from flowrl_jax.experiments.arms import ARMS, STALE_ARMS
from flowrl_jax.experiments.figures import frontier as edge_of

NAMES = (
    *("accuracy", "pass_64", "distinct_64", "strategies_64", "effective", "effective_strategies"),
    *("correct_variation", "kl_to_reference", "length"),
)


@pytest.mark.parametrize(
    ("accuracy", "level", "wanted"),
    [
        ([0.1, 0.5, 0.9], 0.7, (1, 0.5)),
        ([0.1, 0.9, 0.5, 0.95], 0.9, (0, 1.0)),
        ([0.8, 0.9], 0.5, (0, 0.0)),
        ([0.1, 0.2], 0.5, None),
    ],
)
def test_first_crossing(accuracy, level, wanted):
    found = analysis.first_crossing(np.array(accuracy), level)
    assert found == (pytest.approx(wanted) if wanted else None)


def test_measures_are_read_off_where_the_mean_accuracy_crosses():
    accuracy = np.array([[[0.0, 0.4], [0.6, 0.8]]])  # one seed: means 0.2 and 0.7
    distinct = np.array([[[1.0, 2.0], [3.0, 6.0]]])
    found = analysis.at_level({"accuracy": accuracy, "distinct_64": distinct}, 0.45)
    np.testing.assert_allclose(found["distinct_64"], [[2.0, 4.0]])
    assert analysis.at_level({"accuracy": accuracy}, 0.8) is None


def test_an_interval_covers_both_seeds_and_prompts():
    """Its width is that of seeds and prompts drawn anew, not of their product alone."""
    rng = np.random.default_rng(0)
    seeds, prompts = rng.normal(size=(9, 1)), 2 * rng.normal(size=(1, 24))
    mean, low, high = analysis.interval(seeds + prompts)
    wanted = 1.96 * math.sqrt(seeds.var() / 9 + prompts.var() / 24)
    assert mean == pytest.approx((seeds + prompts).mean())
    assert (high - low) / 2 == pytest.approx(wanted, rel=0.1)  # 4,000 resamples


def test_sign_flips_are_exact():
    assert analysis.sign_flip(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert analysis.sign_flip(np.array([1.0, -1.0])) == 1.0
    # In float32, and where a sum depends on its order: never less than the data themselves.
    rounded = np.random.default_rng(0).normal(0.3, 0.01, 9).astype(np.float32)
    assert analysis.sign_flip(rounded) == 2 / 512


def test_holm_s_correction():
    assert analysis.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert analysis.holm([0.6, 0.7]) == [1.0, 1.0]


def test_equivalence_wants_the_whole_interval_within_the_margin():
    differences = np.random.default_rng(0).normal(0.1, 0.3, 9)
    assert analysis.equivalent(differences, 1.0)
    assert not analysis.equivalent(differences, 0.15)


def test_the_chosen_setting_ends_with_most_among_the_accurate():
    def ends(accuracy, distinct):
        shape = (2, 1, 1, 1)
        return {
            "accuracy": np.reshape(accuracy, shape),
            "distinct_64": np.reshape(distinct, shape),
        }

    grid = {"a": ends([0.95, 0.5], [3.0, 9.0]), "b": ends([0.92, 0.99], [5.0, 1.0])}
    assert analysis.choose(grid, (0.1, 0.2), 0.9) == ("b", 0.1)
    assert analysis.choose(grid, (0.1, 0.2), 0.999) == ("b", 0.2)


def test_arms_have_an_equal_grid_and_objectives_that_differ():
    settings = [repr((x, arm.learning)) for arm in ARMS.values() for x in arm.settings.values()]
    assert len(set(settings)) == len(settings)
    assert {name for name, arm in ARMS.items() if len(arm.settings) != 3} == {"grpo_unclipped"}
    assert all(setting in ARMS[arm].settings for arm, setting in STALE_ARMS.items())


def test_the_edge_is_the_most_that_any_setting_keeps():
    runs = {
        "accuracy": np.array([0.35, 0.6, 0.9]).reshape(1, 1, 3, 1),
        "distinct_64": np.array([9.0, 4.0, 6.0]).reshape(1, 1, 3, 1),
    }
    edge = dict(edge_of([runs]))
    assert edge[0.3] == 9.0 and max(edge) <= 0.9
    assert edge[max(edge)] == 6.0
    assert sorted(edge.values(), reverse=True) == list(edge.values())


SHORT = trials.Trial("routes", "flowrl", "beta=6", 2, (1e-3, 1e-2), (0, 1), rollouts=4, points=2)


@pytest.mark.slow
def test_a_trial_is_run_once(tmp_path):
    (tmp_path / "trials").mkdir()
    file = trials.run_trial(SHORT, str(tmp_path))
    with np.load(file) as arrays:
        assert sorted(arrays.files) == sorted(NAMES)
        assert all(arrays[name].shape == (2, 2, 3, 24) for name in NAMES)
        first = arrays["accuracy"][:, :, 0]
        assert np.ptp(first[:, :, 0]) == 0.0  # the same reference at the start
        assert not np.allclose(arrays["accuracy"][0, 0, -1], arrays["accuracy"][1, 0, -1])
        assert not np.allclose(arrays["accuracy"][0, 0, -1], arrays["accuracy"][0, 1, -1])
    parts, reference = trials.prepared("routes", str(tmp_path))
    prior = trials.response_logprobs(trials._POLICY, reference, parts[2])
    np.testing.assert_allclose(first[0, 0], measure(parts[2], prior, prior)["accuracy"], rtol=1e-4)
    before = (tmp_path / "trials").stat().st_mtime_ns
    assert trials.run_trial(SHORT, str(tmp_path)) == file
    assert (tmp_path / "trials").stat().st_mtime_ns == before


def pretend(workdir, trial, offset):
    """Curves of a trial that was not run: accuracy rises, distinct solutions fall with rates."""
    rng = np.random.default_rng(len(trial.arm))
    shape = (len(trial.rates), len(trial.seeds), trial.points + 1, 8)
    rise = np.linspace(0.1, 0.97, trial.points + 1)[:, None]
    arrays = {name: 1.0 + 0.1 * rng.random(shape) for name in NAMES}
    arrays["accuracy"] = np.clip(rise + 0.01 * rng.random(shape), 0.0, 1.0)
    arrays["distinct_64"] = offset + 2.0 * (1.0 - rise) + 0.1 * rng.random(shape)
    np.savez(workdir / "trials" / f"{trial.name}.npz", **arrays)


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_becomes_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frontier, "_pool", lambda workers: InPlace())
    (tmp_path / "trials").mkdir()
    arms = {"flowrl": 9.0, "rloo_kl": 8.99, "grpo": 2.0}
    for trial in frontier._choosing(["path"], arms, smoke=False):
        pretend(tmp_path, trial, arms[trial.arm])
    for arm, offset in arms.items():
        for setting in ARMS[arm].settings:
            base = frontier._choosing(["path"], [arm], smoke=False)[0]
            for rate, age in itertools.product(trials.RATES, (0, 1, 4, 16)):
                own = {"part": 2, "rates": (rate,), "seeds": frontier._MEASURING}
                trial = dataclasses.replace(base, setting=setting, staleness=age, **own)
                pretend(tmp_path, trial, offset)
    flags = [f"--workdir={tmp_path}", "--tasks=path", f"--arms={','.join(arms)}"]
    assert frontier.main(flags) == 0
    with (tmp_path / "frontier.csv").open(newline="") as lines:
        rows = {row["arm"]: row for row in csv.DictReader(lines)}
    assert set(rows) == {*arms, "base"}
    assert float(rows["grpo"]["ours_minus_it"]) == pytest.approx(7.0, abs=0.1)
    assert float(rows["grpo"]["p_holm"]) == pytest.approx(2 * 2 / 512)
    assert rows["rloo_kl"]["equivalent_to_ours"] == "True"
    said = capsys.readouterr().out
    assert said.index("FlowRL, ours") < said.index("| GRPO |") and "Staleness" in said
    assert (tmp_path / "frontier-path.svg").read_text().count("<polyline") == 3
    assert frontier.main([*flags, f"--compare={tmp_path / 'frontier.csv'}"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert last[0] == last[2] and int(last[2]) > 100


class InPlace:
    """A pool that runs what it is given at once."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *arguments):
        done = frontier.concurrent.futures.Future()
        done.set_result(function(*arguments))
        return done


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tasks=paths"], "paths is unknown"),
        (["--arms=grpo,gsp"], "gsp is unknown"),
        (["--workers=0"], "--workers=0"),
    ],
)
def test_wrong_input_is_one_line(flags, said, tmp_path, capsys):
    assert frontier.main([f"--workdir={tmp_path}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
