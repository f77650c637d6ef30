"""DeepSeek-R1-Distill-Qwen-7B on DeepCoder's problems, hyper-parameters as released by FlowRL.

    python -m flowrl_jax.train --config=configs/code_7b.py --workdir=runs/code_7b \
        --config.model.path=/path/to/DeepSeek-R1-Distill-Qwen-7B

What differs from `math_7b.py`, whose docstring says more: the start is a model that reasons
already, 64 prompts make a rollout that is learned from in two steps, and temperature 0.6 is that of
sampling and of all log-probabilities alike. The reward is 1 for a program that passes all tests and
0 otherwise; where rewards are normalised within a group this is the same as 1 and -1.

Data: DeepCoder's three sources, several gigabytes that are downloaded when the run starts; its own
test split is LiveCodeBench v5, which is evaluated on the way.

Hardware: as `math_7b.py`; the models have one shape.

Expected, the paper's table 2 (LiveCodeBench and HumanEval+ in percent, Codeforces as a rating):

              LCB avg@16  LCB pass@16  Codeforces  HumanEval+ avg@16
    start          30.68        49.46         887              80.90
    GRPO           32.75        52.32        1314              80.13
    FlowRL         37.43        56.27        1549              83.28

The policy's programs run in a sandbox (docs/rewards.md). What is comparable with the table:

    python -m flowrl_jax.evaluate --config=configs/code_7b.py --run=runs/code_7b \\
        --benchmarks=livecodebench,humanevalplus,codeforces --codeforces=FOLDER \\
        --temperature=0.6 --top_p=0.95

FOLDER has the standings of the contests (docs/evaluation.md); without it there is no rating.
"""

import ml_collections

from configs import math_7b


def get_config(preset: str = "flowrl_paper") -> ml_collections.ConfigDict:
    """The released 7B code run.

    Args:
        preset: name of an objective's preset.
    """
    config = math_7b.get_config(preset)
    config.model.path = "models/DeepSeek-R1-Distill-Qwen-7B"
    config.task = {
        "name": "code",
        "options": {
            "parallel": 8,  # programs that run at one time, on each host
            "isolation": "auto",  # required: stop where the kernel allows no namespaces
            "memory_mb": 2048,
            "endpoint": "",  # URL that judges instead of the sandbox
        },
    }
    config.data.options.update(train="deepcoder", test="deepcoder")
    config.rollout.update(prompts_per_step=64, temperature=0.6)
    config.train.updates_per_rollout = 2  # of 32 prompts each
    config.eval.every = 10
    config.checkpoint.every = 25
    return config
