"""FlowRL on a real pretrained model: the story reward goes up."""

from pathlib import Path

import numpy as np
import pytest

from configs import stories
from flowrl_jax.config import parse_config
from flowrl_jax.metrics import read_metrics
from flowrl_jax.train import train


@pytest.mark.slow
def test_stories_learn_to_mention_the_words(shared_data: Path, tmp_path: Path) -> None:
    config = stories.get_config()
    config.model.path = str(shared_data / "stories260K" / "hf")
    config.data.data_dir = str(tmp_path / "data")
    train(parse_config(config), tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rewards = np.array([line["rollout/reward_mean"] for line in lines])
    # 256 stories a step: the mean of five steps is known to about 0.01.
    assert rewards[-5:].mean() > rewards[:3].mean() + 0.15, rewards
    assert lines[-1]["train/skipped_steps"] == 0
