"""A number per state: what objectives with a value head ask of it, and what they share.

`values[:, t]` belongs to the state before response token t, so that `values[:, 0]` is the prompt's.
The state after the last token has no entry; its value is known and differs between objectives.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ValueConfig:
    """The head on the policy's final hidden states that gives the values.

    Attributes:
        num_layers: linear layers, all but the last as wide as the policy, with GELU in between.
        detach: whether the head's gradient stops before the policy.
        zero_init: start the last layer at zero, so that all values are 0 at first.
    """

    num_layers: int = 2
    detach: bool = True
    zero_init: bool = True

    def __post_init__(self):
        if self.num_layers < 1:
            raise ValueError(f"loss.value.num_layers={self.num_layers} must be at least 1")


def last_token(mask: jax.Array) -> jax.Array:
    """Where each response's last token is, `[B, T]` bool; nowhere in a response without tokens.

    Args:
        mask: `[B, T]` bool, true on response tokens.
    """
    left = jnp.flip(jnp.cumsum(jnp.flip(mask, axis=1), axis=1), axis=1)
    return mask & (left == 1)


def next_values(values: jax.Array, mask: jax.Array, last: jax.Array) -> jax.Array:
    """The value of the state that each token leads to.

    A masked token leads nowhere: after a token comes the state before the next one of the mask.

    Args:
        values: `[B, T]` float32. Values where the mask is 0 never matter.
        mask: `[B, T]` bool, true on response tokens.
        last: `[B]` float32, the value after the last token.

    Returns:
        `[B, T]` float32.
    """
    length = mask.shape[1]
    place = jnp.where(mask, jnp.arange(length), length)
    first = jax.lax.cummin(place, axis=1, reverse=True)
    following = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    known = jnp.concatenate([jnp.where(mask, values, 0.0), last[:, None]], axis=1)
    return jnp.take_along_axis(known, following, axis=1)
