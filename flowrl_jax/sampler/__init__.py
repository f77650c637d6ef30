"""The sampler: one XLA program from prompts to responses with their log-probabilities."""

from flowrl_jax.sampler.generate import SamplerConfig, generate, rollout_key

__all__ = ["SamplerConfig", "generate", "rollout_key"]
