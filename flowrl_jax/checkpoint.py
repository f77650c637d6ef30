"""Checkpoints: the train state and what the host must remember, written while training goes on.

A checkpoint is the directory `DIRECTORY/STEP`, complete from the moment it has that name: Orbax
writes it under another name and renames it (in a bucket, which cannot rename, a file marks it as
complete). It has two parts: `state`, all arrays, from which any mesh can read its shards; and
`host`, a JSON record of the caller's dictionary, of each array's path, shape, dtype and digest,
and of a checksum over all of it. What is read is compared with that record and with a list of the
files, so a checkpoint comes back bit for bit or is refused.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from flowrl_jax.errors import InputError
from flowrl_jax.integrity import check_files, digests, list_files
from flowrl_jax.retention import CheckpointConfig, Retention
from flowrl_jax.types import TrainState

# The parts of a checkpoint, and the file that Orbax writes a JSON part to.
STATE, HOST, HOST_FILE = "state", "host", "metadata"
POLICY, LOG_Z = "params/policy/", "params/log_z/"

Path = str | os.PathLike[str]


class Checkpointer:
    """Writes the checkpoints of one run and reads them back.

    Every process of the run makes one and calls the same methods in the same order; each writes
    and reads its own shards of the arrays. One run at a time may use a directory: what a killed
    run left half-written in it is deleted.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        """Opens a directory, made if it does not exist.

        Args:
            directory: local path or bucket.
            config: when and what to keep.

        Raises:
            InputError: if the directory cannot be made or read.
        """
        self._config = config
        self._directory = epath.Path(directory).resolve()
        self._scores: dict[int, float] = {}
        self._warned = False
        if config.keep_best:
            self._scores = _saved_scores(self._directory, config.best_metric)
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=config.asynchronous,
            cleanup_tmp_directories=True,
            preservation_policy=Retention(config.keep, config.keep_best, self._scores),
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add(STATE, ocp.args.PyTreeSave, _StateHandler)
        handlers.add(HOST, ocp.args.JsonSave, ocp.JsonCheckpointHandler)
        try:
            if self._directory.exists() and not self._directory.is_dir():
                raise NotADirectoryError("it is a file")
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, handler_registry=handlers
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"checkpoint directory {self._directory} cannot be opened ({_one_line(error)}):"
                " choose another, or make it readable and writable"
            ) from error

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, be it still in writing; None without any."""
        return self._manager.latest_step()

    def should_save(self, step: int) -> bool:
        """Whether a checkpoint is due after rollout step `step` (the first is 1)."""
        return step > 0 and self._config.every > 0 and step % self._config.every == 0

    def save(
        self,
        step: int,
        state: TrainState,
        host: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint; returns as soon as `state` may be donated.

        Waits for the checkpoint before it, if that is still in writing.

        Args:
            step: rollout steps done; larger than that of any checkpoint in the directory.
            state: all arrays of the run; no typed PRNG keys, which derive from seed and step.
            host: JSON-serialisable: position in the data and whatever a resumed run needs to know.
            metrics: name to scalar; only `best_metric` is looked at.

        Raises:
            InputError: if the directory holds this step or a later one.
        """
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise InputError(
                f"checkpoint step {step} is not after step {latest}, the latest in"
                f" {self._directory}: resume from that one, delete the checkpoints from {step} on,"
                " or use another directory"
            )
        leaves = _flatten(state)
        record = {
            "host": json.loads(json.dumps(dict(host))),
            "score": self._score(metrics),
            "metric": self._config.best_metric,
            "leaves": _describe(leaves),
        }
        record["checksum"] = _checksum(record)
        if record["score"] is not None:
            self._scores[step] = record["score"]
        # On CPU Orbax writes from views of the arrays. JAX then copies instead of donating; the
        # digests, taken before, would tell if it ever did not.
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{STATE: ocp.args.PyTreeSave(_nest(leaves)), HOST: ocp.args.JsonSave(record)}
            ),
            force=True,
        )

    def save_final(
        self,
        step: int,
        state: TrainState,
        host: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint unless `step` has one, and returns when it is complete."""
        if self.latest_step() != step:
            self.save(step, state, host, metrics)
        self.wait()

    def restore(
        self, abstract_state: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any], int]:
        """Reads a checkpoint.

        Args:
            abstract_state: shapes, dtypes and shardings of all arrays; the mesh need not be the
                one that the checkpoint was written from. Without a sharding an array goes to the
                process's first device.
            step: which one; the latest if None.

        Returns:
            The state, the host's dictionary and the step.

        Raises:
            InputError: if there is no such checkpoint, if its arrays have other paths, shapes or
                dtypes, or if its files are damaged.
        """
        self.wait()
        step = _choose_step(self._directory, step)
        record = _read_record(self._directory, step)
        state = _read_arrays(self._directory, step, record["leaves"], abstract_state)
        return state, record["host"], step

    def wait(self) -> None:
        """Returns when no checkpoint is in writing; raises what went wrong in writing."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then stops the threads that write."""
        self._manager.close()

    def _score(self, metrics: Mapping[str, Any] | None) -> float | None:
        name = self._config.best_metric
        if not name or not metrics:
            return None
        if name not in metrics:
            if not self._warned:
                known = ", ".join(sorted(metrics))
                logging.warning("no checkpoint.best_metric=%r among the metrics %s", name, known)
                self._warned = True
            return None
        score = float(metrics[name])
        return score if math.isfinite(score) else None


def restore_policy(
    directory: Path, abstract_policy: Any, step: int | None = None
) -> tuple[Any, int]:
    """Reads only the policy's parameters of a run, whatever its log Z and optimiser.

    Args:
        directory: that the run's `Checkpointer` writes to.
        abstract_policy: shapes, dtypes and shardings, as in `abstract_state(...).params["policy"]`.
        step: which checkpoint; the latest if None.

    Returns:
        The parameters and the step.

    Raises:
        InputError: as `Checkpointer.restore`.
    """
    root = epath.Path(directory).resolve()
    step = _choose_step(root, step)
    leaves = _read_record(root, step)["leaves"]
    leaves = {path: leaf for path, leaf in leaves.items() if path.startswith(POLICY)}
    return _read_arrays(root, step, leaves, abstract_policy, POLICY), step


def restore_log_z(directory: Path, step: int | None = None) -> tuple[Any, int]:
    """Reads only the parameters of a run's log Z, as they were saved, into one device.

    Args:
        directory: that the run's `Checkpointer` writes to.
        step: which checkpoint; the latest if None.

    Returns:
        Nested dictionaries of arrays, empty where the run learned no log Z; and the step.

    Raises:
        InputError: as `Checkpointer.restore`.
    """
    root = epath.Path(directory).resolve()
    step = _choose_step(root, step)
    leaves = _read_record(root, step)["leaves"]
    leaves = {path: leaf for path, leaf in leaves.items() if path.startswith(LOG_Z)}
    if not leaves:
        return {}, step
    shapes = {
        path.removeprefix(LOG_Z): jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])
        for path, leaf in leaves.items()
    }
    return _read_arrays(root, step, leaves, _nest(shapes), LOG_Z), step


