"""Countdown rows of another project's files: trained on, evaluated, refused where they overlap."""

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from configs import test_tiny
from flowrl_jax.config import parse_config
from flowrl_jax.datasets.pipeline import PromptSource
from flowrl_jax.errors import InputError
from flowrl_jax.evaluate import evaluate
from flowrl_jax.graded import read_records
from flowrl_jax.metrics import read_metrics
from flowrl_jax.train import train


def _identity(numbers: list[int], target: int) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(numbers)), target


@pytest.mark.slow
def test_real_countdown_rows_are_trained_on(shared_data: Path, tmp_path: Path) -> None:
    """Files of another project, through TFDS and Grain, into two steps and an evaluation."""
    folder = shared_data / "countdown"
    config = test_tiny.get_config()
    config.steps = 2
    config.tokenizer.max_number = 100
    config.rollout.max_prompt_length = 12  # four numbers, three commas, = target :
    config.eval.update(every=2, prompts=8)
    config.data.update(
        data_dir=str(tmp_path / "data"),
        options={
            "train_file": str(folder / "train.parquet"),
            "test_file": str(folder / "test.parquet"),
            "drop_overlap": True,
        },
    )
    train(parse_config(config), tmp_path / "run")
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert [line["data/position"] for line in metrics[1:]] == [8, 16]
    assert all(np.isfinite(line["train/loss"]) for line in metrics[1:])
    assert 0.0 <= metrics[2]["eval/pass_at_1"] <= 1.0

    # The rows are the files', less the problems of train that are in test under another order.
    raw = {
        split: [
            _identity(row["nums"], row["target"])
            for row in pyarrow.parquet.read_table(folder / f"{split}.parquet").to_pylist()
        ]
        for split in ("train", "test")
    }
    kept = [problem for problem in raw["train"] if problem not in set(raw["test"])]
    assert len(kept) < len(raw["train"])
    data = parse_config(config).data
    for split, expected in (("train", kept), ("test", raw["test"])):
        values = {"split": split, "shuffle": False}
        source = PromptSource(type(data)(**(vars(data) | values)))
        rows = source.rows(0, len(source))
        assert [_identity(row["numbers"], row["target"]) for row in rows] == expected

    # What was judged is what was asked.
    evaluate(parse_config(config), tmp_path / "run", tmp_path / "samples.jsonl")
    prompts = [record["prompt"] for record in read_records(tmp_path / "samples.jsonl")]
    first = pyarrow.parquet.read_table(folder / "test.parquet").to_pylist()[:8]
    asked = [f"{','.join(map(str, row['nums']))}={row['target']}:" for row in first]
    assert prompts == asked

    del config.data.options["drop_overlap"]
    with pytest.raises(InputError, match="problems of train are also in test"):
        train(parse_config(config), tmp_path / "refused")
