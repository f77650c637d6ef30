"""One decoder for the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Layers are stacked and scanned, so that the time to compile does not grow with depth. The KV cache
is an argument and a result, never hidden state; `decode.py` runs the same blocks over it.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowrl_jax.masking import positions_from_mask
from flowrl_jax.models.attention import attend, causal_mask
from flowrl_jax.sharding import constrain

Cache = tuple[jax.Array, jax.Array]
Rotation = tuple[jax.Array, jax.Array]

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Describes a decoder of the Llama family.

    Attributes:
        vocab_size: rows of the embedding.
        num_layers: blocks.
        embed_dim: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of a head.
        mlp_dim: width of the SwiGLU's hidden layer.
        rope_theta: base of the rotary frequencies.
        norm_eps: added to the mean square in RMSNorm.
        tie_embeddings: whether the unembedding is the embedding transposed.
        qkv_bias: whether query, key and value projections have a bias (Qwen2).
        init_std: standard deviation of the embedding's and the kernels' normal initialisation.
        dtype: of activations and of the weights they meet.
        param_dtype: of the master weights.
        remat: what the backward pass computes again: "none", "dots" (all but matrix products
            with weights) or "full" (a whole block from its input).
        attention: "xla" or "cudnn", see `attention.attend`.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = False
    init_std: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"

    def __post_init__(self):
        for field in ("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)} must be at least 1")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.num_kv_heads} must divide"
                f" model.num_heads={self.num_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even: rotary pairs")
        if self.remat not in ("none", *REMAT_POLICIES):
            raise ValueError(
                f"model.remat={self.remat!r} is not known: use 'none', 'dots' or 'full'"
            )
        if self.attention not in ("xla", "cudnn"):
            raise ValueError(
                f"model.attention={self.attention!r} is not known: use 'xla' or 'cudnn'"
            )

    @property
    def num_parameters(self) -> int:
        """Parameters of the policy, embeddings included."""
        attention = self.embed_dim * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        if self.qkv_bias:
            attention += self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        block = attention + 3 * self.embed_dim * self.mlp_dim + 2 * self.embed_dim
        embeddings = self.vocab_size * self.embed_dim * (1 if self.tie_embeddings else 2)
        return self.num_layers * block + embeddings + self.embed_dim


def _param(module: nn.Module, name: str, init, shape, axes) -> jax.Array:
    """A parameter boxed with the names of its axes, in the compute dtype."""
    config = module.config
    value: Any = module.param(
        name, nn.with_logical_partitioning(init, axes), shape, config.param_dtype
    )
    return value.astype(config.dtype)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[B, T, D] @ [D, F]` as one product of two matrices.

    XLA's CPU backend computes the kernel's gradient three times faster from matrices than from
    `[B, T, D]` arrays; elsewhere it makes no difference.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def rotary_table(positions: jax.Array, head_dim: int, theta: float) -> Rotation:
    """Sines and cosines by which `rotary` turns heads; every layer uses the same.

    Angles are float32: in bfloat16 position 257 would round to 256.

    Args:
        positions: `[B, T]` int32.
        head_dim: H.
        theta: base of the frequencies.

    Returns:
        Two arrays `[B, 1, T, H / 2]` float32.
    """
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency
    return jnp.sin(angle), jnp.cos(angle)


def rotary(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates pairs (i, i + H/2) of each head by the position (Llama's half-split layout).

    Args:
        x: `[B, N, T, H]`.
        rotation: from `rotary_table`.
    """
    sin, cos = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


