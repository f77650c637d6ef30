"""Training on a listed problem with samples: the objectives' own code around a tiny policy.

Everything that `train.py` does between a rollout and the optimiser happens here too, through the
same functions of `objectives`; the whole run is one program, so that seeds and learning rates can
be a batch.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flowrl_jax.errors import require
from flowrl_jax.exact.language import END
from flowrl_jax.exact.measures import Measures, measure
from flowrl_jax.exact.problem import Policy, Problem, response_logprobs
from flowrl_jax.objectives import objective_of
from flowrl_jax.objectives.flowrl import FlowRLConfig, log_z_estimate, prior_logprobs
from flowrl_jax.objectives.log_z import GROUP_KINDS, update_table

CLIP_NORM = 1.0
# What is learned beside the policy may hurry: a number per prompt has to travel as far as beta r,
# and disturbs no other; values are a regression.
LOG_Z_RATE, VALUE_RATE = 30.0, 10.0
_OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(CLIP_NORM),
    optax.scale_by_adam(),
    optax.partition(
        {
            "policy": optax.identity(),
            "log_z": optax.scale(LOG_Z_RATE),
            "value": optax.scale(VALUE_RATE),
        },
        {"policy": "policy", "log_z": "log_z", "value": "value"},
    ),
)


@dataclasses.dataclass(frozen=True)
class LearnConfig:
    """A run's settings.

    Attributes:
        rollouts: how many are drawn.
        prompts: of a rollout, without repetition.
        group_size: responses of a group.
        groups: of a prompt, in one rollout.
        updates: optimiser steps that a rollout is cut into, by prompts.
        points: at how many rollouts, equally far apart, the policy is measured; they divide
            `rollouts`. The one before the first step comes on top.
        staleness: rollouts that a policy has learned between drawing one and learning it.
        only_varied: groups of equal rewards are left out of the loss (DAPO's dynamic sampling,
            with what was drawn in vain counted as drawn).
        reset_every: rollouts after which the reference becomes the policy and Adam starts anew
            (ProRL); 0: never.
        decay: whether the learning rate falls to 0 along half a cosine.
    """

    rollouts: int = 300
    prompts: int = 8
    group_size: int = 8
    groups: int = 1
    updates: int = 4
    points: int = 15
    staleness: int = 0
    only_varied: bool = False
    reset_every: int = 0
    decay: bool = False

    def __post_init__(self):
        require(
            self.rollouts % self.points == 0,
            f"points={self.points} do not divide rollouts={self.rollouts}: choose a divisor",
        )
        require(
            self.prompts % self.updates == 0,
            f"updates={self.updates} do not divide prompts={self.prompts}: choose a divisor",
        )


class Draw(NamedTuple):
    """A rollout.

    Attributes:
        prompt: `[B]` int32, group-major.
        response: `[B]` int32, numbers of responses.
        state: `[B, L]` int32, what was seen before each token.
        token: `[B, L]` int32.
        mask: `[B, L]` bool, up to and including the end token.
        logprobs: `[B, L]` float32, 0 where masked.
    """

    prompt: jax.Array
    response: jax.Array
    state: jax.Array
    token: jax.Array
    mask: jax.Array
    logprobs: jax.Array


class Carry(NamedTuple):
    """All that changes in a run."""

    params: Any
    reference: Any
    optimizer: Any
    waiting: Draw | None


def draw(policy: Policy, params: Any, problem: Problem, prompt: jax.Array, key: jax.Array) -> Draw:
    """Samples a response to each row.

    Args:
        policy: to sample from.
        params: its parameters.
        problem: of the prompts.
        prompt: `[B]` int32.
        key: consumed.
    """
    language = problem.language

    def step(carry, key):
        node, ended = carry
        state = problem.state[prompt, jnp.minimum(node, language.places - 1)]
        logprobs = jax.nn.log_softmax(policy(params, problem.features, prompt, state))
        token = jnp.where(ended, END, jax.random.categorical(key, logprobs))
        chosen = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
        seen = (state, token, ~ended, jnp.where(ended, 0.0, chosen))
        ended = ended | (token == END)
        node = jnp.where(ended, node, node * language.symbols + token)
        return (node, ended), seen

    start = (jnp.zeros_like(prompt), jnp.zeros(prompt.shape, bool))
    (response, _), seen = jax.lax.scan(step, start, jax.random.split(key, language.length))
    state, token, mask, logprobs = (jnp.moveaxis(x, 0, 1) for x in seen)
    return Draw(prompt, response, state, token, mask, logprobs)


def token_logprobs(policy: Policy, params: Any, problem: Problem, rows: Draw) -> jax.Array:
    """Log-probabilities `[B, L]` of the tokens of some rows, 0 where masked."""
    logits = policy(params, problem.features, rows.prompt[:, None], rows.state)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), rows.token[..., None], axis=2)
    return jnp.where(rows.mask, chosen[..., 0], 0.0)


@dataclasses.dataclass(frozen=True)
class Run:
    """What is fixed in a run.

    Attributes:
        policy: to train.
        objective: its config.
        config: settings.
    """

    policy: Policy
    objective: Any
    config: LearnConfig

    def __call__(
        self,
        problem: Problem,
        measured: Problem,
        reference: Any,
        prior: jax.Array,
        key: jax.Array,
        rate: jax.Array,
    ) -> tuple[Measures, dict[str, Any]]:
        """Trains a policy; pure, so that keys and rates may be a batch.

        Args:
            problem: whose prompts are learned from.
            measured: whose prompts are measured, exactly.
            reference: parameters that the policy starts from and is compared with.
            prior: `response_logprobs` of the reference on what is measured.
            key: of all samples.
            rate: Adam's.

        Returns:
            `measure`'s numbers, `[points + 1, P]` each; and the parameters, of "policy", "log_z"
            and "value".

        Raises:
            InputError: more prompts a rollout than there are.
        """
        config = self.config
        require(
            config.prompts <= problem.prompts,
            f"prompts={config.prompts} of a rollout, of {problem.prompts} that there are: ask for"
            " fewer",
        )
        carry = self._start(problem, reference, key)
        each = config.rollouts // config.points

        def between(carry, point):
            step = lambda i, carry: self._step(problem, key, rate, carry, i)  # noqa: E731
            first = jnp.maximum(point - 1, 0) * each
            carry = jax.lax.fori_loop(first, point * each, step, carry)
            now = response_logprobs(self.policy, carry.params["policy"], measured)
            return carry, measure(measured, now, prior)

        carry, found = jax.lax.scan(between, carry, jnp.arange(config.points + 1))
        return found, carry.params

    def _start(self, problem: Problem, reference: Any, key: jax.Array) -> Carry:
        at_first, drawing = jax.random.split(jax.random.fold_in(key, self.config.rollouts))
        params = {"policy": reference, "log_z": init_log_z(problem), "value": None}
        if objective_of(self.objective).needs_values(self.objective):
            params["value"] = self.policy.init(at_first, problem, 1)
        waiting = None
        if self.config.staleness:
            keys = jax.random.split(drawing, self.config.staleness)
            waiting = jax.lax.map(lambda key: self._sample(problem, reference, key), keys)
        return Carry(params, reference, _OPTIMIZER.init(params), waiting)

    def _sample(self, problem: Problem, params: Any, key: jax.Array) -> Draw:
        choosing, drawing = jax.random.split(key)
        order = jnp.argsort(jax.random.bits(choosing, (problem.prompts,)))
        chosen = order[: self.config.prompts].astype(jnp.int32)
        rows = jnp.repeat(chosen, self.config.group_size * self.config.groups)
        return draw(self.policy, params, problem, rows, drawing)

    def _step(self, problem: Problem, key, rate, carry: Carry, index) -> Carry:
        """A rollout, and learning from it or from one that has waited."""
        if self.config.decay:
            rate = rate * 0.5 * (1.0 + jnp.cos(jnp.pi * index / self.config.rollouts))
        drawing = jax.random.fold_in(key, index)
        rows, waiting = self._sample(problem, carry.params["policy"], drawing), carry.waiting
        if waiting is not None:
            queue = jax.tree.map(lambda old, new: jnp.append(old, new[None], 0), waiting, rows)
            rows = jax.tree.map(lambda x: x[0], queue)
            waiting = jax.tree.map(lambda x: x[1:], queue)
        params, state = self._learn(problem, rate, carry, rows)
        carry = Carry(params, carry.reference, state, waiting)
        if not self.config.reset_every:
            return carry
        reset = carry._replace(reference=params["policy"], optimizer=_OPTIMIZER.init(params))
        due = (index + 1) % self.config.reset_every == 0
        return jax.tree.map(lambda new, old: jnp.where(due, new, old), reset, carry)

    def _learn(self, problem: Problem, rate: jax.Array, carry: Carry, rows: Draw):
        """The optimiser's steps on a rollout: new parameters and optimiser state."""
        objective, config = self.objective, self.config
        reward = problem.reward[rows.prompt, rows.response]
        ref_logprobs = token_logprobs(self.policy, carry.reference, problem, rows)
        found = objective_of(objective)
        seen = {
            "old_logprobs": rows.logprobs,
            "ref_logprobs": ref_logprobs,
            "mask": rows.mask,
        }
        values = self._values(carry.params["value"], problem, rows)
        given = {} if values is None else {"values": values}
        advantage, learned = found.advantages(
            objective,
            reward,
            group_size=config.group_size,
            truncated=~jnp.any(rows.mask & (rows.token == END), axis=1),
            **seen,
            **given,
        )
        returns = found.returns(objective, reward, **seen, **given) if found.returns else None
        values = values if found.returns else None
        if config.only_varied:
            groups = reward.reshape(-1, config.group_size)
            varied = jnp.any(groups != groups[:, :1], axis=1)
            learned &= jnp.repeat(varied, config.group_size)[:, None]
        cut = lambda x: x.reshape(config.updates, -1, *x.shape[1:])  # noqa: E731
        parts = jax.tree.map(cut, (rows, ref_logprobs, advantage, learned, values, returns))

        def update(state, part):
            params, optimizer = state
            grads, estimate = jax.grad(self._loss, has_aux=True)(params, problem, *part)
            updates, optimizer = _OPTIMIZER.update(grads, optimizer, params)
            new: Any = optax.apply_updates(params, jax.tree.map(lambda x: -rate * x, updates))
            log_z = getattr(objective, "log_z", None)
            if log_z is not None and log_z.kind == "table":
                prompt = part[0].prompt
                new["log_z"] = update_table(params["log_z"], prompt, estimate, log_z.table_rate)
            return (new, optimizer), None

        return jax.lax.scan(update, (carry.params, carry.optimizer), parts)[0]

    def _log_z(self, own: jax.Array, estimate: jax.Array) -> jax.Array:
        """Log Z of some rows, from the prompts' own numbers or from the rows at hand."""
        kind = self.objective.log_z.kind
        if kind in GROUP_KINDS:
            return estimate
        if kind == "table":
            return jax.lax.stop_gradient(own)
        return own if kind == "head" else jnp.zeros_like(own)

    def _values(self, params: Any, problem: Problem, rows: Draw) -> jax.Array | None:
        if params is None:
            return None
        return self.policy(params, problem.features, rows.prompt[:, None], rows.state)[..., 0]

    def _loss(
        self, params, problem: Problem, rows: Draw, ref_logprobs, advantage, mask, values, returns
    ):
        """The loss of a minibatch, and each row's estimate of log Z."""
        objective = self.objective
        arrays = {
            "logprobs": token_logprobs(self.policy, params["policy"], problem, rows),
            "ref_logprobs": ref_logprobs,
            "reward": advantage,
            "mask": mask,
        }
        estimate = log_z = jnp.zeros(rows.prompt.shape)
        if isinstance(objective, FlowRLConfig):
            arrays["ref_logprobs"] = prior_logprobs(ref_logprobs, rows.logprobs, objective)
            estimate = log_z_estimate(
                old_logprobs=rows.logprobs,
                config=objective,
                group_size=self.config.group_size,
                **arrays,
            )
            log_z = self._log_z(params["log_z"]["value"][rows.prompt], estimate)
        if params["value"] is not None:
            now = self._values(params["value"], problem, rows)
            arrays |= {"values": now, "old_values": values, "returns": returns}
        total, weight, _ = objective_of(objective).terms(
            objective, log_z=log_z, old_logprobs=rows.logprobs, correction=None, **arrays
        )
        return total.sum() / jnp.maximum(weight.sum(), 1.0), estimate


def init_log_z(problem: Problem) -> dict[str, jax.Array]:
    """Log Z as a number per prompt: what its gradient moves, or a running mean."""
    zeros = jnp.zeros(problem.prompts)
    return {"value": zeros, "visits": zeros}
