"""Countdown from scratch on two CPU cores: warm-up, FlowRL and GRPO.

    make quickstart

or stage by stage (`:grpo` and `:flowrl_paper` choose another objective with all else equal):

    python -m flowrl_jax.sft --config=configs/quickstart.py --workdir=runs/mine/warmup
    python -m flowrl_jax.train --config=configs/quickstart.py --workdir=runs/mine/flowrl \
        --config.model.start_from=runs/mine/warmup
"""

import ml_collections

from configs import base
from flowrl_jax.config import loss_fields
from flowrl_jax.objectives.presets import PRESETS


def get_config(objective: str = "flowrl") -> ml_collections.ConfigDict:
    """The quickstart.

    Args:
        objective: "flowrl", or the name of any preset.
    """
    config = base.get_config()
    config.steps = 80
    config.model.update(
        remat="dots", num_layers=4, embed_dim=128, num_heads=4, num_kv_heads=4, head_dim=32,
        mlp_dim=512,
    )
    config.tokenizer.max_number = 50
    config.data.options = {
        "sizes": (4,), "number_min": 1, "number_max": 10, "target_min": 1, "target_max": 30,
        "min_solutions": 3, "train": 8000, "test": 256,
    }
    config.rollout.update(
        prompts_per_step=64, group_size=8, max_prompt_length=12, max_response_length=14,
    )
    name = "grpo" if objective == "grpo" else "flowrl"
    config.loss = loss_fields(name, PRESETS[objective])
    config.optimizer.update(
        learning_rate=3e-4, log_z_learning_rate=3e-3, warmup_steps=5, weight_decay=0.0,
        clip_jointly=False,
    )
    config.train.update(updates_per_rollout=2, logprob_chunk=64)
    config.sft.update(steps=400, batch_size=256)
    config.sft.optimizer.update(
        learning_rate=1e-3, schedule="cosine", warmup_steps=20, weight_decay=0.01
    )
    config.eval.update(every=10, prompts=128, samples=16, prompts_per_batch=32)
    config.checkpoint.update(every=0)
    config.metrics.table = False
    return config
