"""One optimiser step, and the log-probabilities it compares with: jitted programs over a mesh."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from flowrl_jax.learner import Learner
from flowrl_jax.logprobs import token_logprobs
from flowrl_jax.models.log_z import LogZHead, init_log_z, pool_prompt
from flowrl_jax.models.lora import init_lora, with_adapters
from flowrl_jax.models.transformer import init_params
from flowrl_jax.models.value import init_value, response_values
from flowrl_jax.objectives import balance_of, objective_of
from flowrl_jax.objectives.diagnostics import LogZRows, merge, update_diagnostics
from flowrl_jax.objectives.flowrl import log_z_estimate, log_z_target, prior_logprobs
from flowrl_jax.objectives.log_z import GROUP_KINDS, update_table
from flowrl_jax.types import TrainBatch, TrainState

Metrics = dict[str, jax.Array]
Sums = tuple[jax.Array, jax.Array, Any]  # the loss' numerator, its denominator, its gradient


def response_logprobs(
    learner: Learner, params: Any, tokens, prompt_mask, response_mask, gradients: Any = None
):
    """Log-probabilities `[B, T]` of the responses, and hidden states `[B, P + T, D]` of all."""
    prompt_length = prompt_mask.shape[1]
    mask = jnp.concatenate([prompt_mask, response_mask], axis=1)
    variables = {"params": params}
    hidden: Any = learner.model.apply(variables, tokens, mask, gradients=gradients)
    unembedding: Any = learner.model.apply(variables, method="unembedding")
    logprobs: Any = token_logprobs(
        hidden[:, prompt_length - 1 : -1],
        unembedding,
        tokens[:, prompt_length:],
        learner.temperature,
        learner.config.logprob_chunk,
        learner.model.config.logit_softcap,
        learner.model.config.drawable,
    )
    return jnp.where(response_mask, logprobs, 0.0), hidden


def _log_z(learner: Learner, params, hidden, batch: TrainBatch, estimate, key) -> jax.Array:
    """Log Z of each row, `[B]`, from wherever the objective's config says."""
    config = learner.log_z
    if config is None or config.kind == "zero":
        return jnp.zeros(batch.reward.shape[:1])
    if config.kind in GROUP_KINDS:
        return estimate
    if config.kind == "table":
        return jax.lax.stop_gradient(params["value"][batch.prompt_id])
    rows: Any = batch.row_id
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows) if config.dropout else None
    pooled = pool_prompt(hidden, batch.prompt_mask, config.pooling)
    log_z: Any = LogZHead(config).apply({"params": params}, pooled, keys)
    return log_z


def _loss_sums(params, batch: TrainBatch, key, learner: Learner, base: Any, gradients: Any = None):
    """Numerator of the loss over some rows; beside it the denominator, and what is seen of them."""
    policy = with_adapters(base, params["policy"])
    logprobs, hidden = response_logprobs(
        learner, policy, batch.tokens, batch.prompt_mask, batch.response_mask, gradients
    )
    mask = batch.response_mask
    arrays = {
        "logprobs": logprobs,
        "ref_logprobs": batch.ref_logprobs,
        "reward": batch.reward,
        "mask": mask,
    }
    target = estimate = None
    balance = balance_of(learner.objective)
    if balance is not None:
        old = batch.old_logprobs
        arrays["ref_logprobs"] = prior_logprobs(batch.ref_logprobs, old, balance)
        target = log_z_target(config=balance, **arrays)
        estimate = log_z_estimate(
            old_logprobs=old, config=balance, group_size=learner.group_size, **arrays
        )
    if learner.value is None:
        prompts = hidden[:, : batch.prompt_mask.shape[1]]
        log_z = _log_z(learner, params["log_z"], prompts, batch, estimate, key)
    else:
        values = response_values(learner.value, params["value"], hidden, mask)
        arrays |= {"values": values, "old_values": batch.old_values, "returns": batch.returns}
        log_z = values[:, 0]
    loss, weight, told = objective_of(learner.objective).terms(
        learner.objective,
        log_z=log_z,
        old_logprobs=batch.old_logprobs,
        correction=batch.correction,
        **arrays,
    )
    difference = jnp.abs(jnp.where(mask, logprobs - batch.old_logprobs, 0.0))
    metrics: dict[str, Any] = {**told, "old_logprob_diff_max": jnp.max(difference)}
    metrics |= update_diagnostics(
        learner.objective,
        metrics,
        logprobs=logprobs,
        old_logprobs=batch.old_logprobs,
        mask=mask,
    )
    if target is not None:
        metrics["log_z"] = jnp.mean(log_z)
        metrics["log_z_target"] = jnp.mean(target)
        metrics["log_z_gap"] = jnp.mean(target - log_z)
        if learner.log_z is not None and learner.log_z.kind in ("head", "table"):
            prompt_id: Any = batch.prompt_id  # `with_ids` has seen to it
            metrics["log_z_rows"] = LogZRows(prompt_id, target, log_z)
    metrics = jax.lax.stop_gradient(metrics)
    return jnp.sum(loss), (jnp.sum(weight), (metrics, batch.prompt_id, estimate))


