"""PPO, SubTB and detailed balance against loops, and against what theory says of exact values."""

import dataclasses
import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.objectives import OBJECTIVES, objective_of
from flowrl_jax.objectives.ppo import (
    PPOConfig,
    generalized_advantages,
    ppo_advantages,
    ppo_loss,
    ppo_returns,
)
from flowrl_jax.objectives.presets import PRESETS
from flowrl_jax.objectives.subtb import SubTBConfig, subtb_loss, window_loss
from flowrl_jax.objectives.values import ValueConfig, last_token, next_values

CLOSE = 1e-10  # float64
LENGTHS = [1, 2, 5, 0, 4, 3]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def example(padding: float = math.nan, *, holes: bool = False, seed: int = 0) -> dict[str, Any]:
    """Six responses of up to 5 tokens; with holes some tokens within are not the policy's."""
    rng = np.random.default_rng(seed)
    mask = np.arange(5) < np.array(LENGTHS)[:, None]
    if holes:
        mask[2, 0] = mask[2, 2] = mask[4, 1] = mask[4, 2] = False
    noise = lambda: np.where(mask, rng.normal(0, 0.5, mask.shape), padding)  # noqa: E731
    old = -np.abs(noise()) - 0.3
    values = 2 * noise()
    return {
        "logprobs": old + noise(),
        "old_logprobs": old,
        "ref_logprobs": old + noise(),
        "reward": rng.normal(0, 1, len(LENGTHS)),
        "mask": mask,
        "values": values,
        "old_values": values + 1.5 * noise(),
        "returns": values + noise(),
    }


def at(arrays, i):
    """What belongs to the tokens of one response, in their order."""
    return {k: x[i][arrays["mask"][i]] for k, x in arrays.items() if k != "mask" and x.ndim == 2}


# ---- what both are made of


@pytest.mark.parametrize("holes", [False, True])
def test_where_tokens_lead(holes):
    arrays = example(holes=holes)
    mask = arrays["mask"]
    last = np.asarray(last_token(jnp.asarray(mask)))
    after = np.asarray(
        next_values(jnp.asarray(arrays["values"]), jnp.asarray(mask), jnp.asarray(arrays["reward"]))
    )
    for i in range(len(LENGTHS)):
        places = np.flatnonzero(mask[i])
        assert [*np.flatnonzero(last[i])] == [*places[-1:]]
        expected = [*at(arrays, i)["values"][1:], arrays["reward"][i]][: len(places)]
        np.testing.assert_array_equal(after[i, places], expected)


# ---- PPO


def gae_by_hand(config, arrays):
    """Advantages and returns, one token at a time from the last."""
    advantage, returns = (np.zeros(arrays["mask"].shape) for _ in range(2))
    for i in range(len(LENGTHS)):
        places, own = np.flatnonzero(arrays["mask"][i]), at(arrays, i)
        ahead, value_after = 0.0, 0.0
        for k in reversed(range(len(places))):
            reward = arrays["reward"][i] if k == len(places) - 1 else 0.0
            reward -= config.kl_coef * (own["old_logprobs"][k] - own["ref_logprobs"][k])
            delta = reward + config.gamma * value_after - own["values"][k]
            ahead = delta + config.gamma * config.lam * ahead
            value_after = own["values"][k]
            advantage[i, places[k]] = ahead
            returns[i, places[k]] = ahead + own["values"][k]
    return advantage, returns


ESTIMATES = {
    "verl": PPOConfig(),
    "trl": PRESETS["ppo_trl"],
    "discounted": PPOConfig(gamma=0.9, lam=0.7, kl_coef=0.3),
    "one step": PPOConfig(lam=0.0),
}


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", ESTIMATES)
def test_advantages_and_returns(name, holes):
    config, arrays = ESTIMATES[name], example(holes=holes)
    names = ("old_logprobs", "ref_logprobs", "mask", "values")
    given = {k: jnp.asarray(arrays[k]) for k in names}
    advantage, returns = gae_by_hand(config, arrays)
    reward = jnp.asarray(arrays["reward"])
    np.testing.assert_allclose(ppo_returns(config, reward, **given), returns, atol=CLOSE)
    ours, learned = objective_of(config).advantages(
        config, reward, group_size=2, truncated=jnp.zeros(len(LENGTHS), bool), **given
    )
    mask = arrays["mask"]
    np.testing.assert_array_equal(learned, mask)
    white = (advantage - advantage[mask].mean()) / advantage[mask].std(ddof=1)
    np.testing.assert_allclose(ours, np.where(mask, white, 0.0), atol=1e-5)  # whitened in float32


