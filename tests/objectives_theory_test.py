"""What the objectives do in expectation, over every response of a small space, in float64.

The space: all strings over 3 tokens and an end token, cut at 5 tokens: 364 responses whose
probabilities sum to 1, from a policy that is a table of logits for each of the 121 prefixes.
Expectations are sums over it, so an identity holds to rounding (1e-12) or it does not hold.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.objectives.advantages import group_normalize
from flowrl_jax.objectives.flowrl import FlowRLConfig, flowrl_loss, log_z_target
from flowrl_jax.objectives.grpo import GRPOConfig, aggregate_tokens, grpo_loss
from flowrl_jax.objectives.log_z import group_mean

END, LENGTH, SYMBOLS = 0, 5, 4
BETA = 2.0
EXACT = 1e-12


def strings():
    """All responses: those that end within 5 tokens, and those that are cut there."""
    for length in range(LENGTH):
        for head in itertools.product(range(1, SYMBOLS), repeat=length):
            yield (*head, END)
    yield from itertools.product(range(1, SYMBOLS), repeat=LENGTH)


RESPONSES = list(strings())
PREFIXES = {
    prefix: i for i, prefix in enumerate(sorted({r[:t] for r in RESPONSES for t in range(len(r))}))
}
SIZES = np.array([len(r) for r in RESPONSES])
MASK = np.arange(LENGTH) < SIZES[:, None]
TOKENS = np.array([r + (0,) * (LENGTH - len(r)) for r in RESPONSES])
PLACES = np.array([[PREFIXES.get(r[:t], 0) for t in range(LENGTH)] for r in RESPONSES])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def logprobs_of(table):
    """`[364, 5]` log-probabilities of every token of every response; the padding is NaN."""
    logprobs = jax.nn.log_softmax(table, axis=1)[PLACES, TOKENS]
    return jnp.where(MASK, logprobs, jnp.nan)


def total(logprobs):
    return jnp.where(MASK, logprobs, 0.0).sum(axis=1)


def space(seed=0):
    """Logits of a policy, a reference and a behaviour policy, and rewards of the responses."""
    rng = np.random.default_rng(seed)
    shape = (len(PREFIXES), SYMBOLS)
    reference = rng.normal(0, 1.0, shape)
    policy = reference + rng.normal(0, 0.5, shape)
    behaviour = policy + rng.normal(0, 0.3, shape)
    reward = (rng.random(len(RESPONSES)) < 0.1) * 1.0 + 0.2 * rng.random(len(RESPONSES))
    return tuple(jnp.asarray(x) for x in (policy, reference, behaviour, reward))


def expected_gradient(table, weights, *, log_z, reference, old, reward, config):
    """Gradient of the loss, averaged over responses drawn with fixed probabilities `weights`."""

    def loss(table):
        losses, _ = flowrl_loss(
            log_z=jnp.full(len(RESPONSES), log_z),
            logprobs=logprobs_of(table),
            ref_logprobs=logprobs_of(reference),
            old_logprobs=logprobs_of(old),
            reward=reward,
            mask=jnp.asarray(MASK),
            config=config,
        )
        return jnp.sum(weights * losses)

    return jax.grad(loss)(table)


def kl_to_target(table, reference, reward):
    """KL(policy || pi_ref e^(beta r) / Z) and log Z."""
    log_target = total(logprobs_of(reference)) + BETA * reward
    log_z = jax.nn.logsumexp(log_target)
    log_policy = total(logprobs_of(table))
    return jnp.sum(jnp.exp(log_policy) * (log_policy - log_target + log_z)), log_z


BALANCE = FlowRLConfig(beta=BETA, weight="unit", length_normalize=False, reward_norm="none")


def test_the_space_is_complete():
    policy, *_ = space()
    assert len(RESPONSES) == 364 and len(PREFIXES) == 121
    np.testing.assert_allclose(jnp.exp(total(logprobs_of(policy))).sum(), 1.0, rtol=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("log_z", [0.0, 3.7, -11.0])
def test_balance_gradient_is_the_gradient_of_the_kl(log_z):
    """Proposition 1: without length normalisation, on policy, for any log Z."""
    policy, reference, _, reward = space()
    weights = jnp.exp(total(logprobs_of(policy)))
    grad = expected_gradient(
        policy,
        weights,
        log_z=log_z,
        reference=reference,
        old=policy,
        reward=reward,
        config=BALANCE,
    )
    kl_grad = jax.grad(lambda table: kl_to_target(table, reference, reward)[0])(policy)
    np.testing.assert_allclose(grad, 2 * kl_grad, atol=EXACT)


@pytest.mark.parametrize("log_z", [0.0, 2.5])
def test_length_normalised_gradient(log_z):
    """With 1/|y| it is the gradient of another potential, which depends on log Z."""
    policy, reference, _, reward = space()
    weights = jnp.exp(total(logprobs_of(policy)))
    config = FlowRLConfig(beta=BETA, weight="unit")
    arguments = {"reference": reference, "old": policy, "reward": reward, "config": config}
    grad = expected_gradient(policy, weights, log_z=log_z, **arguments)

    def potential(table):
        log_policy = total(logprobs_of(table))
        d = log_policy - total(logprobs_of(reference))
        inside = (d - 1.0) / SIZES**2 + (log_z - BETA * reward) / SIZES
        return jnp.sum(jnp.exp(log_policy) * inside)

    np.testing.assert_allclose(grad, 2 * jax.grad(potential)(policy), atol=EXACT)
    other = expected_gradient(policy, weights, log_z=log_z + 1.0, **arguments)
    assert jnp.abs(other - grad).max() > 1e-3


def test_length_normalised_zero_of_the_loss():
    """`pi_ref e^(n (beta r - zeta))`, zeta by bisection, has no loss: the optimum is reached."""
    _, reference, _, reward = space()
    log_reference = total(logprobs_of(reference))
    low, high = 0.0, BETA * float(reward.max())
    for _ in range(80):
        middle = (low + high) / 2
        mass = jnp.exp(log_reference + SIZES * (BETA * reward - middle)).sum()
        low, high = (middle, high) if mass > 1.0 else (low, middle)
    zeta = low
    log_policy = log_reference + SIZES * (BETA * reward - zeta)
    # A distribution over responses, spread over their tokens: only its sum matters here.
    logprobs = jnp.where(MASK, (log_policy / SIZES)[:, None], jnp.nan)
    loss, _ = flowrl_loss(
        log_z=jnp.full(len(RESPONSES), zeta),
        logprobs=logprobs,
        old_logprobs=logprobs,
        ref_logprobs=logprobs_of(reference),
        reward=reward,
        mask=jnp.asarray(MASK),
        config=FlowRLConfig(beta=BETA),
    )
    np.testing.assert_allclose(loss, 0.0, atol=EXACT)
    assert 0.0 < zeta < BETA * float(reward.max())


def test_log_z_gap_is_the_kl():
    """log Z - E[log Z estimate] = KL(policy || target): a diagnostic that needs no oracle."""
    policy, reference, _, reward = space()
    logprobs = logprobs_of(policy)
    estimate = log_z_target(logprobs, logprobs_of(reference), reward, jnp.asarray(MASK), BALANCE)
    kl, log_z = kl_to_target(policy, reference, reward)
    gap = log_z - jnp.sum(jnp.exp(total(logprobs)) * estimate)
    np.testing.assert_allclose(gap, kl, rtol=EXACT)
    assert kl > 0.1


@pytest.mark.parametrize("log_z", [0.0, 3.0])
def test_unclipped_weight_corrects_for_the_behaviour_policy(log_z):
    """Drawn from another policy, the full ratio gives the on-policy gradient; 1 does not."""
    policy, reference, behaviour, reward = space()
    weights = jnp.exp(total(logprobs_of(behaviour)))
    kl_grad = jax.grad(lambda table: kl_to_target(table, reference, reward)[0])(policy)
    config = FlowRLConfig(beta=BETA, weight="none", length_normalize=False)
    arguments = {"log_z": log_z, "reference": reference, "old": behaviour, "reward": reward}
    grad = expected_gradient(policy, weights, config=config, **arguments)
    np.testing.assert_allclose(grad, 2 * kl_grad, atol=EXACT)
    biased = expected_gradient(policy, weights, config=BALANCE, **arguments)
    assert jnp.linalg.norm(biased - 2 * kl_grad) > 0.05 * jnp.linalg.norm(2 * kl_grad)


@pytest.mark.parametrize("weight", ["two_sided", "max", "none", "unit"])
def test_optimum_does_not_depend_on_the_weight(weight):
    """At the target with the true log Z every residual is 0, whatever the weights are."""
    _, reference, behaviour, reward = space()
    log_target = total(logprobs_of(reference)) + BETA * reward
    log_z = jax.nn.logsumexp(log_target)
    logprobs = jnp.where(MASK, ((log_target - log_z) / SIZES)[:, None], jnp.nan)

    def loss(logprobs, log_z):
        losses, _ = flowrl_loss(
            log_z=jnp.full(len(RESPONSES), log_z),
            logprobs=logprobs,
            ref_logprobs=logprobs_of(reference),
            old_logprobs=logprobs_of(behaviour),
            reward=reward,
            mask=jnp.asarray(MASK),
            config=FlowRLConfig(beta=BETA, weight=weight, length_normalize=False),
        )
        return losses.mean()

    by_logprobs, by_log_z = jax.grad(loss, argnums=(0, 1))(logprobs, log_z)
    np.testing.assert_allclose(by_logprobs, 0.0, atol=EXACT)
    np.testing.assert_allclose(by_log_z, 0.0, atol=EXACT)


def drawn(count=24, group_size=8, seed=3):
    """Responses of a few groups with rewards; identities over samples need no expectation."""
    policy, reference, behaviour, reward = space(seed)
    rows = np.random.default_rng(seed).integers(0, len(RESPONSES), count)
    mask = jnp.asarray(MASK[rows])
    arrays = {
        "ref_logprobs": logprobs_of(reference)[rows],
        "reward": reward[rows],
        "mask": mask,
    }
    return policy, behaviour, rows, arrays, group_size


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero", "learned"])
def test_flowrl_is_grpo_and_a_regulariser(kind):
    """2 beta [GRPO + mean (d/n + log Z)^2 / (2 beta)], sample by sample, at ratio 1."""
    policy, _, rows, arrays, size = drawn()
    arrays["reward"] = group_normalize(arrays["reward"], size).astype(jnp.float64)
    log_z = jnp.linspace(-1, 1, len(rows)) if kind == "learned" else jnp.zeros(len(rows))
    mask, sizes = arrays["mask"], SIZES[rows]
    old = logprobs_of(policy)[rows]

    def flowrl(table):
        return flowrl_loss(
            log_z=log_z,
            logprobs=logprobs_of(table)[rows],
            old_logprobs=old,
            config=FlowRLConfig(beta=BETA, weight="none"),
            **arrays,
        )[0].mean()

    def composed(table):
        logprobs = logprobs_of(table)[rows]
        loss, _ = grpo_loss(
            logprobs=logprobs, old_logprobs=old, config=GRPOConfig(kl_coef=0.0), **arrays
        )
        grpo, count = aggregate_tokens(loss, mask, "sequence")
        d = jnp.where(mask, logprobs - arrays["ref_logprobs"], 0.0).sum(axis=1) / sizes
        return 2 * BETA * (grpo.sum() / count.sum() + jnp.mean((d + log_z) ** 2) / (2 * BETA))

    np.testing.assert_allclose(jax.grad(flowrl)(policy), jax.grad(composed)(policy), atol=EXACT)


def test_group_log_z_is_leave_one_out_with_kl_in_the_reward():
    """TB-VarGrad = 2 beta (G - 1)/G times RLOO with reward r - d / beta, sample by sample."""
    policy, _, rows, arrays, size = drawn()
    mask = arrays["mask"]
    old = logprobs_of(policy)[rows]

    def balance(table):
        logprobs = logprobs_of(table)[rows]
        target = log_z_target(logprobs, arrays["ref_logprobs"], arrays["reward"], mask, BALANCE)
        return flowrl_loss(
            log_z=group_mean(target, size),
            logprobs=logprobs,
            old_logprobs=old,
            config=BALANCE,
            **arrays,
        )[0].mean()

    d = jnp.where(mask, old - arrays["ref_logprobs"], 0.0).sum(axis=1)
    reward = np.asarray(arrays["reward"] - d / BETA).reshape(-1, size)
    others = (reward.sum(axis=1, keepdims=True) - reward) / (size - 1)
    advantage = jnp.asarray((reward - others).reshape(-1))

    def leave_one_out(table):
        return jnp.mean(-advantage * total(logprobs_of(table))[rows])

    np.testing.assert_allclose(
        jax.grad(balance)(policy),
        2 * BETA * (size - 1) / size * jax.grad(leave_one_out)(policy),
        atol=EXACT,
    )


@pytest.mark.slow
def test_grpo_penalty_on_policy_is_the_forward_kl():
    """k3 as a loss has the gradient of KL(reference || policy), for responses of one token."""
    rng = np.random.default_rng(5)
    policy, reference = (jnp.asarray(rng.normal(0, 1, 6)) for _ in range(2))
    ref_logprobs = jax.nn.log_softmax(reference)
    weights = jax.nn.softmax(policy)

    def penalty(logits):
        logprobs = jax.nn.log_softmax(logits)[:, None]
        loss, _ = grpo_loss(
            logprobs=logprobs,
            ref_logprobs=ref_logprobs[:, None],
            old_logprobs=jax.nn.log_softmax(policy)[:, None],
            reward=jnp.zeros(6),
            mask=jnp.ones((6, 1), bool),
            config=GRPOConfig(kl_coef=1.0),
        )
        return jnp.sum(weights[:, None] * loss)

    def forward_kl(logits):
        return jnp.sum(jnp.exp(ref_logprobs) * (ref_logprobs - jax.nn.log_softmax(logits)))

    np.testing.assert_allclose(jax.grad(penalty)(policy), jax.grad(forward_kl)(policy), atol=EXACT)
