"""Memory of a program in closed form, for what is not compiled: an estimate.

Arguments are counted exactly, from their shapes and shardings. What lives beside them follows a
formula: with float32 master weights and moments, full rematerialisation and flash attention a
train step needs about

    16 N / s + 2 b T L D + max(8 b T (F / t + 2 D) + 8 D F / t, 8 b T D + (2 D + 8 b C) V / t)

bytes on a device, 12 N / s of them the train state: N parameters over s shards, b rows of T tokens
on a device, L layers of width D with an MLP of F, V tokens, t parts of heads, mlp and vocabulary,
the logits of C tokens of a row at a time. The peak is in an MLP's gradient or in the vocabulary's.
Compiled train steps of 7B and 32B lay within 6 % of it. The terms for other programs and
settings follow from the same parts.
"""

import math
from typing import Any

import jax

from flowrl_jax.config import Config
from flowrl_jax.learner import Learner
from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.models.attention import CHUNK
from flowrl_jax.objectives import objective_of
from flowrl_jax.planning.programs import Program, computed, policy_shapes, state_shapes


def device_bytes(tree: Any) -> float:
    """Bytes of a tree of `ShapeDtypeStruct` on one device.

    Args:
        tree: whose leaves have shardings, or live whole on every device.
    """

    def of(x: Any) -> float:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return float(sum(of(x) for x in jax.tree.leaves(tree)))


def resident_bytes(config: Config, learner: Learner) -> dict[str, float]:
    """Bytes on a device that outlive every program and are not its arguments, by program.

    Train state and reference stay where they are while responses are sampled and scored.

    Args:
        config: the settings.
        learner: of the run.
    """
    shapes = policy_shapes(learner)
    policy = device_bytes(shapes)
    trained = device_bytes(state_shapes(learner, config.rows_per_update))
    adapters = learner.model.config.lora.rank > 0
    if adapters:
        frozen = policy  # the reference at the same time
    elif objective_of(config.loss).needs_reference(config.loss):
        frozen = device_bytes(computed(shapes, learner.model.config))
    else:
        frozen = 0.0
    return {
        "prefill": trained + frozen - policy,
        "decode": trained + frozen,
        "score": trained + frozen - policy,
        "train_step": 0.0 if adapters else frozen,
    }


def estimated_bytes(program: Program, learner: Learner) -> tuple[float, float]:
    """What a program needs of a device, not compiled.

    Args:
        program: from `programs.programs`.
        learner: of the run.

    Returns:
        Bytes of its arguments, exactly, and of all else, by the formula above.
    """
    _, arguments = program.build()
    return device_bytes(arguments), _beside(program, learner, arguments)


def _beside(program: Program, learner: Learner, arguments: tuple[Any, ...]) -> float:
    shape = learner.model.config
    cut = program.layout.mesh.shape["tensor"]
    rows = program.rows / program.layout.batch_shards
    tokens = rows * program.columns / program.layout.mesh.shape.get("context", 1)
    unembedding = shape.vocab_rows * shape.embed_dim / cut
    running = 8 * tokens * (shape.mlp_dim / cut + shape.embed_dim)
    if program.attention == "xla" and program.columns > 1:
        running += 10 * rows * shape.num_heads / cut * min(CHUNK, program.columns) * program.columns
    if program.name == "train_step":
        kept = tokens * shape.num_layers * _kept_by_layer(shape, cut)
        running += 8 * shape.embed_dim * (tokens + shape.mlp_dim / cut)
        logits = 8 * rows * learner.config.logprob_chunk * shape.vocab_rows / cut
        vocabulary = 8 * tokens * shape.embed_dim + 2 * unembedding + logits
        gradients = device_bytes(arguments[0].params)  # their sums are cut as the weights are
        return gradients + kept + max(running, vocabulary)
    keys = 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim  # bfloat16, keys and values
    layer = 2 * (shape.num_parameters / shape.num_layers) / cut
    if program.name == "prefill":
        return running + tokens * keys / _key_parts(shape, cut) + layer
    if program.name == "score":
        return running + layer + 2 * unembedding
    return running + 8 * tokens * shape.vocab_rows / cut + layer


def _kept_by_layer(shape: TransformerConfig, cut: int) -> float:
    """Bytes of a token that a layer keeps for the backward pass."""
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim / cut
    mlp = shape.mlp_dim / cut
    return {
        "full": 2 * shape.embed_dim,
        "dots": 2 * (3 * shape.embed_dim + heads + 2 * mlp),
        "none": 2 * (11 * shape.embed_dim + 2 * heads + 6 * mlp),
    }[shape.remat]


def _key_parts(shape: TransformerConfig, cut: int) -> int:
    return cut if shape.num_kv_heads % cut == 0 else 1
