"""Checkpoints come back bit for bit, on any mesh and after any interruption, or are refused."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowrl_jax.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    restore_host,
    restore_policy,
    saved_steps,
)
from flowrl_jax.errors import InputError
from flowrl_jax.optimizer import OptimizerConfig, make_optimizer
from flowrl_jax.sharding import MeshConfig, make_mesh
from flowrl_jax.types import TrainState

OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.1), 10, 1, train_log_z=True)
LOG_Z = {
    "head": {"layer": {"kernel": (16, 4), "bias": (4,)}},
    "table": {"value": (24,), "visits": (24,)},
    "none": {},
}
HOST = {"position": 17, "config": {"vocab_size": 32, "β": [0.1, None, "x"]}}


def shapes(log_z: str = "head", vocab: int = 32) -> TrainState:
    """The state of a small run, without values."""
    policy = {"embedding": (vocab, 16), "blocks": {"kernel": (2, 16, 8), "scale": (16,)}}

    def init() -> TrainState:
        tree = {"policy": policy, "log_z": LOG_Z[log_z]}
        params = jax.tree.map(jnp.zeros, tree, is_leaf=lambda x: isinstance(x, tuple))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, OPTIMIZER.init(params), zero)

    return jax.eval_shape(init)


def abstract(mesh: Mesh, **kwargs: Any) -> TrainState:
    """What a checkpoint of that run should be restored to."""
    specs = {2: PartitionSpec("fsdp", "tensor"), 3: PartitionSpec(None, "fsdp", "tensor")}
    return jax.tree.map(
        lambda x: x.update(sharding=NamedSharding(mesh, specs.get(x.ndim, PartitionSpec()))),
        shapes(**kwargs),
    )


def make(mesh: Mesh, seed: int = 0, **kwargs: Any) -> TrainState:
    """A state of which all arrays, those of the optimiser included, are random."""
    rng = np.random.default_rng(seed)

    def draw(x: jax.ShapeDtypeStruct) -> jax.Array:
        value = np.asarray(100 * rng.standard_normal(x.shape), x.dtype)
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: value[index])

    return jax.tree.map(draw, abstract(mesh, **kwargs))


def bits(tree: Any) -> dict[str, tuple]:
    """All that makes up a tree of arrays, but for where they live."""
    return {
        jax.tree_util.keystr(path): (x.dtype, x.shape, np.asarray(x).tobytes())
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))


@pytest.fixture(scope="module")
def other_mesh() -> Mesh:
    return make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh) -> tuple[Path, TrainState]:
    """A directory with checkpoints of steps 1 and 2, and the state in the latter."""
    directory = tmp_path_factory.mktemp("saved")
    with Checkpointer(directory, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, make(mesh, seed=1), {})
        checkpointer.save(2, make(mesh, seed=2), HOST)
    return directory, make(mesh, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("log_z", LOG_Z)
def test_round_trip_is_exact(tmp_path: Path, mesh: Mesh, log_z: str, asynchronous: bool) -> None:
    state = make(mesh, log_z=log_z)
    odd = jnp.asarray([-0.0, jnp.inf, jnp.nan, 1e-40], jnp.float32)
    scale = state.params["policy"]["blocks"]["scale"]
    state.params["policy"]["blocks"]["scale"] = scale.at[:4].set(odd)
    target = abstract(mesh, log_z=log_z)

    with Checkpointer(tmp_path, CheckpointConfig(asynchronous=asynchronous)) as checkpointer:
        checkpointer.save(3, state, HOST)
        restored, host, step = checkpointer.restore(target)

    assert (host, step) == (HOST, 3)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, target
    )


def test_restores_into_another_mesh(saved, other_mesh: Mesh) -> None:
    directory, state = saved
    target = abstract(other_mesh)

    with Checkpointer(directory, CheckpointConfig()) as checkpointer:
        restored, _, _ = checkpointer.restore(target)

    assert bits(restored) == bits(state)
    embedding = restored.params["policy"]["embedding"]
    assert embedding.sharding == target.params["policy"]["embedding"].sharding
    assert embedding.addressable_shards[0].data.shape == (16, 4)


@pytest.mark.parametrize("devices", [1, 8])
def test_state_may_be_donated_right_after_save(tmp_path: Path, devices: int) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    make_params = lambda: jax.random.normal(jax.random.key(0), (8, 2**18))  # noqa: E731
    params = {"policy": {"kernel": jax.jit(make_params, out_shardings=sharding)()}, "log_z": {}}
    step, skipped = jax.device_put(
        (jnp.int32(1), jnp.int32(0)), NamedSharding(mesh, PartitionSpec())
    )
    state = TrainState(step, params, {"mu": jax.tree.map(jnp.copy, params)}, skipped)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    expected = {path: (*kind, str(data)) for path, (*kind, data) in bits(state).items()}
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 3 + 1, state), donate_argnums=0)

    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, state, {})
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        restored, _, _ = checkpointer.restore(target)

    assert {path: (*kind, str(data)) for path, (*kind, data) in bits(restored).items()} == expected


def test_host_dictionary_may_be_changed_right_after_save(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is handed to the thread that writes is a copy, however soon that thread writes."""
    handed: list[dict[str, Any]] = []
    json_save = ocp.args.JsonSave
    host = {"position": 1, "nested": {"list": [1]}}
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        monkeypatch.setattr(ocp.args, "JsonSave", lambda x: handed.append(x) or json_save(x))
        checkpointer.save(1, make(mesh), host)
        host["position"], host["nested"]["list"][0] = 2, 2

    assert handed[0]["host"] == {"position": 1, "nested": {"list": [1]}}
    assert restore_host(tmp_path) == (handed[0]["host"], 1)


