"""Drawing a token: against distributions worked out by sorting, and at the edges."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.sampler.sampling import draw, inverse_cdf, truncate

SMALLEST, LARGEST = 0.0, 1.0 - 2.0**-24  # what a float32 uniform in [0, 1) can be


jitted = jax.jit(draw, static_argnames=("temperature", "top_k", "top_p", "min_p"))
pick = jax.jit(lambda *a: inverse_cdf(*a)[0])


def distribution(logits, temperature, top_k, top_p, min_p=0.0):
    """Probabilities of one row by sorting, in float64; ties at a boundary are all kept."""
    weights = np.exp((logits - logits.max()) / temperature)
    probs = weights / weights.sum()
    if 0 < top_k < len(probs):
        probs = np.where(probs >= np.sort(probs)[-top_k], probs, 0.0)
        probs /= probs.sum()
    if top_p < 1.0:
        ordered = np.sort(probs)[::-1]
        needed = np.searchsorted(np.cumsum(ordered), top_p - 1e-12)
        probs = np.where(probs >= ordered[needed], probs, 0.0)
        probs /= probs.sum()
    probs = np.where(probs >= min_p * probs.max(), probs, 0.0)
    return probs / probs.sum()


SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.6, 0, 1.0, 0.0),
    (1.0, 5, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (0.7, 12, 0.6, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.5, 6, 0.9, 0.3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
@pytest.mark.parametrize("vocab", [7, 300])
def test_frequencies_and_logprobs(vocab, temperature, top_k, top_p, min_p):
    """5,000 evenly spaced uniforms: counts are exact to one per token; so are log-probs."""
    logits = np.random.default_rng(vocab).normal(0, 2, vocab)
    logits = logits.astype(np.float32).astype(np.float64)
    expected = distribution(logits, temperature, top_k, top_p, min_p)
    count = 5_000
    uniform = (jnp.arange(count) + 0.5) / count
    tokens, logprobs, policy = jitted(
        jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, vocab)),
        uniform,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    assert tokens.dtype == jnp.int32 and logprobs.dtype == jnp.float32
    found = np.bincount(np.asarray(tokens), minlength=vocab)
    # The set of tokens with a weight is exact, and no other is ever drawn.
    kept = (
        truncate(
            jnp.exp((jnp.asarray(logits, jnp.float32) - logits.max()) / temperature)[None],
            top_k,
            top_p,
            min_p,
        )[0]
        > 0
    )
    np.testing.assert_array_equal(kept, expected > 0)
    assert not found[expected == 0].any()
    # Each token owns an interval of that length: the even grid meets it to within one point,
    # and a second for the rounding of the interval's ends.
    assert np.abs(found - count * expected).max() <= 2.0
    # What is returned is the log-probability of what was drawn from, renormalised.
    np.testing.assert_allclose(logprobs, np.log(expected[np.asarray(tokens)]), atol=2e-6)
    # And that of the policy, whatever the distribution that was drawn from.
    untouched = np.log(distribution(logits, 1.0, 0, 1.0))
    np.testing.assert_allclose(policy, untouched[np.asarray(tokens)], atol=2e-6)


def test_random_uniforms_pass_a_chi_square():
    """With the noise that the sampler uses: 5 degrees of freedom, 20.5 is the 0.1 % point."""
    logits = jnp.array([1.0, 0.0, -1.0, 0.5, -0.5, 2.0])
    count = 50_000
    tokens, *_ = jitted(
        jnp.broadcast_to(logits, (count, 6)),
        jax.random.uniform(jax.random.key(3), (count,)),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    expected = count * distribution(np.asarray(logits, np.float64), 1.0, 0, 1.0)
    found = np.bincount(np.asarray(tokens), minlength=6)
    assert ((found - expected) ** 2 / expected).sum() < 20.5


def weights_of(probabilities):
    weights = jnp.asarray(probabilities, jnp.float32)[None]
    return weights / weights.max()


@pytest.mark.parametrize(
    ("probabilities", "top_k", "top_p", "kept"),
    [
        # Powers of two, so that shares are exact.
        ([1 / 2, 1 / 4, 1 / 8, 1 / 8], 1, 1.0, [0]),
        ([1 / 8, 1 / 2, 1 / 8, 1 / 4], 2, 1.0, [1, 3]),
        ([1 / 2, 1 / 4, 1 / 8, 1 / 8], 3, 1.0, [0, 1, 2, 3]),  # a tie at the boundary
        ([1 / 4] * 4, 2, 1.0, [0, 1, 2, 3]),
        ([1 / 2, 1 / 4, 1 / 8, 1 / 8], 4, 1.0, [0, 1, 2, 3]),
        ([1 / 2, 1 / 4, 1 / 8, 1 / 8], 100, 1.0, [0, 1, 2, 3]),
        ([1 / 2, 1 / 4, 1 / 8, 1 / 8], 0, 0.5, [0]),  # reached exactly
        ([1 / 2, 1 / 4, 1 / 8, 1 / 8], 0, 0.51, [0, 1]),
        ([1 / 2, 1 / 4, 1 / 8, 1 / 8], 0, 0.75, [0, 1]),
        ([1 / 2, 1 / 4, 1 / 8, 1 / 8], 0, 0.76, [0, 1, 2, 3]),  # ties again
        ([1 / 8, 1 / 8, 1 / 2, 1 / 4], 0, 1e-6, [2]),
        ([1 / 8, 1 / 8, 1 / 2, 1 / 4], 0, 1e-30, [2]),
        ([1 / 4] * 4, 0, 1e-6, [0, 1, 2, 3]),
        # Top-p counts what top-k leaves: 1/2 of 3/4 is 2/3.
        ([1 / 2, 1 / 4, 1 / 8, 1 / 8], 2, 0.6, [0]),
        ([1 / 2, 1 / 4, 1 / 8, 1 / 8], 2, 0.7, [0, 1]),
        # Neighbouring floats are told apart.
        ([1.0, 0.5, np.nextafter(np.float32(0.5), np.float32(0)), 0.25], 2, 1.0, [0, 1]),
        # Far below the largest, down to the smallest normal numbers.
        ([1.0, 1e-30, 1e-37, 0.0], 3, 1.0, [0, 1, 2]),
        ([1.0, 0.0, 0.0, 0.0], 2, 1.0, None),
    ],
)
def test_truncation_by_hand(probabilities, top_k, top_p, kept):
    weights = weights_of(probabilities)
    truncated = np.asarray(truncate(weights, top_k, top_p))
    if kept is None:  # nothing with a weight may be lost
        assert truncated[0, 0] == 1.0
        return
    assert list(np.nonzero(truncated[0])[0]) == kept
    np.testing.assert_array_equal(truncated[0, kept], np.asarray(weights)[0, kept])


def test_truncation_of_random_rows():
    """Sets by sorting for 40 rows at a time, with ties by construction (few distinct values)."""
    rng = np.random.default_rng(0)
    logits = rng.integers(-8, 3, (40, 50)) / 2.0
    for top_k, top_p in ((0, 0.3), (7, 1.0), (20, 0.9), (1, 1.0), (3, 0.5)):
        weights = jnp.exp(jnp.asarray(logits - logits.max(1, keepdims=True), jnp.float32))
        kept = np.asarray(truncate(weights, top_k, top_p)) > 0
        expected = np.stack([distribution(row, 1.0, top_k, top_p) > 0 for row in logits])
        np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (1.0, 0, 0.5), (1.0, 1, 1.0)])
def test_temperature_zero_is_greedy(settings):
    """A peer divides by zero here: NaN log-probabilities and arbitrary tokens."""
    _, top_k, top_p = settings
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (6, 40)), jnp.float32)
    uniform = jnp.linspace(SMALLEST, LARGEST, 6)
    tokens, logprobs, policy = jitted(logits, uniform, temperature=0.0, top_k=top_k, top_p=top_p)
    np.testing.assert_array_equal(tokens, logits.argmax(1))
    np.testing.assert_array_equal(logprobs, 0.0)
    np.testing.assert_allclose(policy, jax.nn.log_softmax(logits).max(axis=1), atol=2e-6)
    # Which is what one candidate, and a very low temperature, come to.
    for temperature, k in ((1.0, 1), (1e-3, 0)):
        same, logprobs, _ = jitted(logits, uniform, temperature=temperature, top_k=k, top_p=1.0)
        np.testing.assert_array_equal(tokens, same)
        np.testing.assert_allclose(logprobs, 0.0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [5, 128, 300])
def test_extreme_uniforms_never_pick_a_token_without_weight(vocab):
    """Zeros at both ends of the row and of every block of it."""
    weights = np.random.default_rng(0).random(vocab).astype(np.float32)
    weights[[0, 1, vocab - 1]] = 0.0
    weights[128::128] = weights[127::128] = 0.0
    weights = jnp.asarray(np.stack([weights, np.eye(vocab, dtype=np.float32)[vocab // 2]]))
    for value in (SMALLEST, 2.0**-24, 0.5, LARGEST):
        tokens = pick(weights, jnp.full(2, value, jnp.float32))
        assert (np.asarray(weights)[[0, 1], tokens] > 0).all()
        assert tokens[1] == vocab // 2
    positive = np.nonzero(np.asarray(weights[0]))[0]
    assert pick(weights, jnp.full(2, SMALLEST))[0] == positive[0]
    assert pick(weights, jnp.full(2, LARGEST, jnp.float32))[0] == positive[-1]


@pytest.mark.parametrize("seed", range(4))
def test_uniforms_at_the_steps_never_pick_a_token_without_weight(seed):
    """Partial sums of a parallel scan round apart, so that they can rise where the weight is 0.

    Uniforms next to every step of the cumulative sum look for it; before the fix they found it
    six times in ten thousand.
    """
    rng = np.random.default_rng(seed)
    vocab, count = 1000, 13_000
    weights = (rng.random(vocab) * (rng.random(vocab) < 0.3)).astype(np.float32)
    steps = np.cumsum(weights.astype(np.float64))
    near = np.floor(steps / steps[-1] * 2**23)[:, None] + np.arange(-6, 7)
    uniform = jnp.asarray(np.clip(near.ravel(), 0, 2**23 - 1) / 2**23, jnp.float32)
    tokens = pick(jnp.broadcast_to(jnp.asarray(weights), (count, vocab)), uniform)
    assert (weights[np.asarray(tokens)] > 0).all()


def test_rows_are_independent():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 2, (5, 33)), jnp.float32)
    uniform = jnp.asarray(rng.random(5), jnp.float32)
    settings = {"temperature": 0.9, "top_k": 9, "top_p": 0.8}
    together = jitted(logits, uniform, **settings)
    for i in range(5):
        token, logprob, _ = jitted(logits[i : i + 1], uniform[i : i + 1], **settings)
        assert token[0] == together[0][i]
        assert float(logprob[0]) == pytest.approx(float(together[1][i]), abs=1e-6)


def test_large_logits_stay_finite():
    logits = jnp.array([[1e6, -3e38, 0.0], [-1e4, -1e4 - 10, -3e38]], jnp.float32)
    for temperature in (1.0, 0.1):
        draw_ = partial(jitted, temperature=temperature, top_k=0, top_p=0.9)
        tokens, logprobs, policy = draw_(logits, jnp.array([0.5, 0.0]))
        assert tokens.tolist() == [0, 0]
        assert np.isfinite(logprobs).all() and np.isfinite(policy).all()


def tied_rows(rng, rows, vocab):
    """Rows of spread values, of few values, of near ties, and of a single one that counts."""
    logits = rng.normal(0, rng.choice([0.3, 2.0, 6.0], (rows, 1)), (rows, vocab))
    logits[1::4] = np.round(logits[1::4] * 2) / 2
    logits[2::4] = 1.0 + np.round(logits[2::4]) * 2.0**-22
    logits[3::4, 1:] = -np.inf
    return logits.astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [2, 127, 129, 1001, 4096])
def test_kept_sets_by_a_loop_over_the_tokens(vocab):
    """A set, from the likeliest token down, ends where the count or the share is reached."""
    logits = tied_rows(np.random.default_rng(vocab), 12, vocab)
    weights = np.asarray(jnp.exp(logits - logits.max(axis=1, keepdims=True)))
    cut = jax.jit(truncate, static_argnums=(1, 2, 3))
    # A share is off by half a unit of 2^-29 a token at most: what is that close is left open.
    slack = vocab * 2.0**-30 + 2.0**-24
    for top_k, top_p, min_p in ((3, 1.0, 0.0), (0, 0.95, 0.0), (0, 0.3, 0.0), (50, 0.9, 0.02)):
        kept = np.asarray(cut(weights, top_k, top_p, min_p)) > 0
        for row, found in zip(weights.astype(np.float64), kept, strict=True):
            left = row
            if 0 < top_k < vocab:
                left = np.where(row >= np.sort(row)[-top_k], row, 0.0)
            reached = []
            for share in (top_p - slack, top_p + slack) if top_p < 1.0 else (1.0, 1.0):
                mass, bound = 0.0, 0.0
                for value in np.unique(left[left > 0])[::-1]:
                    bound, mass = value, mass + left[left == value].sum()
                    if mass >= share * left.sum() and top_p < 1.0:
                        break
                reached.append((left >= bound) & (left > 0) & (left >= np.float32(min_p)))
            assert (reached[0] <= found).all() and (found <= reached[1]).all()


@pytest.mark.slow
def test_ids_that_do_not_exist_are_never_drawn():
    """A row with -inf everywhere else is a certainty, whatever the settings."""
    logits = np.full((4, 300), -np.inf, np.float32)
    logits[range(4), [0, 128, 299, 7]] = [-50.0, 3.0, 0.0, 1e4]
    uniform = jnp.asarray([SMALLEST, 0.5, 0.9, LARGEST], jnp.float32)
    for temperature, top_k, top_p, min_p in [*SETTINGS, (0.0, 0, 1.0, 0.0), (1.0, 2, 0.99, 0.5)]:
        tokens, logprobs, policy = jitted(
            logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
        assert tokens.tolist() == [0, 128, 299, 7]
        np.testing.assert_allclose(logprobs, 0.0, atol=1e-6)
        np.testing.assert_allclose(policy, 0.0, atol=1e-6)


def test_the_policys_logprob_is_free_where_it_is_the_one_drawn_from():
    logits, uniform = jnp.zeros((2, 5)), jnp.zeros(2)
    _, logprob, policy = draw(logits, uniform, temperature=1.0, top_k=0, top_p=1.0)
    assert policy is logprob
    _, logprob, policy = draw(logits, uniform, temperature=1.0, top_k=5, top_p=1.0)
    assert policy is logprob


def test_no_sort_of_the_vocabulary():
    """Sorting 152k logits per token is what makes a peer's top-p 2.6 times slower."""
    text = str(
        jax.make_jaxpr(partial(draw, temperature=1.0, top_k=20, top_p=0.9, min_p=0.1))(
            jnp.zeros((2, 300)), jnp.zeros(2)
        )
    )
    assert " sort[" not in text and " top_k[" not in text
    assert " sort[" in str(jax.make_jaxpr(jnp.sort)(jnp.zeros(3)))  # what one would look like
