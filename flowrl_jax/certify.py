"""python -m flowrl_jax.certify: trains a policy with an objective where the answer is known.

In a language whose responses can all be listed, policy, reference, reward, log Z and target are
exact. A policy with a number of its own for each token of each prefix is trained with samples, by
the objective's own code, and is then compared with what theory says that it converges to.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowrl_jax.errors import InputError, require
from flowrl_jax.exact.fixed_point import FixedPoint, fixed_point
from flowrl_jax.exact.language import Language
from flowrl_jax.exact.learn import LearnConfig, Run
from flowrl_jax.exact.measures import perplexity, total_variation
from flowrl_jax.exact.problem import Problem, Table, response_logprobs
from flowrl_jax.objectives import balance_of
from flowrl_jax.objectives.flowrl import FlowRLConfig
from flowrl_jax.objectives.policy_gradient import PolicyGradientConfig
from flowrl_jax.objectives.presets import PRESETS
from flowrl_jax.objectives.subtb import SubTBConfig
from flowrl_jax.tasks.base import nearest

REWARDS = ("graded", "binary")
_REWARDED = 0.1  # share of the responses that have a reward above 0
_MODES = 0.99  # the likeliest responses of a target that hold this share of it are its modes
_KEPT = 0.1  # a mode is kept if the policy gives it this share of the target's probability


@dataclasses.dataclass(frozen=True)
class CertifyConfig:
    """A certificate's settings.

    Attributes:
        preset: name of the objective.
        seed: of reference, rewards and samples.
        beta: instead of the preset's; of a policy gradient with a KL penalty in its reward, one
            divided by the coefficient. None: the preset's.
        vocabulary: tokens, the end token among them.
        length: tokens that a response may have.
        prompts: with rewards of their own.
        rewards: "graded" (0, or a quarter to 1) or "binary" (0 or 1).
        rollouts: how many are drawn, with an optimiser step each.
        groups: of 8 responses, for each prompt in each rollout.
        learning_rate: Adam's at first; it falls to 0.
    """

    preset: str
    seed: int = 0
    beta: float | None = None
    vocabulary: int = 4
    length: int = 5
    prompts: int = 2
    rewards: str = "graded"
    rollouts: int = 3000
    groups: int = 32
    learning_rate: float = 0.05

    def __post_init__(self):
        require(
            self.preset in PRESETS,
            f"--preset={self.preset}: unknown; {nearest(self.preset, PRESETS)}",
        )
        require(
            self.rewards in REWARDS,
            f"--rewards={self.rewards}: unknown; give one of {', '.join(REWARDS)}",
        )
        for name in ("prompts", "rollouts", "groups", "learning_rate"):
            value = getattr(self, name)
            require(value > 0, f"--{name}={value}: give a number above 0")


class Target(NamedTuple):
    """What a policy is compared with.

    Attributes:
        name: "gibbs", pi_ref e^(beta r) / Z; "length_tilted", pi_ref e^(n (beta r - zeta)); or
            "best", the reference among the responses of highest reward, which is no fixed point
            but what a maximiser would keep if it lost nothing.
        point: of each prompt.
    """

    name: str
    point: list[FixedPoint]


def certify(config: CertifyConfig) -> dict[str, Any]:
    """Trains a policy and compares it with its target.

    Args:
        config: settings.

    Returns:
        The settings; `target`, its name; and, of the worst prompt each, `total_variation` and `kl`
        (policy to target, nats; None: infinite), `log_z_gap` (log Z minus the mean of the policy's
        estimates of it, which for "gibbs" is that KL), `log_z_error` (of the log Z that was
        learned; None where none was), `modes` and `modes_kept`, `effective` and `effective_target`
        (the exponential of the entropy), and `accuracy`, the probability of a reward above 0.
    """
    objective = _objective(config)
    problem, reference = make_problem(config)
    learn = LearnConfig(
        rollouts=config.rollouts,
        prompts=config.prompts,
        groups=config.groups,
        updates=1,
        points=1,
        decay=True,
    )
    policy, rate = Table(), jnp.float32(config.learning_rate)
    key = jax.random.key(config.seed)
    start = response_logprobs(policy, reference, problem)
    run = jax.jit(Run(policy, objective, learn))
    _, params = run(problem, problem, reference, start, key, rate)
    prior = np.asarray(start, np.float64)
    found = np.asarray(response_logprobs(policy, params["policy"], problem), np.float64)
    target = target_of(objective, problem, prior, learn.group_size)
    result = {**dataclasses.asdict(config), "target": target.name}
    learned = np.asarray(params["log_z"]["value"])
    return result | _compare(objective, problem, prior, found, target, learned)


def make_problem(config: CertifyConfig) -> tuple[Problem, jax.Array]:
    """A random problem, and the reference's table of logits."""
    language = Language(config.vocabulary - 1, config.length)
    rng = np.random.default_rng(config.seed)
    shape = (config.prompts, language.responses)
    height = rng.integers(1, 5, shape) / 4 if config.rewards == "graded" else np.ones(shape)
    # At least one response of each prompt, the last in an order of its own, is worth something.
    rank = rng.permuted(np.tile(np.arange(language.responses), (config.prompts, 1)), axis=1)
    worth = rank < max(1, round(_REWARDED * language.responses))
    places = (config.prompts, language.places)
    problem = Problem(
        language=language,
        reward=jnp.asarray(np.where(worth, height, 0.0), jnp.float32),
        correct=jnp.asarray(worth),
        kind=jnp.broadcast_to(jnp.arange(language.responses), shape),
        state=jnp.broadcast_to(jnp.arange(language.places), places),
        features=jnp.zeros((*places, 0)),
        kinds=language.responses,
    )
    return problem, jnp.asarray(rng.normal(size=(*places, config.vocabulary)), jnp.float32)


