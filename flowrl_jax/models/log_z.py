"""The log Z head: a small network on the policy's hidden states over the prompt."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowrl_jax.masking import masked_sum
from flowrl_jax.objectives.log_z import LogZConfig


def pool_prompt(hidden: jax.Array, prompt_mask: jax.Array, pooling: str) -> jax.Array:
    """Mean hidden state over the prompt.

    Args:
        hidden: `[B, P, D]`, final hidden states of a prompt padded on the left.
        prompt_mask: `[B, P]` bool.
        pooling: "all" or "drop_last", see `LogZConfig`.

    Returns:
        `[B, D]` float32; 0 where no token is left to average.
    """
    if pooling == "drop_last":
        prompt_mask = prompt_mask.at[:, -1].set(False)
    mask = prompt_mask[..., None]
    count = jnp.maximum(prompt_mask.astype(jnp.float32).sum(axis=1), 1.0)
    return masked_sum(hidden.astype(jnp.float32), mask, axis=1) / count[:, None]


def _uniform(fan_in: int) -> nn.initializers.Initializer:
    """torch's default for linear layers, weight and bias: uniform within 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def row_dropout(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
    """Dropout whose noise belongs to the row, so that it does not depend on the batch's cut.

    Args:
        x: `[B, D]`.
        rate: probability of a zero.
        keys: `[B]` PRNG keys, consumed.
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


class LogZHead(nn.Module):
    """`[linear, GELU, layer norm, dropout] x (num_layers - 1)`, then a linear layer to one number.

    Float32 throughout. Layers as in the released `ProjZModule`; `LogZConfig` says what can differ.
    """

    config: LogZConfig

    @nn.compact
    def __call__(self, pooled: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Log Z of each prompt.

        Args:
            pooled: `[B, D]` float32 from `pool_prompt`.
            dropout_keys: `[B]` PRNG keys; without them nothing is dropped.

        Returns:
            `[B]` float32.
        """
        config = self.config
        x = jax.lax.stop_gradient(pooled) if config.detach else pooled
        width = x.shape[-1]
        init = _uniform(width)
        for i in range(config.num_layers - 1):
            x = nn.Dense(width, kernel_init=init, bias_init=init, name=f"hidden_{i}")(x)
            x = nn.gelu(x, approximate=False)
            x = nn.LayerNorm(epsilon=1e-5, name=f"norm_{i}")(x)
            if config.dropout and dropout_keys is not None:
                keys = jax.vmap(jax.random.fold_in, (0, None))(dropout_keys, i)
                x = row_dropout(x, config.dropout, keys)
        last = nn.initializers.zeros if config.zero_init else init
        return nn.Dense(1, kernel_init=last, bias_init=last, name="output")(x)[:, 0]


def init_log_z(config: LogZConfig | None, embed_dim: int, num_prompts: int, key: jax.Array) -> Any:
    """The log Z parameter tree: empty where nothing is learned.

    Args:
        config: None for an objective without log Z.
        embed_dim: width of the policy's hidden states.
        num_prompts: size of the table, for `kind="table"`.
        key: consumed.
    """
    if config is None or config.kind not in ("head", "table"):
        return {}
    if config.kind == "table":
        return {"value": jnp.zeros(num_prompts), "visits": jnp.zeros(num_prompts)}
    return LogZHead(config).init(key, jnp.zeros((1, embed_dim)))["params"]
