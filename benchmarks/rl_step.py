"""A whole step of GRPO: rollout, the reference's log-probabilities, rewards of texts, update.

python -m benchmarks.rl_step [--json=FILE] [--tunix-python=PATH]
"""

import sys

from benchmarks.common import Benchmark, main

BENCHMARK = Benchmark(
    name="rl_step",
    description="Seconds and memory of a whole GRPO step, ours and Tunix'.",
    kind="rl_step",
    at_most={"tunix": {"seconds": 0.65}},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
