"""Certificates: trained with samples, policies end where theory says."""

import json

import pytest

from flowrl_jax import certify
from flowrl_jax.certify import CertifyConfig

# Held-out seeds of reference, rewards and samples, in languages of other sizes than the default.
SMALL = {"vocabulary": 5, "length": 3, "rollouts": 1200, "groups": 16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "beta", "target"),
    [
        ("flowrl", 6.0, "gibbs"),
        ("tb", 4.0, "gibbs"),
        ("tb_vargrad", 4.0, "gibbs"),
        ("ftb_forward_kl", 2.0, "gibbs"),
        ("subtb", 2.0, "gibbs"),
        ("rloo", 2.0, "gibbs"),
    ],
)
def test_it_ends_at_the_gibbs_distribution(preset, beta, target):
    found = certify.certify(CertifyConfig(preset, seed=5, beta=beta, **SMALL))
    assert found["target"] == target
    assert found["total_variation"] < 0.02
    assert found["modes_kept"] == found["modes"]
    # The identity, log Z minus the mean estimate = KL, holds of any policy, to float32.
    assert found["log_z_gap"] == pytest.approx(found["kl"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [6, 7])
@pytest.mark.parametrize(
    ("preset", "beta"),
    [("tb_table", 4.0), ("tb_ema", 4.0), ("ftb_jensen_shannon", 2.0), ("detailed_balance", 2.0)],
)
def test_so_does_the_rest_of_the_family(preset, beta, seed):
    config = CertifyConfig(preset, seed=seed, beta=beta, rewards="binary", **SMALL)
    found = certify.certify(config)
    assert (found["target"], found["modes_kept"]) == ("gibbs", found["modes"])
    assert found["total_variation"] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_paper_s_loss_ends_at_the_length_tilted_law(seed):
    """Its group-normalised rewards are noise that a falling learning rate averages out."""
    config = CertifyConfig(
        "flowrl_paper", seed=seed, beta=0.5, vocabulary=4, length=4, rollouts=4000, groups=32
    )
    found = certify.certify(config)
    assert found["target"] == "length_tilted"
    assert found["total_variation"] < 0.02
    assert found["log_z_error"] < 0.02


@pytest.mark.slow
def test_a_learned_log_z_is_certified_too():
    found = certify.certify(CertifyConfig("tb", seed=9, beta=2.0, **SMALL))
    assert found["log_z_error"] < 0.01


@pytest.mark.slow
def test_a_maximiser_is_compared_with_the_best_responses(tmp_path, capsys):
    output = tmp_path / "grpo.json"
    flags = ["--vocabulary=4", "--length=3", "--rollouts=200", "--groups=4"]
    assert certify.main(["--preset=grpo", f"--json={output}", *flags]) == 0
    found = json.loads(output.read_text())
    assert found["target"] == "best"
    assert found["accuracy"] > 0.9
    assert found["log_z_error"] is None
    assert "total_variation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--preset=tbb"], "--preset=tbb: unknown"),
        (["--preset=tb", "--rewards=some"], "--rewards=some: unknown"),
        (["--preset=grpo", "--beta=2"], "no inverse temperature"),
        (["--preset=tb", "--beta=-1"], "--beta=-1.0"),
        (["--preset=tb", "--vocabulary=12", "--length=7"], "a language of 11 symbols"),
        (["--preset=tb", "--rollouts=0"], "--rollouts=0"),
    ],
)
def test_wrong_input_is_one_line(flags, said, capsys):
    assert certify.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
