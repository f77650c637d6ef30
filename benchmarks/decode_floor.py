"""Seconds of a step of decoding beside the floor that this machine's speed puts under them.

The floor is the larger of two: the operations of the step's matrix products at the speed of a large
matrix product, and the bytes of the weights and of the cache's live columns, each read once, at
the speed at which a large array is read. Both speeds are measured here, before and after, by the
clock and by CPU time, which other work on the machine disturbs less.

python -m benchmarks.decode_floor [--model=25m] [--batches=1,8,64,256] [--json=FILE]
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import MODELS, Work, machine, write_report
from benchmarks.ours import cpu_devices, make_learner, make_rollout
from flowrl_jax.learner import Learner
from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.train_step import init_state

AT_MOST = 1.5
FIRST = 32  # tokens of a response before those that are timed
MATRIX = 2048
ARRAY = 2**26  # floats: 256 MiB, more than any cache holds


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What this machine does at best: in a second, and in a second of CPU time.

    Attributes:
        flops: operations of a matrix product, in float32.
        bandwidth: bytes of memory read.
    """

    flops: Any
    bandwidth: Any


def clocks() -> np.ndarray:
    """`[2]`: seconds, and this process' seconds of CPU time."""
    return np.array([time.perf_counter(), time.process_time()])


def seconds(run: Callable[[], Any]) -> np.ndarray:
    """Of one run, by both clocks."""
    began = clocks()
    jax.block_until_ready(run())
    return clocks() - began


def measure_speeds(repeats: int = 5) -> Speeds:
    """The best of some runs each, after one to compile."""
    product, total = jax.jit(jnp.matmul), jax.jit(jnp.sum)
    matrix, array = jnp.ones((MATRIX, MATRIX)), jnp.ones(ARRAY)
    best = lambda run: np.min([seconds(run) for _ in range(repeats + 1)][1:], axis=0)  # noqa: E731
    return Speeds(
        flops=2 * MATRIX**3 / best(lambda: product(matrix, matrix)),
        bandwidth=array.nbytes / best(lambda: total(array)),
    )


def floor(config: TransformerConfig, rows: int, columns: float, speeds: Speeds) -> Any:
    """Seconds that a step cannot fall below.

    Args:
        config: the decoder; its embedding is its unembedding, so every weight multiplies.
        rows: that draw a token.
        columns: that each of them attends to.
        speeds: of the machine.
    """
    keys = config.num_layers * config.num_kv_heads * config.head_dim
    queries = config.num_layers * config.num_heads * config.head_dim
    flops = 2 * rows * (config.num_parameters + 2 * queries * columns)
    moved = jnp.dtype(config.dtype).itemsize * (config.num_parameters + 2 * rows * keys * columns)
    return np.maximum(flops / speeds.flops, moved / speeds.bandwidth)


def step_seconds(work: Work, learner: Learner, policy: Any, repeats: int) -> np.ndarray:
    """Median time of a step: that of long rollouts less that of short ones, by their steps."""
    rollouts = [
        make_rollout(dataclasses.replace(work, response_length=length), learner)
        for length in (FIRST, work.response_length)
    ]
    runs = [lambda number, rollout=rollout: rollout(policy, number) for rollout in rollouts]
    for run in runs:
        jax.block_until_ready(run(0))
    pairs = [[seconds(lambda run=run: run(number)) for run in runs] for number in range(repeats)]  # noqa: B023
    differences = [long - short for short, long in pairs]
    return np.median(differences, axis=0) / (work.response_length - FIRST)


def measure(work: Work, batches: Sequence[int], steps: int, repeats: int) -> list[dict[str, float]]:
    """Floor, time and their ratio.

    Args:
        work: of which model, prompt length and devices count.
        batches: rows that draw at one time.
        steps: that are timed of each; 0 means fewer of larger batches, 256 to 32.
        repeats: measured repetitions.
    """
    found = []
    for rows in batches:
        learner = make_learner(work, cpu_devices(rows, work.devices))
        policy = init_state(learner, 1, jax.random.key(0)).params["policy"]
        timed = steps or min(max(2048 // rows, 32), 256)
        here = dataclasses.replace(work, prompts=rows, group=1, response_length=FIRST + timed)
        speeds = [measure_speeds()]
        taken = step_seconds(here, learner, policy, repeats)
        speeds.append(measure_speeds())
        flops = np.max([speed.flops for speed in speeds], axis=0)
        bandwidth = np.max([speed.bandwidth for speed in speeds], axis=0)
        columns = work.prompt_length + FIRST + timed / 2
        least = floor(learner.model.config, rows, columns, Speeds(flops, bandwidth))
        found.append(
            {
                "rows": rows,
                "seconds": taken[0],
                "floor": least[0],
                "ratio": taken[0] / least[0],
                "cpu_ratio": taken[1] / least[1],
                "flops": flops[0],
                "bandwidth": bandwidth[0],
            }
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="A step of decoding beside its floor.")
    parser.add_argument("--model", choices=MODELS, default="5m", help="shape of the decoder")
    parser.add_argument("--batches", default="1,8,64,256", help="rows, separated by commas")
    parser.add_argument("--devices", type=int, default=1, help="of a CPU; 0: one a core")
    parser.add_argument("--prompt-length", type=int, default=64, help="tokens")
    parser.add_argument("--steps", type=int, default=0, help="timed; 0: by the batch's size")
    parser.add_argument("--repeats", type=int, default=5, help="measured repetitions")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    values = parser.parse_args(arguments)
    shape = {**MODELS[values.model], "prompt_length": values.prompt_length}
    work = Work(**shape, devices=values.devices)
    batches = [int(rows) for rows in values.batches.split(",")]
    found = measure(work, batches, values.steps, values.repeats)
    columns = ("rows", "ms/step", "floor ms", "ratio", "by CPU", "GFLOP/s", "GB/s")
    print("".join(f"{column:>10}" for column in columns))
    for row in found:
        print(
            f"{row['rows']:10}{1e3 * row['seconds']:10.3f}{1e3 * row['floor']:10.3f}"
            f"{row['ratio']:10.2f}{row['cpu_ratio']:10.2f}"
            f"{row['flops'] / 1e9:10.1f}{row['bandwidth'] / 1e9:10.1f}"
        )
    print(f"wanted: ratios of at most {AT_MOST}")
    report = {"benchmark": "decode_floor", "model": values.model, "steps": found}
    write_report(values.json, {**report, "machine": machine()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