def ppo_by_hand(config, arrays):
    """Token mean of the loss, and its gradients by log-probabilities and by values."""
    mask = arrays["mask"]
    by_logprob, by_value, total = np.zeros(mask.shape), np.zeros(mask.shape), 0.0
    held = np.zeros(mask.shape, bool)
    for i, t in np.argwhere(mask):
        x = {k: array[i, t] for k, array in arrays.items() if array.ndim == 2}
        rho = math.exp(x["logprobs"] - x["old_logprobs"])
        low, high = 1 - config.clip_low, 1 + config.clip_high
        advantage = x["reward"]
        loss, slope = -advantage * rho, -advantage * rho
        if (advantage > 0 and rho > high) or (advantage < 0 and rho < low):
            loss, slope = -advantage * (high if advantage > 0 else low), 0.0
        if config.dual_clip and advantage < 0 and rho > config.dual_clip:
            loss, slope = -advantage * config.dual_clip, 0.0
        loss += config.entropy_coef * x["logprobs"] ** 2 / 2
        slope += config.entropy_coef * x["logprobs"]
        v, old, target, clip = x["values"], x["old_values"], x["returns"], config.value_clip
        square, towards = (v - target) ** 2, v - target
        if clip and abs(v - old) > clip:
            near = old + math.copysign(clip, v - old)
            if (near - target) ** 2 > square:
                square, towards, held[i, t] = (near - target) ** 2, 0.0, True
        total += loss + config.value_coef * square / 2
        by_logprob[i, t], by_value[i, t] = slope, config.value_coef * towards
    return total / mask.sum(), by_logprob / mask.sum(), by_value / mask.sum(), held


LOSSES = ESTIMATES | {
    "unbounded value": PPOConfig(value_clip=0.0, value_coef=0.3),
    "dual, entropy": PPOConfig(clip_high=0.1, dual_clip=1.3, entropy_coef=0.2, value_clip=0.2),
}


@partial(jax.jit, static_argnums=0)
def ppo_mean(config, arrays) -> Any:
    """Mean loss with metrics, and its gradients by log-probabilities and values."""

    def loss(logprobs, values):
        given = arrays | {"logprobs": logprobs, "values": values}
        total, weight, metrics = objective_of(config).terms(
            config, log_z=None, correction=None, **given
        )
        return total.sum() / weight.sum(), metrics

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return run(arrays["logprobs"], arrays["values"])


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_ppo_loss(name, holes):
    config, arrays = LOSSES[name], example(holes=holes)
    advantage = np.random.default_rng(3).normal(0, 1, arrays["mask"].shape)
    arrays["reward"] = np.where(arrays["mask"], advantage, math.nan)
    total, by_logprob, by_value, held = ppo_by_hand(config, arrays)
    (ours, metrics), gradients = ppo_mean(config, arrays)
    np.testing.assert_allclose(ours, total, atol=CLOSE)
    np.testing.assert_allclose(gradients[0], by_logprob, atol=CLOSE)
    np.testing.assert_allclose(gradients[1], by_value, atol=CLOSE)
    mask = arrays["mask"]
    shares = np.where(mask, held, 0).sum(1) / np.maximum(mask.sum(1), 1)
    np.testing.assert_allclose(metrics["value_clipped"], shares.mean(), atol=CLOSE)
    assert not config.value_clip or 0 < held.sum() < mask.sum()


