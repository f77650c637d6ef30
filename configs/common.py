"""What config files share besides `base.py`."""

from typing import Any

from flowrl_jax.config import loss_fields
from flowrl_jax.errors import InputError
from flowrl_jax.objectives import OBJECTIVES
from flowrl_jax.objectives.presets import PRESETS
from flowrl_jax.tasks.base import nearest


def preset_loss(name: str) -> dict[str, Any]:
    """The `loss` section of a preset, for `--config=FILE:NAME`.

    Args:
        name: a name in `flowrl_jax.objectives.presets.PRESETS`.

    Raises:
        InputError: there is no such preset.
    """
    if name not in PRESETS:
        raise InputError(f"preset {name!r}: unknown; {nearest(name, PRESETS)}")
    preset = PRESETS[name]
    objective = next(key for key, o in OBJECTIVES.items() if o.config_class is type(preset))
    return loss_fields(objective, preset)
