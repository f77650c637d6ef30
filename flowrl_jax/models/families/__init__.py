"""Families of models: what their config.json says, and what their tensors are called."""

from flowrl_jax.models.families.common import Family
from flowrl_jax.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from flowrl_jax.models.families.llama import LLAMA, MISTRAL
from flowrl_jax.models.families.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA, GEMMA2, GEMMA3)
}
"""By `model_type`. A decoder that several can express is saved as the first of them."""
