"""Seconds of a step of decoding beside the floor that this machine's speed puts under them.

The floor is the larger of two: the operations of the step's matrix products at the speed of a large
matrix product, and the bytes of the weights and of the cache's live columns, each read once, at
the speed at which a large array is read. Groups of rows begin with one prompt, whose columns count
once. Machines that others compute on do not keep their speeds from minute to minute, so both are
measured right before and right after the steps of each repetition, by the clock and by CPU time,
and each repetition has a floor of its own.

python -m benchmarks.decode_floor [--model=25m] [--batches=1,8,64,256] [--json=FILE]
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import MODELS, Work, machine, write_report
from benchmarks.ours import cpu_devices, draw_prompts, make_learner
from flowrl_jax.learner import Learner
from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.sampler import SamplerConfig, rollout_key
from flowrl_jax.sampler.programs import programs_of
from flowrl_jax.sampler.slots import Queue, Slots
from flowrl_jax.train_step import init_state

AT_MOST = 1.5
FIRST = 32  # tokens of a response before those that are timed
GROUP = 8  # rows that begin with one prompt
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

    def faster(self, other: "Speeds") -> "Speeds":
        """The faster one of each."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Speeds(*(np.maximum(*pair) for pair in pairs))


def clocks() -> np.ndarray:
    """`[2]`: seconds, and this process' seconds of CPU time."""
    return np.array([time.perf_counter(), time.process_time()])


def seconds(run: Callable[[], Any]) -> np.ndarray:
    """Of one run, by both clocks."""
    began = clocks()
    jax.block_until_ready(run())
    return clocks() - began


def speed_meter(repeats: int = 5) -> Callable[[], Speeds]:
    """Measures the speeds, each as the median of some runs; what these need is compiled here."""
    product, total = jax.jit(jnp.matmul), jax.jit(jnp.sum)
    matrix, array = jnp.ones((MATRIX, MATRIX)), jnp.ones(ARRAY)

    def taken(run: Callable[[], Any]) -> np.ndarray:
        return np.median([seconds(run) for _ in range(repeats)], axis=0)

    def speeds() -> Speeds:
        return Speeds(
            flops=2 * MATRIX**3 / taken(lambda: product(matrix, matrix)),
            bandwidth=array.nbytes / taken(lambda: total(array)),
        )

    speeds()
    return speeds


def floor(
    config: TransformerConfig, rows: int, columns: float, speeds: Speeds, shared: float = 0.0
) -> Any:
    """Seconds that a step cannot fall below.

    Args:
        config: the decoder; its embedding is its unembedding, so every weight multiplies.
        rows: that draw a token.
        columns: that each of them attends to.
        speeds: of the machine.
        shared: columns, of all rows, that are others' too and are counted with those.
    """
    keys = config.num_layers * config.num_kv_heads * config.head_dim
    queries = config.num_layers * config.num_heads * config.head_dim
    flops = 2 * rows * (config.num_parameters + 2 * queries * columns)
    read = config.num_parameters + 2 * keys * (rows * columns - shared)
    moved = jnp.dtype(config.dtype).itemsize * read
    return np.maximum(flops / speeds.flops, moved / speeds.bandwidth)


def make_decoder(
    work: Work, learner: Learner, policy: Any, segment: int
) -> tuple[Callable[[], Slots], Callable[[Slots, int], Slots]]:
    """The sampler's programs, without what is read and written down around them.

    Args:
        work: that is decoded, all rows at one time.
        learner: of the work.
        policy: its parameters.
        segment: tokens between two looks of the host.

    Returns:
        A function to slots in which prompts have been read; and one of slots, which are donated,
        and a multiple of `segment`, to slots with as many more tokens of each row.
    """
    config = SamplerConfig(
        max_response_length=work.max_length, eos_ids=(), group_size=work.group, segment=segment
    )
    programs = programs_of(learner.model.config, config, learner.layout, learner.layout)
    key, per_shard = rollout_key(0, 0), work.rows // programs.shards
    prompts = draw_prompts(work, learner, 0)
    limits = learner.layout.put_batch(np.full(work.rows, work.max_length, np.int32))
    rows = programs.rows(key, prompts, limits)
    own = np.tile(np.arange(per_shard, dtype=np.int32), (programs.shards, 1))
    pick = learner.layout.put_batch(own[:, :: work.group].copy())
    queue = Queue(own // work.group, own, np.full(programs.shards, per_shard, np.int32))
    (stage,) = programs.stages(work.prompt_length, waiting=False)
    weights = programs.weights(policy)

    def begin() -> Slots:
        starts = programs.prefill(policy, prompts, pick)
        until = np.int32(stage.limit)
        slots = programs.empty(starts, rows, until, work.rows, stage.columns[-1])
        return programs.enter(slots, starts, rows, queue)

    def decode(slots: Slots, tokens: int) -> Slots:
        for _ in range(tokens // segment):
            never = np.full(programs.shards, -1, np.int32)
            slots, *_ = programs.segment(
                weights, slots, None, None, never, 0, jax.random.key_impl(key), None
            )
        return jax.block_until_ready(slots)

    return begin, decode


def measure(work: Work, rows: int, steps: int, repeats: int) -> dict[str, Any]:
    """Medians over repetitions of floor, time and their ratio.

    Args:
        work: of which model, prompt length and devices count.
        rows: that draw at one time.
        steps: that are timed; 0 means fewer of larger batches, 256 to 32.
        repeats: measured repetitions.
    """
    devices = cpu_devices(rows, work.devices)
    learner = make_learner(work, devices)
    policy = init_state(learner, 1, jax.random.key(0)).params["policy"]
    steps = steps or min(max(2048 // rows, 32), 256)
    shard = rows // learner.layout.batch_shards
    group = next(size for size in range(GROUP, 0, -1) if shard % size == 0)
    here = dataclasses.replace(work, prompts=rows // group, group=group, limit=FIRST + steps)
    begin, decode = make_decoder(here, learner, policy, math.gcd(FIRST, steps))
    decode(begin(), FIRST + steps)
    meter = speed_meter()
    columns = work.prompt_length + FIRST + (steps - 1) / 2
    shared = (here.rows - here.prompts) * (work.prompt_length - 1)
    found = []
    for _ in range(repeats):
        slots, before = decode(begin(), FIRST), meter()
        began = clocks()
        decode(slots, steps)
        taken = (clocks() - began) / steps
        speeds = before.faster(meter())
        least = floor(learner.model.config, rows, columns, speeds, shared)
        found.append((taken, least, taken / least, speeds.flops, speeds.bandwidth))
    names = ("seconds", "floor", "ratio", "flops", "bandwidth")
    clock, cpu = np.median(found, axis=0).T
    figures = dict(zip(names, clock.tolist(), strict=True))
    return {"rows": rows, **figures, "cpu_ratio": float(cpu[names.index("ratio")])}


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
    found = [measure(work, rows, values.steps, values.repeats) for rows in batches]
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
