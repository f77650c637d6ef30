"""A real pretrained model, stories260K, learns to put asked-for words into its stories.

    python -m flowrl_jax.train --config=configs/stories.py --workdir=runs/stories \\
        --config.model.path=FOLDER

FOLDER holds stories260K in the Hugging Face layout, a Llama of 260 thousand parameters, with its
tokenizer.model. The reward is the share of two asked-for words in the story, and a quarter more if
it ends as a sentence; it goes from 0.05 to above 0.3 in 40 steps, a minute on two CPU cores.
"""

import ml_collections

from configs import base
from configs.common import preset_loss


def get_config(preset: str = "flowrl_per_token") -> ml_collections.ConfigDict:
    """The stories run.

    Args:
        preset: name of an objective's preset; that of the default has another beta here.
    """
    config = base.get_config()
    config.steps = 40
    config.model.update(path="stories260K", remat="none")
    config.tokenizer.add_bos = True  # the model was trained on texts that begin with it
    config.task = {"name": "stories", "options": {"end_bonus": 0.25}}
    config.data.update(
        builder="stories", options={"words": 2, "train": 1024, "test": 64, "seed": 0}
    )
    config.rollout.update(
        prompts_per_step=32,
        group_size=8,
        max_prompt_length=24,
        max_response_length=48,
    )
    config.loss = preset_loss(preset)
    if preset == "flowrl_per_token":
        config.loss.beta = 3.0
    config.optimizer.update(
        learning_rate=1e-3,
        log_z_learning_rate=1e-2,
        warmup_steps=2,
        weight_decay=0.0,
        clip_jointly=False,
    )
    config.train.update(updates_per_rollout=2, logprob_chunk=48)
    config.eval.update(every=0, prompts=32, samples=8, k=8)
    config.checkpoint.every = 0
    return config
