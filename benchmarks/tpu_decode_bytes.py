"""What a TPU reads and writes for a token of every row, by the compiled program's own account.

Compiles `flowrl_jax.plan`'s decode program, the shape of Qwen2.5-1.5B in bfloat16, for a TPU that
need not be there, and divides the bytes that it moves in and out of the chip's large memory by
those that it cannot do without: the weights and the cache of keys and values, each once. Of a
Pallas kernel counts what its `cost_estimate` says. XLA's own "bytes accessed" is printed too: it
counts what is read again near the processor, and both ends of every copy to there.

python -m benchmarks.tpu_decode_bytes [--topology=v5e:1x1] [--rows=64] [--json=FILE]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.common import write_report
from configs import base
from flowrl_jax.config import Config, parse_config
from flowrl_jax.errors import InputError
from flowrl_jax.planning.buffers import moved_bytes
from flowrl_jax.planning.chips import describe
from flowrl_jax.planning.measure import compile_program
from flowrl_jax.planning.memory import device_bytes
from flowrl_jax.planning.programs import planned_learner, programs

AT_MOST = 1.2


def make_config(rows: int, prompt_length: int, response_length: int) -> Config:
    """A run that draws so many responses at one time."""
    config: Any = base.get_config()
    config.model.update(
        vocab_size=151_936,
        num_layers=28,
        embed_dim=1536,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        mlp_dim=8960,
        qkv_bias=True,
        dtype="bfloat16",
    )
    config.rollout.update(
        prompts_per_step=rows,
        group_size=1,
        max_prompt_length=prompt_length,
        max_response_length=response_length,
    )
    config.train.update(updates_per_rollout=1)
    return parse_config(config)


def measure(config: Config, topology: str) -> dict[str, Any]:
    """Bytes of a step of decoding on one device.

    Args:
        config: of the run; the cache is as long as its rows, and all of it is live.
        topology: such as "v5e:1x1".

    Returns:
        `weights` and `cache`, which a step needs; `moved`, see `planning.buffers.moved_bytes`, and
        its `ratio` to the need; `accessed`, by XLA's cost analysis.

    Raises:
        InputError: the TPU compiler is not installed, or the topology is not known.
    """
    learner = planned_learner(config, describe(topology).devices)
    program = next(p for p in programs(config, learner) if p.name == "decode")
    compiled = compile_program(program.lower())
    _, arguments = program.build()
    assert program.replaced is not None
    weights, cache = device_bytes(arguments[0]), device_bytes(arguments[program.replaced])
    accessed = float(compiled.executable.cost_analysis()["bytes accessed"])
    moved = moved_bytes(compiled.module, compiled.executed)
    return {
        "weights": weights,
        "cache": cache,
        "moved": moved,
        "accessed": accessed,
        "ratio": moved / (weights + cache),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Bytes of a TPU's step of decoding.")
    parser.add_argument("--topology", default="v5e:1x1", help="such as v5e:1x1")
    parser.add_argument("--rows", type=int, default=64, help="responses drawn at one time")
    parser.add_argument("--prompt-length", type=int, default=512, help="tokens")
    parser.add_argument("--response-length", type=int, default=512, help="tokens")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    values = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # neither wait for a TPU nor take one
    config = make_config(values.rows, values.prompt_length, values.response_length)
    try:
        found = measure(config, values.topology)
    except InputError as error:
        print(f"skipped: {error}")
        return 0
    sizes = (
        f"{name} {found[name] / 1e9:.3f}" for name in ("weights", "cache", "moved", "accessed")
    )
    print(f"{values.topology}, GB: {', '.join(sizes)}")
    print(f"moved / (weights + cache): {found['ratio']:.2f}, wanted at most {AT_MOST}")
    write_report(values.json, {"benchmark": "tpu_decode_bytes", **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
