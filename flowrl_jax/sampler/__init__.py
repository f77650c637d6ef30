"""The sampler: from prompts to responses with their log-probabilities."""

from flowrl_jax.sampler.generate import generate, rollout_key
from flowrl_jax.sampler.settings import SamplerConfig

__all__ = ["SamplerConfig", "generate", "rollout_key"]