class RMSNorm(nn.Module):
    """Divides by the root mean square, in float32, and scales."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = _param(self, "scale", nn.initializers.ones, (x.shape[-1],), ("norm",))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.config.norm_eps)
        return wide.astype(x.dtype) * scale


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rotation: Rotation,
        mask: jax.Array,
        cache: Cache | None = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache]:
        """Attends within `x`, or over a cache that `x` is first written to.

        Args:
            x: `[B, T, D]`.
            rotation: from `rotary_table`.
            mask: `[B, T, S]` bool; S = T without a cache.
            cache: keys and values `[B, K, S, H]`.
            index: column of the cache that the first token of `x` goes to.

        Returns:
            `[B, T, D]`, and the cache: the one given with `x` written in, or the keys and values
            of `x`.
        """
        config = self.config
        init = nn.initializers.normal(config.init_std)
        width, head_dim = config.embed_dim, config.head_dim

        def project(name, heads, axis):
            kernel = _param(self, name, init, (width, heads, head_dim), ("embed", axis, "head_dim"))
            out = matmul(x, kernel.reshape(width, -1)).reshape(*x.shape[:2], heads, head_dim)
            out = jnp.swapaxes(out, 1, 2)
            if config.qkv_bias:
                zeros = nn.initializers.zeros
                bias = _param(self, f"{name}_bias", zeros, (heads, head_dim), (axis, "head_dim"))
                out += bias[:, None]
            return constrain(out, "batch", axis, "seq", "head_dim")

        query = rotary(project("query", config.num_heads, "heads"), rotation)
        key = rotary(project("key", config.num_kv_heads, "kv_heads"), rotation)
        value = project("value", config.num_kv_heads, "kv_heads")
        if cache is not None:
            start = (0, 0, index, 0)
            key = jax.lax.dynamic_update_slice(cache[0], key.astype(cache[0].dtype), start)
            value = jax.lax.dynamic_update_slice(cache[1], value.astype(cache[1].dtype), start)
        out = attend(query, key, value, mask, config.attention)
        kernel = _param(
            self, "out", init, (config.num_heads, head_dim, width), ("heads", "head_dim", "embed")
        )
        out = jnp.swapaxes(out, 1, 2).reshape(*x.shape[:2], -1)
        return matmul(out, kernel.reshape(-1, width)), (key, value)


class MLP(nn.Module):
    """SwiGLU."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        init = nn.initializers.normal(config.init_std)
        shape = (config.embed_dim, config.mlp_dim)
        rows = x.reshape(-1, config.embed_dim)
        gate = rows @ _param(self, "gate", init, shape, ("embed", "mlp"))
        up = rows @ _param(self, "up", init, shape, ("embed", "mlp"))
        hidden = constrain(nn.silu(gate) * up, "batch", "mlp")
        out = hidden @ _param(self, "down", init, shape[::-1], ("mlp", "embed"))
        return out.reshape(x.shape)


class Block(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, rotation, mask, cache=None, index=0):
        """Arguments and results as in `Attention`."""
        attended, cache = Attention(self.config, name="attention")(
            RMSNorm(self.config, name="attention_norm")(x), rotation, mask, cache, index
        )
        x = constrain(x + attended, "batch", "seq", "activation_embed")
        x = x + MLP(self.config, name="mlp")(RMSNorm(self.config, name="mlp_norm")(x))
        return constrain(x, "batch", "seq", "activation_embed"), cache


class Embedding(nn.Module):
    """Token vectors, and the way back from hidden states to the vocabulary."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        init = nn.initializers.normal(config.init_std)
        shape = (config.vocab_size, config.embed_dim)
        self.tokens = _param(self, "tokens", init, shape, ("vocab", "embed"))
        if not config.tie_embeddings:
            self.output = _param(self, "output", init, shape[::-1], ("embed", "vocab"))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Vectors `[B, T, D]` of tokens `[B, T]`."""
        return constrain(self.tokens[tokens], "batch", "seq", "activation_embed")

    def unembedding(self) -> jax.Array:
        """`[D, V]`, in the compute dtype."""
        return self.tokens.T if self.config.tie_embeddings else self.output


class Transformer(nn.Module):
    """The decoder: tokens to final hidden states.

    Parameters: `embedding`, `layers` (every leaf with a leading axis of layers), `final_norm`.
    """

    config: TransformerConfig

    def setup(self):
        config = self.config
        self.embedding = Embedding(config)
        block = Block
        if config.remat != "none":
            policy = REMAT_POLICIES[config.remat]
            block = nn.remat(block, policy=policy, prevent_cse=False)
        broadcast: Any = nn.broadcast  # flax types in_axes as int alone
        self.layers = nn.scan(
            _drop_cache(block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=broadcast,
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config)
        self.final_norm = RMSNorm(config)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states, normalised.

        Args:
            tokens: `[B, T]` int32.
            mask: `[B, T]` bool, true on real tokens; all of them by default.
            positions: `[B, T]` int32; counted over real tokens by default.

        Returns:
            `[B, T, D]` in the compute dtype.
        """
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        positions = positions_from_mask(mask) if positions is None else positions
        rotation = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        x, _ = self.layers(self.embedding(tokens), rotation, causal_mask(mask))
        return self.final_norm(x)

    def logits(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Logits `[B, T, V]` float32; for small models and tests, training never holds them."""
        return jnp.einsum(
            "btd,dv->btv",
            self(tokens, mask),
            self.unembedding(),
            preferred_element_type=jnp.float32,
        )

    def unembedding(self) -> jax.Array:
        """`[D, V]` in the compute dtype."""
        return self.embedding.unembedding()


def _drop_cache(block: type[nn.Module]) -> type[nn.Module]:
    """The block as a scan body: its carry is the residual stream and it has no other output."""

    class ScannedBlock(block):
        @nn.compact
        def __call__(self, x, rotation, mask):
            x, _ = super().__call__(x, rotation, mask)
            return x, None

    return ScannedBlock


def init_params(config: TransformerConfig, key: jax.Array) -> Any:
    """A fresh policy, its leaves boxed with the names of their axes (see `Layout`).

    Kernels and embeddings are normal with `config.init_std`, norms 1, biases 0.
    """
    return Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