def test_latest_and_best_stay_also_after_a_restart(tmp_path: Path, mesh: Mesh) -> None:
    state = make(mesh)
    config = CheckpointConfig(keep=2, keep_best=2, best_metric="eval/pass_at_1")
    scores = {1: 0.3, 2: 0.9, 3: float("nan"), 4: None, 5: 0.5, 6: 0.2, 7: 0.5, 8: 0.1}
    kept = {1: {1}, 2: {1, 2}, 3: {1, 2, 3}, 4: {1, 2, 3, 4}, 5: {2, 4, 5}, 6: {2, 5, 6},
            7: {2, 6, 7}, 8: {2, 7, 8}}  # fmt: skip
    for some in [range(1, 5), range(5, 9)]:
        with Checkpointer(tmp_path, config) as checkpointer:
            for step in some:
                score = scores[step]
                metrics = {"loss": 1.0} if score is None else {"eval/pass_at_1": jnp.array(score)}
                checkpointer.save(step, state, {}, metrics)
                checkpointer.wait()
                assert set(saved_steps(tmp_path)) == kept[step]


def test_steps_only_grow(tmp_path: Path, mesh: Mesh) -> None:
    state = make(mesh)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(4, state, {"position": 4})
        for step in (3, 4):
            with pytest.raises(InputError, match=f"step {step} is not after step 4"):
                checkpointer.save(step, state, {})
        checkpointer.save_final(4, state, {"position": 5})
        assert restore_host(tmp_path) == ({"position": 4}, 4)
        checkpointer.save_final(5, state, {"position": 5})
        assert restore_host(tmp_path) == ({"position": 5}, 5)


def test_should_save_every_few_steps(tmp_path: Path) -> None:
    for every, due in [(3, [3, 6]), (1, [1, 2, 3, 4, 5, 6]), (0, [])]:
        with Checkpointer(tmp_path, CheckpointConfig(every=every)) as checkpointer:
            assert [step for step in range(7) if checkpointer.should_save(step)] == due


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"every": -1}, "checkpoint.every=-1"),
        ({"keep": 0}, "checkpoint.keep=0"),
        ({"keep_best": -1}, "checkpoint.keep_best=-1"),
        ({"keep_best": 1}, "set checkpoint.best_metric"),
    ],
)
def test_config_is_checked(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=re.escape(complaint)):
        CheckpointConfig(**changes)


