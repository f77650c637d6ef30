"""The programs of a run, lowered for devices that are not there."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flowrl_jax.assembly import layout_of
from flowrl_jax.buckets import check_buckets
from flowrl_jax.config import Config
from flowrl_jax.distributed import row_share
from flowrl_jax.errors import InputError
from flowrl_jax.learner import Learner, TrainStepConfig, check_batch
from flowrl_jax.masking import positions_from_mask
from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.models.attention import Columns
from flowrl_jax.models.decode import decode_params, forward_cached, read_prompts, unembed
from flowrl_jax.models.transformer import Transformer
from flowrl_jax.objectives import objective_of
from flowrl_jax.optimizer import OptimizerConfig, make_optimizer
from flowrl_jax.planning.shapes import planned_shape
from flowrl_jax.rollouts import check_rollouts
from flowrl_jax.sharding import Layout, make_mesh, sampling_layout
from flowrl_jax.train_step import abstract_policy, abstract_state, make_score, make_train_step
from flowrl_jax.types import TrainBatch

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
    train_log_z = log_z is not None and log_z.kind == "head"
    learner = Learner(
        model=Transformer(model),
        objective=config.loss,
        optimizer=_optimizer(config.optimizer, config.steps, config.updates, train_log_z),
        group_size=config.rollout.group_size,
        temperature=config.rollout.temperature,
        config=config.train.step,
        layout=layout_of(config, mesh, model),
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
def _optimizer(config: OptimizerConfig, steps: int, updates: int, train_log_z: bool) -> Any:
    return make_optimizer(config, steps, updates, train_log_z=train_log_z)


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
    prompts = rollout.prompts_per_batch or rollout.prompts_per_step
    batches = rollout.prompts_per_step // prompts
    rows = prompts * rollout.group_size
    arrays = _Arrays(layout, width, length)
    within = sampling_layout(layout, learner.model.config.axis_sizes, rollout.tensor)
    tpu = layout.mesh.devices.flat[0].platform == "tpu"
    attention = learner.model.config.attention if tpu else config.model.attention
    sampler = dataclasses.replace(learner, layout=within)
    token = dataclasses.replace(arrays, layout=within)
    yield Program(
        "prefill",
        lambda: _prefill(learner, within, arrays, prompts),
        within,
        rows=prompts,
        columns=width,
        trips=1,
        runs=batches,
        attention=attention,
    )
    yield Program(
        "decode",
        lambda: _decode(sampler, token, rows),
        within,
        rows=rows,
        columns=1,
        trips=1,
        runs=batches * length,
        attention=attention,
        replaced=1,
    )
    total = rollout.prompts_per_step * rollout.group_size
    micro = learner.micro_batch(config.rows_per_update)
    scored = math.gcd(total, micro)
    reference = objective_of(config.loss).needs_reference(config.loss)
    yield Program(
        "score",
        lambda: _score(learner, arrays, total, config.rows_per_update),
        layout,
        rows=scored,
        columns=columns,
        trips=total // scored,
        runs=int(reference) + (rollout.old_logprobs == "trainer"),
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
    batch = TrainBatch(
        tokens=arrays.tokens(rows),
        prompt_mask=prompt_mask,
        response_mask=response_mask,
        old_logprobs=logprobs,
        ref_logprobs=logprobs,
        reward=arrays.rows(rows, dtype=jnp.float32),
        prompt_id=ids,
        row_id=ids,
    )
    base = (policy_shapes(learner),) if learner.model.config.lora.rank else ()
    make = functools.partial(make_train_step, learner, num_prompts=rows)
    return make, (state, batch, _key(arrays.layout), *base)


def _score(learner: Learner, arrays: _Arrays, rows: int, rows_per_update: int) -> Built:
    tokens, masks = arrays.tokens(rows), arrays.masks(rows)
    make = functools.partial(make_score, learner, rows_per_update)
    return make, (policy_shapes(learner), tokens, *masks)


def _prefill(learner: Learner, within: Layout, arrays: _Arrays, prompts: int) -> Built:
    """Every prompt once; weights come from the layout of training into that of sampling."""
    config = learner.model.config

    def prefill(params, tokens, mask):
        positions = positions_from_mask(mask)
        hidden, caches = read_prompts(params, config, tokens, positions, mask)
        return unembed(params, config, hidden[:, -1]), caches

    # One row of each group: fewer than shards, perhaps, and then every device holds them all.
    whole = prompts % within.batch_shards > 0
    sharding = within.replicated if whole else within.batch
    shape = (prompts, arrays.width)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    mask = jax.ShapeDtypeStruct(shape, bool, sharding=sharding)
    rows = None if whole else "batch"
    cache = within.sharding(rows, "kv_heads", None, "head_dim")
    outputs = (within.sharding(rows, "vocab"), cache)
    make = functools.partial(within.jit, prefill, out_shardings=outputs)
    return make, (policy_shapes(learner), tokens, mask)


def _decode(learner: Learner, arrays: _Arrays, rows: int) -> Built:
    """One token of every row, over a cache of the full length."""
    config, layout = learner.model.config, learner.layout
    columns = arrays.width + arrays.length
    cache = jax.ShapeDtypeStruct(
        (rows, config.num_kv_heads, columns, config.head_dim),
        config.dtype,
        sharding=layout.sharding("batch", "kv_heads", "seq", "head_dim"),
    )
    caches = ((cache, cache),) * config.num_layers
    weights = jax.eval_shape(lambda params: decode_params(params, config), policy_shapes(learner))
    weights = _sharded_like(weights, learner)

    def decode(weights, caches, token, position, real, column):
        hidden, caches = forward_cached(
            weights, config, token, position, Columns(real, column), caches
        )
        return unembed(weights, config, hidden[:, 0]), caches

    one = arrays.rows(rows, 1, dtype=jnp.int32)
    real = arrays.rows(rows, columns, dtype=bool)
    column = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated)
    make = functools.partial(layout.jit, decode, donate_argnums=1)
    return make, (weights, caches, one, one, real, column)


def _sharded_like(weights: Any, learner: Learner) -> Any:
    """Decoding's weights, cut as the policy's are; layers are apart and have no axis of layers."""
    policy = policy_shapes(learner)

    def drop(x, whole):
        spec = tuple(whole.sharding.spec)[1:]
        sharding = jax.sharding.NamedSharding(
            whole.sharding.mesh, jax.sharding.PartitionSpec(*spec)
        )
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def keep(x, whole):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole.sharding)

    layers = tuple(jax.tree.map(drop, layer, policy["layers"]) for layer in weights["layers"])
    rest = {name: value for name, value in policy.items() if name != "layers"}
    kept = jax.tree.map(keep, {name: weights[name] for name in rest}, rest)
    return {**kept, "layers": layers}