def _split_rows(batch: TrainBatch, learner: Learner) -> TrainBatch:
    """Adds a leading axis of micro-batches; each takes rows of every shard and whole groups.

    Rows (or groups, where log Z is a group's mean) i, i + n, i + 2n, ... form micro-batch i of n,
    so that the rows a device holds stay on it.
    """
    rows = batch.reward.shape[0]
    size = learner.micro_batch(rows)
    count = rows // size

    def split(x):
        x = x.reshape(size // learner.unit, count, learner.unit, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0).reshape(count, size, *x.shape[3:])

    return jax.tree.map(split, batch)


def _adds_in_place(learner: Learner) -> bool:
    """Whether layers add their gradient to the sum themselves; adapters' gradients are small."""
    config = learner.model.config
    return config.remat == "full" and not config.lora.rank


def zero_sums(params: Any) -> Sums:
    """Sums over no rows, for `add_rows`."""
    return jax.tree.map(jnp.zeros_like, (jnp.float32(0), jnp.float32(0), params))


def add_rows(
    learner: Learner, params: Any, rows: TrainBatch, key: jax.Array, base: Any, sums: Sums | None
) -> tuple[Sums, Any]:
    """Adds a micro-batch to an optimiser step's sums.

    Args:
        learner: what is fixed.
        params: of the state.
        rows: of a batch that `with_ids` has seen.
        key: `train_step`'s, folded with the step.
        base: see `train_step`.
        sums: over other rows of the step; None: there are none.

    Returns:
        The new sums, and what was seen of the rows: metrics, prompt ids and estimates of log Z.
    """
    layers = sums[2]["policy"]["layers"] if sums and _adds_in_place(learner) else None
    (loss, (weight, seen)), grads = jax.value_and_grad(_loss_sums, has_aux=True)(
        params, rows, key, learner, base, layers
    )
    if sums is None:
        return (loss, weight, grads), seen
    added = jax.tree.map(jnp.add, sums, (loss, weight, grads))
    if layers is not None:
        added[2]["policy"]["layers"] = grads["policy"]["layers"]  # the sum, see `run_layers`
    return added, seen


def finish_step(
    learner: Learner, state: TrainState, sums: Sums, seen: Any
) -> tuple[TrainState, Metrics]:
    """Takes the optimiser's step.

    Args:
        learner: what is fixed.
        state: before it.
        sums: over all rows.
        seen: what `add_rows` saw, with a leading axis of micro-batches.

    Returns:
        The new state, and metrics: scalars, and `[B, 3]` float32 "log_z_rows" (see `LogZRows`)
        where log Z is learned.
    """
    loss, weight, grads = sums
    metrics, prompt_id, estimate = seen
    weight = jnp.maximum(weight, 1.0)
    grads = jax.tree.map(lambda grad: grad / weight, grads)
    metrics = merge(metrics)
    metrics["loss"] = loss / weight
    updates, opt_state = learner.optimizer.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    if estimate is not None and learner.log_z is not None and learner.log_z.kind == "table":
        rate = learner.log_z.table_rate
        table = state.params["log_z"]
        params["log_z"] = update_table(table, prompt_id.reshape(-1), estimate.reshape(-1), rate)

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)  # noqa: E731
    new_state = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + ~finite,
    )
    metrics |= {
        "grad_norm": grad_norm,
        "policy_grad_norm": optax.tree.norm(grads["policy"]),
        "log_z_grad_norm": optax.tree.norm(grads["log_z"]) if grads["log_z"] else jnp.zeros(()),
        "skipped_steps": new_state.skipped.astype(jnp.float32),
    }
    if "value" in grads:
        metrics["value_grad_norm"] = optax.tree.norm(grads["value"])
    return new_state, metrics


