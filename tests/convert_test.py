"""Policies leave as folders that transformers loads, and come in again bit by bit."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from flowrl_jax import convert
from flowrl_jax.assembly import CHECKPOINTS, assemble, first_policy, load_run_policy, make_learner
from flowrl_jax.checkpoint import Checkpointer, saved_steps
from flowrl_jax.config import parse_config
from flowrl_jax.convert import export_run, import_checkpoint
from flowrl_jax.errors import InputError
from flowrl_jax.metrics import CompileCounter
from flowrl_jax.models.hf import load_policy
from flowrl_jax.models.hf_save import save_policy
from flowrl_jax.models.transformer import Transformer
from flowrl_jax.sampler import SamplerConfig, generate
from flowrl_jax.settings import load_settings
from flowrl_jax.train import train
from flowrl_jax.train_step import abstract_state
from flowrl_jax.types import PromptBatch
from tests.tiny import tiny_config, tiny_params
from tests.tiny_runs import (
    REPOSITORY,
    TINY,
    finish,
    one_device,
    scratch,
    start,
    started_together,
    tiny_arguments,
    tiny_run,
)

FILE = "model.safetensors"
LENGTH = 13  # of greedy texts; with their prompt they are as long as the tiny run's may be


@pytest.fixture(autouse=True)
def single() -> Iterator[None]:
    with one_device():
        yield


@functools.cache
def trained() -> Path:
    """The folder of a run of two steps, with a checkpoint of each."""
    folder = scratch() / "trained"
    changes = {"steps": 2, "eval__every": 0, "checkpoint__every": 1, "model__init_std": 0.5}
    changes["optimizer__weight_decay"] = 1.0  # or nothing moves: the policy earns no reward yet
    with one_device():
        train(tiny_run(**changes), folder)
    return folder


@functools.cache
def exported() -> Path:
    folder = scratch() / "exported"
    with one_device():
        export_run(settings(trained()), trained(), folder)
    return folder


def settings(run: Path) -> Any:
    return parse_config(load_settings(run))


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, of one file or of several."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}


def assert_same_bits(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, x in left.items():
        assert x.dtype == right[name].dtype, name
        np.testing.assert_array_equal(x.view(np.uint8), right[name].view(np.uint8), name)


def our_greedy(config: Any, params: Any, prompt: list[int], eos_ids: tuple[int, ...], length: int):
    """Greedy tokens after a prompt, the end included."""
    tokens = jnp.asarray([prompt], jnp.int32)
    zero = jnp.zeros(1, jnp.int32)
    rollout = generate(
        params,
        PromptBatch(tokens, jnp.ones(tokens.shape, bool), zero, zero),
        jax.random.key(0),
        model=Transformer(config),
        config=SamplerConfig(max_response_length=length, eos_ids=eos_ids, temperature=0.0),
    )
    return np.asarray(rollout.tokens)[0, len(prompt) :][np.asarray(rollout.response_mask)[0]]


def theirs(folder: Path) -> Any:
    import torch
    import transformers

    torch.set_num_threads(1)  # for models as small as these more of them only wait
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_equal_to_transformers(folder: Path, config: Any, params: Any, eos: tuple[int, ...]):
    """Logits of a row, and the greedy text after it as the folder's own settings end it."""
    import torch

    model = theirs(folder)
    prompt = [1, 7, 4, 9, 5]
    row = jnp.asarray([prompt], jnp.int32)
    run = jax.jit(lambda p: Transformer(config).apply({"params": p}, row, method="logits"))
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits.numpy()
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False)
    ours = np.asarray(run(params))[..., : config.vocab_size]  # without the rows that fill it up
    assert ours.shape == logits.shape
    assert np.abs(ours - logits).max() < 1e-4 < np.abs(logits).max()
    text = our_greedy(config, params, prompt, eos, LENGTH)
    np.testing.assert_array_equal(text, greedy[0, len(prompt) :].numpy())


# --- Export


@pytest.mark.slow
def test_exported_run_is_the_policy_in_transformers(parity_packages):
    run, folder = trained(), exported()
    parts = assemble(settings(run), run)
    policy = load_run_policy(parts, run)
    assert_equal_to_transformers(folder, parts.model.config, policy, parts.eos_ids)
    assert (folder / "tokenizer.model").read_bytes() == (run / "tokenizer.model").read_bytes()
    entries = read_json(folder / "config.json")
    rollout = parts.config.rollout
    assert entries["max_position_embeddings"] == (
        rollout.max_prompt_length + rollout.max_response_length
    )
    expected = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert read_json(folder / "generation_config.json") == expected
    assert entries.items() >= expected.items()


