"""What plays the role of log Z(x), the learned log-partition function of a prompt."""

import dataclasses

import jax
import jax.numpy as jnp

# Kinds that are one number for a group, of all its samples.
GROUP_KINDS = ("group", "group_old")


@dataclasses.dataclass(frozen=True)
class LogZConfig:
    """How log Z of a prompt is obtained.

    Attributes:
        kind: "head" (a small network on the prompt's hidden states, trained by the loss),
            "table" (a running mean per prompt of its Monte-Carlo estimate), "group" (the
            Monte-Carlo estimate of the group at hand), "group_old" (the same of the policy that
            sampled, its log-ratio never divided by the length; GFlowRL) or "zero".
        pooling: which prompt tokens the head's input averages: "all" (paper, appendix E) or
            "drop_last" (released code: all but the last prompt token).
        detach: whether the head's gradient stops before the policy. The released code lets it
            flow; its authors report lower accuracy when it is stopped.
        zero_init: start the head's last layer at zero, so that log Z = 0 at first; otherwise
            torch's uniform default, as released.
        num_layers: linear layers of the head; 3 as released.
        dropout: rate after each hidden layer of the head; 0.1 as released.
        table_rate: weight of a new estimate in the table; the first visit of a prompt takes
            the estimate whole.
    """

    kind: str = "head"
    pooling: str = "drop_last"
    detach: bool = False
    zero_init: bool = False
    num_layers: int = 3
    dropout: float = 0.1
    table_rate: float = 0.3

    def __post_init__(self):
        for field, known in (
            ("kind", ("head", "table", *GROUP_KINDS, "zero")),
            ("pooling", ("all", "drop_last")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"log_z.{field}={getattr(self, field)!r} is not known: use one of {known}"
                )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"log_z.dropout={self.dropout} must be in [0, 1)")
        if not 0.0 < self.table_rate <= 1.0:
            raise ValueError(f"log_z.table_rate={self.table_rate} must be in (0, 1]")
        if self.num_layers < 1:
            raise ValueError(f"log_z.num_layers={self.num_layers} must be at least 1")


def group_mean(target: jax.Array, group_size: int) -> jax.Array:
    """Replaces each sample's estimate of log Z by the mean over its group.

    Args:
        target: `[B]` float32, `beta r - d / kappa` of each sample (see `flowrl.log_z_target`).
        group_size: samples per prompt; divides B.

    Returns:
        `[B]` float32, constant within a group and without gradient.
    """
    mean = target.reshape(-1, group_size).mean(axis=1)
    return jax.lax.stop_gradient(jnp.repeat(mean, group_size))


def update_table(
    table: dict[str, jax.Array], prompt_id: jax.Array, target: jax.Array, rate: float
) -> dict[str, jax.Array]:
    """Moves each visited prompt's log Z towards the mean of its new estimates.

    `z <- (1 - rate) z + rate * mean(target)`, with rate 1 at the first visit. With `kappa = 1`
    and rate 1 this is the group mean of TB-VarGrad.

    Args:
        table: `{"value": [N] float32, "visits": [N] float32}`.
        prompt_id: `[B]` int32 in `[0, N)`.
        target: `[B]` float32.
        rate: in (0, 1].

    Returns:
        The new table.
    """
    size = table["value"].shape[0]
    count = jax.ops.segment_sum(jnp.ones_like(target), prompt_id, size)
    total = jax.ops.segment_sum(target, prompt_id, size)
    visited = count > 0
    mean = total / jnp.maximum(count, 1.0)
    weight = jnp.where(table["visits"] > 0, rate, 1.0)
    value = jnp.where(visited, table["value"] + weight * (mean - table["value"]), table["value"])
    return {"value": value, "visits": table["visits"] + visited.astype(jnp.float32)}
