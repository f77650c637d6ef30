"""A rollout: prompts to responses with their log-probabilities, none of which ends early.

python -m benchmarks.sampler [--json=FILE] [--tunix-python=PATH]
"""

import dataclasses
import sys

from benchmarks.common import Benchmark, main

BENCHMARK = Benchmark(
    name="sampler",
    description="Tokens per second of a rollout: ours, Tunix', and what options cost ours.",
    kind="sampler",
    variants={
        "top_p": lambda work: dataclasses.replace(work, top_p=0.95),
        "large_limit": lambda work: dataclasses.replace(work, limit=8 * work.response_length),
    },
    at_least={"tunix": {"tokens_per_second": 2.0}},
    at_most={"top_p": {"tokens_per_second": 1.1}, "large_limit": {"tokens_per_second": 1.05}},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
