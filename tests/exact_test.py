"""Languages whose responses can all be listed: what is listed, drawn, measured and predicted."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.errors import InputError
from flowrl_jax.exact.fixed_point import expected_normalized, fixed_point
from flowrl_jax.exact.language import END, Language
from flowrl_jax.exact.learn import LearnConfig, Run, draw, token_logprobs
from flowrl_jax.exact.measures import measure
from flowrl_jax.exact.paths import OPERATIONS, graph_routes, integer_paths, skewed_prior
from flowrl_jax.exact.problem import Network, Problem, Table, fit, response_logprobs
from flowrl_jax.objectives.advantages import group_normalize
from flowrl_jax.objectives.flowrl import FlowRLConfig
from flowrl_jax.objectives.presets import PRESETS

LANGUAGE = Language(3, 4)


def listed(language):
    """All responses as tuples of tokens, by brute force."""
    symbols = range(1, language.symbols + 1)
    for length in range(language.length):
        for head in itertools.product(symbols, repeat=length):
            yield (*head, END)
    yield from itertools.product(symbols, repeat=language.length)


def table_problem(seed=0, language=LANGUAGE, prompts=2):
    """A problem of random rewards whose policy is a table, and random logits for it."""
    rng = np.random.default_rng(seed)
    shape = (prompts, language.responses)
    places = (prompts, language.places)
    reward = np.where(rng.random(shape) < 0.2, rng.integers(1, 4, shape) / 3, 0.0)
    reward[:, 0] = 1.0
    problem = Problem(
        language=language,
        reward=jnp.asarray(reward, jnp.float32),
        correct=jnp.asarray(reward > 0),
        kind=jnp.asarray(rng.integers(0, 5, shape), jnp.int32),
        state=jnp.broadcast_to(jnp.arange(language.places), places),
        features=jnp.zeros((*places, 0)),
        kinds=5,
    )
    return problem, jnp.asarray(rng.normal(size=(*places, language.symbols + 1)), jnp.float32)


@pytest.mark.parametrize("sizes", [(2, 1), (2, 3), (3, 4), (5, 3)])
def test_all_responses_are_listed_once(sizes):
    language = Language(*sizes)
    places, tokens = language.paths()
    found = [tuple(row[:size]) for row, size in zip(tokens, language.sizes, strict=True)]
    assert sorted(found) == sorted(listed(language))
    assert (tokens.sum(axis=1) > 0).sum() == language.responses - 1  # padding is 0
    for response in range(language.responses):
        prefixes = [0]
        for token in found[response]:
            prefixes.append(prefixes[-1] * language.symbols + token)
        size = language.sizes[response]
        assert places[response, :size].tolist() == prefixes[:size]


def test_probabilities_are_products_and_sum_to_one():
    rng = np.random.default_rng(0)
    logprobs = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(2, LANGUAGE.places, 4))))
    found = LANGUAGE.log_probability(logprobs)
    np.testing.assert_allclose(jnp.exp(found).sum(axis=1), 1.0, rtol=1e-5)
    places, tokens = LANGUAGE.paths()
    for response in rng.integers(LANGUAGE.responses, size=20):
        size = LANGUAGE.sizes[response]
        wanted = sum(logprobs[1, places[response, t], tokens[response, t]] for t in range(size))
        np.testing.assert_allclose(found[1, response], wanted, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 3), (3, 0), (10, 7)])
def test_a_language_too_small_or_too_large_is_one_line(sizes):
    with pytest.raises(InputError, match="language of"):
        Language(*sizes)


def test_draws_have_the_probabilities_of_the_policy():
    problem, params = table_problem()
    prompt = jnp.tile(jnp.arange(2), 20_000)
    rows = draw(Table(), params, problem, prompt, jax.random.key(3))
    exact = jnp.exp(response_logprobs(Table(), params, problem))
    for i in range(2):
        counts = np.bincount(np.asarray(rows.response)[i::2], minlength=LANGUAGE.responses)
        # Five standard errors of each share; 364 shares of 20,000 draws.
        error = 5 * np.sqrt(exact[i] * (1 - exact[i]) / 20_000) + 1e-4
        assert (np.abs(counts / 20_000 - exact[i]) < error).all()


@pytest.mark.slow
def test_what_is_drawn_is_told_consistently():
    problem, params = table_problem()
    rows = draw(Table(), params, problem, jnp.arange(200) % 2, jax.random.key(1))
    responses = list(listed(LANGUAGE))
    _, tokens = LANGUAGE.paths()
    for i in range(200):
        size = int(rows.mask[i].sum())
        assert tuple(np.asarray(rows.token[i, :size])) in responses
        assert (tokens[rows.response[i]] == rows.token[i]).all()
        assert size == LANGUAGE.sizes[rows.response[i]]
    again = token_logprobs(Table(), params, problem, rows)
    np.testing.assert_allclose(again, rows.logprobs, atol=1e-6)  # two ways to the same logits
    exact = response_logprobs(Table(), params, problem)[rows.prompt, rows.response]
    np.testing.assert_allclose(rows.logprobs.sum(axis=1), exact, atol=1e-5)


def test_measures_are_what_they_say():
    problem, params = table_problem()
    _, other = table_problem(seed=1)
    logprobs = response_logprobs(Table(), params, problem)
    reference = response_logprobs(Table(), other, problem)
    found = measure(problem, logprobs, reference)
    p, q = np.exp(np.float64(logprobs[1])), np.exp(np.float64(reference[1]))
    correct, kind = np.asarray(problem.correct[1]), np.asarray(problem.kind[1])
    accuracy = p[correct].sum()
    among = p[correct] / accuracy
    by_kind = np.array([p[correct & (kind == k)].sum() for k in range(5)])
    wanted = {
        "accuracy": accuracy,
        "pass_64": 1 - (1 - accuracy) ** 64,
        "distinct_64": (1 - (1 - p[correct]) ** 64).sum(),
        "strategies_64": (1 - (1 - by_kind) ** 64).sum(),
        "effective": math.exp(-(among * np.log(among)).sum()),
        "effective_strategies": math.exp(
            -sum(x * math.log(x) for x in by_kind / accuracy if x > 0)
        ),
        "correct_variation": 0.5 * np.abs(among - q[correct] / q[correct].sum()).sum(),
        "kl_to_reference": (p * np.log(p / q)).sum(),
        "length": (p * LANGUAGE.sizes).sum(),
    }
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        # float32 sums over 364 terms.
        np.testing.assert_allclose(found[name][1], value, rtol=2e-4, err_msg=name)


def test_a_group_normalised_reward_on_average():
    """Against every group of three, one by one; and the figures of docs/objective.md."""
    levels, chance = np.array([0.0, 0.25, 1.0]), np.array([0.5, 0.2, 0.3])
    for i in range(3):
        wanted = sum(
            chance[a] * chance[b] * float(group_normalize(levels[np.array([i, a, b])], 3)[0])
            for a, b in itertools.product(range(3), repeat=2)
        )
        found = expected_normalized(levels, chance, 3)[i]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)  # float32 there
    for group, p, ahead in ((8, 0.5, 1.74), (8, 0.01, 2.44), (4, 0.1, 1.46), (64, 0.9, 3.23)):
        low, high = expected_normalized(np.array([0.0, 1.0]), np.array([1 - p, p]), group)
        assert round(high - low, 2) == ahead


def test_a_group_that_mixes_in_too_many_ways_is_one_line():
    with pytest.raises(InputError, match="fewer"):
        expected_normalized(np.arange(20.0), np.ones(20), 16)


def prior(seed=0):
    problem, params = table_problem(seed)
    logprobs = np.asarray(response_logprobs(Table(), params, problem), np.float64)[0]
    return logprobs, np.asarray(problem.reward[0], np.float64)


def test_without_length_normalisation_the_fixed_point_is_gibbs():
    logprobs, reward = prior()
    config = FlowRLConfig(beta=2.0, length_normalize=False, reward_norm="none")
    found = fixed_point(config, logprobs, reward, LANGUAGE.sizes, group_size=8)
    weight = np.exp(logprobs + 2.0 * reward)
    np.testing.assert_allclose(np.exp(found.logprobs), weight / weight.sum(), rtol=1e-9)
    assert found.log_z == pytest.approx(math.log(weight.sum()))


def test_with_it_the_fixed_point_has_residual_zero():
    logprobs, reward = prior()
    config = FlowRLConfig(beta=2.0, reward_norm="none")
    found = fixed_point(config, logprobs, reward, LANGUAGE.sizes, group_size=8)
    assert np.exp(found.logprobs).sum() == pytest.approx(1.0)
    residual = found.log_z + (found.logprobs - logprobs) / LANGUAGE.sizes - 2.0 * reward
    np.testing.assert_allclose(residual, 0.0, atol=1e-9)


@pytest.mark.parametrize("length_normalize", [True, False])
def test_with_normalised_rewards_it_is_consistent_with_itself(length_normalize):
    logprobs, reward = prior()
    config = FlowRLConfig(beta=1.0, length_normalize=length_normalize)
    found = fixed_point(config, logprobs, reward, LANGUAGE.sizes, group_size=8)
    levels, level = np.unique(reward, return_inverse=True)
    chance = np.bincount(level, np.exp(found.logprobs))
    mean = expected_normalized(levels, chance, 8)[level]
    per = LANGUAGE.sizes if length_normalize else 1
    residual = found.log_z + (found.logprobs - logprobs) / per - mean
    # The mean of group-normalised rewards is 0, to the 1e-6 that the deviation is given.
    np.testing.assert_allclose(residual, 0.0, atol=1e-6)


def test_integer_paths_are_what_their_operations_reach():
    problem = integer_paths()
    _, tokens = problem.language.paths()
    sizes = problem.language.sizes
    assert problem.prompts == 8
    counts = np.asarray(problem.correct).sum(axis=1)
    assert ((counts >= 100) & (counts <= 260)).all()
    rng = np.random.default_rng(0)
    for prompt in range(8):
        solved = np.flatnonzero(problem.correct[prompt])
        ends = set()
        starts = range(1, 10)
        for start in starts:  # the start is not told: one of them takes all solutions to one end
            reached = set()
            for response in solved:
                value = start
                for token in tokens[response, : sizes[response] - 1]:
                    value = OPERATIONS[token - 1](value)
                reached.add(int(value))
            if len(reached) == 1:
                ends |= {(start, *reached)}
        assert ends
        assert (tokens[solved, sizes[solved] - 1] == END).all()
        one, two = rng.choice(solved, 2)
        same = np.array_equal(np.sort(tokens[one]), np.sort(tokens[two]))
        assert same == (problem.kind[prompt, one] == problem.kind[prompt, two])


def test_routes_without_round_trips_are_strategies():
    problem = graph_routes(prompts=4, nodes=8, length=5)
    for prompt in range(4):
        solved = np.asarray(problem.correct[prompt])
        kinds = np.asarray(problem.kind[prompt])[solved]
        assert len(set(kinds)) > 1
        assert solved.sum() >= len(set(kinds))
    assert problem.features.shape[-1] == 8 + 8 + 5 + 1


def test_a_prior_has_the_asked_share_of_right_answers():
    problem = graph_routes(prompts=3, nodes=8, length=4)
    target = skewed_prior(problem, 0, solved=0.2, skew=1.0)
    np.testing.assert_allclose(target.sum(axis=1), 1.0)
    np.testing.assert_allclose((target * problem.correct).sum(axis=1), 0.2)


@pytest.mark.slow
def test_a_network_is_fitted_to_a_prior():
    problem = graph_routes(prompts=3, nodes=6, length=3)
    target = skewed_prior(problem, 0, solved=0.3, skew=0.0)
    policy = Network(32)
    key = jax.random.key(0)
    params = fit(policy, problem, jnp.asarray(target), key, steps=300, rate=1e-2)
    logprobs = response_logprobs(policy, params, problem)
    found = measure(problem, logprobs, logprobs)["accuracy"]
    np.testing.assert_allclose(found, 0.3, atol=0.05)  # what a network of this size can say


TINY = LearnConfig(rollouts=6, prompts=2, group_size=4, updates=2, points=2)


def trained(preset, config=TINY, seed=0):
    problem, params = table_problem()
    start = response_logprobs(Table(), params, problem)
    run = Run(Table(), PRESETS[preset], config)
    rate = jnp.float32(0.05)
    return jax.jit(run)(problem, problem, params, start, jax.random.key(seed), rate)


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset", ["flowrl", "tb_ema", "gflowrl", "ftb_jensen_shannon", "dapo", "ppo", "subtb"]
)
def test_every_kind_of_objective_trains(preset):
    found, params = trained(preset)
    assert found["accuracy"].shape == (3, 2)
    np.testing.assert_allclose(found["kl_to_reference"][0], 0.0, atol=1e-5)
    assert (found["kl_to_reference"][-1] > 1e-4).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((found, params)))


@pytest.mark.slow
def test_stale_rollouts_are_those_of_the_first_policy():
    """As long as only rollouts of the start are learned from, their age does not matter."""
    fresh = dataclasses.replace(TINY, rollouts=1, points=1)
    stale = dataclasses.replace(fresh, staleness=3)
    assert (trained("grpo", fresh)[0]["kl_to_reference"][-1] > 0).all()
    assert (trained("grpo", stale)[0]["kl_to_reference"][-1] > 0).all()
    late = dataclasses.replace(TINY, staleness=2)
    one, two = trained("flowrl", TINY)[0], trained("flowrl", late)[0]
    assert not np.allclose(one["accuracy"][-1], two["accuracy"][-1])


@pytest.mark.slow
def test_a_reset_takes_the_reference_along():
    """With a reset before every rollout, FlowRL's penalty holds nothing back but one step."""
    often = dataclasses.replace(TINY, rollouts=60, points=2, reset_every=1)
    never = dataclasses.replace(TINY, rollouts=60, points=2)
    free = trained("flowrl_per_token", often)[0]["kl_to_reference"][-1]
    held = trained("flowrl_per_token", never)[0]["kl_to_reference"][-1]
    assert (free > held).all()


@pytest.mark.parametrize(("field", "value"), [("points", 4), ("updates", 3), ("prompts", 10)])
def test_sizes_that_do_not_divide_are_one_line(field, value):
    changes = {field: value} | ({"updates": 1} if field == "prompts" else {})
    with pytest.raises(InputError, match=field):
        trained("flowrl", dataclasses.replace(TINY, **changes))
