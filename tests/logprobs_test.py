"""Chunked log-probabilities against `log_softmax` of the whole logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from flowrl_jax.logprobs import token_logprobs

B, T, D, V = 3, 7, 5, 23


def chunked(hidden, unembedding, targets, temperature, chunk) -> Any:
    return token_logprobs(hidden, unembedding, targets, temperature, chunk)


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(0, 1, (B, T, D)), dtype)
    unembedding = jnp.asarray(rng.normal(0, 1, (D, V)), dtype)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    # Some tokens with no weight, as padding has.
    cotangent = jnp.asarray(rng.normal(0, 1, (B, T)) * (rng.random((B, T)) < 0.8), jnp.float32)
    return hidden, unembedding, targets, cotangent


def whole(hidden, unembedding, targets, temperature):
    """The textbook: all logits at once."""
    logits = jnp.einsum("btd,dv->btv", hidden, unembedding) / temperature
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_values_and_gradients(chunk, temperature):
    """Chunks of one token, that do not divide T, that are T, and that are longer than T."""
    hidden, unembedding, targets, cotangent = inputs()
    ours, pull = jax.vjp(
        lambda h, w: chunked(h, w, targets, temperature, chunk), hidden, unembedding
    )
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (hidden, unembedding)]
        expected, pull_wide = jax.vjp(lambda h, w: whole(h, w, targets, temperature), *wide)
        expected_grads = pull_wide(jnp.asarray(np.asarray(cotangent), jnp.float64))
    assert ours.dtype == jnp.float32
    # Float32 sums of D = 5 and V = 23 terms of size 1 to 10 against float64.
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(pull(cotangent), expected_grads, strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-5)


def capped(hidden, unembedding, targets, temperature, softcap, count):
    """The textbook of a soft-capped vocabulary of which only the first ids exist."""
    logits = jnp.einsum("btd,dv->btv", hidden, unembedding)[..., :count]
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    logprobs = jax.nn.log_softmax(logits / temperature)
    return jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]


@pytest.mark.slow
@pytest.mark.parametrize(("softcap", "count"), [(2.0, 0), (0.0, 19), (1.5, 20)])
def test_soft_caps_and_ids_that_do_not_exist(softcap, count):
    hidden, unembedding, targets, cotangent = inputs()
    targets = jnp.minimum(targets, (count or V) - 1)
    ours, pull = jax.vjp(
        lambda h, w: token_logprobs(h, w, targets, 0.7, 3, softcap, count), hidden, unembedding
    )
    expected, pull_whole = jax.vjp(
        lambda h, w: capped(h, w, targets, 0.7, softcap, count or V), hidden, unembedding
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(pull(cotangent), pull_whole(cotangent), strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-5)
    # Rows that pad the vocabulary never move.
    if count:
        assert not pull(cotangent)[1][:, count:].any()


def test_far_logits_do_not_overflow():
    hidden, unembedding, targets, _ = inputs()
    logprobs = chunked(100.0 * hidden, unembedding, targets, 0.1, 3)
    assert np.isfinite(logprobs).all() and (logprobs <= 0.0).all()


def test_bfloat16_is_reduced_in_float32():
    """From bfloat16 inputs, products and sums are float32: only the inputs are rounded."""
    hidden, unembedding, targets, cotangent = inputs(jnp.bfloat16)
    expected = whole(
        hidden.astype(jnp.float32), unembedding.astype(jnp.float32), targets, temperature=1.0
    )
    ours, pull = jax.vjp(lambda h, w: chunked(h, w, targets, 1.0, 2), hidden, unembedding)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert [grad.dtype for grad in pull(cotangent)] == [jnp.bfloat16, jnp.bfloat16]


def shapes_in(jaxpr):
    """Sizes of all arrays in a program and in those that it calls."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.size
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


def test_logits_of_a_row_never_exist_at_once():
    """Neither forward nor backward makes an array of B x T x V, or more than a chunk's share."""
    batch, length, width, vocab, chunk = 2, 64, 8, 512, 16
    hidden = jnp.zeros((batch, length, width))
    unembedding = jnp.zeros((width, vocab))
    targets = jnp.zeros((batch, length), jnp.int32)

    def ours(hidden, unembedding):
        return chunked(hidden, unembedding, targets, 1.0, chunk).sum()

    def textbook(hidden, unembedding):
        return whole(hidden, unembedding, targets, 1.0).sum()

    def largest(function):
        program = jax.make_jaxpr(jax.value_and_grad(function, argnums=(0, 1)))(hidden, unembedding)
        return max(shapes_in(program.jaxpr))

    assert largest(textbook) == batch * length * vocab
    assert largest(ours) == batch * chunk * vocab


def test_compiled_memory_is_a_chunks():
    """What XLA reserves shrinks with the chunk."""
    batch, length, width, vocab = 2, 64, 8, 4096
    arguments = (
        jnp.zeros((batch, length, width)),
        jnp.zeros((width, vocab)),
        jnp.zeros((batch, length), jnp.int32),
    )

    def temporary_bytes(chunk):
        loss = lambda h, w, t: chunked(h, w, t, 1.0, chunk).sum()  # noqa: E731
        compiled: Any = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < 0.3 * temporary_bytes(64)
