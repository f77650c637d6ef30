"""Operations and transfers of a program in closed form, for chips whose compiler is not at hand."""

import dataclasses

from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.planning.collectives import Traffic
from flowrl_jax.planning.programs import Program

_HALF = 2  # bytes of a weight or an activation in bfloat16


def model_flops(config: TransformerConfig, program: Program, length: int) -> float:
    """Operations of a program's matrix products over all devices, nothing computed twice.

    Two for each weight and token, and four for each pair of tokens, of which a row has half as
    many as columns squared, in each layer and head; three times that with a backward pass, but
    twice where weights are frozen below adapters. A prompt that is only read does not meet the
    unembedding.

    Args:
        config: of the policy.
        program: whose tokens are counted.
        length: columns that a decoded token attends to.
    """
    unembedding = config.vocab_size * config.embed_dim
    weights = config.num_parameters - (0 if config.tie_embeddings else unembedding)
    columns = length if program.columns == 1 else program.columns / 2
    pairs = 4 * columns * config.num_heads * config.head_dim * config.num_layers
    passes = 3 if program.backward else 1
    of_weights = 2 * weights * (2 if program.backward and config.lora.rank else passes)
    flops = program.tokens * (of_weights + pairs * passes)
    if program.name == "prefill":
        flops -= 2 * unembedding * program.tokens
    return flops


def expected_flops(config: TransformerConfig, program: Program, length: int) -> float:
    """`model_flops` with what rematerialisation repeats: a forward pass, where it is full."""
    flops = model_flops(config, program, length)
    if program.backward and config.remat == "full":
        flops += model_flops(config, dataclasses.replace(program, backward=False), length)
    return flops


def expected_traffic(config: TransformerConfig, program: Program) -> tuple[Traffic, ...]:
    """Collectives that a program cannot do without, taken to run beside its operations.

    Weights are gathered for each pass over a micro-batch; their gradient, unless they are frozen
    below adapters, is scattered after it and summed over copies of the policy, once a micro-batch;
    two activations a layer and pass are summed over tensor.

    Args:
        config: of the policy.
        program: whose transfers are counted.
    """
    mesh = program.layout.mesh.shape
    tensor, data, context = mesh["tensor"], mesh["data"], mesh.get("context", 1)
    fsdp = mesh["fsdp"] * context
    passes = (2 if config.remat == "none" else 3) if program.backward else 1
    weights = _HALF * config.num_parameters / tensor * (fsdp - 1) / fsdp
    tokens = program.rows * program.columns / program.layout.batch_shards / context
    summed = 2 * config.num_layers * _HALF * tokens * config.embed_dim * 2 * (tensor - 1) / tensor
    gradient = _HALF * config.num_parameters / (fsdp * tensor) * 2 * (data - 1) / data
    learning = program.trips * (program.backward and not config.lora.rank)
    found = {
        ("all-gather", "fsdp"): program.trips * weights * (2 if program.backward else 1),
        ("reduce-scatter", "fsdp"): learning * weights,
        ("all-reduce", "tensor"): program.trips * summed * passes,
        ("all-reduce", "data"): learning * gradient,
    }
    return tuple(
        Traffic(*key, count=0.0, bytes=size, loop_bytes=0.0, waiting_bytes=0.0)
        for key, size in found.items()
        if size
    )


def expected_movement(program: Program, arguments: float, beside: float) -> float:
    """Bytes that a device reads and writes: arguments once, what lives beside them each trip.

    Args:
        program: that moves them.
        arguments: bytes of its arguments.
        beside: bytes of all else, of which half is written and read.
    """
    return arguments * (2 if program.backward else 1) + program.trips * beside
