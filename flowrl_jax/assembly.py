"""From a config to the parts of a run: tokenizer, task, model, mesh, learner, first policy."""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from flowrl_jax.checkpoint import restore_policy, saved_steps
from flowrl_jax.config import DTYPES, Config
from flowrl_jax.distributed import agree_on_kernels, any_process
from flowrl_jax.errors import InputError
from flowrl_jax.learner import Learner, check_batch
from flowrl_jax.metric_sinks import FILE_NAME
from flowrl_jax.models.decode_support import refusal
from flowrl_jax.models.hf import check_vocabulary, load_policy
from flowrl_jax.models.hf_config import read_config
from flowrl_jax.models.lora import with_adapters, without_adapters
from flowrl_jax.models.transformer import Transformer, TransformerConfig
from flowrl_jax.new_folder import in_first_process
from flowrl_jax.objectives import for_length, objective_of
from flowrl_jax.objectives.sft import SFTConfig
from flowrl_jax.optimizer import OptimizerConfig, make_optimizer
from flowrl_jax.sampler import SamplerConfig, StopTable, rollout_key
from flowrl_jax.sampling_config import RolloutConfig
from flowrl_jax.sharding import Layout, make_layout, make_mesh, sampling_layout
from flowrl_jax.tasks import Task, build
from flowrl_jax.tasks.countdown import symbols
from flowrl_jax.tokenizers import (
    ChatTemplate,
    Tokenizer,
    generation_eos,
    load_chat_template,
    load_tokenizer,
    train_symbol_tokenizer,
)
from flowrl_jax.train_step import abstract_policy, abstract_state, init_policy

