"""Qwen2.5-7B on DAPO-Math-17k with the hyper-parameters of the released FlowRL.

    python -m flowrl_jax.train --config=configs/math_7b.py --workdir=runs/math_7b \
        --config.model.path=/path/to/Qwen2.5-7B

`--config=configs/math_7b.py:grpo` and the other presets change the objective and nothing else. The
default is `flowrl_paper`: this file is there to repeat the paper as it is written. The releases
differ from it and from each other (docs/objective.md), and none of them says which one made the
published figures; `:flowrl_release` and `:flowrl_recipe` are theirs, `:flowrl` is what we recommend
for work of your own (the rewards here are 1 and -1, so its beta of 6 counts as 12).

Prompts are rendered by the model's own chat template, as in the release: no system message but the
one that Qwen2.5's template writes by itself.

Data: DAPO-Math-17k, downloaded from its authors when the run starts and stripped of the
instruction around each problem; AIME 2024 for the evaluation on the way (docs/data.md has all sets
by name). The file repeats its 17 thousand problems a hundred times, of which one stays. Nothing is
left out as contaminated, since no release says that anything was: that is
--config.data.options.decontaminate="('aime24', 'math500')". For files of your own leave `train`
empty and set `train_file`; for prompts that carry the instruction already, set
--config.task.options.template=plain too.

Hardware: the paper used 8 H800 of 80 GB. Full fine-tuning at 2048 + 8192 tokens with float32 master
weights and moments fits, with flash attention and by the TPU compiler's account, on 2 v5p, 8 v6e or
16 v5e chips or one of tpu7x. One response at a time goes through each part of the batch. On TPU add
--config.model.attention=splash, on GPUs cudnn. What another slice would need says
`python -m flowrl_jax.plan` (docs/plan.md).

Expected: the paper's table 1 in percent, means over 16 samples at temperature 0.6 and top-p 0.95,
after a number of steps that is not stated (names of released files say 200 and 300):

              AIME24  AIME25  AMC23  MATH500  Minerva  Olympiad  mean
    start       4.38    2.08  30.78    54.47    22.38     24.03  23.02
    GRPO       13.54    9.79  64.53    57.05    23.06     26.88  32.48
    FlowRL     15.41   10.83  54.53    66.96    31.41     34.61  35.63

They were graded by math-verify, which accepts more than the training reward does, so `eval/` here,
which uses the training reward, is not comparable with them. What is:

    python -m flowrl_jax.evaluate --config=configs/math_7b.py --run=runs/math_7b \\
        --benchmarks=aime24,aime25,amc23,math500,minerva,olympiadbench
"""

import ml_collections

from configs import base
from configs.common import preset_loss


def get_config(preset: str = "flowrl_paper") -> ml_collections.ConfigDict:
    """The released 7B math run.

    Args:
        preset: name of an objective's preset.
    """
    config = base.get_config()
    config.steps = 200  # not stated; see above
    config.model.update(path="models/Qwen2.5-7B", dtype="bfloat16", remat="full")
    config.tokenizer.chat = True
    config.task = {
        "name": "math",
        "options": {
            "template": "dapo",
            "verifier": "released",  # or semantic
            "time_limit": 5.0,  # seconds, of a comparison that sympy has to make
            "function": "",  # a reward of your own (docs/rewards.md)
        },
    }
    config.data.update(
        builder="prompts",
        options={
            "train": "dapo_math_17k",
            "test": "aime24",
            "train_file": "",  # where the set lies, if not on the web
            "test_file": "",
            "prompt_field": "prompt",  # of files of your own
            "answer_field": "answer",
            "deduplicate": True,
            "decontaminate": (),  # names of evaluation sets
        },
    )
    config.rollout.update(
        prompts_per_step=512,
        group_size=8,
        max_prompt_length=2048,
        max_response_length=8192,
        long_prompts="truncate",  # as released: the last tokens stay
        temperature=1.0,
        slots=128,  # responses; they hold 70 GiB of keys and values in bfloat16
        tensor=-1,  # cut over its 4 key heads: weights stay put while tokens are drawn
        old_logprobs="trainer",
    )
    config.loss = preset_loss(preset)
    config.optimizer.update(
        learning_rate=1e-6,
        log_z_learning_rate=0.0,
        schedule="constant",
        warmup_steps=10,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
        clip_jointly=True,
    )
    config.train.update(
        updates_per_rollout=16,  # of 32 prompts each
        epochs=1,
        micro_batch_size=-1,  # the release cuts by tokens, 10,240 a device: one longest response
        # Ours: a row of 2048 + 2048 tokens takes less than 40 % of the time of the longest. Each is
        # a few programs more, of minutes at most and kept by --compilation_cache; a run has days.
        length_buckets=(2048, 4096),
    )
    config.eval.update(
        every=5,
        samples=16,
        k=16,
        temperature=0.6,
        top_p=0.95,
        top_k=50,  # not in the paper, but in the release's settings for generation
        prompts_per_batch=8,
    )
    config.checkpoint.every = 50
    config.mesh.update(data=1, fsdp=-1, tensor=1)
    return config