def test_the_correction_weighs_the_policy_alone():
    arrays = example()
    arrays["reward"] = np.where(arrays["mask"], 0.7, math.nan)
    weights = np.random.default_rng(1).uniform(0, 2, arrays["mask"].shape)
    config = PPOConfig(entropy_coef=0.1)
    rest = {k: jnp.asarray(v) for k, v in arrays.items()}
    plain, _ = ppo_loss(config=config, **rest)
    extra, _ = ppo_loss(config=config, **rest | {"reward": rest["reward"] * 0.0})
    for given in (weights, weights[:, 0]):
        ours, _ = ppo_loss(config=config, correction=jnp.asarray(given), **rest)
        each = given if given.ndim == 2 else given[:, None]
        np.testing.assert_allclose(ours, extra + each * (plain - extra), atol=CLOSE)


def test_reinforce_without_values():
    """With all values 0 and gamma = lam = 1 an advantage is what comes: REINFORCE++'s."""
    arrays = example() | {"values": np.zeros((6, 5))}
    config = PPOConfig(kl_coef=0.2)
    names = ("old_logprobs", "ref_logprobs", "mask")
    given: dict[str, Any] = {k: jnp.asarray(arrays[k]) for k in names}
    given |= {"group_size": 2, "truncated": jnp.zeros(6, bool)}
    other = dataclasses.replace(
        PRESETS["reinforce_pp"], kl_coef=0.2, kl_estimator="k1", kl_in="reward"
    )
    reward = jnp.asarray(arrays["reward"])
    ours, _ = ppo_advantages(config, reward, values=jnp.asarray(arrays["values"]), **given)
    theirs, _ = objective_of(other).advantages(other, reward, **given)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# ---- a language small enough to be summed over: tokens 0 (ends a response), 1, 2; up to 3 tokens

LIMIT = 3


def _responses() -> list[tuple[int, ...]]:
    inner = [r for n in range(LIMIT + 1) for r in itertools.product((1, 2), repeat=n)]
    return [r if len(r) == LIMIT else (*r, 0) for r in inner]


RESPONSES = _responses()
PREFIXES = sorted({r[:t] for r in RESPONSES for t in range(len(r))})
MASK = np.array([[t < len(r) for t in range(LIMIT)] for r in RESPONSES])
STATE = np.array(
    [[PREFIXES.index(r[:t]) if t < len(r) else 0 for t in range(LIMIT)] for r in RESPONSES]
)
TOKEN = np.array([[r[t] if t < len(r) else 0 for t in range(LIMIT)] for r in RESPONSES])


def table(seed: int) -> np.ndarray:
    """Log-probabilities of the next token in every state."""
    logits = np.random.default_rng(seed).normal(0, 1, (len(PREFIXES), 3))
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def of_responses(logits) -> Any:
    return jnp.where(MASK, jax.nn.log_softmax(jnp.asarray(logits))[STATE, TOKEN], 0.0)


def expectation(log_policy: np.ndarray, f: np.ndarray) -> np.ndarray:
    """E[f | state] of every state; `log_policy` `[responses, T]`."""
    found = []
    for state in PREFIXES:
        through = [i for i, r in enumerate(RESPONSES) if r[: len(state)] == state]
        weights = [math.exp(log_policy[i, len(state) :].sum()) for i in through]
        assert math.isclose(sum(weights), 1.0)
        found.append(sum(w * f[i] for w, i in zip(weights, through, strict=True)))
    return np.array(found)


REWARD = np.random.default_rng(8).normal(0, 1, len(RESPONSES))


@pytest.mark.slow
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_perfect_values_leave_the_policy_gradient_as_it_is(lam):
    """Advantages from exact values have mean 0 in each state, and any `lam` the same gradient."""
    logits = table(0)
    log_policy = np.asarray(of_responses(logits))
    values = expectation(log_policy, REWARD)[STATE]
    reward = np.where(MASK & ~np.pad(MASK, ((0, 0), (0, 1)))[:, 1:], REWARD[:, None], 0.0)
    advantage = np.asarray(
        generalized_advantages(
            jnp.asarray(reward), jnp.asarray(values), jnp.asarray(MASK), gamma=1.0, lam=lam
        )
    )
    chance = np.exp(log_policy.sum(1))
    for state in range(len(PREFIXES)):
        here = MASK & (state == STATE)
        assert abs((chance[:, None] * np.where(here, advantage, 0.0)).sum()) < CLOSE

    def surrogate(x):
        return jnp.sum(chance[:, None] * jnp.where(MASK, advantage * of_responses(x), 0.0))

    def mean_reward(x):
        return jnp.sum(jnp.exp(of_responses(x).sum(1)) * REWARD)

    gradient = jax.grad(mean_reward)(jnp.asarray(logits))
    assert jnp.abs(gradient).max() > 0.01
    np.testing.assert_allclose(jax.grad(surrogate)(jnp.asarray(logits)), gradient, atol=CLOSE)


