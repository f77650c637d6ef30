"""The settings that a run keeps are the settings that it had."""

import dataclasses
import json
from pathlib import Path

import pytest

from flowrl_jax.cli import load_config
from flowrl_jax.config import parse_config
from flowrl_jax.errors import InputError
from flowrl_jax.objectives.presets import PRESETS
from flowrl_jax.settings import SETTINGS_FILE, load_settings, save_settings

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FILES = [path for path in sorted(CONFIGS.glob("*.py")) if path.stem not in ("__init__", "common")]
NAMES = [str(path) for path in FILES] + [f"{CONFIGS / 'test_tiny.py'}:{name}" for name in PRESETS]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: Path(name).name)
def test_every_config_comes_back(name, tmp_path):
    config = parse_config(load_config(name, {"data.options": "{'sizes': (3, 4), 'path': 'x'}"}))
    save_settings(tmp_path, config)
    assert parse_config(load_settings(tmp_path)) == config


def test_every_value_matters(tmp_path):
    config = parse_config(load_config(str(CONFIGS / "test_tiny.py"), {}))
    changed = dataclasses.replace(config, loss=dataclasses.replace(config.loss, beta=0.25))
    save_settings(tmp_path, changed)
    assert parse_config(load_settings(tmp_path)).loss.beta == 0.25 != config.loss.beta


WRONG = {
    "absent": (None, "cannot be read"),
    "no json": ("{", "not JSON"),
    "no text": (b"\xff\xfe", "not JSON"),
    "nested": ("[" * 100_000, "not JSON"),
    "a list": ("[]", "names no loss.objective"),
    "another program's": (json.dumps({"model_type": "llama"}), "names no loss.objective"),
    "an older run's": (json.dumps({"loss": {"beta": 15.0}}), "names no loss.objective"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_files_are_refused(case, tmp_path):
    content, message = WRONG[case]
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / SETTINGS_FILE).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_settings(tmp_path)
    assert "\n" not in str(caught.value) and "--config=FILE" in str(caught.value)
