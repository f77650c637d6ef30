"""The programs of a run, lowered for devices that are not there."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flowrl_jax.assembly import layout_of, make_sampler
from flowrl_jax.buckets import check_buckets
from flowrl_jax.config import Config
from flowrl_jax.distributed import row_share
from flowrl_jax.errors import InputError
from flowrl_jax.learner import Learner, TrainStepConfig, check_batch
from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.models.decode import decode_params, decode_shardings, rotation_tables
from flowrl_jax.models.transformer import Transformer
from flowrl_jax.objectives import for_length, objective_of
from flowrl_jax.objectives.correction import PER_TOKEN
from flowrl_jax.optimizer import OptimizerConfig, make_optimizer
from flowrl_jax.planning.shapes import planned_shape
from flowrl_jax.rollouts import check_rollouts
from flowrl_jax.sampler.programs import Programs
from flowrl_jax.sampler.schedule import Groups
from flowrl_jax.sampler.slots import Rows, Slots, Starts
from flowrl_jax.sharding import Layout, make_mesh, sampling_layout
from flowrl_jax.train_step import abstract_policy, abstract_state, make_score, make_train_step
from flowrl_jax.types import PromptBatch, TrainBatch

Built = tuple[Callable[[], Any], tuple[Any, ...]]
_WITHOUT_SPLASH = ("TPU v2", "TPU v3")  # their compiler refuses the kernel


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of the loop.

    Attributes:
        name: "train_step", "score", "prefill" or "decode".
        build: gives a maker of the jitted function, and the shapes of its arguments.
        layout: where its activations live.
        rows: responses or prompts that it computes at one time, over all devices.
        columns: tokens that it computes of a row.
        trips: how often it does so.
        runs: of the program in a step of the loop.
        attention: the kernel that it runs with, which on GPUs is not what is traced.
        backward: whether it has a backward pass.
        replaced: which argument is donated and becomes a result; None where none is.
    """

    name: str
    build: Callable[[], Built]
    layout: Layout
    rows: int
    columns: int
    trips: int
    runs: int
    attention: str
    backward: bool = False
    replaced: int | None = None

    @property
    def tokens(self) -> int:
        """Computed by a run, over all devices."""
        return self.rows * self.columns * self.trips

    def lower(self) -> Any:
        """Lowers it for the planned devices."""
        make, arguments = self.build()
        return make().lower(*arguments)


def planned_learner(config: Config, devices: Sequence[Any]) -> Learner:
    """The learner of a config over devices that need not be there.

    Args:
        config: the settings; neither weights nor a tokenizer are read.
        devices: as a topology describes them.

    Raises:
        InputError: the mesh or the batch does not divide, or the model's shape is not known.
    """
    mesh = make_mesh(config.mesh, devices)
    cut = max(config.rollout.tensor, 1)
    model = planned_shape(config.model, vocab_multiple=math.lcm(64, mesh.shape["tensor"], cut))
    model = dataclasses.replace(model, attention=_attention(model, devices[0]))
    log_z = getattr(config.loss, "log_z", None)
    trained = (
        log_z is not None and log_z.kind == "head",
        objective_of(config.loss).needs_values(config.loss),
    )
    learner = Learner(
        model=Transformer(model),
        objective=for_length(config.loss, config.rollout.max_response_length),
        optimizer=_optimizer(config.optimizer, config.steps, config.updates, *trained),
        group_size=config.rollout.group_size,
        temperature=config.rollout.temperature,
        config=config.train.step,
        layout=layout_of(config, mesh, model),
        correction=config.rollout.correction,
    )
    try:
        check_batch(learner, config.rows_per_update)
    except ValueError as error:
        raise InputError(str(error)) from error
    check_buckets(learner, config.rollout.max_prompt_length)
    sizes = learner.model.config.axis_sizes
    sampling = sampling_layout(learner.layout, sizes, config.rollout.tensor)
    check_rollouts(config.rollout, row_share(learner.layout), learner.layout, sampling)
    return learner


@functools.cache  # one object for equal settings, so that learners can be equal
def _optimizer(
    config: OptimizerConfig, steps: int, updates: int, train_log_z: bool, train_value: bool
) -> Any:
    return make_optimizer(config, steps, updates, train_log_z=train_log_z, train_value=train_value)


def policy_shapes(learner: Learner) -> Any:
    """`train_step.abstract_policy`, traced once for learners that differ in their steps alone.

    Weights below adapters are held in the compute dtype.
    """
    shapes = _policy(dataclasses.replace(learner, config=TrainStepConfig()))
    config = learner.model.config
    return computed(shapes, config) if config.lora.rank else shapes


