"""The programs of a run, lowered for devices that are not there."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flowrl_jax.assembly import layout_of
from flowrl_jax.config import Config
from flowrl_jax.errors import InputError
from flowrl_jax.learner import Learner, check_batch
from flowrl_jax.masking import positions_from_mask
from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.models.attention import Columns
from flowrl_jax.models.decode import decode_params, forward_cached, read_prompts, unembed
from flowrl_jax.models.transformer import Transformer
from flowrl_jax.objectives import objective_of
from flowrl_jax.optimizer import make_optimizer
from flowrl_jax.planning.shapes import planned_shape
from flowrl_jax.sharding import Layout, make_mesh, sampling_layout
from flowrl_jax.train_step import abstract_policy, abstract_state, make_score, make_train_step
from flowrl_jax.types import TrainBatch


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of the loop.

    Attributes:
        name: "train_step", "score", "prefill" or "decode".
        build: makes the jitted function and the shapes of its arguments.
        layout: where its activations live.
        rows: responses or prompts that it computes at one time, over all devices.
        columns: tokens that it computes of a row.
        trips: how often it does so.
        runs: of the program in a step of the loop.
        backward: whether it has a backward pass.
        replaced: which argument is donated and becomes a result; None where none is.
    """

    name: str
    build: Callable[[], tuple[Any, tuple[Any, ...]]]
    layout: Layout
    rows: int
    columns: int
    trips: int
    runs: int
    backward: bool = False
    replaced: int | None = None

    @property
    def tokens(self) -> int:
        """Computed by a run, over all devices."""
        return self.rows * self.columns * self.trips

    def lower(self) -> Any:
        """Lowers it for the planned devices."""
        function, arguments = self.build()
        return function.lower(*arguments)


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
    model = dataclasses.replace(model, attention=_attention(model, devices[0].platform))
    log_z = getattr(config.loss, "log_z", None)
    train_log_z = log_z is not None and log_z.kind == "head"
    learner = Learner(
        model=Transformer(model),
        objective=config.loss,
        optimizer=make_optimizer(
            config.optimizer, config.steps, config.updates, train_log_z=train_log_z
        ),
        group_size=config.rollout.group_size,
        temperature=config.rollout.temperature,
        config=config.train.step,
        layout=layout_of(config, mesh, model),
    )
    try:
        check_batch(learner, config.rows_per_update)
    except ValueError as error:
        raise InputError(str(error)) from error
    _check_rollouts(config, learner, hosts=len({device.process_index for device in devices}))
    return learner


def _attention(model: TransformerConfig, platform: str) -> str:
    """The kernel of a config, or where that names none of a platform's the one to choose there."""
    if model.attention != "xla":
        return model.attention
    if platform == "tpu":
        return "splash"
    return "xla" if model.attention_softcap else "cudnn"


def _check_rollouts(config: Config, learner: Learner, hosts: int) -> None:
    rollout = config.rollout
    shards = math.lcm(
        learner.layout.batch_shards,
        sampling_layout(
            learner.layout, learner.model.config.axis_sizes, rollout.tensor
        ).batch_shards,
    )
    for name in ("prompts_per_step", "prompts_per_batch"):
        prompts = getattr(rollout, name)
        if prompts % hosts or prompts * rollout.group_size % shards:
            raise InputError(
                f"rollout.{name}={prompts} times rollout.group_size={rollout.group_size} does not"
                f" divide over {hosts} hosts and the {shards} parts of the batch (data x fsdp):"
                " choose a multiple"
            )


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
    )
    yield Program(
        "decode",
        lambda: _decode(sampler, token, rows),
        within,
        rows=rows,
        columns=1,
        trips=1,
        runs=batches * length,
        replaced=1,
    )
    total = rollout.prompts_per_step * rollout.group_size
    micro = learner.micro_batch(config.rows_per_update)
    scored = math.gcd(total, micro)
    reference = objective_of(config.loss).needs_reference(config.loss)
    yield Program(
        "score",
        lambda: _score(learner, arrays, total),
        layout,
        rows=scored,
        columns=columns,
        trips=total // scored,
        runs=int(reference) + (rollout.old_logprobs == "trainer"),
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


def _train_step(learner: Learner, arrays: _Arrays, rows: int) -> tuple[Any, tuple[Any, ...]]:
    state, _ = abstract_state(learner, num_prompts=rows)
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
    base = (abstract_policy(learner),) if learner.model.config.lora.rank else ()
    step: Any = make_train_step(learner, num_prompts=rows)
    return step, (state, batch, _key(arrays.layout), *base)


def _score(learner: Learner, arrays: _Arrays, rows: int) -> tuple[Any, tuple[Any, ...]]:
    tokens, masks = arrays.tokens(rows), arrays.masks(rows)
    score: Any = make_score(learner)
    return score, (abstract_policy(learner), tokens, *masks)


def _prefill(
    learner: Learner, within: Layout, arrays: _Arrays, prompts: int
) -> tuple[Any, tuple[Any, ...]]:
    """Every prompt once; weights come from the layout of training into that of sampling."""
    config = learner.model.config

    def prefill(params, tokens, mask):
        with within.activate():
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
    compiled = jax.jit(prefill, out_shardings=outputs)
    return compiled, (abstract_policy(learner), tokens, mask)


def _decode(learner: Learner, arrays: _Arrays, rows: int) -> tuple[Any, tuple[Any, ...]]:
    """One token of every row, over a cache of the full length."""
    config, layout = learner.model.config, learner.layout
    columns = arrays.width + arrays.length
    cache = jax.ShapeDtypeStruct(
        (rows, config.num_kv_heads, columns, config.head_dim),
        config.dtype,
        sharding=layout.sharding("batch", "kv_heads", "seq", "head_dim"),
    )
    caches = ((cache, cache),) * config.num_layers
    weights = jax.eval_shape(lambda params: decode_params(params, config), abstract_policy(learner))
    weights = _sharded_like(weights, learner)

    def decode(weights, caches, token, position, real, column):
        with layout.activate():
            hidden, caches = forward_cached(
                weights, config, token, position, Columns(real, column), caches
            )
            return unembed(weights, config, hidden[:, 0]), caches

    one = arrays.rows(rows, 1, dtype=jnp.int32)
    real = arrays.rows(rows, columns, dtype=bool)
    column = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated)
    return jax.jit(decode, donate_argnums=1), (weights, caches, one, one, real, column)


def _sharded_like(weights: Any, learner: Learner) -> Any:
    """Decoding's weights, cut as the policy's are; layers are apart and have no axis of layers."""
    policy = abstract_policy(learner)

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