CHECKPOINTS = "checkpoints"
TOKENIZER_FILE = "tokenizer.model"
# Streams of randomness derived from the seed besides the rollouts', which take steps as labels.
INIT_STREAM, DROPOUT_STREAM, EVAL_STREAM, SAMPLE_STREAM, RESAMPLE_STREAM = (
    2**31 - i for i in range(1, 6)
)
_VOCAB_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Parts:
    """What every entry point is made of.

    Attributes:
        config: the settings.
        layout: mesh and sharding rules.
        sampling_layout: the same devices as sampling wants them.
        tokenizer: of prompts and responses.
        eos_ids: tokens that end a response.
        task: asks and judges.
        model: the policy's architecture.
        chat: what prompts are rendered with; None: they are put before the policy as they are.
        stops: strings that end a response; None: there are none.
    """

    config: Config
    layout: Layout
    sampling_layout: Layout
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    task: Task
    model: Transformer
    chat: ChatTemplate | None = None
    stops: StopTable | None = None

    def sampler(self, **changes: Any) -> SamplerConfig:
        """The sampler's settings for training, with changes for other uses.

        Raises:
            InputError: a setting is out of range.
        """
        ends = {"eos_ids": self.eos_ids, "pad_id": self.tokenizer.pad_id}
        return make_sampler(self.config.rollout, **(ends | changes))

    def round_up_prompts(self, prompts: int, samples: int) -> int:
        """The least number of prompts from `prompts` on whose samples divide over the devices."""
        shards = math.lcm(self.layout.batch_shards, self.sampling_layout.batch_shards)
        unit = shards // math.gcd(shards, samples)
        return -(-prompts // unit) * unit


def make_sampler(rollout: RolloutConfig, **settings: Any) -> SamplerConfig:
    """The sampler's settings.

    Args:
        rollout: the config's section.
        settings: what it does not say, or is to be otherwise.

    Raises:
        InputError: a setting is out of range.
    """
    names = ("max_response_length", "group_size", "temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(rollout, name) for name in (*names, "slots", "cache")}
    try:
        return SamplerConfig(**(given | settings))
    except ValueError as error:
        raise InputError(str(error)) from error


def claim_workdir(workdir: Path, *, resume: bool = False) -> None:
    """Makes the folder of a run, and refuses one that holds another run.

    The first process looks, before another one writes.

    Args:
        workdir: of the run.
        resume: whether the run in it is to be continued.

    Raises:
        InputError: it holds a run that is not to be continued, cannot be made, or is not there for
            all processes.
    """
    in_first_process(lambda: _claim(workdir, resume))
    if any_process(not workdir.is_dir()):
        raise InputError(
            f"--workdir={workdir} of process 0 is not there for all processes: name a folder that"
            " all hosts share"
        )


def _claim(workdir: Path, resume: bool) -> None:
    metrics = workdir / FILE_NAME
    used = metrics.is_file() and metrics.stat().st_size > 0
    if not resume and (used or saved_steps(workdir / CHECKPOINTS)):
        raise InputError(
            f"{workdir} already holds a run: continue it with --resume, where the command has"
            " that, or name another --workdir"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--workdir={workdir} cannot be made ({error.strerror}): name another folder"
        ) from error


def assemble(config: Config, workdir: str | os.PathLike[str]) -> Parts:
    """Builds the parts of a run; reads no weights and compiles nothing.

    Args:
        config: the settings.
        workdir: the run's folder; a vocabulary made for the run is written there.

    Raises:
        InputError: whatever of the config does not fit the files or the devices.
    """
    layout_mesh = make_mesh(config.mesh)
    native = config.model.decode_kernel in ("auto", "native")
    if native and not refusal("native", dtype=DTYPES[config.model.dtype]):
        agree_on_kernels()
    tokenizer, eos_ids = _tokenizer(config, Path(workdir))
    shape = _shape(config, tokenizer, layout_mesh.shape["tensor"])
    layout = layout_of(config, layout_mesh, shape)
    stop = config.rollout.stop
    return Parts(
        config=config,
        layout=layout,
        sampling_layout=sampling_layout(layout, shape.axis_sizes, config.rollout.tensor),
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        task=build(config.task),
        model=Transformer(shape),
        chat=_chat(config, tokenizer),
        stops=StopTable.build(tokenizer, stop, shape.drawable) if stop else None,
    )


def layout_of(config: Config, mesh: Mesh, shape: TransformerConfig) -> Layout:
    """Where a run's arrays live while it trains.

    Args:
        config: the settings.
        mesh: of the devices.
        shape: of the policy.

    Raises:
        InputError: the model or the rows do not divide.
    """
    layout = make_layout(
        mesh, shape.axis_sizes, optimizer_over_data=config.mesh.optimizer_over_data
    )
    layout.check_columns(config.rollout.max_prompt_length + config.rollout.max_response_length)
    if layout.context_shards > 1 and shape.attention == "cudnn":
        raise InputError(
            f"mesh.context={layout.context_shards} with model.attention=cudnn: its kernel wants"
            " whole rows; set model.attention=xla, or mesh.context=1"
        )
    return layout


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
    train = {
        "train_log_z": log_z is not None and log_z.kind == "head",
        "train_value": objective_of(objective).needs_values(objective),
    }
    learner = Learner(
        model=parts.model,
        objective=for_length(objective, parts.config.rollout.max_response_length),
        optimizer=make_optimizer(optimizer, steps, updates, **train),
        group_size=parts.config.rollout.group_size,
        temperature=parts.config.rollout.temperature,
        config=parts.config.train.step,
        layout=parts.layout,
        correction=parts.config.rollout.correction,
    )
    try:
        check_batch(learner, rows)
    except ValueError as error:
        raise InputError(str(error)) from error
    return learner


def first_policy(parts: Parts, learner: Learner) -> Any:
    """The policy that training starts from, placed on the mesh.

    Where adapters are trained, it stays as it is, and is held in the compute dtype.

    Raises:
        InputError: the checkpoint or run folder is missing, damaged or of another shape.
    """
    shape = parts.model.config
    policy = _first_policy(parts, learner)
    if not shape.lora.rank or shape.dtype == shape.param_dtype:
        return policy
    return jax.tree.map(lambda x: x.astype(shape.dtype), policy)


def _first_policy(parts: Parts, learner: Learner) -> Any:
    model = parts.config.model
    if model.start_from:
        folder = Path(model.start_from) / CHECKPOINTS
        if not saved_steps(folder):
            raise InputError(
                f"model.start_from={model.start_from!r} holds no checkpoint: name the folder of a"
                " run, such as one of `python -m flowrl_jax.sft`"
            )
        return restore_policy(folder, abstract_policy(learner))[0]
    if model.path:
        return load_pretrained(parts)
    return init_policy(learner, rollout_key(parts.config.seed, INIT_STREAM))


def load_pretrained(parts: Parts, on_tensor: Callable[[], object] = lambda: None) -> Any:
    """The policy of `model.path`, placed on the mesh.

    Args:
        parts: of the run.
        on_tensor: called for each tensor that has been read.

    Raises:
        InputError: the checkpoint is missing, damaged or of another shape.
    """
    path, multiple = parts.config.model.path, parts.model.config.vocab_multiple
    mesh = parts.layout.mesh
    return load_policy(path, mesh=mesh, vocab_multiple=multiple, on_tensor=on_tensor)[1]


def scoring_learner(parts: Parts, *, temperature: float = 1.0) -> Learner:
    """A learner that scores responses and knows the shape of the policy, but does not learn.

    Args:
        parts: of the run.
        temperature: of the log-probabilities.
    """
    rows = max(parts.config.train.micro_batch_size, 0) or parts.layout.batch_shards
    learner = make_learner(parts, SFTConfig(), parts.config.sft.optimizer, rows, steps=1, updates=1)
    return dataclasses.replace(learner, temperature=temperature)


def load_run_policy(parts: Parts, run: str | os.PathLike[str], step: int | None = None) -> Any:
    """A policy of a run, placed on the mesh.

    Args:
        parts: built from the run's config.
        run: the run's folder; empty for the policy that training would start from.
        step: which checkpoint; the latest if None.

    Raises:
        InputError: there is no such policy, or it is damaged or of another shape.
    """
    learner = scoring_learner(parts)
    if not run:
        return first_policy(parts, learner)
    trained = abstract_state(learner, num_prompts=1)[0].params["policy"]
    trained = restore_policy(Path(run) / CHECKPOINTS, trained, step)[0]
    base = first_policy(parts, learner) if parts.model.config.lora.rank else None
    return with_adapters(base, trained)


def reference_of(parts: Parts, policy: Any) -> Any:
    """The policy that a run started from, placed on the mesh.

    Args:
        parts: built from the run's config.
        policy: from `load_run_policy`; where it has adapters, the rest of it is the reference.
    """
    if parts.model.config.lora.rank:
        return without_adapters(policy)
    return first_policy(parts, scoring_learner(parts))


def _tokenizer(config: Config, workdir: Path) -> tuple[Tokenizer, tuple[int, ...]]:
    path = config.tokenizer.path or config.model.path
    eos_ids = config.tokenizer.eos_ids or None
    if not path:
        path = _symbol_tokenizer(config, workdir)
    if eos_ids is None and config.model.path:
        eos_ids = generation_eos(Path(config.model.path))
    tokenizer = load_tokenizer(path, eos_ids=eos_ids)
    if not tokenizer.eos_ids:
        raise InputError(f"tokenizer {path} names no end-of-sequence token: set tokenizer.eos_ids")
    if config.tokenizer.add_bos and tokenizer.bos_id is None:
        raise InputError(f"tokenizer {path} has no opening id: set tokenizer.add_bos=False")
    return tokenizer, tokenizer.eos_ids


def _symbol_tokenizer(config: Config, workdir: Path) -> Path:
    """The Countdown vocabulary in the run's folder, the one that the starting policy knows."""
    path, largest = workdir / TOKENIZER_FILE, config.tokenizer.max_number
    if not path.exists():
        known = Path(config.model.start_from) / TOKENIZER_FILE
        if config.model.start_from and known.is_file():
            # Renamed into place: other hosts may be reading.
            copy = shutil.copyfile(known, path.with_name(f"{path.name}.{os.getpid()}"))
            os.replace(copy, path)
        else:
            train_symbol_tokenizer(path, symbols(largest))
    encode = load_tokenizer(path).encode
    if len(encode(str(largest))) != 1 or len(encode(str(largest + 1))) == 1:
        raise InputError(
            f"tokenizer.max_number={largest} is not what the vocabulary {path} was made for: set"
            " it as in the run that this one continues or starts from"
        )
    return path


def _chat(config: Config, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of prompts, tried on one."""
    settings = config.tokenizer
    if not settings.chat:
        return None
    source = settings.chat_template or settings.path or config.model.path
    template = load_chat_template(source, tokenizer.special_tokens) if source else None
    if template is None:
        raise InputError(
            f"tokenizer {source or 'of Countdown'} has no chat template: name a file in"
            " tokenizer.chat_template, or set tokenizer.chat=False"
        )
    template.render(settings.conversation("?"), options=settings.chat_options)
    return template


def _shape(config: Config, tokenizer: Tokenizer, tensor_shards: int) -> TransformerConfig:
    model = config.model
    computing = {
        "dtype": DTYPES[model.dtype],
        "remat": model.remat,
        "attention": model.attention,
        "decode_kernel": model.decode_kernel,
        "lora": model.lora,
        "vocab_multiple": math.lcm(_VOCAB_MULTIPLE, tensor_shards, max(config.rollout.tensor, 1)),
    }
    try:
        if model.path:
            shape = dataclasses.replace(read_config(Path(model.path)), **computing)
        else:
            fields = {field.name for field in dataclasses.fields(TransformerConfig)}
            given = {k: v for k, v in vars(model).items() if k in fields}
            given["vocab_size"] = model.vocab_size or tokenizer.vocab_size
            shape = TransformerConfig(**(given | computing))
        check_vocabulary(tokenizer.vocab_size, shape)
        # Ids without a text are of no use to anybody.
        return dataclasses.replace(shape, num_tokens=tokenizer.vocab_size)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def configure_jax(cache_dir: str | None = None) -> None:
    """Process-wide settings of JAX: a compilation cache that later runs start faster from.

    Args:
        cache_dir: folder of the cache; none without one.
    """
    if cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(cache_dir).absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