def test_values_that_know_the_reward_leave_nothing_to_learn():
    arrays = example(0.0)
    values = jnp.broadcast_to(jnp.asarray(arrays["reward"])[:, None], (6, 5))
    names = ("old_logprobs", "ref_logprobs", "mask")
    given = {k: jnp.asarray(arrays[k]) for k in names}
    advantage, _ = ppo_advantages(
        PPOConfig(lam=0.9), jnp.asarray(arrays["reward"]), values=values, **given
    )
    assert not np.asarray(advantage).any()


# ---- sub-trajectory and detailed balance

BALANCES = {
    "subtb": SubTBConfig(beta=1.7),
    "short windows": SubTBConfig(beta=1.7, lam=0.3, weight="unit"),
    "long windows": SubTBConfig(beta=1.7, lam=4.0, weight="none"),
    "detailed": SubTBConfig(kind="detailed_balance", weight_max=1.1),
}


def subtb_by_hand(config, arrays):
    """Mean loss and gradients, over all pairs of states i < j."""
    by_logprob, by_value = np.zeros(arrays["mask"].shape), np.zeros(arrays["mask"].shape)
    total, count = 0.0, len(LENGTHS)
    for i in range(count):
        places, own = np.flatnonzero(arrays["mask"][i]), at(arrays, i)
        n = len(places)
        values = [*own["values"], config.beta * arrays["reward"][i]]
        c = [values[t] - (own["logprobs"] - own["ref_logprobs"])[:t].sum() for t in range(n + 1)]
        drift = (own["logprobs"] - own["old_logprobs"]).sum()
        weight = {"unit": 1.0, "none": math.exp(drift)}.get(
            config.weight, min(math.exp(drift), config.weight_max)
        )
        pairs = [(a, b) for a in range(n + 1) for b in range(a + 1, n + 1)]
        if config.kind == "detailed_balance":
            pairs = [(a, b) for a, b in pairs if b == a + 1]
        norm = sum(config.lam ** (b - a) for a, b in pairs) or 1.0
        for a, b in pairs:
            share = weight * config.lam ** (b - a) / norm / count
            total += share * (c[a] - c[b]) ** 2
            slope = 2 * share * (c[a] - c[b])
            by_logprob[i, places[a:b]] += slope
            by_value[i, places[a]] += slope
            if b < n:
                by_value[i, places[b]] -= slope
    return total, by_logprob, by_value


@partial(jax.jit, static_argnums=0)
def _subtb(config, arrays):
    def loss(logprobs, values):
        given = arrays | {"logprobs": logprobs, "values": values}
        unread = {"log_z": None, "correction": None, "old_values": None, "returns": None}
        total, weight, metrics = objective_of(config).terms(config, **given, **unread)
        return total.sum() / weight.sum(), metrics

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return run(arrays["logprobs"], arrays["values"])