def with_ids(learner: Learner, batch: TrainBatch) -> TrainBatch:
    """A batch whose rows without an id are known by their place.

    Raises:
        ValueError: a table of log Z needs to know the prompts.
    """
    if batch.prompt_id is None and learner.log_z is not None and learner.log_z.kind == "table":
        raise ValueError(
            "the batch has no prompt_id, but loss.log_z.kind='table' keeps a row per prompt: set"
            " it, or choose another kind"
        )
    rows = jnp.arange(batch.reward.shape[0], dtype=jnp.int32)
    return dataclasses.replace(
        batch,
        prompt_id=jnp.zeros_like(rows) if batch.prompt_id is None else batch.prompt_id,
        row_id=rows if batch.row_id is None else batch.row_id,
    )


def train_step(
    state: TrainState, batch: TrainBatch, key: jax.Array, base: Any = None, *, learner: Learner
) -> tuple[TrainState, Metrics]:
    """One optimiser step.

    A step whose loss or gradient is not finite changes nothing but `state.skipped`.

    Args:
        state: parameters and optimiser; its buffers are donated by `make_train_step`.
        batch: the rows to learn from.
        key: dropout noise of the log Z head; folded with the step and each row.
        base: the frozen weights that the policy's adapters belong to, if it has any.
        learner: what is fixed.

    Returns:
        The new state, and metrics, as `finish_step`.
    """
    key = jax.random.fold_in(key, state.step)
    micro_batches = _split_rows(with_ids(learner, batch), learner)

    def add(sums, rows):
        # Else the compiler casts all weights before the loop, and holds the copy through it.
        params = jax.lax.optimization_barrier(state.params)
        return add_rows(learner, params, rows, key, base, sums)

    if micro_batches.reward.shape[0] == 1:
        sums, seen = add(None, jax.tree.map(lambda x: x[0], micro_batches))
        seen = jax.tree.map(lambda x: x[None], seen)
    else:
        sums, seen = jax.lax.scan(add, zero_sums(state.params), micro_batches)
    return finish_step(learner, state, sums, seen)


def abstract_state(learner: Learner, num_prompts: int) -> tuple[TrainState, TrainState]:
    """Shapes of the state and where each array lives.

    Args:
        learner: what is fixed.
        num_prompts: size of a log Z table.

    Returns:
        A state of `ShapeDtypeStruct` with shardings, and the same tree of shardings.
    """
    boxed = jax.eval_shape(lambda: _init(learner, num_prompts, jax.random.key(0)))
    layout = learner.layout
    shardings = dataclasses.replace(
        layout.tree_shardings(boxed), opt_state=layout.optimizer_shardings(boxed.opt_state)
    )
    shapes = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings,
    )
    return shapes, shardings


def abstract_policy(learner: Learner) -> Any:
    """Shapes of all the policy's weights, adapters aside, and where each of them lives."""
    boxed = jax.eval_shape(lambda: init_params(learner.model.config, jax.random.key(0)))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.unbox(boxed),
        learner.layout.tree_shardings(boxed),
    )


