"""Objectives by the name of the paper or implementation that they reproduce.

`docs/objective.md` says where the FlowRL paper and its releases differ and what each means.
"""

from flowrl_jax.objectives.flowrl import FlowRLConfig
from flowrl_jax.objectives.grpo import GRPOConfig
from flowrl_jax.objectives.log_z import LogZConfig

PRESETS: dict[str, FlowRLConfig | GRPOConfig] = {
    # arXiv 2509.15207: two-sided clip, log Z from the mean over all prompt tokens.
    "flowrl_paper": FlowRLConfig(
        weight="two_sided", clip_low=0.2, clip_high=0.2, log_z=LogZConfig(pooling="all")
    ),
    # First release (2025-09-18): the clipped weight is computed there but not used.
    "flowrl_release": FlowRLConfig(weight="none", log_z=LogZConfig(pooling="drop_last")),
    # verl recipe (2025-12-04): one-sided clip at 10.
    "flowrl_recipe": FlowRLConfig(
        weight="max", weight_max=10.0, log_z=LogZConfig(pooling="drop_last")
    ),
    # What we recommend: a beta that leaves room for more than one answer, and a log Z that starts
    # at 0, has no dropout and leaves the policy's features alone.
    "flowrl": FlowRLConfig(
        beta=1.0,
        weight="max",
        weight_max=10.0,
        log_z=LogZConfig(pooling="all", detach=True, zero_init=True, dropout=0.0),
    ),
    "grpo": GRPOConfig(),
}
