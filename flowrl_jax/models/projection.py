"""Products of activations with kernels, whose gradients are summed over devices one by one."""

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from flowrl_jax.models.architecture import PROJECTED
from flowrl_jax.sharding import constrain


def project(
    rows: jax.Array, kernels: tuple[jax.Array, ...], axes: tuple[tuple[str, ...], ...]
) -> tuple[jax.Array, ...]:
    """The same rows times each of some kernels.

    The backward pass has summed a kernel's gradient over devices before it goes on to the next
    kernel's, or from the rows' gradient to what lies below: left to itself, the compiler puts the
    sums off and holds the whole gradients of a layer's kernels at once. A sum may still overlap
    with the product that makes the rows' gradient.

    Args:
        rows: `[R, D]`.
        kernels: the first axes of each make D together; its others, F together, are the result's.
        axes: names of each kernel's axes.

    Returns:
        `[R, F]` for each kernel, in the dtype of the arguments.
    """
    return checkpoint_name(_project(rows, kernels, axes), PROJECTED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(rows: Any, kernels: Any, axes: tuple[tuple[str, ...], ...]) -> Any:
    return tuple(rows @ kernel.reshape(rows.shape[-1], -1) for kernel in kernels)


def _forward(rows: Any, kernels: Any, axes: tuple[tuple[str, ...], ...]):
    # Kernels below adapters are frozen and have no gradient.
    inputs = rows.value if any(kernel.perturbed for kernel in kernels) else None
    values = tuple(kernel.value for kernel in kernels)
    return _project(rows.value, values, axes), (inputs, values)


def _backward(axes: tuple[tuple[str, ...], ...], residuals, cotangents):
    rows, kernels = residuals
    rows_grad: Any = 0
    grads = []
    for kernel, names, cotangent in zip(kernels, axes, cotangents, strict=True):
        width = kernel.size // cotangent.shape[-1]
        rows_grad += cotangent @ kernel.reshape(width, -1).T
        if rows is not None:
            grad = constrain((rows.T @ cotangent).reshape(kernel.shape), *names)
            rows, rows_grad, grad = jax.lax.optimization_barrier((rows, rows_grad, grad))
            grads.append(grad)
    return rows_grad, tuple(grads) or None


_project.defvjp(_forward, _backward, symbolic_zeros=True)
