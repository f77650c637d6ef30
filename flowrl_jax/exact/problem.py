"""What is to be learned in a listed language, and by which policy."""

import itertools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from flowrl_jax.exact.language import Language


@struct.dataclass
class Problem:
    """Prompts, and what each response to them is worth.

    Attributes:
        language: of the responses.
        reward: `[P, responses]` float32.
        correct: `[P, responses]` bool, what counts as solved.
        kind: `[P, responses]` int32, which solutions are the same strategy, 0 to `kinds` - 1.
        state: `[P, places]` int32, all that a policy sees of a place, a row of `features`.
        features: `[P, states, F]` float32; F is 0 where a policy is a table.
        kinds: number of strategies.
    """

    language: Language = struct.field(pytree_node=False)
    reward: jax.Array
    correct: jax.Array
    kind: jax.Array
    state: jax.Array
    features: jax.Array
    kinds: int = struct.field(pytree_node=False)

    @property
    def prompts(self) -> int:
        """P, how many there are."""
        return self.reward.shape[0]

    def take(self, prompts: np.ndarray) -> "Problem":
        """The problem of some of the prompts."""
        return jax.tree.map(lambda x: x[prompts], self)


class Policy(Protocol):
    """How logits, or any other numbers, come from parameters: a table or a small network."""

    def init(self, key: jax.Array, problem: Problem, width: int) -> Any:
        """Parameters for `width` numbers a state."""
        ...

    def __call__(self, params: Any, features: jax.Array, prompt: Any, state: Any) -> jax.Array:
        """The numbers of some states, `[..., width]`."""
        ...


class Table:
    """Numbers of its own for each prompt and state."""

    def init(self, key: jax.Array, problem: Problem, width: int) -> Any:
        """All zero: the even distribution."""
        del key
        return jnp.zeros((*problem.features.shape[:2], width))

    def __call__(self, params: Any, features: jax.Array, prompt: Any, state: Any) -> jax.Array:
        """Looks them up."""
        del features
        return params[prompt, state]


class Network:
    """Two hidden layers on a state's features: what is learned of one prompt serves others.

    Args:
        hidden: width of a layer.
    """

    def __init__(self, hidden: int = 64):
        self.hidden = hidden

    def init(self, key: jax.Array, problem: Problem, width: int) -> Any:
        """Random hidden layers; the last is 0, so that distributions are even at first."""
        sizes = (problem.features.shape[-1], self.hidden, self.hidden)
        layers = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            key, drawing = jax.random.split(key)
            kernel = jax.random.normal(drawing, (fan_in, fan_out)) * fan_in**-0.5
            layers.append({"kernel": kernel, "bias": jnp.zeros(fan_out)})
        last = {"kernel": jnp.zeros((self.hidden, width)), "bias": jnp.zeros(width)}
        return [*layers, last]

    def __call__(self, params: Any, features: jax.Array, prompt: Any, state: Any) -> jax.Array:
        """Computes them."""
        x = features[prompt, state]
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ params[-1]["kernel"] + params[-1]["bias"]


def response_logprobs(policy: Policy, params: Any, problem: Problem) -> jax.Array:
    """The logarithm of each response's probability, `[P, responses]`."""
    prompts = jnp.arange(problem.prompts)[:, None]
    states = jnp.arange(problem.features.shape[1])[None]
    logprobs = jax.nn.log_softmax(policy(params, problem.features, prompts, states))
    at_places = jnp.take_along_axis(logprobs, problem.state[..., None], axis=1)
    return problem.language.log_probability(at_places)


def fit(
    policy: Policy, problem: Problem, target: jax.Array, key: jax.Array, *, steps: int, rate: float
) -> Any:
    """Fits a policy to a distribution over responses by maximum likelihood, exactly.

    Args:
        policy: to fit.
        problem: its prompts.
        target: `[P, responses]` probabilities.
        key: of the policy's initialisation.
        steps: of Adam.
        rate: learning rate at first; it falls to 0 along half a cosine.

    Returns:
        The policy's parameters.
    """
    params = policy.init(key, problem, problem.language.symbols + 1)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(params):
        return -jnp.mean(jnp.sum(target * response_logprobs(policy, params, problem), axis=1))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), None, steps))
    return run(params)[0][0]
