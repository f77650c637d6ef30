"""How responses are drawn."""

import dataclasses
from typing import Any

import jax.numpy as jnp

CACHE_DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "int8": jnp.int8}


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How responses are drawn.

    Attributes:
        max_response_length: tokens, the end-of-sequence token included.
        eos_ids: tokens that end a response; they are part of it.
        pad_id: fills the row after the end; never read.
        group_size: samples per prompt; rows of one prompt are adjacent and read it once.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens up to this share; 1 keeps all.
        min_p: keep tokens at least this share as likely as the most likely one; 0 keeps all.
        slots: rows decoded at one time, over all devices; a row that has ended leaves its slot to
            one that waits. 0 means all rows at once.
        cache: what keys and values are kept in: "bfloat16", "float32", "int8", or empty for the
            compute dtype.
        first_columns: response tokens that the cache has room for at first. It grows by half of
            that and more whenever they are used up; where rows wait for slots, rows that outgrow it
            are put aside instead, until all the shorter ones have ended.
        segment: tokens of a row, at most, between two looks of the host at what has ended.
    """

    max_response_length: int
    eos_ids: tuple[int, ...]
    pad_id: int = 0
    group_size: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    slots: int = 0
    cache: str = ""
    first_columns: int = 64
    segment: int = 128

    def __post_init__(self):
        for field in ("max_response_length", "group_size", "first_columns", "segment"):
            if getattr(self, field) < 1:
                raise ValueError(f"sampler.{field}={getattr(self, field)} must be at least 1")
        if self.temperature < 0.0:
            raise ValueError(
                f"sampler.temperature={self.temperature} must not be negative; 0 is greedy"
            )
        for field in ("top_k", "slots"):
            if getattr(self, field) < 0:
                raise ValueError(
                    f"sampler.{field}={getattr(self, field)} must not be negative; 0 means all"
                )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampler.top_p={self.top_p} must be in (0, 1]; 1 keeps all")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"sampler.min_p={self.min_p} must be in [0, 1]; 0 keeps all")
        if self.cache and self.cache not in CACHE_DTYPES:
            raise ValueError(
                f"sampler.cache={self.cache!r} is not known: use one of {', '.join(CACHE_DTYPES)},"
                " or nothing for the compute dtype"
            )

    def cache_dtype(self, compute: Any) -> Any:
        """What keys and values are kept in.

        Args:
            compute: the model's compute dtype.
        """
        return jnp.dtype(CACHE_DTYPES[self.cache] if self.cache else compute)
