"""Runs of the policy-gradient family: what its objectives ask of the parts around the loss."""

import numpy as np
import pytest

from flowrl_jax.errors import InputError
from flowrl_jax.train import train
from tests.tiny_runs import metrics as read_metrics
from tests.tiny_runs import one_device, tiny_run


def test_a_buffer_longer_than_responses_is_refused():
    with pytest.raises(InputError, match="overlong_buffer=11 .*max_response_length=10"):
        tiny_run("dapo", loss__overlong_buffer=11)


@pytest.mark.slow
def test_length_buckets_change_nothing(tmp_path):
    """Two steps with every part that reaches past the loss: advantages of tokens, both masks."""
    runs = []
    for name, buckets in (("whole", "()"), ("cut", "(4,)")):
        config = tiny_run(
            "reinforce_pp",
            steps=2,
            loss__aggregation="constant",
            loss__kl_coef=0.1,
            loss__entropy_coef=0.01,
            loss__overlong_buffer=4,
            loss__mask_truncated=True,
            train__micro_batch_size=4,
            train__length_buckets=buckets,
            checkpoint__every=0,
            eval__every=0,
        )
        with one_device():
            train(config, tmp_path / name)
        runs.append(read_metrics(tmp_path / name))
    whole, cut = runs
    assert len(whole) == 2 and 0 < whole[0]["rollout/truncated"] < 1
    for a, b in zip(whole, cut, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/ratio"):
            np.testing.assert_allclose(b[name], a[name], rtol=2e-4, atol=1e-6, err_msg=name)
        assert a["train/skipped_steps"] == 0 and a["train/grad_norm"] > 0
