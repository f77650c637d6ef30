"""A rollout whose responses differ in length, with fewer slots than responses.

Lengths are log-normal with a mean of a quarter of the limit. Ours is compared with itself on as
many tokens in responses of one length; the peers, which have no slots, take as many responses as
there are slots at one time and draw until the longest of them has its length.

python -m benchmarks.skewed [--json=FILE] [--tunix-python=PATH] [--transformers-python=PATH]
"""

import dataclasses
import sys

from benchmarks.common import Benchmark, Work, main


def equal(work: Work) -> Work:
    """As many tokens, in responses of one length."""
    mean = round(work.tokens("sampler") / work.rows)
    return dataclasses.replace(work, response_length=mean, limit=work.max_length, spread=0.0)


BENCHMARK = Benchmark(
    name="skewed",
    description="Tokens per second of responses of different lengths, and of one.",
    kind="sampler",
    peers=("tunix", "transformers"),
    variants={"equal": equal},
    work=Work(prompts=128, group=4, response_length=128, limit=512, spread=1.0, slots=32),
    at_least={"equal": {"tokens_per_second": 0.85}},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
