"""The value head: a number for each state, from the policy's hidden states."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowrl_jax.objectives.values import ValueConfig


class ValueHead(nn.Module):
    """`[linear, GELU] x (num_layers - 1)`, then a linear layer to one number; float32 throughout.

    The layers' inputs are the policy's final, normalised hidden states.
    """

    config: ValueConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """The value of each state.

        Args:
            hidden: `[..., D]`, final hidden states of what has been read in that state.

        Returns:
            `[...]` float32.
        """
        config = self.config
        x = jax.lax.stop_gradient(hidden) if config.detach else hidden
        x = x.astype(jnp.float32)
        for i in range(config.num_layers - 1):
            x = nn.gelu(nn.Dense(x.shape[-1], name=f"hidden_{i}")(x), approximate=False)
        last = nn.initializers.zeros if config.zero_init else nn.initializers.lecun_normal()
        return nn.Dense(1, kernel_init=last, name="output")(x)[..., 0]


def response_values(
    config: ValueConfig, params: Any, hidden: jax.Array, response_mask: jax.Array
) -> jax.Array:
    """The value of the state before each response token.

    Args:
        config: of the head.
        params: of the head.
        hidden: `[B, P + T, D]`, final hidden states of prompts and responses.
        response_mask: `[B, T]` bool.

    Returns:
        `[B, T]` float32, 0 where masked.
    """
    before = hidden[:, -response_mask.shape[1] - 1 : -1]
    values: Any = ValueHead(config).apply({"params": params}, before)
    return jnp.where(response_mask, values, 0.0)


def init_value(config: ValueConfig, embed_dim: int, key: jax.Array) -> Any:
    """The parameters of a value head.

    Args:
        config: of the head.
        embed_dim: width of the policy's hidden states.
        key: consumed.
    """
    return ValueHead(config).init(key, jnp.zeros((1, embed_dim)))["params"]
