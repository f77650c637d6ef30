"""Dynamic sampling: prompts are drawn until enough groups have rewards that differ.

A group whose rewards are all equal says nothing to an objective that compares responses with their
group. DAPO (arXiv 2503.14476, section 3.2) draws other prompts in place of such groups.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flowrl_jax.sharding import Layout
from flowrl_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class Groups:
    """What is known of groups, all processes' in the order of rows, once they are judged.

    Attributes:
        prompt_id: `[N]` int32.
        reward: `[N, G]` float32, raw.
    """

    prompt_id: np.ndarray
    reward: np.ndarray

    @property
    def varied(self) -> np.ndarray:
        """`[N]` bool, which of them have rewards that are not all equal."""
        return (self.reward != self.reward[:, :1]).any(axis=1)


def keep_groups(varied: np.ndarray, count: int) -> np.ndarray:
    """Which groups are kept.

    Args:
        varied: `[N]` bool, whether the rewards of each are not all equal, in the order drawn.
        count: how many are wanted, at most N.

    Returns:
        `[count]` int, places in the order drawn: the first ones that vary and, where these are too
        few, the first of the others.
    """
    return np.sort(np.argsort(~varied, kind="stable")[:count])


def make_take(layout: Layout) -> Callable[[Rollout, Rollout, np.ndarray], Rollout]:
    """A jitted `(held, new, rows)` to the rollout of some rows of two.

    Args:
        layout: where rollouts live.

    Returns:
        A function of two rollouts of B rows and of `[B]` int32 places, from B on in the second one.
    """

    def take(held: Rollout, new: Rollout, rows: jax.Array) -> Rollout:
        return jax.tree.map(lambda *both: jnp.concatenate(both)[rows], held, new)

    return jax.jit(take, out_shardings=layout.batch)


def draw_until_varied(
    draw: Callable[[int], tuple[Rollout, Groups]],
    take: Callable[[Rollout, Rollout, np.ndarray], Rollout],
    max_batches: int,
) -> tuple[Rollout, Groups, int]:
    """Draws batches until as many groups vary as a batch has; memory holds two batches at most.

    Args:
        draw: gives batch 0, 1, ... with the same number of rows each.
        take: from `make_take`.
        max_batches: to draw at most, from 1 on.

    Returns:
        A rollout with the rows of one batch, its groups, and how many groups that were drawn vary.
    """
    rollout, held = draw(0)
    count, size = held.reward.shape
    drawn = int(held.varied.sum())
    for number in range(1, max_batches):
        if held.varied.all():
            break
        more, new = draw(number)
        drawn += int(new.varied.sum())
        prompt_id = np.concatenate([held.prompt_id, new.prompt_id])
        reward = np.concatenate([held.reward, new.reward])
        kept = keep_groups(Groups(prompt_id, reward).varied, count)
        rows = (kept[:, None] * size + np.arange(size)).reshape(-1)
        rollout = take(rollout, more, rows.astype(np.int32))
        held = Groups(prompt_id[kept], reward[kept])
    return rollout, held, drawn