def test_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file cannot be opened \(.*choose another"):
        Checkpointer(tmp_path / "file", CheckpointConfig())


def test_no_checkpoint(tmp_path: Path, saved, mesh: Mesh) -> None:
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(InputError, match="holds no checkpoint: name"):
            checkpointer.restore(abstract(mesh))
    with pytest.raises(InputError, match="holds no checkpoint: name"):
        restore_policy(tmp_path / "absent", {})
    with pytest.raises(InputError, match="no checkpoint of step 7: choose one of 1, 2"):
        restore_host(saved[0], 7)


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"vocab": 64}, "embedding is float32[32, 16] there, but the config asks for"
                        " float32[64, 16]: use the config of the run that wrote it"),
        ({"log_z": "table"}, "params/log_z/value is absent there, but the config asks for"
                             " float32[24]"),
        ({"log_z": "none"}, "params/log_z/layer/bias is float32[4] there, but the config asks for"
                            " none"),
    ],
)  # fmt: skip
def test_first_differing_array_is_named(saved, mesh: Mesh, kwargs, complaint: str) -> None:
    with (
        Checkpointer(saved[0], CheckpointConfig()) as checkpointer,
        pytest.raises(InputError, match=re.escape(complaint)) as caught,
    ):
        checkpointer.restore(abstract(mesh, **kwargs))
    assert "\n" not in str(caught.value)


def test_other_dtype_is_refused_not_cast(saved, mesh: Mesh) -> None:
    policy = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), abstract(mesh).params["policy"])
    with pytest.raises(InputError, match=r"is float32\[2, 16, 8\] there, .* bfloat16\[2, 16, 8\]"):
        restore_policy(saved[0], policy)


@pytest.mark.parametrize("log_z", LOG_Z)
def test_policy_alone(saved, other_mesh: Mesh, log_z: str) -> None:
    """The log Z and optimiser of the run that reads do not matter."""
    target = abstract(other_mesh, log_z=log_z).params["policy"]

    policy, step = restore_policy(saved[0], target)

    assert step == 2
    assert bits(policy) == bits(saved[1].params["policy"])
    assert policy["embedding"].sharding == target["embedding"].sharding
    older, step = restore_policy(saved[0], target, 1)
    assert step == 1
    assert bits(older) != bits(policy)


def test_policy_of_another_size(saved, mesh: Mesh) -> None:
    with pytest.raises(InputError, match=r"params/policy/embedding is float32\[32, 16\] there"):
        restore_policy(saved[0], abstract(mesh, vocab=64).params["policy"])


