"""What a decoder computes, as one frozen description; a family of models is a way to fill it in."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flowrl_jax.models.decode_support import require_support
from flowrl_jax.models.rotary import RopeScaling

PROJECTED = "projected"  # what the products of activations with kernels are called
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PROJECTED),
    ),
}
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
ATTENTION_KERNELS = ("xla", "cudnn", "splash")
DECODE_KERNELS = ("auto", "xla", "pallas", "triton", "native")
_MOST_LAYERS = 10_000

ATTENTION_TARGETS = ("query", "key", "value", "out")
MLP_TARGETS = ("gate", "up", "down")
TARGETS = ATTENTION_TARGETS + MLP_TARGETS


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels have adapters.

    Attributes:
        rank: inner size of an adapter; 0 means that there are none and all weights are trained.
        alpha: adapters are scaled by `alpha / rank`.
        targets: kernels with an adapter, in every block.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        if self.rank < 0 or self.alpha <= 0:
            raise ValueError(
                f"model.lora.rank={self.rank} must not be negative and"
                f" model.lora.alpha={self.alpha} must be positive"
            )
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"model.lora.targets={self.targets}: name at least one of {', '.join(TARGETS)},"
                " each once"
            )

    @property
    def scale(self) -> float:
        """What `(x A) B` is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Describes a decoder; the defaults are those of Llama 2.

    Attributes:
        vocab_size: ids of the model, as its checkpoint has rows in the embedding.
        num_layers: blocks.
        embed_dim: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of a head.
        mlp_dim: width of the gated MLP's hidden layer.
        family: Hugging Face's `model_type`, under which the model is saved; empty means the first
            one that computes the same.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how the frequencies are stretched.
        local_rope_theta: base of the frequencies in layers with a window; 0 means `rope_theta`
            and `rope_scaling` there too.
        local_rope_scaling: the stretching that goes with `local_rope_theta`.
        norm_eps: added to the mean square in RMSNorm.
        norm_offset: added to the scales of RMSNorm, and the product with them taken in float32
            (Gemma: 1).
        tie_embeddings: whether the unembedding is the embedding transposed.
        qkv_bias: whether query, key and value projections have a bias (Qwen2).
        out_bias: whether the attention's output projection has one.
        mlp_bias: whether the three projections of the MLP have one.
        qk_norm: whether queries and keys are normalised head by head (Qwen3, Gemma 3).
        sandwich_norm: whether what attention and MLP add is normalised too (Gemma).
        activation: of the MLP's gate: "silu", "gelu", "gelu_tanh" or "relu".
        embed_scale: multiplies the embedding's vectors (Gemma: the root of `embed_dim`).
        query_scale: multiplies the attention's scores; 0 means `head_dim ** -0.5`.
        attention_softcap: scores s become `c * tanh(s / c)`; 0 leaves them.
        logit_softcap: the same for the final logits.
        window: tokens, itself included, that a token of a windowed layer may attend to; 0 means
            no layer has a window.
        windowed_layers: which layers have it; empty means all.
        init_std: standard deviation of the embedding's and the kernels' normal initialisation.
        dtype: of activations and of the weights they meet.
        param_dtype: of the master weights.
        remat: what the backward pass computes again: "none", "dots" (all but matrix products
            with weights) or "full" (a whole block from its input).
        attention: "xla", "cudnn" or "splash", see `attention.attend`.
        decode_kernel: of decoding's attention: "pallas", for TPU, which reads no more of the cache
            than a row has; "triton", for NVIDIA GPUs, which reads little more than that; "native",
            for CPUs, which reads no more and multiplies with weights in panels as well; "xla",
            which reads all columns; or "auto", that of the platform where it can
            (`decode_support.refusal`) and else the last.
        vocab_multiple: the embedding gets rows of zeros up to a multiple of this, so that it can
            be cut over devices.
        num_tokens: ids that the tokenizer knows; 0 means `vocab_size`. The others are never drawn
            and have no share in log-probabilities, nor have the rows of zeros.
        lora: adapters that are trained in place of the weights.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    family: str = ""
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float = 0.0
    local_rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    tie_embeddings: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norm: bool = False
    activation: str = "silu"
    embed_scale: float = 1.0
    query_scale: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    window: int = 0
    windowed_layers: tuple[bool, ...] = ()
    init_std: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    decode_kernel: str = "auto"
    vocab_multiple: int = 1
    num_tokens: int = 0
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        at_least_one = ("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim")
        for field in (*at_least_one, "vocab_multiple"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)} must be at least 1")
        if self.num_layers > _MOST_LAYERS:
            raise ValueError(
                f"model.num_layers={self.num_layers} must be at most {_MOST_LAYERS}: no such model"
            )
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.num_kv_heads} must divide"
                f" model.num_heads={self.num_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even: rotary pairs")
        for field, known in (
            ("remat", ("none", *REMAT_POLICIES)),
            ("attention", ATTENTION_KERNELS),
            ("decode_kernel", DECODE_KERNELS),
            ("activation", ACTIVATIONS),
        ):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"model.{field}={getattr(self, field)!r} is not known: use one of"
                    f" {', '.join(known)}"
                )
        if self.attention == "cudnn" and self.attention_softcap:
            raise ValueError(
                f"model.attention='cudnn' cannot soft-cap scores (at {self.attention_softcap:g},"
                " as this model does): use 'xla'"
            )
        shape = {"head_dim": self.head_dim, "softcap": self.attention_softcap}
        require_support(self.decode_kernel, **shape, dtype=self.dtype)
        if len(self.windowed_layers) not in (0, self.num_layers):
            raise ValueError(
                f"model.windowed_layers speaks of {len(self.windowed_layers)} layers: give one"
                f" entry for each of the {self.num_layers}"
            )
        if not 0 <= self.num_tokens <= self.vocab_size:
            raise ValueError(
                f"model.num_tokens={self.num_tokens} must lie in 0..{self.vocab_size}, the"
                " model's ids"
            )

    @property
    def windows(self) -> tuple[bool, ...]:
        """Which layers have a window."""
        if not self.window:
            return (False,) * self.num_layers
        return self.windowed_layers or (True,) * self.num_layers

    def scores(self, windowed: bool) -> dict[str, Any]:
        """How attention makes its scores, in layers with or without a window."""
        return {
            "scale": self.query_scale or self.head_dim**-0.5,
            "window": self.window if windowed else 0,
            "softcap": self.attention_softcap,
        }

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding in memory."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def drawable(self) -> int:
        """Ids, from 0, that may be drawn."""
        return self.num_tokens or self.vocab_size

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the axes that a mesh may cut, for `sharding.make_layout`."""
        return {
            "embed": self.embed_dim,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "mlp": self.mlp_dim,
            "vocab": self.vocab_rows,
        }

    @property
    def num_parameters(self) -> int:
        """Parameters of the policy, embeddings included, padding rows not."""
        width, mlp = self.embed_dim, self.mlp_dim
        queries = self.num_heads * self.head_dim
        keys = self.num_kv_heads * self.head_dim
        block = 2 * width * (queries + keys) + 3 * width * mlp
        block += self.qkv_bias * (queries + 2 * keys) + self.out_bias * width
        block += self.mlp_bias * (2 * mlp + width) + self.qk_norm * 2 * self.head_dim
        block += (4 if self.sandwich_norm else 2) * width
        embeddings = self.vocab_size * width * (1 if self.tie_embeddings else 2)
        return self.num_layers * block + embeddings + width
