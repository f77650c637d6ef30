"""From a config to the parts of a run: tokenizer, task, model, mesh, learner, first policy."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax

from flowrl_jax.checkpoint import restore_policy
from flowrl_jax.config import DTYPES, Config
from flowrl_jax.errors import InputError
from flowrl_jax.models.hf import check_vocabulary, load_policy
from flowrl_jax.models.hf_config import read_config
from flowrl_jax.models.transformer import Transformer, TransformerConfig
from flowrl_jax.optimizer import OptimizerConfig, make_optimizer
from flowrl_jax.sampler import SamplerConfig
from flowrl_jax.sharding import Layout, make_layout, make_mesh
from flowrl_jax.tasks import Task, build
from flowrl_jax.tasks.countdown import symbols
from flowrl_jax.tokenizers import Tokenizer, load_tokenizer, train_symbol_tokenizer
from flowrl_jax.train_step import Learner, abstract_state, check_batch

CHECKPOINTS = "checkpoints"
TOKENIZER_FILE = "tokenizer.model"
_VOCAB_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Parts:
    """What every entry point is made of.

    Attributes:
        config: the settings.
        layout: mesh and sharding rules.
        tokenizer: of prompts and responses.
        eos_ids: tokens that end a response.
        task: asks and judges.
        model: the policy's architecture.
    """

    config: Config
    layout: Layout
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    task: Task
    model: Transformer

    def sampler(self, **changes: Any) -> SamplerConfig:
        """The sampler's settings for training, with changes for other uses."""
        rollout = self.config.rollout
        settings = {
            "max_response_length": rollout.max_response_length,
            "group_size": rollout.group_size,
            "temperature": rollout.temperature,
            "top_k": rollout.top_k,
            "top_p": rollout.top_p,
        }
        return SamplerConfig(
            eos_ids=self.eos_ids, pad_id=self.tokenizer.pad_id, **(settings | changes)
        )


def assemble(config: Config, workdir: str | os.PathLike[str]) -> Parts:
    """Builds the parts of a run; reads no weights and compiles nothing.

    Args:
        config: the settings.
        workdir: the run's folder; a vocabulary made for the run is written there.

    Raises:
        InputError: whatever of the config does not fit the files or the devices.
    """
    layout_mesh = make_mesh(config.mesh)
    tokenizer, eos_ids = _tokenizer(config, Path(workdir))
    shape = _shape(config, tokenizer)
    sizes = {
        "embed": shape.embed_dim, "heads": shape.num_heads, "kv_heads": shape.num_kv_heads,
        "mlp": shape.mlp_dim, "vocab": shape.vocab_size,
    }
    return Parts(
        config=config,
        layout=make_layout(layout_mesh, sizes),
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        task=build(config.task),
        model=Transformer(shape),
    )


def make_learner(
    parts: Parts, objective: Any, optimizer: OptimizerConfig, rows: int, *, steps: int, updates: int
) -> Learner:
    """The learner of a run.

    Args:
        parts: of the run.
        objective: config of the objective.
        optimizer: hyper-parameters.
        rows: responses per optimiser step, over all hosts.
        steps: rollout steps, for the schedule.
        updates: optimiser updates per rollout step.

    Raises:
        InputError: if the sizes do not divide.
    """
    log_z = getattr(objective, "log_z", None)
    learner = Learner(
        model=parts.model,
        objective=objective,
        optimizer=make_optimizer(
            optimizer, steps, updates, train_log_z=log_z is not None and log_z.kind == "head"
        ),
        group_size=parts.config.rollout.group_size,
        temperature=parts.config.rollout.temperature,
        config=parts.config.train.step,
        layout=parts.layout,
    )
    try:
        check_batch(learner, rows)
    except ValueError as error:
        raise InputError(str(error)) from error
    return learner


def first_policy(parts: Parts, learner: Learner) -> Any | None:
    """The policy that training starts from, placed on the mesh; None for random weights.

    Raises:
        InputError: the checkpoint or run folder is missing, damaged or of another shape.
    """
    model = parts.config.model
    if model.start_from:
        abstract, _ = abstract_state(learner, num_prompts=1)
        folder = Path(model.start_from) / CHECKPOINTS
        return restore_policy(folder, abstract.params["policy"])[0]
    if model.path:
        return load_policy(model.path, mesh=parts.layout.mesh)[1]
    return None


def _tokenizer(config: Config, workdir: Path) -> tuple[Tokenizer, tuple[int, ...]]:
    path = config.tokenizer.path or config.model.path
    eos_ids = config.tokenizer.eos_ids or None
    if not path:
        path = str(workdir / TOKENIZER_FILE)
        if not Path(path).exists():
            train_symbol_tokenizer(path, symbols(config.tokenizer.max_number))
    if eos_ids is None and config.model.path:
        eos_ids = _generation_eos(Path(config.model.path))
    tokenizer = load_tokenizer(path, eos_ids=eos_ids)
    if not tokenizer.eos_ids:
        raise InputError(
            f"tokenizer {path} names no end-of-sequence token: set tokenizer.eos_ids"
        )
    if config.tokenizer.add_bos and tokenizer.bos_id is None:
        raise InputError(
            f"tokenizer {path} has no opening id: set tokenizer.add_bos=False"
        )
    return tokenizer, tokenizer.eos_ids


def _generation_eos(folder: Path) -> tuple[int, ...] | None:
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    ids = json.loads(file.read_text()).get("eos_token_id")
    if ids is None:
        return None
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _shape(config: Config, tokenizer: Tokenizer) -> TransformerConfig:
    model = config.model
    computing = {
        "dtype": DTYPES[model.dtype], "remat": model.remat, "attention": model.attention
    }
    try:
        if model.path:
            shape = dataclasses.replace(read_config(Path(model.path)), **computing)
        else:
            fields = {field.name for field in dataclasses.fields(TransformerConfig)}
            given = {k: v for k, v in dataclasses.asdict(model).items() if k in fields}
            if not model.vocab_size:
                given["vocab_size"] = -(-tokenizer.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
            shape = TransformerConfig(**(given | computing))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    check_vocabulary(tokenizer.vocab_size, shape)
    return shape


def configure_jax(cache_dir: str | None = None) -> None:
    """Process-wide settings of JAX: a compilation cache that later runs start faster from.

    Args:
        cache_dir: folder of the cache; none without one.
    """
    if cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(cache_dir).absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