def damage(content: bytes, how: str) -> bytes | None:
    rng = random.Random(0)
    if how == "deleted":
        return None
    if how == "truncated":
        return content[: len(content) // 2]
    if how == "garbage":
        return rng.randbytes(len(content))
    flipped = bytearray(content)
    flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deleted", "truncated", "garbage", "bit flipped"])
def test_damage_to_any_file_is_harmless_or_refused(
    saved, tmp_path: Path, mesh: Mesh, how: str, capfd: pytest.CaptureFixture
) -> None:
    directory, state = saved
    target, expected = abstract(mesh), bits(state)
    files = [path for path in (directory / "2").rglob("*") if path.is_file()]
    refused = 0
    for path in files:
        copy = tmp_path / "copy"
        shutil.copytree(directory, copy)
        victim = copy / path.relative_to(directory)
        content = damage(victim.read_bytes(), how)
        victim.unlink() if content is None else victim.write_bytes(content)
        try:
            with Checkpointer(copy, CheckpointConfig(keep_best=1, best_metric="x")) as checkpointer:
                restored, host, _ = checkpointer.restore(target)
            assert (bits(restored), host) == (expected, HOST), f"{how}: {path}"
        except InputError as error:
            message = f"checkpoint {copy / '2'} is damaged (.*): delete it and use step 1"
            assert re.fullmatch(message, str(error)), f"{how}: {path}: {error}"
            refused += 1
            assert restore_host(copy, 1) == ({}, 1)
        shutil.rmtree(copy)

    assert refused >= len(files) - 4  # Orbax's four notes about the commit do not matter
    assert "Traceback" not in capfd.readouterr().err


def test_bit_flipped_within_a_large_array(tmp_path: Path, mesh: Mesh) -> None:
    """Orbax would return the wrong values; nothing in its files tells.

    A flip may also hit what the decompressor checks itself, so several places are tried.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    draw = lambda: jax.random.normal(jax.random.key(0), (2**20,))  # noqa: E731
    kernel = jax.jit(draw, out_shardings=sharding)()
    state = TrainState(jnp.int32(0), {"policy": {"kernel": kernel}, "log_z": {}}, {}, jnp.int32(0))
    refusals = []
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save_final(1, state, {})
        largest = max(tmp_path.rglob("*"), key=lambda path: path.stat().st_size)
        content = largest.read_bytes()
        for fourths in (1, 2, 3):
            damaged = bytearray(content)
            damaged[len(content) * fourths // 4] ^= 1
            largest.write_bytes(damaged)
            with pytest.raises(InputError, match="is damaged") as refusal:
                checkpointer.restore(jax.eval_shape(lambda: state))
            refusals.append(str(refusal.value))

    assert any("the values of params/policy/kernel are not those" in line for line in refusals)


def test_damage_to_the_only_checkpoint(tmp_path: Path, mesh: Mesh) -> None:
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, make(mesh), {})
    shutil.rmtree(tmp_path / "1" / "state")
    with pytest.raises(InputError, match=r"is damaged .*: delete it and start a new run"):
        restore_policy(tmp_path, abstract(mesh).params["policy"])


def test_lack_of_memory_is_not_damage(saved, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr("flowrl_jax.checkpoint.ocp.Checkpointer.restore", exhaust)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        restore_policy(saved[0], abstract(mesh).params["policy"])


# What the programs that are killed, or run as one of two processes, do: python checkpoint_test.py


def big_state(step: int) -> TrainState:
    """A state of 32 MiB that follows from its step."""
    kernel = np.random.default_rng(step).random((2048, 2048), np.float32)
    params = {"policy": {"kernel": jnp.asarray(kernel)}, "log_z": {}}
    moments = {"policy": {"kernel": jnp.asarray(-kernel)}, "log_z": {}}
    return TrainState(jnp.int32(step), params, moments, jnp.int32(0))


def save_until_killed(directory: str) -> None:
    with Checkpointer(directory, CheckpointConfig(keep=2)) as checkpointer:
        first = (checkpointer.latest_step() or 0) + 1
        for step in range(first, first + 1000):
            checkpointer.save(step, big_state(step), {"position": step * 10})
            print(step, flush=True)


def save_and_restore_as_one_of_two(directory: str, port: str, process: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    with Checkpointer(directory, CheckpointConfig(keep=1)) as checkpointer:
        for step in (1, 2):
            state = make(mesh, seed=step)
            checkpointer.save(step, state, HOST)
        wanted = jax.tree.map(lambda x: x.addressable_data(0), state)
        restored, host, step = checkpointer.restore(abstract(mesh))
    assert (host, step) == (HOST, 2)
    assert bits(jax.tree.map(lambda x: x.addressable_data(0), restored)) == bits(wanted)


def start(*arguments: Any, devices: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
    }
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def half_written(directory: Path) -> bool:
    """Whether there is a directory by the name that Orbax gives to what it still writes."""
    return any(".orbax-checkpoint-tmp" in path.name for path in directory.iterdir())


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen]]:
    """Programs to be gone at the end of a test."""
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_killed_while_writing(tmp_path: Path, processes: list[subprocess.Popen]) -> None:
    delays = random.Random(0)
    interrupted = 0
    target = jax.eval_shape(lambda: big_state(0))
    for _ in range(3):
        process = start("save_until_killed", tmp_path, devices=1)
        processes.append(process)
        assert process.stdout is not None
        # The second line says that the first checkpoint is complete.
        first = process.stdout.readline() + process.stdout.readline()
        time.sleep(delays.uniform(0, 0.5))
        while not half_written(tmp_path):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        done = int((first + process.communicate()[0]).split()[-1])
        interrupted += half_written(tmp_path)

        with Checkpointer(tmp_path, CheckpointConfig(keep=2)) as checkpointer:
            restored, host, step = checkpointer.restore(target)
        # `save` returned for step `done`, so the step before it was complete.
        assert done - 1 <= step <= done + 1
        assert host == {"position": step * 10}
        assert bits(restored) == bits(big_state(step))
    assert interrupted


@pytest.mark.slow
def test_two_processes_write_one_checkpoint(
    saved, tmp_path: Path, other_mesh: Mesh, processes: list[subprocess.Popen]
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    name = "save_and_restore_as_one_of_two"
    processes += [start(name, tmp_path, port, process, devices=4) for process in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]

    assert saved_steps(tmp_path) == [2]
    policy, _ = restore_policy(tmp_path, abstract(other_mesh).params["policy"])
    assert bits(policy) == bits(saved[1].params["policy"])


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