def test_step_is_chosen(tmp_path):
    run = trained()
    assert saved_steps(run / CHECKPOINTS) == [1, 2]
    assert export_run(settings(run), run, tmp_path / "a", step=1) == 1
    name = "model.layers.0.mlp.up_proj.weight"
    first, last = tensors(tmp_path / "a")[name], tensors(exported())[name]
    assert not np.array_equal(first, last)


def test_log_z_has_a_file_of_its_own():
    run, folder = trained(), exported()
    assert [path.name for path in folder.glob("*.safetensors")] == [FILE]
    assert not any("log_z" in name or "proj_z" in name for name in tensors(folder))
    config = settings(run)
    parts = assemble(config, run)
    learner = make_learner(
        parts, config.loss, config.optimizer, 32, steps=config.steps, updates=config.updates
    )
    with Checkpointer(run / CHECKPOINTS, config.checkpoint) as checkpointer:
        state, _, step = checkpointer.restore(abstract_state(learner, 64)[0])
    log_z = load_file(folder / "log_z" / "log_z.safetensors")
    expected = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x)
        for path, x in jax.tree_util.tree_flatten_with_path(state.params["log_z"])[0]
    }
    assert_same_bits(log_z, expected)
    assert any(np.any(x) for x in log_z.values())
    record = read_json(folder / "log_z" / "log_z.json")
    assert record["step"] == step == 2
    assert type(config.loss.log_z)(**record["log_z"]) == config.loss.log_z


