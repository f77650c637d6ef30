"""Masked reductions against numpy's masked arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.masking import masked_mean, masked_sum, positions_from_mask


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", [bool, np.float32, np.int32])
def test_reductions(axis, dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 5)).astype(np.float32)
    mask = rng.random((4, 5)) < 0.6
    mask[2] = False  # a row without anything
    poisoned = jnp.asarray(np.where(mask, x, np.nan))
    masked = np.ma.masked_array(x, ~mask)
    given = jnp.asarray(mask.astype(dtype))
    # Sums of at most 20 float32 numbers of size 1, in another order.
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(
        masked_sum(poisoned, given, axis), np.ma.filled(masked.sum(axis), 0.0), **close
    )
    np.testing.assert_allclose(
        masked_mean(poisoned, given, axis), np.ma.filled(masked.mean(axis), 0.0), **close
    )


def test_padding_gets_no_gradient():
    """NaN in the padding reaches neither the value nor, as 0 times NaN, the gradient."""
    x = jnp.array([[1.0, jnp.nan], [2.0, 3.0]])
    mask = jnp.array([[True, False], [True, True]])
    grad = jax.grad(lambda x: masked_mean(x, mask) ** 2)(x)
    np.testing.assert_allclose(grad, 2 * 2.0 * np.array([[1, 0], [1, 1]]) / 3, rtol=1e-6)


def test_positions_do_not_depend_on_padding():
    mask = jnp.array(
        [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], bool
    )
    positions = positions_from_mask(mask)
    assert positions.dtype == jnp.int32
    for row, real in zip(positions, mask, strict=True):
        assert list(row[real]) == list(range(int(real.sum())))
    assert (positions >= 0).all() and (positions < 5).all()
