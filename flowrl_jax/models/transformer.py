"""One decoder for many families: RMSNorm, rotary positions, grouped-query attention, gated MLP.

What a family adds to that is a field of `TransformerConfig`. Layers are stacked and scanned, so
that the time to compile does not grow with depth. The KV cache is an argument and a result, never
hidden state; `decode.py` runs the same blocks over it.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowrl_jax.logprobs import vocabulary_logits
from flowrl_jax.masking import positions_from_mask
from flowrl_jax.models.accumulation import run_layers
from flowrl_jax.models.architecture import ACTIVATIONS, REMAT_POLICIES, TransformerConfig
from flowrl_jax.models.attention import Columns, attend
from flowrl_jax.models.cache import KVCache
from flowrl_jax.models.decode_attention import Held, attend_next, decode_kernel
from flowrl_jax.models.decode_native import panels_name
from flowrl_jax.models.lora import lora_term
from flowrl_jax.models.projection import project
from flowrl_jax.models.rotary import Rotation, rotary, rotary_table
from flowrl_jax.sharding import constrain


class View(NamedTuple):
    """What layers are told about their tokens.

    Attributes:
        rotations: of the positions, from `rotary_table`, for layers with a window (True) and
            without (False), as far as there are any.
        columns: that the tokens may attend to, windows aside; of a cache, where there is one.
    """

    rotations: dict[bool, Rotation]
    columns: Columns | Held


def rotations(config: TransformerConfig, positions: jax.Array) -> dict[bool, Rotation]:
    """Of a `View`.

    Args:
        config: the decoder.
        positions: `[B, T]` int32.
    """
    table = lambda theta, scaling: rotary_table(positions, config.head_dim, theta, scaling)  # noqa: E731
    rotation = table(config.rope_theta, config.rope_scaling)
    kinds = {windowed: rotation for windowed in set(config.windows)}
    if True in kinds and config.local_rope_theta:
        kinds[True] = table(config.local_rope_theta, config.local_rope_scaling)
    return kinds


def _param(module: nn.Module, name: str, init, shape, axes) -> jax.Array:
    """A parameter boxed with the names of its axes, in the compute dtype.

    It is cut as it is stored until it is used: so it is gathered, and its gradient reduced, in the
    compute dtype and in one layer at a time.
    """
    config = module.config
    value: Any = module.param(
        name, nn.with_logical_partitioning(init, axes), shape, config.param_dtype
    )
    return constrain(value.astype(config.dtype), *axes)


def _choose(kinds: dict[bool, Rotation], windowed: jax.Array | bool) -> Rotation:
    """The rotation of layers with or without a window."""
    if isinstance(windowed, bool):
        return kinds[windowed]
    choose = lambda window, full: jnp.where(windowed, window, full)  # noqa: E731
    return jax.tree.map(choose, kinds[True], kinds[False])


def _bias(module: nn.Module, name: str, shape, axes) -> jax.Array:
    return _param(module, f"{name}_bias", nn.initializers.zeros, shape, axes)


def _kernel_init(config: TransformerConfig):
    return nn.initializers.normal(config.init_std)


def _project(
    module: nn.Module, rows: jax.Array, kernels: dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
) -> list[jax.Array]:
    """Rows `[R, D]` times kernels of a module, given by shape and names of axes: `[R, F]` each."""
    config: Any = module.config
    init, axes = _kernel_init(config), tuple(axes for _, axes in kernels.values())
    values = tuple(_param(module, name, init, *kernel) for name, kernel in kernels.items())
    outs, weights = project(rows, values, axes), module.variables["params"]
    return [
        out + lora_term(config, weights, name, rows)
        for name, out in zip(kernels, outs, strict=True)
    ]


class RMSNorm(nn.Module):
    """Divides by the root mean square, in float32, and scales."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        # What multiplies is 1 at first, with an offset (Gemma) and without.
        init = nn.initializers.constant(1.0 - config.norm_offset)
        scale = _param(self, "scale", init, (x.shape[-1],), ("norm",))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + config.norm_eps)
        if config.norm_offset:
            return (wide * (config.norm_offset + scale.astype(jnp.float32))).astype(x.dtype)
        return wide.astype(x.dtype) * scale


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        view: View,
        windowed: jax.Array | bool,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, Any]:
        """Attends within `x`, or over a cache that `x` is first written to.

        Args:
            x: `[B, T, D]`; T = 1 with a cache.
            view: of the tokens.
            windowed: whether this layer has a window; a scalar array where layers are scanned and
                differ in it.
            cache: of the slots that the rows of `x` are in; without one the view's columns are
                the tokens themselves.

        Returns:
            `[B, T, D]`, and the cache with `x` written in or, without one, the keys and values
            `[B, K, T, H]` of `x`.
        """
        config = self.config
        query, key, value = self._heads(x)
        rotation = _choose(view.rotations, windowed)
        if cache is None:
            query, key = rotary(query, rotation), rotary(key, rotation)
            kept: Any = (key, value)
            kinds = {
                windowed: functools.partial(
                    attend,
                    columns=view.columns,
                    implementation=config.attention,
                    **config.scores(windowed),
                )
                for windowed in view.rotations
            }
            if isinstance(windowed, bool):
                out = kinds[windowed](query, key, value)
            else:
                out = jax.lax.cond(windowed, kinds[True], kinds[False], query, key, value)
        else:
            assert isinstance(windowed, bool) and isinstance(view.columns, Held)
            out, kept = attend_next(
                query,
                key,
                value,
                rotation,
                cache,
                view.columns,
                kernel=decode_kernel(config, cache.key.dtype),
                **config.scores(windowed),
            )
        shape = (config.num_heads, config.head_dim, config.embed_dim)
        rows = jnp.swapaxes(out, 1, 2).reshape(-1, config.num_heads * config.head_dim)
        (out,) = _project(self, rows, {"out": (shape, ("heads", "head_dim", "embed"))})
        if config.out_bias:
            out += _bias(self, "out", (config.embed_dim,), ("norm",))
        return out.reshape(x.shape), kept

    def _heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `[B, N, T, H]`, keys and values `[B, K, T, H]`, without their positions.

        Activations meet kernels as `[B * T, D]`: XLA's CPU backend computes a kernel's gradient
        three times faster from matrices than from `[B, T, D]` arrays; elsewhere it is the same.
        """
        config = self.config
        heads = {"heads": config.num_heads, "kv_heads": config.num_kv_heads}
        kinds = {"query": "heads", "key": "kv_heads", "value": "kv_heads"}
        kernels = {
            name: ((config.embed_dim, heads[axis], config.head_dim), ("embed", axis, "head_dim"))
            for name, axis in kinds.items()
        }
        outs = _project(self, x.reshape(-1, config.embed_dim), kernels)

        def split(name, out):
            axes = (kinds[name], "head_dim")
            shape = (heads[axes[0]], config.head_dim)
            out = jnp.swapaxes(out.reshape(*x.shape[:2], *shape), 1, 2)
            if config.qkv_bias:
                out += _bias(self, name, shape, axes)[:, None]
            return constrain(out, "batch", axes[0], "seq", "head_dim")

        query, key, value = map(split, kinds, outs)
        if config.qk_norm:
            query = RMSNorm(config, name="query_norm")(query)
            key = RMSNorm(config, name="key_norm")(key)
        return query, key, value


class MLP(nn.Module):
    """Gated: `down(activation(gate(x)) * up(x))`."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config

        sizes = {"embed": config.embed_dim, "mlp": config.mlp_dim}

        def dense(rows, axes, *names):
            shape = tuple(sizes[axis] for axis in axes)
            outs = _project(self, rows, {name: (shape, axes) for name in names})
            if not config.mlp_bias:
                return outs
            axis = "norm" if axes[1] == "embed" else axes[1]
            biases = [_bias(self, name, shape[1:], (axis,)) for name in names]
            return [out + bias for out, bias in zip(outs, biases, strict=True)]

        gate, up = dense(x.reshape(-1, config.embed_dim), ("embed", "mlp"), "gate", "up")
        hidden = (ACTIVATIONS[config.activation](gate) * up).reshape(*x.shape[:2], -1)
        hidden = constrain(hidden, "batch", "seq", "mlp")
        (down,) = dense(hidden.reshape(gate.shape), ("mlp", "embed"), "down")
        return down.reshape(x.shape)