def _init(learner: Learner, num_prompts: int, key: jax.Array, policy: Any = None) -> TrainState:
    policy_key, log_z_key = jax.random.split(key)
    config = learner.model.config
    if config.lora.rank:
        policy = init_lora(config, policy_key)
    params = {
        "policy": init_params(config, policy_key) if policy is None else policy,
        "log_z": init_log_z(learner.log_z, config.embed_dim, num_prompts, log_z_key),
    }
    if learner.value is not None:
        params["value"] = init_value(learner.value, config.embed_dim, log_z_key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero, params=params, opt_state=learner.optimizer.init(params), skipped=zero
    )


def init_policy(learner: Learner, key: jax.Array) -> Any:
    """A random policy, made directly on its devices: that of a new state with the same key.

    Args:
        learner: what is fixed.
        key: of the random initialisation.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_policy(learner))
    make = lambda key: nn.unbox(init_params(learner.model.config, jax.random.split(key)[0]))  # noqa: E731
    return jax.jit(make, out_shardings=shardings)(key)


def init_state(
    learner: Learner, num_prompts: int, key: jax.Array, policy: Any = None
) -> TrainState:
    """A new state, made directly on its devices.

    Args:
        learner: what is fixed.
        num_prompts: size of a log Z table.
        key: of the random initialisation.
        policy: parameters to start from instead of random ones, unboxed, any sharding. With
            adapters the state holds these alone, and the policy is `train_step`'s `base`.
    """
    _, shardings = abstract_state(learner, num_prompts)
    if learner.model.config.lora.rank:
        policy = None
    if policy is not None:
        policy = jax.device_put(policy, shardings.params["policy"])

    def make(key, policy):
        # A copy: the state is donated at every step, the caller's parameters are not.
        policy = jax.tree.map(jnp.copy, policy)
        return nn.unbox(_init(learner, num_prompts, key, policy))

    return jax.jit(make, out_shardings=shardings)(key, policy)


def make_train_step(learner: Learner, num_prompts: int) -> Callable:
    """The jitted `train_step` over the learner's mesh; it donates the state it is given.

    A policy with adapters wants its frozen weights as a fourth argument.
    """
    _, state_shardings = abstract_state(learner, num_prompts)
    layout = learner.layout
    in_shardings: tuple[Any, ...] = (state_shardings, layout.batch, layout.replicated)
    if learner.model.config.lora.rank:
        in_shardings += (jax.tree.map(lambda x: x.sharding, abstract_policy(learner)),)

    return layout.jit(
        functools.partial(train_step, learner=learner),
        in_shardings=in_shardings,
        out_shardings=(state_shardings, layout.replicated),
        donate_argnums=0,
    )


def score_rows(learner: Learner, policy: Any, head: Any, tokens, prompt_mask, response_mask) -> Any:
    """Log-probabilities `[B, T]` of responses; with a value head's parameters, values beside them.

    Args:
        learner: what is fixed.
        policy: parameters.
        head: parameters of the value head, or None.
        tokens: `[B, P + T]`.
        prompt_mask: `[B, P]`.
        response_mask: `[B, T]`.
    """
    logprobs, hidden = response_logprobs(learner, policy, tokens, prompt_mask, response_mask)
    if head is None or learner.value is None:
        return logprobs
    return logprobs, response_values(learner.value, head, hidden, response_mask)


def make_score(learner: Learner, rows_per_update: int = 0) -> Callable:
    """A jitted `(policy, tokens, prompt_mask, response_mask, head=None) -> logprobs [B, T]`.

    The old and the reference log-probabilities; rows go through in micro-batches, so that memory
    stays that of a train step. With the parameters of a value head it gives log-probabilities and
    values, both `[B, T]`.

    Args:
        learner: what is fixed.
        rows_per_update: responses of an optimiser step, where these are fewer than are scored.
    """

    def score(params, tokens, prompt_mask, response_mask, head=None):
        rows = tokens.shape[0]
        size = math.gcd(rows, learner.micro_batch(rows_per_update or rows))

        def some(arrays):
            return score_rows(learner, params, head, *arrays)

        arrays = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(size, rows // size, *x.shape[1:]), 1, 0),
            (tokens, prompt_mask, response_mask),
        )
        found = jax.lax.map(some, arrays)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1), found)

    return learner.layout.jit(score, out_shardings=learner.layout.batch)
