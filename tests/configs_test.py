"""Config files: what they say is accepted, is what was released, and is what the docs say."""

import ast
import contextlib
import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import ml_collections
import pytest

from configs import base, code_7b, common, math_7b, math_32b
from flowrl_jax import tasks
from flowrl_jax.cli import load_config
from flowrl_jax.config import parse_config
from flowrl_jax.errors import InputError
from flowrl_jax.models.transformer import TransformerConfig
from flowrl_jax.objectives import OBJECTIVES
from flowrl_jax.objectives.flowrl import FlowRLConfig
from flowrl_jax.objectives.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py"))
FILES = [name for name in FILES if name not in ("__init__", "common")]
WITH_PRESETS = [name for name in FILES if name != "base"]


def get(name: str, *arguments: str) -> ml_collections.ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(*arguments)


@pytest.mark.parametrize("name", FILES)
def test_config_is_accepted(name):
    parse_config(get(name))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", WITH_PRESETS)
def test_preset_changes_the_objective_alone(name, preset):
    config, default = parse_config(get(name, preset)), parse_config(get(name))
    objective = OBJECTIVES[get(name, preset).loss.objective]
    assert type(config.loss) is objective.config_class is type(PRESETS[preset])
    assert dataclasses.replace(config, loss=default.loss) == default


@pytest.mark.parametrize("module", [math_7b, math_32b, code_7b])
def test_released_runs_take_presets_as_they_are(module):
    for name, preset in PRESETS.items():
        assert parse_config(module.get_config(name)).loss == preset
    assert parse_config(module.get_config()).loss == PRESETS["flowrl_paper"]


def test_unknown_preset_names_the_nearest():
    with pytest.raises(InputError, match="'flowrl_papr': unknown; did you mean 'flowrl_paper'"):
        common.preset_loss("flowrl_papr")
    with pytest.raises(InputError, match="did you mean 'flowrl_paper'"):
        load_config(f"{REPOSITORY}/configs/math_7b.py:flowrl_papr", {})


# The released scripts and their defaults, one value a line; (7B math, 32B math, 7B code).
RELEASED = {
    "rollout.prompts_per_step": (512, 512, 64),
    "rollout.group_size": (8, 8, 8),
    "rollout.max_prompt_length": (2048, 2048, 2048),
    "rollout.max_response_length": (8192, 8192, 8192),
    "rollout.long_prompts": ("truncate", "truncate", "truncate"),
    "rollout.temperature": (1.0, 1.0, 0.6),
    "rollout.top_p": (1.0, 1.0, 1.0),
    "rollout.top_k": (0, 0, 0),
    "rollout.old_logprobs": ("trainer", "trainer", "trainer"),
    "train.updates_per_rollout": (16, 16, 2),
    "train.epochs": (1, 1, 1),
    "optimizer.learning_rate": (1e-6, 1e-6, 1e-6),
    "optimizer.log_z_learning_rate": (0.0, 0.0, 0.0),
    "optimizer.schedule": ("constant", "constant", "constant"),
    "optimizer.warmup_steps": (10, 10, 10),
    "optimizer.weight_decay": (0.1, 0.1, 0.1),
    "optimizer.b1": (0.9, 0.9, 0.9),
    "optimizer.b2": (0.999, 0.999, 0.999),
    "optimizer.eps": (1e-8, 1e-8, 1e-8),
    "optimizer.clip_norm": (1.0, 1.0, 1.0),
    "optimizer.clip_jointly": (True, True, True),
    "loss.beta": (15.0, 15.0, 15.0),
    "loss.reward_norm": ("group", "group", "group"),
    "loss.log_z.kind": ("head", "head", "head"),
    "loss.log_z.num_layers": (3, 3, 3),
    "loss.log_z.dropout": (0.1, 0.1, 0.1),
    "loss.log_z.detach": (False, False, False),
    "checkpoint.every": (50, 50, 25),
    "eval.every": (5, 5, 10),
    "eval.samples": (16, 16, 16),
    "eval.temperature": (0.6, 0.6, 0.6),
    "eval.top_p": (0.95, 0.95, 0.95),
    "eval.top_k": (50, 50, 50),
    "task.name": ("math", "math", "code"),
    "model.dtype": ("bfloat16", "bfloat16", "bfloat16"),
    "model.remat": ("full", "full", "full"),
    "mesh.fsdp": (-1, -1, -1),
}


def value(config, name: str):
    for part in name.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("name", RELEASED)
def test_released_hyper_parameters(name):
    found = tuple(value(m.get_config(), name) for m in (math_7b, math_32b, code_7b))
    assert found == RELEASED[name]


@pytest.mark.parametrize("module", [math_7b, math_32b, code_7b])
def test_released_optimizer_step_is_32_prompts(module):
    config = parse_config(module.get_config())
    assert config.rows_per_update == 32 * 8
    assert config.train.micro_batch_size == -1  # one a shard, on any mesh


QWEN = {  # layers, width, query heads, key heads, head width, mlp width
    math_7b: (28, 3584, 28, 4, 128, 18944),
    math_32b: (64, 5120, 40, 8, 128, 27648),
    code_7b: (28, 3584, 28, 4, 128, 18944),
}


