"""What reading prompts costs where the responses of a group share one, and where they do not.

Counts the operations of the matrix products of the sampler's programs, compiled: the prompts, all
but their last tokens, and the step that reads those and draws. Nothing is run.

python -m benchmarks.prefill [--prompts=4] [--group=8] [--prompt-length=512] [--json=FILE]
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.common import Work, write_report
from configs import base
from flowrl_jax.config import parse_config
from flowrl_jax.planning.measure import compile_program
from flowrl_jax.planning.operations import matmul_flops
from flowrl_jax.planning.programs import planned_learner, programs

AT_MOST = 1 / 6


def prefill_flops(work: Work) -> float:
    """Operations of reading the work's prompts and drawing the first token of each response."""
    config: Any = base.get_config()
    config.model.update(
        vocab_size=work.vocab,
        num_layers=work.layers,
        embed_dim=work.width,
        num_heads=work.heads,
        num_kv_heads=work.kv_heads,
        head_dim=work.head_dim,
        mlp_dim=work.mlp,
    )
    config.rollout.update(
        prompts_per_step=work.prompts,
        group_size=work.group,
        max_prompt_length=work.prompt_length,
        max_response_length=work.response_length,
    )
    config.train.update(updates_per_rollout=1)
    parsed = parse_config(config)
    learner = planned_learner(parsed, jax.devices()[:1])
    return sum(
        matmul_flops(compile_program(program.lower()).executed)
        for program in programs(parsed, learner)
        if program.name in ("prefill", "decode")
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Operations of reading prompts.")
    parser.add_argument("--prompts", type=int, default=4, help="different prompts")
    parser.add_argument("--group", type=int, default=8, help="responses to each")
    parser.add_argument("--prompt-length", type=int, default=512, help="tokens")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    values = parser.parse_args(arguments)
    shared = Work(
        prompts=values.prompts,
        group=values.group,
        prompt_length=values.prompt_length,
        response_length=64,
    )
    unshared = dataclasses.replace(shared, prompts=shared.rows, group=1)
    flops = {"shared": prefill_flops(shared), "unshared": prefill_flops(unshared)}
    ratio = flops["shared"] / flops["unshared"]
    print(", ".join(f"{name} {count / 1e9:.3f} GFLOP" for name, count in flops.items()))
    print(f"shared / unshared: {ratio:.3f}, wanted at most {AT_MOST:.3f}")
    write_report(values.json, {"benchmark": "prefill", "flops": flops, "ratio": ratio})
    return 0


if __name__ == "__main__":
    sys.exit(main())
