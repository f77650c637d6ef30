"""From a config file's values to dataclasses: what is refused, and what every file must hold."""

import dataclasses
import typing
from pathlib import Path

import pytest

from flowrl_jax.cli import load_config
from flowrl_jax.config import Config, loss_fields, parse_config, section
from flowrl_jax.errors import InputError
from flowrl_jax.objectives import OBJECTIVES
from flowrl_jax.objectives.flowrl import FlowRLConfig
from flowrl_jax.objectives.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = sorted(
    path for path in (REPOSITORY / "configs").glob("*.py") if "def get_config" in path.read_text()
)
BASE = REPOSITORY / "configs" / "base.py"


def base(**changes):
    """The values of configs/base.py with changes; `loss__beta=5` sets `loss.beta`."""
    values = load_config(str(BASE), {}).to_dict()
    for name, value in changes.items():
        *sections, last = name.split("__")
        target = values
        for part in sections:
            target = target[part]
        target[last] = value
    return values


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_file_is_complete(path):
    config = parse_config(load_config(str(path), {}))
    assert isinstance(config, Config)
    assert isinstance(config.loss, FlowRLConfig)


def test_files_are_found():
    assert {"base", "quickstart", "test_tiny"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("name", ["quickstart", "test_tiny"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_change_the_objective_alone(name, preset):
    path = REPOSITORY / "configs" / f"{name}.py"
    config = parse_config(load_config(f"{path}:{preset}", {}))
    wanted = PRESETS[preset]
    if (name, preset) == ("quickstart", "flowrl"):
        wanted = dataclasses.replace(wanted, beta=20.0)  # chosen for its short run
    assert config.loss == wanted
    plain = parse_config(load_config(str(path), {}))
    assert dataclasses.replace(config, loss=plain.loss) == plain


def leaves(config_class, path=""):
    for name, hint in typing.get_type_hints(config_class).items():
        inner = FlowRLConfig if hint is typing.Any else hint
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def test_base_shows_every_field_with_a_comment():
    """A reader of configs/base.py sees all there is; presets stand for the objective's fields."""
    lines = BASE.read_text().splitlines()
    for name in leaves(Config):
        if name.startswith("loss."):
            continue
        field = name.split(".")[-1]
        found = [line for line in lines if f'"{field}":' in line or f"config.{field} =" in line]
        assert found, name
        # The sizes of the model speak for themselves.
        assert any("#" in line for line in found) or name.startswith(("model.", "eval.", "mesh."))


def test_values_arrive():
    config = parse_config(
        base(seed=3, loss__beta=2, tokenizer__eos_ids=[7, 8], loss__log_z__dropout=0)
    )
    assert config.seed == 3
    # Integers are fine where a real number is wanted, lists where a tuple is.
    assert config.loss.beta == 2.0 and isinstance(config.loss.beta, float)
    assert config.tokenizer.eos_ids == (7, 8)
    assert config.loss.log_z.dropout == 0.0
    assert config.rows_per_update == 512 // 16 * 8
    assert config.updates == 16


def test_objective_chooses_its_class():
    values = base()
    values["loss"] = loss_fields("grpo", PRESETS["grpo"])
    assert parse_config(values).loss == PRESETS["grpo"]
    assert section(PRESETS["grpo"]).keys() == values["loss"].keys() - {"objective"}


WRONG = {
    "unknown section": ({"rolout": {}}, "config.rolout: no such field; did you mean 'rollout'?"),
    "unknown field": ({"loss__bta": 1.0}, "config.loss.bta: no such field; did you mean 'beta'?"),
    "unknown inner field": ({"loss__log_z__pool": ""}, "config.loss.log_z.pool: no such field"),
    "objective": ({"loss__objective": "flowlr"}, "did you mean 'flowrl'?"),
    "section": ({"model": 3}, "config.model=3: a section"),
    "loss": ({"loss": 3}, "config.loss.objective=3"),
    "real for int": ({"steps": 1.5}, "config.steps=1.5 is of type float: give int"),
    "text for float": ({"loss__beta": "1"}, "config.loss.beta='1' is of type str: give float"),
    "truth for int": ({"steps": True}, "config.steps=True is of type bool: give int"),
    "int for truth": ({"data__shuffle": 1}, "config.data.shuffle=1 is of type int: give bool"),
    "truth for float": ({"loss__beta": True}, "config.loss.beta=True"),
    "none": ({"seed": None}, "config.seed=None is of type NoneType: give int"),
    "optional": ({"metrics__wandb_name": 3}, "config.metrics.wandb_name=3 is of type int"),
    "no tuple": ({"tokenizer__eos_ids": 7}, "config.tokenizer.eos_ids=7 is of type int"),
    "text for tuple": ({"tokenizer__eos_ids": "12"}, "eos_ids='12' is of type str"),
    "tuple of text": ({"tokenizer__eos_ids": ("a",)}, "eos_ids[0]='a' is of type str: give int"),
    "no options": ({"task__options": "x"}, "config.task.options='x' is of type str: give dict"),
    "nan": ({"loss__beta": float("nan")}, "config.loss.beta=nan is not a finite number"),
    "infinity": ({"optimizer__learning_rate": float("inf")}, "learning_rate=inf is not a finite"),
    "dtype": ({"model__dtype": "float16"}, "use one of float32, bfloat16"),
    "seed": ({"seed": -1}, "seed=-1: give an integer from 0"),
    "steps": ({"steps": 0}, "steps=0 must be at least 1"),
    "beta": ({"loss__beta": 0.0}, "loss.beta=0.0 must be positive"),
    "kind": ({"loss__log_z__kind": "heads"}, "log_z.kind='heads' is not known"),
    "updates": ({"train__updates_per_rollout": 7}, "does not divide rollout.prompts_per_step=512"),
    "epochs": ({"train__epochs": 0}, "train.epochs=0 must be at least 1"),
    "micro batch": ({"train__micro_batch_size": -2}, "train.micro_batch_size=-2 must be a number"),
    "chunk": ({"train__logprob_chunk": 0}, "train.logprob_chunk=0 must be at least 1"),
    "pieces": ({"rollout__prompts_per_batch": 5}, "prompts_per_batch=5 must divide"),
    "group": ({"rollout__group_size": 0}, "rollout.group_size=0 must be at least 1"),
    "temperature": ({"rollout__temperature": 0.0}, "rollout.temperature=0.0 must be positive"),
    "long prompts": ({"rollout__long_prompts": "cut"}, "rollout.long_prompts='cut' is not known"),
    "old": ({"rollout__old_logprobs": "old"}, "rollout.old_logprobs='old' is not known"),
    "truncated old": (
        {"rollout__old_logprobs": "sampler", "rollout__top_p": 0.9}, "the truncated distribution"
    ),
    "correction": ({"rollout__correction__kind": "tis"}, "correction.kind='tis' is not known"),
    "correction bounds": (
        {"rollout__correction__low": 2.0}, "correction.low=2.0 must be in [0, 1] and"
    ),
    "correction cap": ({"rollout__correction__high": 0.5}, "correction.high=0.5 at least 1"),
    "correction low": (
        {"rollout__correction__kind": "sequence", "rollout__correction__low": 0.5},
        "set low=0, or kind='sequence_mask'",
    ),
    "nothing to correct": (
        {"rollout__correction__kind": "sequence", "rollout__old_logprobs": "sampler"},
        "rollout.correction.kind='sequence' with old_logprobs='sampler' has nothing to correct",
    ),
    "tokens of a flow": (
        {"rollout__correction__kind": "token"},
        "kind='token' does not fit loss.objective='flowrl', whose loss is one number per response",
    ),
    "nothing ahead": (
        {"rollout__dynamic_sampling": True, "rollout__ahead": True},
        "so there is nothing to do meanwhile; set one of them to False",
    ),
    "single responses": (
        {"rollout__dynamic_sampling": True, "rollout__group_size": 1},
        "rewards of a single response never differ",
    ),
    "batches": ({"rollout__max_batches": 0}, "rollout.max_batches=0 must be at least 1"),
    "replayed share": (
        {"replay__fraction": 0.3},
        "replay.fraction=0.3 of the 32 prompts of an optimiser step",
    ),
    "replay size": (
        {"replay__fraction": 0.5, "replay__size": 100},
        "replay.size=100 is less than the 256 prompts that a step replays",
    ),
    "sampled pieces": (
        {"replay__fraction": 0.5, "rollout__prompts_per_batch": 512},
        "prompts_per_batch=512 must divide the 256 prompts that a step samples",
    ),
    "no evaluations": ({"reference__on_plateau": 2}, "eval.every=0 makes none: set eval.every"),
    "k": ({"eval__k": 17}, "eval.k=17 must lie in 1..eval.samples=16"),
    "eval batch": ({"eval__prompts_per_batch": 0}, "eval.prompts_per_batch=0 must be at least 1"),
    "schedule": ({"optimizer__schedule": "step"}, "optimizer.schedule='step' is not known"),
    "rate": ({"optimizer__learning_rate": -1.0}, "optimizer.learning_rate=-1.0 must not"),
    "sft": ({"sft__steps": 0}, "sft.steps=0 and"),
    "checkpoint": ({"checkpoint__keep": 0}, "checkpoint.keep=0 must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_one_clear_line(case):
    changes, message = WRONG[case]
    with pytest.raises(InputError) as caught:
        parse_config(base(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["steps", "model", "model__dtype", "loss__beta", "eval__k"])
def test_nothing_is_filled_in(name):
    values = base()
    *sections, last = name.split("__")
    target = values
    for part in sections:
        target = target[part]
    del target[last]
    with pytest.raises(InputError, match=f"{last} not given"):
        parse_config(values)


def test_every_objective_parses_its_own_defaults():
    for name, objective in OBJECTIVES.items():
        values = base()
        values["loss"] = loss_fields(name, objective.config_class())
        assert parse_config(values).loss == objective.config_class()