def subtb_mean(config, arrays) -> Any:
    """Mean loss with metrics, and its gradients by log-probabilities and values."""
    return _subtb(config, {k: x for k, x in arrays.items() if k not in ("old_values", "returns")})


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", BALANCES)
def test_balance_against_all_windows(name, holes):
    config, arrays = BALANCES[name], example(holes=holes)
    total, by_logprob, by_value = subtb_by_hand(config, arrays)
    (ours, metrics), gradients = subtb_mean(config, arrays)
    np.testing.assert_allclose(ours, total, atol=CLOSE)
    np.testing.assert_allclose(gradients[0], by_logprob, atol=CLOSE)
    np.testing.assert_allclose(gradients[1], by_value, atol=CLOSE)
    zeroed = {k: np.where(arrays["mask"], x, 0) for k, x in arrays.items() if x.ndim == 2}
    d = (zeroed["logprobs"] - zeroed["ref_logprobs"]).sum(1)
    first = [at(arrays, i)["values"][:1].sum() for i in range(len(LENGTHS))]
    whole = np.where(arrays["mask"].any(1), first + d - config.beta * arrays["reward"], 0.0)
    np.testing.assert_allclose(metrics["residual"], whole.mean(), atol=CLOSE)


def test_a_correction_weighs_whole_responses():
    arrays = example()
    rest = {k: jnp.asarray(arrays[k]) for k in example() if k not in ("old_values", "returns")}
    weights = jnp.asarray(np.random.default_rng(1).uniform(0, 2, len(LENGTHS)))
    plain, _ = subtb_loss(config=SubTBConfig(), **rest)
    ours, _ = subtb_loss(config=SubTBConfig(), correction=weights, **rest)
    np.testing.assert_allclose(ours, weights * plain, atol=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("lam", [1e-30, 0.3, 1.0, 50.0, 1e30])
def test_any_lam_is_stable(lam):
    """From single tokens to whole responses, where `lam^n` is far from any float32."""
    rng = np.random.default_rng(0)
    residual, mask = rng.normal(0, 1, (2, 300)), np.arange(300) < np.array([[300], [40]])
    weights = np.array(
        [lam ** float(k - 300) if lam > 1 else lam ** (k - 1) for k in range(1, 301)]
    )
    for dtype, close in ((jnp.float64, 1e-10), (jnp.float32, 1e-4)):
        run = jax.jit(jax.value_and_grad(lambda x: window_loss(x, jnp.asarray(mask), lam).sum()))
        ours, gradient = run(jnp.asarray(residual, dtype))
        assert ours.dtype == dtype and jnp.isfinite(gradient).all()
        expected = 0.0
        for i, n in enumerate((300, 40)):
            ends = np.cumsum([0.0, *residual[i, :n]])
            scaled = weights[300 - n :] if lam > 1 else weights
            found = [
                (scaled[k - 1] * ((ends[k:] - ends[:-k]) ** 2).sum(), scaled[k - 1] * (n + 1 - k))
                for k in range(1, n + 1)
            ]
            expected += sum(a for a, _ in found) / sum(b for _, b in found)
        np.testing.assert_allclose(ours, expected, rtol=close)


def soft_values(reference: np.ndarray, beta: float) -> np.ndarray:
    return np.log(expectation(reference, np.exp(beta * REWARD)))


@pytest.mark.slow
@pytest.mark.parametrize("name", BALANCES)
def test_zero_at_the_target_and_its_soft_values(name):
    config = BALANCES[name]
    reference = np.asarray(of_responses(table(1)))
    values = soft_values(reference, config.beta)
    log_target = reference.sum(1) + config.beta * REWARD - values[0]
    assert math.isclose(np.exp(log_target).sum(), 1.0)
    # What the target gives a token: from the value before it to the value after it.
    after = [[*(values[PREFIXES.index(r[:t])] for t in range(1, len(r)))] for r in RESPONSES]
    after = [[*some, config.beta * REWARD[i]] for i, some in enumerate(after)]
    logprobs = np.full(MASK.shape, math.nan)
    for i, r in enumerate(RESPONSES):
        for t in range(len(r)):
            logprobs[i, t] = reference[i, t] + after[i][t] - values[STATE[i, t]]
    np.testing.assert_allclose(np.nansum(logprobs, 1), log_target, atol=CLOSE)
    arrays = {
        "logprobs": logprobs,
        "ref_logprobs": reference,
        "old_logprobs": reference,
        "reward": REWARD,
        "mask": MASK,
        "values": np.where(MASK, values[STATE], math.nan),
    }
    (loss, metrics), gradients = subtb_mean(config, arrays)
    assert loss < 1e-20
    assert max(jnp.abs(g).max() for g in gradients) < CLOSE
    assert metrics["token_residual_abs"] < CLOSE
    # and only there
    other = arrays | {"values": arrays["values"] + (STATE == 1)}
    assert subtb_mean(config, other)[0][0] > 1e-3


def test_few_windows_are_detailed_balance_and_long_ones_trajectory_balance():
    arrays = example()
    run = lambda **fields: subtb_mean(SubTBConfig(weight="unit", **fields), arrays)[0][0]  # noqa: E731
    detailed = run(kind="detailed_balance")
    np.testing.assert_allclose(run(lam=1e-12), detailed, rtol=1e-9)
    balance = dataclasses.replace(PRESETS["flowrl"], beta=1.0, weight="unit")
    rest = {k: jnp.asarray(v) for k, v in arrays.items()}
    for name in ("values", "old_values", "returns"):
        rest.pop(name)
    log_z = jnp.where(arrays["mask"][:, 0], arrays["values"][:, 0], arrays["reward"])
    loss, weight, _ = objective_of(balance).terms(balance, log_z=log_z, correction=None, **rest)
    np.testing.assert_allclose(run(lam=1e12), loss.sum() / weight.sum(), rtol=1e-9)
    assert abs(detailed - run(lam=1e12)) > 0.1


# ---- both


@pytest.mark.parametrize("name", ["ppo", "ppo_trl", "subtb", "detailed_balance"])
def test_padding_never_matters(name):
    config = PRESETS[name]
    found = []
    for padding in (math.nan, 7.0, math.inf):
        arrays = example(0.0)
        outside = ~arrays["mask"]
        for x in arrays.values():
            if x.ndim == 2 and x.dtype != bool:
                x[outside] = padding
        if objective_of(config).token_advantages(config):
            arrays["reward"] = np.where(outside, padding, 0.5)
            run = ppo_mean(config, arrays)
        else:
            run = subtb_mean(config, arrays)
        assert all((np.asarray(g)[outside] == 0).all() for g in run[1])
        found.append(run)
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])


