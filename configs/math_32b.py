"""Qwen2.5-32B on DAPO-Math-17k with the hyper-parameters of the released FlowRL.

    python -m flowrl_jax.train --config=configs/math_32b.py --workdir=runs/math_32b \
        --config.model.path=/path/to/Qwen2.5-32B

All is as in `math_7b.py`, whose docstring applies (presets, data, what is not there yet), but the
model and the room it needs.

Hardware: the paper used 32 GPUs. Full fine-tuning at 2048 + 8192 tokens fits, with flash attention
and by the TPU compiler's account, on 8 v5p, 32 v6e or 64 v5e chips (there with mesh.tensor=4) or 4
of tpu7x.

Expected, the paper's table 1 in percent:

              AIME24  AIME25  AMC23  MATH500  Minerva  Olympiad  mean
    start       4.58    2.08  28.59    52.48    26.99     21.37  22.68
    GRPO       23.12   14.58  76.87    61.60    18.95     34.94  38.34
    FlowRL     23.95   21.87  73.75    80.75    38.21     51.83  48.39
"""

import ml_collections

from configs import math_7b


def get_config(preset: str = "flowrl_paper") -> ml_collections.ConfigDict:
    """The released 32B math run.

    Args:
        preset: name of an objective's preset.
    """
    config = math_7b.get_config(preset)
    config.model.path = "models/Qwen2.5-32B"
    config.rollout.slots = 64  # responses; they hold 160 GiB of keys and values
    config.eval.prompts_per_batch = 4
    return config
