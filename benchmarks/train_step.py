"""One optimiser step on given rows: GRPO's loss with a reference, its gradient, AdamW.

python -m benchmarks.train_step [--json=FILE] [--tunix-python=PATH]
"""

import sys

from benchmarks.common import Benchmark, main

BENCHMARK = Benchmark(
    name="train_step",
    description="Seconds and memory of an optimiser step, ours and Tunix'.",
    kind="train_step",
    at_most={"tunix": {"seconds": 0.7, "peak_rss_bytes": 0.5}},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