def test_the_seam():
    for name, objective in OBJECTIVES.items():
        has = name in ("ppo", "subtb")
        config = objective.config_class()
        assert objective.needs_values(config) == has
        assert hasattr(config, "value") == has
        assert (objective.returns is not None) == (name == "ppo")


WRONG = [
    (PPOConfig, {"lam": 1.5}, "loss.lam=1.5 must be in"),
    (PPOConfig, {"gamma": -0.1}, "loss.gamma=-0.1 must be in"),
    (PPOConfig, {"value_clip": -1.0}, "loss.value_clip=-1.0 must not be negative"),
    (PPOConfig, {"clip_low": 2.0}, "loss.clip_low=2.0 must be at most 1"),
    (PPOConfig, {"reward_norm": "group"}, "must be 'none' in PPO"),
    (SubTBConfig, {"lam": 0.0}, "loss.lam=0.0 must be positive"),
    (SubTBConfig, {"kind": "db"}, "loss.kind='db' is not known"),
    (SubTBConfig, {"weight": "two_sided"}, "loss.weight='two_sided' is not known"),
    (SubTBConfig, {"beta": 0.0}, "loss.beta=0.0 must be positive"),
    (ValueConfig, {"num_layers": 0}, "loss.value.num_layers=0 must be at least 1"),
]


@pytest.mark.parametrize(("config", "fields", "message"), WRONG)
def test_wrong_settings_are_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_shapes_are_checked():
    arrays = {k: jnp.asarray(v) for k, v in example().items()}
    arrays["reward"] = arrays["old_logprobs"]
    with pytest.raises(ValueError, match="returns has shape"):
        ppo_loss(config=PPOConfig(), **arrays | {"returns": arrays["returns"][:, 0]})
    rest = {k: v for k, v in arrays.items() if k not in ("returns", "old_values")}
    with pytest.raises(ValueError, match="values has shape"):
        subtb_loss(
            config=SubTBConfig(),
            **rest | {"values": rest["values"][:, 0], "reward": jnp.zeros(len(LENGTHS))},
        )
