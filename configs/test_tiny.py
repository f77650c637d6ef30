"""Countdown with three numbers and a tiny model: a run of 40 steps in well under a minute.

    python -m flowrl_jax.train --config=configs/test_tiny.py --workdir=runs/tiny

It checkpoints every 5 steps and evaluates every 20. Tests use it, and so does fault injection:
kill it wherever you like, start it again with --resume, and compare. A policy of random weights
solves nothing; one that has seen demonstrations does (`:grpo` and the other presets too):

    python -m flowrl_jax.sft --config=configs/test_tiny.py --workdir=runs/tiny_warmup
    python -m flowrl_jax.train --config=configs/test_tiny.py:grpo --workdir=runs/tiny_grpo \
        --config.model.start_from=runs/tiny_warmup
"""

import ml_collections

from configs import base
from configs.common import preset_loss


def get_config(objective: str = "flowrl_per_token") -> ml_collections.ConfigDict:
    """The smallest run that uses every part.

    Args:
        objective: name of a preset; this one has a log Z that is learned.
    """
    config = base.get_config()
    config.steps = 40
    config.model.update(
        num_layers=2,
        embed_dim=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mlp_dim=64,
        init_std=0.1,
        remat="none",
    )
    config.tokenizer.max_number = 12
    config.data.options = {
        "sizes": (3,),
        "number_min": 1,
        "number_max": 6,
        "target_min": 1,
        "target_max": 12,
        "min_solutions": 2,
        "max_value": 12,
        "train": 64,
        "test": 16,
    }
    config.rollout.update(
        prompts_per_step=8,
        group_size=4,
        max_prompt_length=8,
        max_response_length=10,
    )
    config.loss = preset_loss(objective)
    config.optimizer.update(
        learning_rate=1e-3, log_z_learning_rate=1e-2, warmup_steps=2, weight_decay=0.0
    )
    config.train.update(updates_per_rollout=2, logprob_chunk=16)
    config.sft.update(steps=150, batch_size=64)
    config.sft.optimizer.update(
        learning_rate=1e-2, schedule="cosine", warmup_steps=10, weight_decay=0.0
    )
    config.eval.update(every=20, prompts=16, samples=4, k=4, prompts_per_batch=8)
    config.checkpoint.every = 5
    return config
