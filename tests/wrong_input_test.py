"""Wrong input: one line with value, rule and remedy, exit code 2, nothing compiled or lost."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from configs import base, quickstart, test_tiny
from flowrl_jax import evaluate, sft, train
from flowrl_jax.assembly import assemble
from flowrl_jax.config import parse_config
from flowrl_jax.errors import InputError
from flowrl_jax.grading import Grading
from flowrl_jax.metrics import CompileCounter
from flowrl_jax.sampler import Response
from flowrl_jax.tasks import Verdict
from flowrl_jax.train import train as run


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def arguments(data_dir, tmp_path) -> list[str]:
    return [
        "--config=configs/test_tiny.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.data_dir={data_dir}",
    ]


WRONG = {
    "no such field, the nearest is named": (["--config.loss.bta=2"], "beta"),
    "no such section": (["--config.los.beta=2"], "loss"),
    "wrong type": (["--config.steps=many"], "steps"),
    "not a flag": (["--wrokdir=x"], "wrokdir"),
    "broken rule": (["--config.loss.beta=-1"], "beta"),
    "updates do not divide the prompts": (["--config.train.updates_per_rollout=3"], "divisor"),
    "micro-batch does not divide": (["--config.train.micro_batch_size=7"], "micro_batch_size=7"),
    "mesh does not fit the devices": (["--config.mesh.tensor=3"], "devices"),
    "prompt longer than the limit": (
        ["--config.rollout.max_prompt_length=3"],
        "max_prompt_length=3",
    ),
    "unknown task": (["--config.task.name=countdwn"], "countdown"),
    "unknown data set": (["--config.data.builder=countdwn"], "countdown"),
    "missing tokenizer": (["--config.tokenizer.path=/nowhere.model"], "/nowhere.model"),
    "vocabulary larger than the model's": (["--config.model.vocab_size=8"], "tokenizer has 26 ids"),
    "unknown metric": (
        ["--config.reference.on_plateau=2", "--config.reference.metric=eval/pass_at_2"],
        "eval/pass_at_1",
    ),
    "what is sampled does not divide over the devices": (
        ["--config.rollout.group_size=2", "--config.replay.fraction=0.25"],
        "prompts_per_step*(1 - replay.fraction)=6",
    ),
    "missing weights": (["--config.model.path=/nowhere"], "/nowhere"),
    "missing run to start from": (["--config.model.start_from=/nowhere"], "/nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_line_and_exit_code_2(case, arguments, capsys, tmp_path):
    wrong, named = WRONG[case]
    with CompileCounter() as compilations:
        code = train.main([*arguments, *wrong])
    errors = capsys.readouterr().err.strip().splitlines()
    assert code == 2, errors
    assert len(errors) == 1, errors
    assert named in errors[0]
    assert compilations.count == 0
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_missing_config_and_workdir(arguments, capsys):
    assert train.main(arguments[1:2]) == 2
    assert "--config" in capsys.readouterr().err
    assert train.main([arguments[0], arguments[2]]) == 2
    assert "--workdir" in capsys.readouterr().err
    assert train.main(["--config=configs/nowhere.py", *arguments[1:]]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_a_used_folder_is_left_alone(data_dir, tmp_path):
    config = test_tiny.get_config()
    config.data.data_dir = data_dir
    config.steps = 1
    config.eval.every = 0
    parsed = parse_config(config)
    run(parsed, tmp_path / "run")
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(InputError, match="--resume"):
        run(parsed, tmp_path / "run")
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    # A damaged checkpoint stops the resumed run instead of starting it anew.
    shutil.rmtree(next((tmp_path / "run" / "checkpoints").glob("1/state")))
    with pytest.raises(InputError):
        run(parsed, tmp_path / "run", resume=True)


def test_rewards_must_be_finite(data_dir, tmp_path):
    class Odd:
        name = "odd"
        parallel = 1

        def judge(self, response, row):
            return Verdict(float("nan"), None, "wrong")

    config = test_tiny.get_config()
    config.data.data_dir = data_dir
    parts = assemble(parse_config(config), tmp_path)
    object.__setattr__(parts, "task", Odd())
    with pytest.raises(InputError, match="prompt 7"):
        grading = Grading(parts, [{"prompt_id": 7}], 1)
        grading(0, Response(np.array([1, 2]), np.zeros(2), np.zeros(2), truncated=False))
        grading.rewards()


@pytest.mark.parametrize("module", [train, sft, evaluate])
def test_help(module, capsys):
    assert module.main(["--help"]) == 0
    assert "config" in capsys.readouterr().out


def test_every_config_sets_every_field():
    for path in sorted(Path("configs").glob("*.py")):
        if path.stem not in ("__init__", "common"):
            module = __import__(f"configs.{path.stem}", fromlist=["get_config"])
            parse_config(module.get_config())


def test_unknown_and_missing_fields_of_a_config_file():
    config = base.get_config().to_dict()
    with pytest.raises(InputError, match=r"rollout\.group_sze.*group_size"):
        parse_config(config | {"rollout": config["rollout"] | {"group_sze": 8}})
    del config["seed"]
    with pytest.raises(InputError, match="seed"):
        parse_config(config)
    with pytest.raises(InputError, match="objective"):
        parse_config(quickstart.get_config().to_dict() | {"loss": {"objective": "flwrl"}})