def restore_host(directory: Path, step: int | None = None) -> tuple[dict[str, Any], int]:
    """Reads only the host's dictionary, e.g. to rebuild the model before its parameters are read.

    Args:
        directory: that the run's `Checkpointer` writes to.
        step: which checkpoint; the latest if None.

    Returns:
        The dictionary and the step.

    Raises:
        InputError: if there is no such checkpoint or its record is damaged.
    """
    root = epath.Path(directory).resolve()
    step = _choose_step(root, step)
    return _read_record(root, step)["host"], step


def saved_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in a directory, ascending; empty if it does not exist."""
    root = epath.Path(directory).resolve()
    if not root.is_dir():
        return []
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(root))


class _StateHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's writer of arrays; lists its files before they count as a checkpoint.

    Orbax reads arrays in threads that print tracebacks when a file is damaged, and go on printing
    after the error was caught. With the list, damage is found before Orbax sees it.
    """

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        list_files(directory)


def _saved_scores(directory: epath.Path, metric: str) -> dict[int, float]:
    """What earlier checkpoints scored in this metric; a damaged one has no score."""
    scores = {}
    for step in saved_steps(directory):
        with contextlib.suppress(InputError):
            record = _read_record(directory, step)
            if record["metric"] == metric and record["score"] is not None:
                scores[step] = record["score"]
    return scores


