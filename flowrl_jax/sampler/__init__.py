"""The sampler: from prompts to responses with their log-probabilities."""

from flowrl_jax.sampler.generate import Finished, Response, generate, rollout_key
from flowrl_jax.sampler.settings import SamplerConfig
from flowrl_jax.sampler.stops import StopTable, cut_at_stop

__all__ = [
    "Finished",
    "Response",
    "SamplerConfig",
    "StopTable",
    "cut_at_stop",
    "generate",
    "rollout_key",
]
