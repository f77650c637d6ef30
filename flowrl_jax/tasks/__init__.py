"""Tasks: what is asked and how answers are judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flowrl_jax.errors import InputError
from flowrl_jax.tasks import code, countdown, math, stories
from flowrl_jax.tasks.base import Row, Task, Verdict, make_config, nearest

__all__ = ["TASKS", "Row", "Task", "TaskConfig", "Verdict", "build"]

TASKS: Mapping[str, tuple[type, Callable[[Any], Task]]] = {
    "code": (code.CodeConfig, code.Code),
    "countdown": (countdown.CountdownConfig, countdown.Countdown),
    "math": (math.MathConfig, math.Math),
    "stories": (stories.StoriesConfig, stories.Stories),
}
"""Name -> (config dataclass, task class)."""


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Which task, and its settings.

    Attributes:
        name: a name in TASKS.
        options: settings by name, as in the task's own config dataclass; what is left out keeps
            its default.
    """

    name: str = "countdown"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def build(config: TaskConfig) -> Task:
    """Returns the task of a config.

    Raises:
        InputError: no task has this name, or it has no such option.
    """
    if config.name not in TASKS:
        raise InputError(f"task {config.name!r}: unknown; {nearest(config.name, TASKS)}")
    config_class, task_class = TASKS[config.name]
    options = make_config(config_class, config.options, owner=f"task {config.name}")
    return task_class(options)