class Block(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, view, windowed, cache=None):
        """Arguments and results as in `Attention`."""
        config = self.config

        def norm(name, x):
            return RMSNorm(config, name=name)(x)

        attended, cache = Attention(config, name="attention")(
            norm("attention_norm", x), view, windowed, cache
        )
        if config.sandwich_norm:
            attended = norm("attention_out_norm", attended)
        x = constrain(x + attended, "batch", "seq", "activation_embed")
        added = MLP(config, name="mlp")(norm("mlp_norm", x))
        if config.sandwich_norm:
            added = norm("mlp_out_norm", added)
        return constrain(x + added, "batch", "seq", "activation_embed"), cache


class Embedding(nn.Module):
    """Token vectors, and the way back from hidden states to the vocabulary."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        init = _kernel_init(config)
        shape = (config.vocab_rows, config.embed_dim)
        self.tokens = _param(self, "tokens", init, shape, ("vocab", "embed"))
        in_panels = self.has_variable("params", panels_name("output"))  # as decoding has it
        if not config.tie_embeddings and not in_panels:
            self.output = _param(self, "output", init, shape[::-1], ("embed", "vocab"))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Vectors `[B, T, D]` of tokens `[B, T]`."""
        vectors = self.tokens[tokens]
        if self.config.embed_scale != 1.0:
            # In the compute dtype, as Gemma was trained: bfloat16 makes 55.5 of 55.4.
            vectors *= jnp.asarray(self.config.embed_scale, vectors.dtype)
        return constrain(vectors, "batch", "seq", "activation_embed")

    def unembedding(self) -> jax.Array:
        """`[D, V]`, in the compute dtype; V rows of the embedding, padding included."""
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
            # Where all layers are of one kind, `windowed` says which while tracing.
            static = (3,) if len(set(config.windows)) == 1 else ()
            block = nn.remat(block, policy=policy, prevent_cse=False, static_argnums=static)
        axes: Any = (nn.broadcast, 0)  # flax types in_axes as int alone
        self.layers = nn.scan(
            _scanned(block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=axes,
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config)
        self.final_norm = RMSNorm(config)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        gradients: Any = None,
    ) -> jax.Array:
        """Final hidden states, normalised.

        Args:
            tokens: `[B, T]` int32.
            mask: `[B, T]` bool, true on real tokens; all of them by default.
            positions: `[B, T]` int32; counted over real tokens by default.
            gradients: a sum that the gradient of `layers` is to be added to, see `run_layers`;
                layers are then computed again in the backward pass, as with remat="full".

        Returns:
            `[B, T, D]` in the compute dtype.
        """
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        positions = positions_from_mask(mask) if positions is None else positions
        view = View(rotations(self.config, positions), Columns(mask))
        x: Any = self.embedding(tokens)
        windowed = jnp.array(self.config.windows)
        if gradients is None:
            x, _ = self.layers(x, view, windowed)
        else:
            params = self.layers.variables["params"]
            x = run_layers(self._run_block, params, gradients, x, view, windowed)
        return self.final_norm(x)

    def _run_block(self, params: Any, x: jax.Array, view: View, windowed: jax.Array) -> jax.Array:
        """One layer by its own parameters."""
        block = _scanned(Block)(self.config, parent=None)
        return block.apply({"params": params}, x, view, windowed)[0]

    def logits(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Logits `[B, T, V]` float32; for small models and tests, training never holds them."""
        config = self.config
        return vocabulary_logits(
            self(tokens, mask), self.unembedding(), config.logit_softcap, config.drawable
        )

    def unembedding(self) -> jax.Array:
        """`[D, V]` in the compute dtype."""
        return self.embedding.unembedding()


def _scanned(block: type[nn.Module]) -> type[nn.Module]:
    """The block as a scan body: its carry is the residual stream and it has no other output."""

    class ScannedBlock(block):
        @nn.compact
        def __call__(self, x, view, windowed):
            if len(view.rotations) == 1:
                (windowed,) = view.rotations
            x, _ = super().__call__(x, view, windowed)
            return x, None

    return ScannedBlock


def init_params(config: TransformerConfig, key: jax.Array) -> Any:
    """A fresh policy, its leaves boxed with the names of their axes (see `Layout`).

    Kernels and embeddings are normal with `config.init_std`, norms 1, biases 0.
    """
    return Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
