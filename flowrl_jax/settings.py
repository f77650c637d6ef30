"""The settings of a run, kept in its folder: for people, for reports, and to be read back."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax

from flowrl_jax.config import Config
from flowrl_jax.errors import InputError
from flowrl_jax.objectives import OBJECTIVES

SETTINGS_FILE = "config.json"


def save_settings(workdir: str | os.PathLike[str], config: Config) -> None:
    """Writes `SETTINGS_FILE`; the first process does.

    Args:
        workdir: the run's folder.
        config: the settings.
    """
    if jax.process_index() == 0:
        text = json.dumps(settings_of(config), indent=2, default=str)
        Path(workdir, SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def load_settings(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_settings` wrote.

    Args:
        workdir: the run's folder.

    Returns:
        Values as `parse_config` takes them. What was a tuple is one again; a list in the options of
        a task or data set is one too, which both take for the other.

    Raises:
        InputError: the file is missing, or not what `save_settings` writes.
    """
    file = Path(workdir, SETTINGS_FILE)
    remedy = "give the run's settings with --config=FILE"
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON; {remedy}") from error
    loss = values.get("loss") if isinstance(values, dict) else None
    if not isinstance(loss, dict) or "objective" not in loss:
        raise InputError(f"{file}: names no loss.objective, so it is no run's settings; {remedy}")
    return {name: _with_tuples(value) for name, value in values.items()}


def settings_of(config: Config) -> dict[str, Any]:
    """The values from which `parse_config` makes a config.

    Args:
        config: the settings.
    """
    objective = next(
        name for name, known in OBJECTIVES.items() if known.config_class is type(config.loss)
    )
    values = dataclasses.asdict(config)
    return values | {"loss": {"objective": objective, **values["loss"]}}


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    if isinstance(value, list):
        return tuple(_with_tuples(item) for item in value)
    return value
