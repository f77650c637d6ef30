"""Responses of one length, one to each prompt: ours beside transformers' `generate`.

python -m benchmarks.generate [--model=25m] [--json=FILE] [--transformers-python=PATH]
"""

import sys

from benchmarks.common import Benchmark, Work, main

BENCHMARK = Benchmark(
    name="generate",
    description="Tokens per second of 32 responses to different prompts, ours and transformers'.",
    kind="sampler",
    peers=("transformers",),
    work=Work(prompts=32, group=1, response_length=256),
    at_least={"transformers": {"tokens_per_second": 3.0}},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
