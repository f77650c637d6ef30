"""Tests of the kernels for CPUs, which want a compiler."""

import pytest

from flowrl_jax.native import library

NATIVE = pytest.mark.skipif(
    bool(library.missing()), reason=f"needs a C++ compiler: {library.missing()}"
)
