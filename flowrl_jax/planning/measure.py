"""What the compiler says of a program: memory, and whether it fits."""

import dataclasses
import re
import time
from typing import Any

from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.planning.chips import GIB, Chip
from flowrl_jax.planning.programs import Program

# FSDP's matrix products must not be cut into loops of their own with their transfers: they are
# slower by the compiler's own estimate, and their memory and operations are hidden in them.
_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
_USED = re.compile(r"[Uu]sed ([\d.]+)([KMGT])i? of ([\d.]+)([KMGT])i? hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Measured:
    """A compiled program.

    Attributes:
        name: of the program.
        fits: whether the compiler found room for it.
        peak_bytes: arguments, results that are not arguments, and temporaries, on one device;
            where the program does not fit, what it would need.
        argument_bytes: of the arguments, on one device.
        temporary_bytes: of everything else that lives while it runs.
        alias_bytes: of arguments that are donated and become results.
        model_flops: operations of the model's matrix products over all devices, nothing computed
            twice.
        seconds: a lower bound of its time, see `lower_bound`; 0 where it does not fit.
        compile_seconds: on this machine.
        message: the compiler's, where it did not fit.
    """

    name: str
    fits: bool
    peak_bytes: float
    argument_bytes: float
    temporary_bytes: float
    alias_bytes: float
    model_flops: float
    seconds: float
    compile_seconds: float
    message: str = ""


def measure(
    program: Program, config: TransformerConfig, chip: Chip, devices: int, length: int
) -> Measured:
    """Compiles a program.

    Args:
        program: to compile.
        config: of the policy.
        chip: that it is compiled for.
        devices: number of them.
        length: columns that a token attends to at most.

    Raises:
        RuntimeError: the compiler fails for another reason than memory.
    """
    flops = model_flops(config, program, length)
    began = time.perf_counter()
    try:
        compiled = program.lower().compile(compiler_options=_OPTIONS)
    except Exception as error:  # jax raises the compiler's error under several names
        text = " ".join(str(error).split())
        used = _USED.search(text)
        if used is None:
            raise
        return Measured(
            program.name,
            False,
            float(used[1]) * _UNITS[used[2]],
            0.0,
            0.0,
            0.0,
            flops,
            0.0,
            time.perf_counter() - began,
            text[:300],
        )
    memory: Any = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
    return Measured(
        program.name,
        peak <= chip.memory,
        peak,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        flops,
        lower_bound(program, config, chip, devices, flops, memory.argument_size_in_bytes),
        time.perf_counter() - began,
    )


def model_flops(config: TransformerConfig, program: Program, length: int) -> float:
    """Operations of a program's matrix products, nothing computed twice.

    Two for each weight and token, and four for each pair of tokens, of which a row has half as
    many as columns squared, in each layer and head; three times that with a backward pass.

    Args:
        config: of the policy.
        program: whose tokens are counted.
        length: columns that a token attends to at most.
    """
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    weights = config.num_parameters - looked_up
    columns = length if program.name == "decode" else length / 2
    pairs = 4 * columns * config.num_heads * config.head_dim * config.num_layers
    return program.tokens * (2 * weights + pairs) * (3 if program.backward else 1)


def lower_bound(
    program: Program,
    config: TransformerConfig,
    chip: Chip,
    devices: int,
    flops: float,
    argument_bytes: float,
) -> float:
    """Seconds that a program takes at the least, by the chip's published rates.

    The larger of two times: of its operations at peak, those that rematerialisation repeats among
    them; and of reading its arguments once a micro-batch. Transfers between chips are taken to be
    hidden, so the truth lies above.
    """
    repeated = 4 / 3 if program.backward and config.remat == "full" else 1.0
    computing = flops * repeated / (devices * chip.flops)
    return max(computing, program.trips * argument_bytes / chip.bandwidth)


def gib(size: float) -> str:
    """A size in GiB."""
    return f"{size / GIB:.1f}"
