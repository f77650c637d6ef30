"""Off-policy replay: groups of responses of earlier steps, to be learnt from again.

A group keeps the log-probabilities of the policy that sampled it, so the objective's importance
weight is right whenever it is learnt from. Each process keeps groups of its own rows, on the host.
"""

import dataclasses
import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from flowrl_jax.errors import InputError, require

PRIORITIES = ("uniform", "reward", "variance")
REWARD = "reward"  # of the arrays of groups, the one that priorities go by
STEP, PLACE = "step_drawn", "place"  # beside the arrays of groups: when, and where in the ring


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """What is kept of earlier rollouts, and how much of an update comes from there.

    Attributes:
        fraction: share of the prompts of each optimiser step that are replayed, in [0, 1); so many
            fewer are sampled. 0: no replay.
        size: prompts that are kept, over all hosts; the oldest make room.
        max_age: rollout steps after which a group is not learnt from any more.
        priority: "uniform"; "reward" or "variance": the group with the k-th greatest mean or
            variance of rewards has a weight of 1 / k.
    """

    fraction: float = 0.0
    size: int = 1024
    max_age: int = 16
    priority: str = "uniform"

    def __post_init__(self):
        require(
            0.0 <= self.fraction < 1.0,
            f"replay.fraction={self.fraction} must be at least 0 and below 1: a step that samples"
            " nothing has nothing to replay",
        )
        require(
            self.size >= 1 and self.max_age >= 1,
            f"replay.size={self.size} and replay.max_age={self.max_age} must be at least 1; set"
            " replay.fraction=0 for no replay",
        )
        require(
            self.priority in PRIORITIES,
            f"replay.priority={self.priority!r} is not known: use one of {PRIORITIES}",
        )


def mixed_places(fresh: int, replayed: int) -> np.ndarray:
    """Which places of a batch hold what is replayed, spread so that every cut of it has its share.

    Args:
        fresh: groups that were sampled.
        replayed: groups that were not.

    Returns:
        `[fresh + replayed]` bool.
    """
    total = fresh + replayed
    ends = np.arange(1, total + 1) * replayed // total
    return np.diff(ends, prepend=0) > 0


