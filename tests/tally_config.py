"""configs/test_tiny.py with a task of its own, which any text earns something from.

Rewards depend on every token and differ within a group, so that a run that mixes up rows is not
the run that does not. Each process notes which prompts it was asked to judge.
"""

import dataclasses
import zlib
from pathlib import Path

import jax
import ml_collections

from configs import test_tiny
from flowrl_jax.tasks import TASKS, Row, Verdict
from flowrl_jax.tasks.countdown import Countdown, CountdownConfig


@dataclasses.dataclass(frozen=True)
class TallyConfig(CountdownConfig):
    """Settings of the task: where to note the prompts."""

    notes: str = ""


class Tally(Countdown):
    """Countdown, but a response earns 0 to 1 by its checksum."""

    def __init__(self, config: TallyConfig):
        super().__init__(config)
        self._notes = Path(config.notes)

    def judge(self, response: str, row: Row) -> Verdict:
        """Returns a reward; the prompt's id is noted under the name of the process."""
        with (self._notes / str(jax.process_index())).open("a") as file:
            file.write(f"{row['prompt_id']}\n")
        reward = zlib.crc32(f"{row['prompt_id']} {response}".encode()) % 4 / 3
        return super().judge(response, row)._replace(reward=reward)


TASKS["tally"] = (TallyConfig, Tally)  # type: ignore[index]


def get_config(objective: str = "flowrl") -> ml_collections.ConfigDict:
    """The tiny config, made smaller still: what costs time is compiling it.

    Args:
        objective: as in configs/test_tiny.py.
    """
    config = test_tiny.get_config(objective)
    config.steps = 12
    config.model.num_layers = 1
    config.task = {"name": "tally", "options": {"notes": "."}}
    # Normalised rewards of a group sum to zero, so the first gradients of log Z are nothing but
    # rounding errors, and Adam would make whole steps of them.
    config.optimizer.eps = 1e-3
    config.eval.update(every=12, prompts=8)
    config.checkpoint.update(every=6, keep=9)
    config.sft.steps = 2
    config.metrics.tensorboard = False
    config.rollout.slots = 16  # of 32 rows: those that end make room for others
    return config