def _choose_step(directory: epath.Path, step: int | None) -> int:
    steps = saved_steps(directory)
    if not steps:
        raise InputError(
            f"{directory} holds no checkpoint: name the checkpoint directory of a run, or start"
            " without one"
        )
    if step is not None and step not in steps:
        raise InputError(
            f"{directory} holds no checkpoint of step {step}: choose one of"
            f" {', '.join(map(str, steps))}"
        )
    return steps[-1] if step is None else step


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by path, e.g. "params/policy/embedding"; empty subtrees leave no trace."""
    return {
        prefix + jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries by path: all that a checkpoint knows of the tree's containers."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def _describe(leaves: Mapping[str, jax.Array]) -> dict[str, dict[str, Any]]:
    return {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": digest}
        for (path, leaf), digest in zip(leaves.items(), digests(leaves.values()), strict=True)
    }


def _checksum(record: Mapping[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_record(directory: epath.Path, step: int) -> dict[str, Any]:
    with _refuse_damage(directory, step):
        record = json.loads((directory / str(step) / HOST / HOST_FILE).read_text())
        intact = record["checksum"] == _checksum(record)
    if not intact:
        raise _damaged(directory, step, f"{HOST}/{HOST_FILE} does not have its checksum")
    return record


def _read_arrays(
    directory: epath.Path,
    step: int,
    saved: Mapping[str, dict[str, Any]],
    abstract: Any,
    prefix: str = "",
) -> Any:
    """The arrays under `prefix`, as `abstract` wants them laid out, once they prove unharmed."""
    asked = _flatten(jax.tree.map(_with_sharding, abstract), prefix)
    _check_leaves(f"checkpoint {directory / str(step)}", saved, asked)
    target = _nest(asked)
    arguments = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    with _refuse_damage(directory, step):
        check_files(directory / str(step) / STATE)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(directory / str(step) / STATE, args=arguments)
    found = _flatten(restored)
    leaves = {path: found[path] for path in asked}
    for path, digest in zip(leaves, digests(leaves.values()), strict=True):
        if digest != saved[path]["digest"]:
            raise _damaged(directory, step, f"the values of {path} are not those that were saved")
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves.values())


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_leaves(
    checkpoint: str, saved: Mapping[str, dict[str, Any]], asked: Mapping[str, Any]
) -> None:
    """Names the first array that is not the one asked for."""

    def kind(shape, dtype) -> str:
        return f"{dtype}[{', '.join(map(str, shape))}]"

    have = {path: kind(leaf["shape"], leaf["dtype"]) for path, leaf in saved.items()}
    want = {path: kind(leaf.shape, leaf.dtype) for path, leaf in asked.items()}
    for path in [*want, *have]:
        if have.get(path) != want.get(path):
            raise InputError(
                f"{checkpoint}: {path} is {have.get(path, 'absent')} there, but the config asks for"
                f" {want.get(path, 'none')}: use the config of the run that wrote it, or start a"
                " new run in another directory"
            )


@contextlib.contextmanager
def _refuse_damage(directory: epath.Path, step: int) -> Iterator[None]:
    """Turns what a damaged file makes Orbax raise into one line; lack of memory is no damage."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise _damaged(directory, step, _one_line(error)) from error


def _damaged(directory: epath.Path, step: int, reason: str) -> InputError:
    others = [str(other) for other in saved_steps(directory) if other != step]
    remedy = f"use step {' or '.join(others)}" if others else "start a new run"
    return InputError(
        f"checkpoint {directory / str(step)} is damaged ({reason}): delete it and {remedy}"
    )


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