class ReplayBuffer:
    """Groups of one process, by age.

    Args:
        config: what is kept.
        size: groups that are kept here.
        seed: of what is drawn, besides the step.
        part: of the rows that are held here, so that processes draw differently.
    """

    def __init__(self, config: ReplayConfig, size: int, seed: int, part: int = 0):
        self._config, self._size, self._seed, self._part = config, size, seed, part
        self._arrays: dict[str, np.ndarray] = {}
        self._next = self._count = self._filled = 0

    def __len__(self) -> int:
        """Groups that are kept."""
        return self._count

    def clear(self) -> None:
        """Forgets all groups."""
        self._count = 0

    def mix(
        self, step: int, fresh: Mapping[str, np.ndarray], count: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Puts kept groups between fresh ones, and keeps the fresh ones for later.

        Where fewer can be replayed than are wanted, as in the first step, the first fresh ones
        stand in: they are learnt from twice.

        Args:
            step: of the fresh ones.
            fresh: arrays by name, `[F, ...]`, a group along the first axis; `REWARD` is `[F, G]`.
            count: groups to replay.

        Returns:
            Arrays `[F + count, ...]` by name, and the `[k]` ages, in steps, of those replayed.

        Raises:
            InputError: a run that is continued has groups or responses of another size.
        """
        self._forget(before=step - self._config.max_age)
        chosen = self._draw(step, count)
        number = len(next(iter(fresh.values())))
        twice = np.arange(count - chosen.size) % number
        places = mixed_places(number, count)
        mixed = {}
        for name, values in fresh.items():
            kept = self._arrays.get(name, values)
            require(
                kept.shape[1:] == values.shape[1:],
                f"the replay buffer holds responses of shape {kept.shape[1:]} a prompt, not"
                f" {values.shape[1:]}: resume with the run's own rollout settings",
            )
            mixed[name] = np.empty((places.size, *values.shape[1:]), values.dtype)
            mixed[name][~places] = values
            old = [kept[chosen]] if chosen.size else []
            mixed[name][places] = np.concatenate([*old, values[twice]])
        ages = step - self._arrays[STEP][chosen] if chosen.size else np.zeros(0, np.int64)
        self._add({**fresh, STEP: np.full(number, step, np.int64)})
        return mixed, ages

    def save(self, path: Path) -> str:
        """Writes the groups to a file that appears whole.

        Args:
            path: of an .npz.

        Returns:
            Its SHA-256.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            # Views, not copies: the buffer may be most of the host's memory.
            held = {name: x[: self._filled] for name, x in self._arrays.items()}
            held[PLACE] = np.array([self._size, self._filled, self._next, self._count])
            np.savez(file, allow_pickle=False, **held)
        digest = _sha256(partial)
        os.replace(partial, path)
        return digest

    def load(self, path: Path, digest: str) -> None:
        """Reads what `save` wrote.

        Args:
            path: of the file.
            digest: that `save` gave.

        Raises:
            InputError: the file is missing, is another one, or is of a buffer of another size.
        """
        if not path.is_file() or _sha256(path) != digest:
            what = "is not the one of its checkpoint" if path.is_file() else "is missing"
            raise InputError(
                f"{path}: the replay buffer {what}: put it back, or delete the run's checkpoint"
                f" {path.name.split('.')[0]} and resume from the one before"
            )
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        size, self._filled, self._next, self._count = map(int, arrays.pop(PLACE))
        if size != self._size:
            raise InputError(
                f"replay.size keeps {self._size} prompts here, but {path} is of a run that keeps"
                f" {size}: resume with the run's own settings"
            )
        for name, values in arrays.items():
            self._arrays[name] = np.zeros((size, *values.shape[1:]), values.dtype)
            self._arrays[name][: self._filled] = values

    def _order(self) -> np.ndarray:
        """Where the groups are, the oldest first."""
        return (self._next - self._count + np.arange(self._count)) % self._size

    def _forget(self, before: int) -> None:
        if self._count:
            self._count = int((self._arrays[STEP][self._order()] >= before).sum())

    def _add(self, groups: Mapping[str, np.ndarray]) -> None:
        number = min(len(groups[STEP]), self._size)
        at = (self._next + np.arange(number)) % self._size
        for name, values in groups.items():
            if name not in self._arrays:
                self._arrays[name] = np.zeros((self._size, *values.shape[1:]), values.dtype)
            self._arrays[name][at] = values[len(values) - number :]
        end = self._next + number
        self._filled = self._size if end >= self._size else max(self._filled, end)
        self._count = min(self._count + number, self._size)
        self._next = end % self._size

    def _draw(self, step: int, count: int) -> np.ndarray:
        """Where `count` groups are, or all there are, in a random order."""
        order = self._order()
        if not order.size:
            return order
        weight = np.ones(order.size)
        if self._config.priority != "uniform":
            reward = self._arrays[REWARD][order].astype(np.float64)
            value = reward.mean(axis=1) if self._config.priority == "reward" else reward.var(axis=1)
            # Of equals the newest counts as greatest.
            ranked = np.lexsort((-np.arange(order.size), -value))
            weight[ranked] = 1.0 / np.arange(1, order.size + 1)
        random = np.random.default_rng([self._seed, step, self._part])
        size = min(count, order.size)
        return order[random.choice(order.size, size, replace=False, p=weight / weight.sum())]


def prune(folder: Path, steps: Collection[int]) -> None:
    """Deletes the buffers of checkpoints that are gone.

    Args:
        folder: of files named STEP.PART.npz.
        steps: whose files stay.
    """
    for path in folder.glob("*.npz"):
        if int(path.name.split(".")[0]) not in steps:
            path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