@pytest.mark.parametrize("module", QWEN)
def test_memory_figures_of_the_docstrings(module):
    layers, width, heads, kv_heads, head_dim, mlp = QWEN[module]
    shape = TransformerConfig(
        152_064, layers, width, heads, kv_heads, head_dim, mlp, tie_embeddings=False, qkv_bias=True
    )
    assert round(shape.num_parameters / 1e9, 1) == (32.8 if module is math_32b else 7.6)
    config = parse_config(module.get_config())
    tokens = config.rollout.max_prompt_length + config.rollout.max_response_length
    for rows in (config.rollout.slots, config.eval.prompts_per_batch * config.eval.samples):
        cache = rows * tokens * 2 * layers * kv_heads * head_dim * 2 / 2**30
        assert cache == (160 if module is math_32b else 70)


def test_tasks_of_the_released_runs():
    assert tasks.build(parse_config(math_7b.get_config()).task).name == "math"
    with contextlib.closing(tasks.build(parse_config(code_7b.get_config()).task)) as task:
        assert task.name == "code"


def documented(text: str) -> dict[str, str]:
    """Setting -> default, from the tables of docs/configuration.md."""
    rows = re.findall(r"^\| `([\w.]+)` \| `?(.*?)`? \| .+ \|$", text, re.MULTILINE)
    names = [name for name, _ in rows]
    assert len(names) == len(set(names)), "a setting has two rows"
    return dict(rows)


def flatten(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for name, entry in config.items():
        if isinstance(entry, ml_collections.ConfigDict) and len(entry):
            flat |= flatten(entry, f"{prefix}{name}.")
        else:
            empty = isinstance(entry, ml_collections.ConfigDict)
            flat[prefix + name] = {} if empty else entry
    return flat


def test_every_setting_is_documented_with_its_default():
    text = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    table = documented(text)
    settings = flatten(base.get_config())
    settings = {k: v for k, v in settings.items() if not k.startswith("sft.optimizer.")}
    assert table.pop("sft.optimizer") == "as above"
    assert base.get_config().sft.optimizer == base.get_config().optimizer
    assert sorted(table) == sorted(settings)
    for name, default in table.items():
        assert ast.literal_eval(default) == settings[name], name


def test_every_config_file_is_documented():
    text = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    for name in FILES:
        assert f"`{name}.py`" in text, name


def test_presets_are_documented():
    """The table of docs/objective.md is the presets' own values."""
    text = (REPOSITORY / "docs" / "objective.md").read_text(encoding="utf-8")
    columns = ("flowrl_paper", "flowrl_release", "flowrl_recipe", "flowrl_per_token", "flowrl")
    assert re.search(
        r"^\| \| " + r".*\| ".join(f"`{name}`" for name in columns), text, re.MULTILINE
    )
    rows = re.findall(r"^\| (.+) \|$", text, re.MULTILINE)
    # Of fields that later tables have too, the first row.
    table = {row.split(" | ")[0]: row.split(" | ")[1:] for row in reversed(rows)}
    for i, name in enumerate(columns):
        preset = PRESETS[name]

        def cell(row, i=i):
            return table[row][i - 1 if table[row][i] == "same" else i]

        assert cell("`beta`").startswith(f"{preset.beta:g}")
        assert cell("`weight`").startswith(f"`{preset.weight}`")
        assert cell("`log_z.pooling`").startswith(f"`{preset.log_z.pooling}`")
        for field in ("detach", "zero_init"):
            wanted = "yes" if getattr(preset.log_z, field) else "no"
            assert cell(f"`log_z.{field}`").startswith(wanted)
        assert float(cell("`log_z.dropout`")) == preset.log_z.dropout
        assert cell("`reward_norm`").startswith(f"`{preset.reward_norm}`")
        assert cell("`log_z.kind`") == f"`{preset.log_z.kind}`"
        assert cell("`length_normalize`") == ("yes" if preset.length_normalize else "no")


def test_flow_family_is_documented():
    """Each row of its table is the preset's own values."""
    text = (REPOSITORY / "docs" / "objective.md").read_text(encoding="utf-8")
    section = text.partition("## The flow family")[2].partition("\n## ")[0]
    rows = [row.split(" | ") for row in re.findall(r"^\| (`\w+` \|.+) \|$", section, re.MULTILINE)]
    rows = [row for row in rows if row[0].strip("`") in PRESETS]
    family = {name for name, preset in PRESETS.items() if isinstance(preset, FlowRLConfig)}
    assert {row[0].strip("`") for row in rows} == family - {
        *("flowrl_paper", "flowrl_release", "flowrl_recipe", "flowrl_per_token")
    }
    for name, _, beta, kappa, norm, kind, weight, besides in rows:
        preset: Any = PRESETS[name.strip("`")]
        assert float(beta) == preset.beta
        assert kappa == ("n" if preset.length_normalize else "1")
        assert (norm, kind) == (f"`{preset.reward_norm}`", f"`{preset.log_z.kind}`")
        bound = f" {preset.weight_max:g}" if preset.weight == "max" else ""
        assert weight == f"`{preset.weight}`{bound}"
        assert ("reference=old" in besides) == (preset.reference == "old")
        assert (f"divergence={preset.divergence}" in besides) == (preset.divergence != "reverse_kl")
        if preset.log_z.kind == "table":
            assert f"`table_rate` {preset.log_z.table_rate:g}" in besides
        if preset.gap_high:
            assert f"`gap_low` {preset.gap_low:g}, `gap_high` {preset.gap_high:g}" in besides
