"""Countdown from scratch on two CPU cores: a warm-up, then FlowRL and GRPO from it.

    make quickstart

is `python -m flowrl_jax.quickstart --config=configs/quickstart.py --workdir=runs/quickstart`. The
same by hand, where `:grpo`, `:flowrl_paper` or another preset changes the objective and no more:

    python -m flowrl_jax.sft --config=configs/quickstart.py --workdir=runs/mine/warmup
    python -m flowrl_jax.train --config=configs/quickstart.py --workdir=runs/mine/flowrl \
        --config.model.start_from=runs/mine/warmup
    python -m flowrl_jax.evaluate --config=configs/quickstart.py --run=runs/mine/flowrl \
        --config.model.start_from=runs/mine/warmup

A problem gives four numbers and a target, an answer is three steps such as `3+5=8,8-5=3,8*3=24`,
and a problem has 14 solutions on average. The warm-up imitates players of whom half do not aim at
the target: like a pretrained model, the policy then knows more than it shows. README.md has the
figures; the whole takes some five minutes on two quiet cores.

Why beta is 20: any beta above 6 has nearly the same target, the reference among its own right
answers, and in 120 steps a larger one comes nearer to it; at 40 solutions begin to get lost.
docs/objective.md has the figures, and those of the paper's own setting, which collapses here as
GRPO does.
"""

import ml_collections

from configs import base
from configs.common import preset_loss


def get_config(objective: str = "flowrl") -> ml_collections.ConfigDict:
    """The quickstart.

    Args:
        objective: "flowrl", or the name of any preset.
    """
    config = base.get_config()
    config.steps = 120
    config.model.update(
        num_layers=3,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        mlp_dim=256,
        init_std=0.1,
        remat="dots",
    )
    config.tokenizer.max_number = 100
    config.task.options = {"style": "steps", "careless": 0.5}
    config.data.options = {
        "sizes": (4,),
        "number_min": 1,
        "number_max": 6,
        "target_min": 1,
        "target_max": 24,
        "min_solutions": 6,
        "max_value": 100,
        "train": 640,
        "test": 200,
    }
    config.rollout.update(
        prompts_per_step=64,
        group_size=8,
        max_prompt_length=12,
        max_response_length=20,
    )
    config.loss = preset_loss(objective)
    if objective == "flowrl":
        config.loss.beta = 20.0
    config.optimizer.update(
        learning_rate=5e-4,
        log_z_learning_rate=5e-3,
        warmup_steps=5,
        weight_decay=0.0,
        clip_jointly=False,
    )
    config.train.update(updates_per_rollout=2, logprob_chunk=64)
    config.sft.update(steps=1500, batch_size=64)
    config.sft.optimizer.update(
        learning_rate=4e-3, schedule="cosine", warmup_steps=40, weight_decay=0.01
    )
    config.eval.update(every=20, prompts=128, prompts_per_batch=64)
    config.checkpoint.update(every=0)
    config.metrics.table = False
    return config
