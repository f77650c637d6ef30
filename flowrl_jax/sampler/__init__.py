"""The sampler: from prompts to responses with their log-probabilities."""

from flowrl_jax.sampler.generate import Finished, generate, rollout_key
from flowrl_jax.sampler.settings import SamplerConfig

__all__ = ["Finished", "SamplerConfig", "generate", "rollout_key"]
