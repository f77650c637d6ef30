"""Operations and transfers of a program in closed form, for chips whose compiler is not at hand."""

from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.planning.collectives import Traffic
from flowrl_jax.planning.programs import Program

_HALF = 2  # bytes of a weight or an activation in bfloat16


def model_flops(config: TransformerConfig, program: Program, length: int) -> float:
    """Operations of a program's matrix products over all devices, nothing computed twice.

    Two for each weight and token, and four for each pair of tokens, of which a row has half as
    many as columns squared, in each layer and head; three times that with a backward pass. Of a
    prompt that is only read, the last token alone meets the unembedding.

    Args:
        config: of the policy.
        program: whose tokens are counted.
        length: columns that a decoded token attends to.
    """
    unembedding = config.vocab_size * config.embed_dim
    weights = config.num_parameters - (0 if config.tie_embeddings else unembedding)
    columns = length if program.columns == 1 else program.columns / 2
    pairs = 4 * columns * config.num_heads * config.head_dim * config.num_layers
    flops = program.tokens * (2 * weights + pairs)
    if program.name == "prefill":
        flops -= 2 * unembedding * (program.tokens - program.rows * program.trips)
    return flops * (3 if program.backward else 1)


def expected_flops(config: TransformerConfig, program: Program, length: int) -> float:
    """`model_flops` with what rematerialisation repeats: a forward pass, where it is full."""
    repeated = 4 / 3 if program.backward and config.remat == "full" else 1.0
    return repeated * model_flops(config, program, length)


def expected_traffic(config: TransformerConfig, program: Program) -> tuple[Traffic, ...]:
    """Collectives that a program cannot do without, taken to run beside its operations.

    Weights are gathered for each pass over a micro-batch and their gradient is scattered after it,
    once a micro-batch; two activations a layer and pass are summed over tensor; copies of the
    policy sum their gradients once.

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
    gradient = 4 * config.num_parameters / (fsdp * tensor) * 2 * (data - 1) / data
    found = {
        ("all-gather", "fsdp"): program.trips * weights * (2 if program.backward else 1),
        ("reduce-scatter", "fsdp"): program.trips * weights * program.backward,
        ("all-reduce", "tensor"): program.trips * summed * passes,
        ("all-reduce", "data"): gradient * program.backward,
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