def target_of(objective: Any, problem: Problem, prior: np.ndarray, group_size: int) -> Target:
    """What theory says of an objective.

    Args:
        objective: its config.
        problem: with rewards.
        prior: `[P, responses]` log-probabilities of the reference.
        group_size: samples of a group.
    """
    balance = _balance(objective)
    reward, sizes = np.asarray(problem.reward, np.float64), problem.language.sizes
    if balance is None:
        best = np.where(reward == reward.max(axis=1, keepdims=True), 0.0, -np.inf)
        log_z = [float(np.log(np.exp(row).sum())) for row in prior + best]
        rows = zip(prior + best, log_z, best, strict=True)
        return Target("best", [FixedPoint(row - z, z, scaled) for row, z, scaled in rows])
    name = "length_tilted" if balance.length_normalize else "gibbs"
    rows = zip(prior, reward, strict=True)
    return Target(name, [fixed_point(balance, *row, sizes, group_size=group_size) for row in rows])


def _balance(objective: Any) -> FlowRLConfig | None:
    """The trajectory balance with an objective's fixed point; None if it has none that is known."""
    own = balance_of(objective)
    if own is not None:
        return own if own.reference == "reference" and not own.gap_low else None
    if (
        isinstance(objective, PolicyGradientConfig)
        and (objective.kl_in, objective.kl_estimator, objective.ratio)
        == ("reward", "k1", "sequence")
        and objective.reward_norm in ("leave_one_out", "center")
        and objective.kl_coef > 0.0
    ):
        return FlowRLConfig(
            beta=1.0 / objective.kl_coef, length_normalize=False, reward_norm="none"
        )
    return None


def _objective(config: CertifyConfig) -> Any:
    """The preset, with another beta if one is wanted."""
    objective = PRESETS[config.preset]
    if config.beta is None:
        return objective
    require(config.beta > 0.0, f"--beta={config.beta}: give a number above 0")
    if isinstance(objective, FlowRLConfig | SubTBConfig):
        return dataclasses.replace(objective, beta=config.beta)
    require(
        isinstance(objective, PolicyGradientConfig) and objective.kl_in == "reward",
        f"--beta={config.beta}: {config.preset} has no inverse temperature; leave the flag out",
    )
    return dataclasses.replace(objective, kl_coef=1.0 / config.beta)


def _compare(objective, problem, prior, found, target: Target, learned) -> dict[str, Any]:
    goal = np.stack([point.logprobs for point in target.point])
    probability, wanted = np.exp(found), np.exp(goal)
    log_z = np.array([point.log_z for point in target.point])
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(probability > 0.0, probability * (found - goal), 0.0).sum(axis=1)
        share = (
            prior - found
            if target.name != "length_tilted"
            else (prior - found) / problem.language.sizes
        )
        estimate = np.stack([point.scaled for point in target.point]) + share
        gap = log_z - np.where(probability > 0.0, probability * estimate, 0.0).sum(axis=1)
    head = isinstance(objective, FlowRLConfig) and objective.log_z.kind in ("head", "table")
    order = np.sort(wanted, axis=1)[:, ::-1]
    enough = (np.cumsum(order, axis=1) < _MODES).sum(axis=1)
    least = np.take_along_axis(order, enough[:, None], axis=1)
    modes = wanted >= least
    kept = modes & (probability >= _KEPT * wanted)
    worst = int(np.argmin(kept.sum(axis=1) / modes.sum(axis=1)))
    solved = np.where(problem.correct, probability, 0.0).sum(axis=1)
    return {
        "total_variation": float(
            total_variation(jnp.asarray(probability), jnp.asarray(wanted)).max()
        ),
        "kl": _finite(kl.max()),
        "log_z_gap": _finite(gap[np.argmax(kl)]),
        "log_z_error": float(np.abs(learned - log_z).max()) if head else None,
        "modes": int(modes[worst].sum()),
        "modes_kept": int(kept[worst].sum()),
        "effective": float(perplexity(jnp.asarray(probability))[worst]),
        "effective_target": float(perplexity(jnp.asarray(wanted))[worst]),
        "accuracy": float(solved.min()),
    }


def _finite(x: np.floating) -> float | None:
    return float(x) if np.isfinite(x) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line about a wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m flowrl_jax.certify",
        description="Trains a policy with an objective where the answer is known, and compares.",
    )
    for field in dataclasses.fields(CertifyConfig):
        required = field.default is dataclasses.MISSING
        kind = float if field.name == "beta" else type(field.default) if not required else str
        default = None if required else field.default
        parser.add_argument(f"--{field.name}", type=kind, default=default, required=required)
    parser.add_argument("--json", help="also write the result to this file")
    options = vars(parser.parse_args(arguments))
    output = options.pop("json")
    try:
        result = certify(CertifyConfig(**options))
        if output:
            Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --json={output}: {error.strerror}; name another file", file=sys.stderr)
        return 2
    for name, value in result.items():
        print(f"{name:16} {value:.6g}" if isinstance(value, float) else f"{name:16} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
