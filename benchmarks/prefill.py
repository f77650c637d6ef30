"""What reading prompts costs where the responses of a group share one, and where they do not.

Counts the operations of the matrix products of a rollout of one token, compiled: the prompts and a
draw. Nothing is run.

python -m benchmarks.prefill [--prompts=4] [--group=8] [--prompt-length=512] [--json=FILE]
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks.common import Work, write_report
from benchmarks.ours import make_learner, make_rollout
from flowrl_jax.planning.measure import compile_program
from flowrl_jax.planning.operations import matmul_flops
from flowrl_jax.train_step import abstract_policy

AT_MOST = 1 / 6


def prefill_flops(work: Work) -> float:
    """Operations of reading the work's prompts and drawing the first token of each response."""
    learner = make_learner(dataclasses.replace(work, response_length=1))
    rollout = make_rollout(dataclasses.replace(work, response_length=1), learner)
    lowered = jax.jit(lambda policy: rollout(policy, 0)).lower(abstract_policy(learner))
    return matmul_flops(compile_program(lowered).executed)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Operations of reading prompts.")
    parser.add_argument("--prompts", type=int, default=4, help="different prompts")
    parser.add_argument("--group", type=int, default=8, help="responses to each")
    parser.add_argument("--prompt-length", type=int, default=512, help="tokens")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    values = parser.parse_args(arguments)
    shared = Work(prompts=values.prompts, group=values.group, prompt_length=values.prompt_length)
    unshared = dataclasses.replace(shared, prompts=shared.rows, group=1)
    flops = {"shared": prefill_flops(shared), "unshared": prefill_flops(unshared)}
    ratio = flops["shared"] / flops["unshared"]
    print(", ".join(f"{name} {count / 1e9:.3f} GFLOP" for name, count in flops.items()))
    print(f"shared / unshared: {ratio:.3f}, wanted at most {AT_MOST:.3f}")
    write_report(values.json, {"benchmark": "prefill", "flops": flops, "ratio": ratio})
    return 0


if __name__ == "__main__":
    sys.exit(main())
