"""Rotary positions, and the ways in which families stretch them over longer texts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

Rotation = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by a number (Chen et al., arXiv 2306.15595).

    Attributes:
        factor: what they are divided by.
    """

    factor: float

    def stretch(self, frequency: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        """Scaled frequencies, and what sines and cosines are multiplied by."""
        del theta
        return frequency / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Long waves are stretched, short ones stay, those between are blended (Llama 3.1).

    Attributes:
        factor: by which long waves are stretched.
        low_freq_factor: waves longer than `original_length` over this are long.
        high_freq_factor: waves shorter than `original_length` over this are short.
        original_length: tokens of the texts before the model was extended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: float

    def stretch(self, frequency: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        """Scaled frequencies, and what sines and cosines are multiplied by."""
        del theta
        turns = self.original_length * frequency / (2.0 * math.pi)
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return (1.0 - blend) * frequency / self.factor + blend * frequency, 1.0


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Dimensions that turn seldom are stretched, the others stay (YaRN, arXiv 2309.00071).

    Attributes:
        factor: by which slow dimensions are stretched.
        original_length: tokens of the texts before the model was extended.
        beta_fast: dimensions with more turns over the original length stay.
        beta_slow: dimensions with fewer turns are stretched in full.
        amplitude: multiplies sines and cosines, and so the attention's scores by its square.
        truncate: whether the bounds between the dimensions are rounded to whole ones.
    """

    factor: float
    original_length: float
    beta_fast: float
    beta_slow: float
    amplitude: float
    truncate: bool = True

    def stretch(self, frequency: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        """Scaled frequencies, and what sines and cosines are multiplied by."""
        half = frequency.size

        def dimension(turns: float) -> float:
            """The dimension, of `half`, that turns so often over the original length."""
            return half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(half) - low) / (high - low), 0.0, 1.0)
        return frequency / self.factor * ramp + frequency * (1.0 - ramp), self.amplitude


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


def rotary_table(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Rotation:
    """Sines and cosines by which `rotary` turns heads.

    Angles are float32: in bfloat16 position 257 would round to 256.

    Args:
        positions: `[B, T]` int32.
        head_dim: H.
        theta: base of the frequencies.
        scaling: how the model stretches them; not at all without one.

    Returns:
        Two arrays `[B, 1, T, H / 2]` float32.
    """
    frequency, amplitude = theta ** (-np.arange(0, head_dim, 2) / head_dim), 1.0
    if scaling is not None:
        frequency, amplitude = scaling.stretch(frequency, theta)
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency.astype(np.float32)
    return jnp.sin(angle) * amplitude, jnp.cos(angle) * amplitude


def rotary(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates pairs (i, i + H/2) of each head by the position (Llama's half-split layout).

    Args:
        x: `[B, N, T, H]`.
        rotation: from `rotary_table`.
    """
    sin, cos = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