def computed(shapes: Any, config: TransformerConfig) -> Any:
    """Shapes of weights that are not trained, in the dtype that they are held in.

    Args:
        shapes: `ShapeDtypeStruct`.
        config: names the dtype.
    """
    return jax.tree.map(lambda x: x.update(dtype=config.dtype), shapes)


def state_shapes(learner: Learner, num_prompts: int) -> Any:
    """The shapes of `train_step.abstract_state`, traced once likewise.

    Args:
        learner: of the run.
        num_prompts: size of a log Z table.
    """
    return _state(dataclasses.replace(learner, config=TrainStepConfig()), num_prompts)


@functools.lru_cache(maxsize=4)
def _policy(learner: Learner) -> Any:
    return abstract_policy(learner)


@functools.lru_cache(maxsize=4)
def _state(learner: Learner, num_prompts: int) -> Any:
    return abstract_state(learner, num_prompts)[0]


def _attention(model: TransformerConfig, device: Any) -> str:
    """The kernel to plan with: on TPU splash, where there is one, unless the config names another.

    Raises:
        InputError: the config names the kernel of another platform.
    """
    tpu = device.platform == "tpu"
    if model.attention == ("cudnn" if tpu else "splash"):
        raise InputError(
            f"model.attention={model.attention!r} is a kernel for {'GPUs' if tpu else 'TPUs'}: set"
            f" {'splash' if tpu else 'cudnn'!r} for this topology, or 'xla'"
        )
    if not tpu:
        return "xla"  # shapes are all that is asked for, and cuDNN need not be installed
    return model.attention if device.device_kind in _WITHOUT_SPLASH else "splash"