def test_settings_of_another_objective_do_not_describe_log_z(tmp_path):
    for objective in ("grpo", "flowrl_per_token"):
        config = tiny_run(
            objective, **({"loss__log_z__num_layers": 2} if objective != "grpo" else {})
        )
        with pytest.raises(InputError, match="log Z has .*output.kernel"):
            export_run(config, trained(), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# --- Import, and out again


@functools.cache
def source() -> Path:
    """A bfloat16 checkpoint with more than one end, in several files."""
    folder = scratch() / "source"
    config = tiny_config(vocab_size=26, tie_embeddings=False, qkv_bias=True)
    save_policy(
        folder,
        config,
        tiny_params(config),
        tokenizer_path=exported(),
        fields={"eos_token_id": 2, "bos_token_id": 1, "max_position_embeddings": 99},
        generation={"eos_token_id": [2, 7], "temperature": 0.6, "do_sample": True},
        dtype="bfloat16",
        shard_bytes=2_000,
    )
    assert (folder / f"{FILE}.index.json").exists()
    return folder


@functools.cache
def imported() -> Path:
    folder = scratch() / "imported"
    with one_device():
        import_checkpoint(tiny_run(model__path=source()), folder)
    return folder


@pytest.mark.slow
def test_export_of_an_import_is_bit_identical(tmp_path):
    export_run(settings(imported()), imported(), tmp_path / "half", dtype="bfloat16")
    assert_same_bits(tensors(tmp_path / "half"), tensors(source()))
    for name in ("config.json", "generation_config.json"):
        found, expected = (read_json(folder / name) for folder in (tmp_path / "half", source()))
        assert found == (expected | {"bos_token_id": 1} if name.startswith("gen") else expected)
    assert not (tmp_path / "half" / "log_z").exists()
    # As it is trained, in float32, the numbers are the same too.
    export_run(settings(imported()), imported(), tmp_path / "whole")
    wide = {name: x.astype(np.float32) for name, x in tensors(source()).items()}
    assert_same_bits(tensors(tmp_path / "whole"), wide)
    import_checkpoint(tiny_run(model__path=tmp_path / "whole"), tmp_path / "again")
    export_run(settings(tmp_path / "again"), tmp_path / "again", tmp_path / "third")
    assert_same_bits(tensors(tmp_path / "third"), wide)


def test_runs_start_from_an_import(tmp_path):
    config = tiny_run(model__path=source(), model__start_from=imported())
    parts = assemble(config, tmp_path)
    _, expected = load_policy(source(), vocab_multiple=parts.model.config.vocab_multiple)
    learner = make_learner(parts, config.loss, config.optimizer, 16, steps=1, updates=1)
    for policy in (first_policy(parts, learner), load_run_policy(parts, imported())):
        jax.tree.map(np.testing.assert_array_equal, policy, expected)
    assert saved_steps(imported() / CHECKPOINTS) == [0]


def test_ends_of_the_run_go_before_those_of_the_source(tmp_path):
    config = tiny_run(model__path=source(), tokenizer__eos_ids="(5,6)")
    export_run(config, imported(), tmp_path / "a")
    assert read_json(tmp_path / "a" / "config.json")["eos_token_id"] == [5, 6]
    generation = read_json(tmp_path / "a" / "generation_config.json")
    assert generation["eos_token_id"] == [5, 6] and generation["temperature"] == 0.6


def test_ends_of_the_source_that_are_no_ids_are_replaced(tmp_path):
    shutil.copytree(source(), tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(read_json(file) | {"eos_token_id": [[2]]}))
    export_run(tiny_run(model__path=tmp_path / "source"), imported(), tmp_path / "a")
    assert read_json(tmp_path / "a" / "config.json")["eos_token_id"] == [2, 7]


def test_template_of_the_run_goes_along(tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    (tmp_path / "own.jinja").write_text(template)
    changes = {"tokenizer__chat": True, "tokenizer__chat_template": tmp_path / "own.jinja"}
    export_run(tiny_run(model__path=source(), **changes), imported(), tmp_path / "a")
    assert (tmp_path / "a" / "chat_template.jinja").read_text() == template
    export_run(tiny_run(model__path=source()), imported(), tmp_path / "b")
    assert not (tmp_path / "b" / "chat_template.jinja").exists()


@pytest.mark.slow
def test_stories_go_in_and_out(shared_data, parity_packages, tmp_path):
    folder = shared_data / "stories260K" / "hf"
    changes = {"model__path": folder, "tokenizer__add_bos": True, "tokenizer__eos_ids": "(1,)"}
    import_checkpoint(tiny_run(**changes), tmp_path / "run")
    export_run(settings(tmp_path / "run"), tmp_path / "run", tmp_path / "out")
    found, expected = tensors(tmp_path / "out"), tensors(folder)
    if found.keys() != expected.keys():  # the source may hold the tied unembedding twice
        assert expected.keys() - found.keys() == {"lm_head.weight"}
        expected = {name: expected[name] for name in found}
    assert_same_bits(found, {name: x.astype(np.float32) for name, x in expected.items()})
    config, params = load_policy(folder)
    assert_equal_to_transformers(tmp_path / "out", config, params, (1,))
    carried = ("max_position_embeddings", "bos_token_id")
    entries = [read_json(place / "config.json") for place in (tmp_path / "out", folder)]
    assert [entries[0][name] for name in carried] == [entries[1][name] for name in carried]
    assert (tmp_path / "out" / "tokenizer.model").is_file()


# --- The command line


def test_commands(tmp_path, capsys):
    words = ["export", f"--run={trained()}", f"--out={tmp_path / 'a'}", "--step=2"]
    assert convert.main([*words, "--dtype=float16"]) == 0
    assert "the policy of step 2" in capsys.readouterr().out
    assert {x.dtype for x in tensors(tmp_path / "a").values()} == {np.dtype(np.float16)}
    words = tiny_arguments(model__path=exported())
    assert convert.main(["import", *words, f"--out={tmp_path / 'b'}"]) == 0
    assert saved_steps(tmp_path / "b" / CHECKPOINTS) == [0]
    # A config file and changes of it are for runs that kept no settings, or moved.
    (tmp_path / "b" / "config.json").unlink()
    words = ["export", *words, f"--run={tmp_path / 'b'}", f"--out={tmp_path / 'c'}"]
    assert convert.main(words) == 0
    assert_same_bits(tensors(tmp_path / "c"), tensors(exported()))


@pytest.mark.parametrize("words", [["--help"], ["export", "--help"], ["import", "-h"]], ids=str)
def test_help(words, capsys):
    assert convert.main(words) == 0
    out, err = capsys.readouterr()
    assert err == "" and "--config=FILE" in out and "--out: " in out
    assert ("--dtype: " in out) == ("--run: " in out) == (words[0] != "import")


RUN, OUT, CONFIG = "--run={run}", "--out={new}", f"--config={TINY}"
WRONG = {
    "no command": ([], "write `export` or `import` first"),
    "another command": (["exprot", RUN, OUT], "exprot: write `export` or `import` first"),
    "no run": (["export", OUT], "--run is missing"),
    "no such run": (["export", "--run=/nowhere", OUT], "--run=/nowhere: no such folder"),
    "no out": (["export", RUN], "--out is missing"),
    "not a flag": (["export", RUN, OUT, "--dtpye=float16"], "dtpye"),
    "dtype": (["export", RUN, OUT, "--dtype=int8"], "--dtype=int8: not known"),
    "step is no number": (["export", RUN, OUT, "--step=last"], "step"),
    "step": (["export", RUN, OUT, "--step=7"], "no checkpoint of step 7: choose one of 1, 2"),
    "out is full": (["export", RUN, "--out={run}"], "exists already"),
    "out is a file": (["export", RUN, "--out={run}/config.json"], "exists already"),
    "out cannot be": (["export", RUN, "--out={run}/config.json/a"], "cannot be"),
    "not a run": (["export", "--run={empty}", OUT], "config.json: cannot be read"),
    "no checkpoint": (["export", CONFIG, "--run={empty}", OUT], "holds no checkpoint"),
    "another shape": (["export", RUN, OUT, "--config.model.num_layers=3"], "num_layers|layers"),
    "no such setting": (["export", RUN, OUT, "--config.model.num_layer=3"], "num_layers"),
    "import without config": (["import", OUT], "--config is missing"),
    "import of nothing": (["import", CONFIG, OUT], "config.model.path is empty"),
    "import from nowhere": (["import", CONFIG, OUT, "--config.model.path=/nowhere"], "/nowhere"),
    "import without out": (["import", CONFIG, "--config.model.path={source}"], "--out is missing"),
    "import into a run": (
        ["import", CONFIG, "--config.model.path={source}", "--out={run}"],
        "exists already",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case, tmp_path, capsys):
    words, message = WRONG[case]
    (tmp_path / "empty").mkdir()
    places = {
        "run": trained(),
        "source": exported(),
        "empty": tmp_path / "empty",
        "new": tmp_path / "new",
    }
    capsys.readouterr()
    with CompileCounter() as compilations:
        code = convert.main([word.format(**places) for word in words])
    errors = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(errors) == 1, errors
    assert any(part in errors[0] for part in message.split("|")), errors
    assert compilations.count == 0
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


# --- Killed, and several processes: python convert_test.py NAME ARGUMENTS


def export_slowly(run: str, out: str) -> None:
    """An export that says when it has begun to write, and takes a minute for each tensor."""
    update = convert.Progress.update

    def wait(self: Any, *arguments: Any) -> None:
        update(self, *arguments)
        print("writing", flush=True)
        for _ in range(600):  # one long sleep would sleep on, had a signal come just before it
            time.sleep(0.1)

    convert.Progress.update = wait  # type: ignore[method-assign]
    sys.exit(convert.main(["export", f"--run={run}", f"--out={out}"]))


def begin(*arguments: Any, devices: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(REPOSITORY),
    }
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_export_leaves_no_folder_and_the_next_one_cleans_up(tmp_path):
    for number in (signal.SIGKILL, signal.SIGTERM):
        with begin("export_slowly", trained(), tmp_path / "a", devices=1) as process:
            assert process.stdout is not None and process.stdout.readline() == "writing\n"
            assert [path.name.startswith(".a.") for path in tmp_path.iterdir()] == [True]
            process.send_signal(number)
            process.communicate(timeout=60)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        left = [path.name for path in tmp_path.iterdir()]
        # The second process has removed what the first one left.
        assert len(left) == (1 if number == signal.SIGKILL else 0)
        assert "a" not in left
        if number == signal.SIGKILL:
            assert str(process.pid) in left[0]
    export_run(settings(trained()), trained(), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def convert_in_two(*arguments: Any) -> tuple[list[int], list[str]]:
    """Exit codes of two processes that convert together, and what each says on stderr."""
    cache = scratch() / "programs"
    with started_together("convert", *arguments, count=2, devices=2, cache_dir=cache) as processes:
        said = finish(processes)
    return [process.returncode for process in processes], said


@pytest.mark.slow
def test_two_processes_write_one_folder(tmp_path):
    for arguments in (
        ["export", f"--run={trained()}", f"--out={tmp_path / 'a'}"],
        [
            *("import", f"--config={TINY}", f"--config.model.path={tmp_path / 'a'}"),
            f"--out={tmp_path / 'b'}",
        ],
        ["export", f"--run={tmp_path / 'b'}", f"--out={tmp_path / 'c'}"],
        ["export", f"--run={trained()}", f"--out={tmp_path / 'd'}", "--dtype=float16"],
    ):
        codes, said = convert_in_two(*arguments)
        assert codes == [0, 0], said
    for folder in ("a", "c"):
        assert_same_bits(tensors(tmp_path / folder), tensors(exported()))
    for name in ("log_z/log_z.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (exported() / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d"]
    assert {x.dtype for x in tensors(tmp_path / "d").values()} == {np.dtype(np.float16)}


@pytest.mark.slow
def test_two_processes_fail_as_one(tmp_path):
    """One says what was wrong, and the other that it was the first."""
    (tmp_path / "file").touch()
    codes, said = convert_in_two(
        "export", f"--run={trained()}", f"--out={tmp_path / 'file' / 'out'}"
    )
    assert codes == [2, 2]
    assert "cannot be written" in said[0] and "process 0" in said[1]


@pytest.mark.slow
def test_evaluate_takes_an_import():
    """And so does `sample`: the page on your own model, whose commands are tested, shows it."""
    words = tiny_arguments(model__path=source(), eval__prompts=2)
    process = start("evaluate", *words, f"--run={imported()}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "pass@" in out, err


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
