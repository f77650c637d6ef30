"""The settings of a run: from a ConfigDict to frozen dataclasses, unknown names refused.

Below this module nothing sees a ConfigDict. `configs/base.py` shows every field once.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections

from flowrl_jax.alarm import AlarmConfig
from flowrl_jax.checkpoint import CheckpointConfig
from flowrl_jax.datasets.pipeline import DataConfig
from flowrl_jax.errors import InputError, require
from flowrl_jax.learner import TrainStepConfig
from flowrl_jax.metric_sinks import MetricsConfig
from flowrl_jax.models.architecture import LoraConfig
from flowrl_jax.models.decode_support import require_support
from flowrl_jax.objectives import OBJECTIVES, check_correction, objective_of
from flowrl_jax.optimizer import OptimizerConfig
from flowrl_jax.reference import ReferenceConfig
from flowrl_jax.replay import ReplayConfig
from flowrl_jax.sampler.settings import CACHE_DTYPES
from flowrl_jax.sampling_config import EvalConfig, RolloutConfig
from flowrl_jax.sharding import MeshConfig
from flowrl_jax.tasks import TaskConfig
from flowrl_jax.tasks.base import nearest

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Where the policy comes from, and its shape where it starts from random numbers.

    Attributes:
        path: folder of a Hugging Face checkpoint; its config.json then gives the shape and the
            fields below from `num_layers` to `init_std` are not read. Empty: random weights.
        start_from: folder of another run of ours (of `sft`, say) whose latest policy to start
            from; its shape must be the one given here. The reference policy is the same one.
        dtype: of activations, "float32" or "bfloat16"; master weights are float32 either way.
        remat: "none", "dots" or "full", see `TransformerConfig`.
        attention: "xla", "cudnn" or "splash", see `models.attention.attend`.
        decode_kernel: "auto", "xla", "pallas", "triton" or "native", see `TransformerConfig`.
        vocab_size: ids of the model; 0 means the tokenizer's.
        num_layers: blocks.
        embed_dim: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        mlp_dim: width of the SwiGLU's hidden layer.
        rope_theta: base of the rotary frequencies.
        norm_eps: of RMSNorm.
        tie_embeddings: whether the unembedding is the embedding transposed.
        qkv_bias: whether query, key and value have a bias.
        init_std: of the random initialisation.
        lora: adapters to train in place of the weights, see `LoraConfig`.
    """

    path: str = ""
    start_from: str = ""
    dtype: str = "float32"
    remat: str = "full"
    attention: str = "xla"
    decode_kernel: str = "auto"
    vocab_size: int = 0
    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 512
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = False
    init_std: float = 0.02
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        require(
            self.dtype in DTYPES,
            f"model.dtype={self.dtype!r} is not known: use one of {', '.join(DTYPES)}",
        )


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer.

    Attributes:
        path: a tokenizer.json, a sentencepiece .model file or a folder with one of them; empty
            means `model.path`, and without that a vocabulary made for Countdown is written to the
            run's folder.
        max_number: of the Countdown vocabulary: numbers up to it are one token each.
        eos_ids: ids that end a response; empty means what the model's generation_config.json, or
            else the tokenizer, says.
        add_bos: whether prompts start with the opening id; one that a chat template has written
            is not doubled.
        chat: whether a prompt is put before the policy as the user's message of a conversation,
            rendered by the tokenizer's chat template up to where the answer begins.
        system_prompt: of the conversation; empty: none but what the template itself may add.
        chat_template: a file with a template; empty: the tokenizer's own.
        chat_options: what the template knows by name, such as {"enable_thinking": False}.
    """

    path: str = ""
    max_number: int = 100
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    chat: bool = False
    system_prompt: str = ""
    chat_template: str = ""
    chat_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for field in ("system_prompt", "chat_template", "chat_options"):
            require(
                self.chat or not getattr(self, field),
                f"tokenizer.{field}={getattr(self, field)!r} is for conversations only: set"
                " tokenizer.chat=True too",
            )

    def conversation(self, prompt: str) -> list[dict[str, str]]:
        """The messages that a prompt becomes where `chat` is set."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": prompt}]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How often a rollout is learned from, and in which pieces.

    Attributes:
        updates_per_rollout: optimiser steps that a rollout is cut into, by prompts, in order.
        epochs: passes over a rollout.
        micro_batch_size: responses whose activations are held at one time, over all devices;
            0 means those of a whole optimiser step, -1 one for each part of the batch
            (data x fsdp).
        logprob_chunk: logits held at one time, counted in tokens of each response.
        length_buckets: lengths that responses are cut to in learning, increasing, below
            `rollout.max_response_length`, which is always one more; see `buckets`.
    """

    updates_per_rollout: int = 1
    epochs: int = 1
    micro_batch_size: int = 0
    logprob_chunk: int = 256
    length_buckets: tuple[int, ...] = ()

    def __post_init__(self):
        require(
            self.updates_per_rollout >= 1 and self.epochs >= 1,
            f"train.updates_per_rollout={self.updates_per_rollout} and train.epochs={self.epochs}"
            " must be at least 1",
        )
        _ = self.step  # checks the fields it is made of

    @property
    def step(self) -> TrainStepConfig:
        """What the train step itself needs to know."""
        return TrainStepConfig(self.micro_batch_size, self.logprob_chunk, self.length_buckets)


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning on the task's demonstrations (`python -m flowrl_jax.sft`).

    Attributes:
        steps: optimiser steps.
        batch_size: demonstrations per step, over all hosts.
        optimizer: its own, the policy's alone.
    """

    steps: int = 100
    batch_size: int = 64
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        require(
            self.steps >= 1 and self.batch_size >= 1,
            f"sft.steps={self.steps} and sft.batch_size={self.batch_size} must be at least 1",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run.

    Attributes:
        seed: of initialisation, sampling, data order and dropout.
        steps: rollout steps.
        loss: config of the objective that `loss.objective` names.
        model, tokenizer, task, data, rollout, replay, reference, optimizer, train, sft, eval, mesh,
            checkpoint, metrics, alarm: see the class of each.
    """

    seed: int
    steps: int
    model: ModelConfig
    tokenizer: TokenizerConfig
    task: TaskConfig
    data: DataConfig
    rollout: RolloutConfig
    replay: ReplayConfig
    reference: ReferenceConfig
    loss: Any
    optimizer: OptimizerConfig
    train: TrainConfig
    sft: SftConfig
    eval: EvalConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    alarm: AlarmConfig

    def __post_init__(self):
        require(0 <= self.seed < 2**31, f"seed={self.seed}: give an integer from 0 to 2**31 - 1")
        require(self.steps >= 1, f"steps={self.steps} must be at least 1")
        require(
            self.rollout.prompts_per_step % self.train.updates_per_rollout == 0,
            f"train.updates_per_rollout={self.train.updates_per_rollout} does not divide"
            f" rollout.prompts_per_step={self.rollout.prompts_per_step}: choose a divisor",
        )
        limit = self.rollout.max_response_length
        require(
            max(self.train.length_buckets, default=0) < limit,
            f"train.length_buckets={self.train.length_buckets} must lie below"
            f" rollout.max_response_length={limit}, which is always the last of them: leave out"
            " what is as large or larger",
        )
        buffer = getattr(self.loss, "overlong_buffer", 0)
        require(
            buffer <= limit,
            f"loss.overlong_buffer={buffer} must not exceed rollout.max_response_length={limit}:"
            " the punishment sets in that many tokens before it",
        )
        dtype = DTYPES[self.model.dtype]
        kept = CACHE_DTYPES.get(self.rollout.cache, dtype)
        require_support(self.model.decode_kernel, dtype=dtype, kept=kept)
        check_correction(self.loss, self.rollout.correction)
        self._check_replay()
        self._check_reference()

    def _check_replay(self) -> None:
        prompts = self.rollout.prompts_per_step // self.train.updates_per_rollout
        share = self.replay.fraction * prompts
        require(
            abs(share - round(share)) < 1e-6,
            f"replay.fraction={self.replay.fraction} of the {prompts} prompts of an optimiser step"
            " (rollout.prompts_per_step / train.updates_per_rollout) is no whole number: choose"
            f" a multiple of 1/{prompts}",
        )
        require(
            not self.replayed_prompts or self.replayed_prompts <= self.replay.size,
            f"replay.size={self.replay.size} is less than the {self.replayed_prompts} prompts that"
            " a step replays: keep more, or lower replay.fraction",
        )
        batch = self.rollout.prompts_per_batch
        require(
            not batch or self.sampled_prompts % batch == 0,
            f"rollout.prompts_per_batch={batch} must divide the {self.sampled_prompts} prompts that"
            f" a step samples with replay.fraction={self.replay.fraction}, or be 0",
        )

    def _check_reference(self) -> None:
        reference = self.reference
        require(
            not reference.moves or objective_of(self.loss).needs_reference(self.loss),
            f"reference.reset_every={reference.reset_every}, on_plateau={reference.on_plateau}: the"
            " objective has no reference policy to reset; give it one, as by loss.kl_coef, or set"
            " both to 0",
        )
        require(
            not reference.on_plateau or self.eval.every > 0,
            f"reference.on_plateau={reference.on_plateau} counts evaluations, and eval.every=0"
            " makes none: set eval.every",
        )

    @property
    def replayed_prompts(self) -> int:
        """Prompts of a rollout step that are not sampled but replayed, over all hosts."""
        return round(self.replay.fraction * self.rollout.prompts_per_step)

    @property
    def sampled_prompts(self) -> int:
        """Prompts of a rollout step that are sampled, over all hosts."""
        return self.rollout.prompts_per_step - self.replayed_prompts

    @property
    def updates(self) -> int:
        """Optimiser updates per rollout step."""
        return self.train.updates_per_rollout * self.train.epochs

    @property
    def rows_per_update(self) -> int:
        """Responses that one optimiser update learns from, over all hosts."""
        prompts = self.rollout.prompts_per_step // self.train.updates_per_rollout
        return prompts * self.rollout.group_size


def loss_fields(objective: str, preset: Any) -> dict[str, Any]:
    """The `loss` section of a config file: the objective's name and every field of a preset."""
    return {"objective": objective, **dataclasses.asdict(preset)}


def section(default: Any) -> dict[str, Any]:
    """A section of a config file with every field of a config dataclass."""
    return dataclasses.asdict(default)


def parse_config(values: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Turns a config file's values into dataclasses.

    Raises:
        InputError: a name is unknown or missing, or a value has the wrong type or breaks a rule.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    values = dict(values)
    loss = values.get("loss")
    if not isinstance(loss, Mapping) or loss.get("objective") not in OBJECTIVES:
        name = loss.get("objective") if isinstance(loss, Mapping) else loss
        raise InputError(
            f"config.loss.objective={name!r}: unknown; {nearest(str(name), OBJECTIVES)}"
        )
    objective = OBJECTIVES[loss["objective"]]
    rest = {name: value for name, value in loss.items() if name != "objective"}
    values["loss"] = _build(objective.config_class, rest, "config.loss")
    return _build(Config, values, "config")


def _build(config_class: type, values: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    for name in values:
        if name not in names:
            raise InputError(f"{path}.{name}: no such field; {nearest(name, names)}")
    missing = [name for name in names if name not in values]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} not given; set every field")
    converted = {
        name: _convert(hints[name], value, f"{path}.{name}") for name, value in values.items()
    }
    try:
        return config_class(**converted)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise InputError(f"{path}={value!r}: a section of settings is wanted here")
        return _build(hint, value, path)
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if origin is tuple:
        item, _ = typing.get_args(hint)
        if not isinstance(value, tuple | list):
            raise InputError(f"{path}={value!r} is of type {type(value).__name__}: give tuple")
        return tuple(_convert(item, x, f"{path}[{i}]") for i, x in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise InputError(f"{path}={value!r} is of type {type(value).__name__}: give dict")
        return dict(value)
    accepted: Any = typing.get_args(hint) or (hint,)
    if float in accepted and type(value) is int:
        value = float(value)
    if type(value) not in accepted:
        names = " or ".join(kind.__name__.removesuffix("Type") for kind in accepted)
        raise InputError(f"{path}={value!r} is of type {type(value).__name__}: give {names}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{path}={value} is not a finite number: give one")
    return value