def programs(config: Config, learner: Learner) -> Iterator[Program]:
    """The programs in the order in which a step runs them."""
    rollout, layout = config.rollout, learner.layout
    width, length = rollout.max_prompt_length, rollout.max_response_length
    columns = width + length
    prompts = rollout.prompts_per_batch or config.sampled_prompts
    batches = config.sampled_prompts // prompts
    rows = prompts * rollout.group_size
    arrays = _Arrays(layout, width, length)
    within = sampling_layout(layout, learner.model.config.axis_sizes, rollout.tensor)
    tpu = layout.mesh.devices.flat[0].platform == "tpu"
    attention = learner.model.config.attention if tpu else config.model.attention
    sampler = _Sampler(config, learner, within, rows)
    yield Program(
        "prefill",
        sampler.prefill,
        within,
        rows=sampler.prompts,
        columns=width,
        trips=1,
        runs=batches * sampler.chunks,
        attention=attention,
    )
    yield Program(
        "decode",
        sampler.decode,
        within,
        rows=sampler.slots,
        columns=1,
        trips=1,
        runs=batches * length * -(-rows // sampler.slots),
        attention=attention,
        replaced=1,
    )
    total = config.sampled_prompts * rollout.group_size
    micro = learner.micro_batch(config.rows_per_update)
    scored = math.gcd(total, micro)
    objective = objective_of(config.loss)
    reference = objective.needs_reference(config.loss)
    own = rollout.old_logprobs == "trainer" or objective.returns is not None
    yield Program(
        "score",
        lambda: _score(learner, arrays, total, config.rows_per_update),
        layout,
        rows=scored,
        columns=columns,
        trips=total // scored,
        runs=int(reference) + own,
        attention=attention,
    )
    update = config.rows_per_update
    yield Program(
        "train_step",
        lambda: _train_step(learner, arrays, update),
        layout,
        rows=micro,
        columns=columns,
        trips=update // micro,
        runs=config.updates,
        attention=attention,
        backward=True,
        replaced=0,
    )


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Makes shapes of batches."""

    layout: Layout
    width: int
    length: int

    def rows(self, count: int, *shape: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=self.layout.batch)

    def masks(self, count: int) -> tuple[Any, Any]:
        return self.rows(count, self.width, dtype=bool), self.rows(count, self.length, dtype=bool)

    def tokens(self, count: int) -> Any:
        return self.rows(count, self.width + self.length, dtype=jnp.int32)


def _key(layout: Layout) -> Any:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=layout.replicated)


def _train_step(learner: Learner, arrays: _Arrays, rows: int) -> Built:
    state = state_shapes(learner, rows)
    prompt_mask, response_mask = arrays.masks(rows)
    logprobs = arrays.rows(rows, arrays.length, dtype=jnp.float32)
    ids = arrays.rows(rows, dtype=jnp.int32)
    each = arrays.rows(rows, dtype=jnp.float32)
    objective = objective_of(learner.objective)
    by_token = objective.token_advantages(learner.objective)
    values = None if objective.returns is None else logprobs
    correction = None
    if learner.correction.kind != "none":
        correction = logprobs if learner.correction.kind in PER_TOKEN else each
    batch = TrainBatch(
        tokens=arrays.tokens(rows),
        prompt_mask=prompt_mask,
        response_mask=response_mask,
        old_logprobs=logprobs,
        ref_logprobs=logprobs,
        reward=logprobs if by_token else each,
        prompt_id=ids,
        row_id=ids,
        correction=correction,
        old_values=values,
        returns=values,
    )
    base = (policy_shapes(learner),) if learner.model.config.lora.rank else ()
    make = functools.partial(make_train_step, learner, num_prompts=rows)
    return make, (state, batch, _key(arrays.layout), *base)


def _score(learner: Learner, arrays: _Arrays, rows: int, rows_per_update: int) -> Built:
    tokens, masks = arrays.tokens(rows), arrays.masks(rows)
    make = functools.partial(make_score, learner, rows_per_update)
    return make, (policy_shapes(learner), tokens, *masks)


class _Sampler:
    """The programs of sampling a batch, all rows of it as long as they may be."""

    def __init__(self, config: Config, learner: Learner, within: Layout, rows: int):
        rollout = config.rollout
        self._learner, self._within, self._rows = learner, within, rows
        self._width = rollout.max_prompt_length
        settings = make_sampler(rollout, eos_ids=())
        self._programs = Programs(learner.model.config, settings, learner.layout, within)
        shards = self._programs.shards
        slots = -(-min(rollout.slots or rows, rows) // shards)
        groups = Groups(rows, rollout.group_size, shards, slots)
        self.slots = slots * shards
        self.prompts = groups.chunk_prompts * shards
        self.chunks = -(-rows // (rollout.group_size * self.prompts))
        stages = self._programs.stages(self._width, waiting=self.slots < rows)
        self._columns = stages[-1].columns[-1]
        self._shelf = self._width + stages[-2].limit if len(stages) > 1 else 0

    def _array(self, *shape: int, dtype: Any = jnp.int32, layout: Layout | None = None) -> Any:
        sharding = (layout or self._within).batch
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _pick(self) -> Any:
        shards = self._programs.shards
        return self._array(shards, self.prompts // shards)

    def prefill(self) -> Built:
        """Prompts of one chunk; weights come from the layout of training into that of sampling."""
        shape, layout = (self._rows, self._width), self._learner.layout
        tokens = self._array(*shape, layout=layout)
        prompts = PromptBatch(tokens, self._array(*shape, dtype=bool, layout=layout))
        arguments = (policy_shapes(self._learner), prompts, self._pick())
        return lambda: self._programs.prefill, arguments

    def decode(self) -> Built:
        """One token of every slot, over a cache of the full length.

        Where rows wait, what they start from stays beside it: a chunk of prompts, or a shelf.
        """
        programs, config = self._programs, self._learner.model.config
        weights = jax.eval_shape(
            lambda params: decode_params(params, config, self._within), policy_shapes(self._learner)
        )
        weights = _placed(weights, decode_shardings(config, self._within))
        _, (params, prompts, pick) = self.prefill()
        read = jax.eval_shape(programs.read, params, prompts, pick)
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        each = self._array(self._rows)
        rows = Rows(self._array(self._rows, *key.shape, dtype=key.dtype), each, each)
        slots = jax.eval_shape(
            lambda read, rows: programs.without_rows(read, rows, 0, self.slots, self._columns),
            read,
            rows,
        )
        slots = _placed(slots, programs.shardings(Slots))
        key_impl = jax.random.key_impl(jax.random.key(0))
        tables = functools.partial(rotation_tables, config, self._columns)
        make = functools.partial(
            self._within.jit,
            lambda weights, slots, *_: programs.token(weights, slots, tables(), key_impl),
            donate_argnums=1,
            out_shardings=(programs.shardings(Slots), None),
            keep_unused=True,
        )
        if self.slots == self._rows:
            return make, (weights, slots)
        if self._shelf:
            shelf = lambda slots: programs.shelf(slots, self.slots, self._shelf).starts  # noqa: E731
            read = jax.eval_shape(shelf, slots)
        return make, (weights, slots, _placed(read, programs.shardings(Starts)))


def _placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings."""
    return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), shapes, shardings)
