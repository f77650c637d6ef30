"""Objectives by the name of the paper or implementation that they reproduce.

`docs/objective.md` says where the FlowRL paper and its releases differ and what each means.
"""

import dataclasses

from flowrl_jax.objectives.flowrl import FlowRLConfig
from flowrl_jax.objectives.grpo import GRPOConfig
from flowrl_jax.objectives.log_z import LogZConfig
from flowrl_jax.objectives.policy_gradient import PolicyGradientConfig
from flowrl_jax.objectives.ppo import PPOConfig
from flowrl_jax.objectives.subtb import SubTBConfig

# A log Z that starts at 0, has no dropout and leaves the policy's features alone.
_QUIET_HEAD = LogZConfig(pooling="all", detach=True, zero_init=True, dropout=0.0)
# Trajectory balance of whole responses and raw rewards, where beta is the inverse temperature
# itself. 6 is ours: a right answer gains e^6, which takes a reference that is right once in a
# hundred to four in five, and one in ten to 98 %.
_BALANCE = FlowRLConfig(
    beta=6.0,
    weight="unit",
    length_normalize=False,
    reward_norm="none",
    log_z=LogZConfig(kind="group"),
)

PRESETS: dict[str, FlowRLConfig | GRPOConfig | PolicyGradientConfig | PPOConfig | SubTBConfig] = {
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
    # What we recommend: it ends at pi_ref exp(beta r) / Z. log Z is the group's, the weights are
    # the paper's; docs/objective.md and docs/comparison.md have the reasons.
    "flowrl": dataclasses.replace(
        _BALANCE, weight="two_sided", log_z=dataclasses.replace(_QUIET_HEAD, kind="group")
    ),
    # The published form at a beta that leaves room for more than one answer, and a quiet log Z.
    "flowrl_per_token": FlowRLConfig(
        beta=1.0,
        weight="max",
        weight_max=10.0,
        log_z=_QUIET_HEAD,
    ),
    # The two variants of verl_FlowRL: log Z is 0, and the reference may be the old policy.
    "flowrl_no_z": FlowRLConfig(weight="max", log_z=LogZConfig(kind="zero")),
    "flowrl_old_ref": FlowRLConfig(weight="max", reference="old", log_z=LogZConfig(kind="zero")),
    # arXiv 2201.13259, by what stands for log Z: a head, a number per prompt (the newest visit's,
    # or a running mean of them), or the group's own (TB-VarGrad; TBA, arXiv 2503.18929).
    "tb": dataclasses.replace(_BALANCE, log_z=_QUIET_HEAD),
    "tb_table": dataclasses.replace(_BALANCE, log_z=LogZConfig(kind="table", table_rate=1.0)),
    "tb_ema": dataclasses.replace(_BALANCE, log_z=LogZConfig(kind="table", table_rate=0.3)),
    "tb_vargrad": _BALANCE,
    # arXiv 2605.15417.
    "ftb_forward_kl": dataclasses.replace(_BALANCE, divergence="forward_kl"),
    "ftb_jensen_shannon": dataclasses.replace(_BALANCE, divergence="jensen_shannon"),
    # arXiv 2504.19599; its beta of 0.1 is the inverse of ours.
    "gvpo": dataclasses.replace(_BALANCE, beta=10.0, reward_norm="center", reference="old"),
    # arXiv 2607.13394, from third-party notes, which do not give the bound of the weight.
    "gflowrl": FlowRLConfig(
        beta=8.0,
        weight="max",
        weight_max=1.2,
        reward_norm="none",
        gap_low=0.2,
        gap_high=0.28,
        log_z=LogZConfig(kind="group_old"),
    ),
    "grpo": GRPOConfig(),
    # arXiv 2503.20783: no deviation, no mean over a response's own length.
    "dr_grpo": PolicyGradientConfig(reward_norm="center", aggregation="constant"),
    # arXiv 2503.14476, with the dual clip of its verl recipe.
    "dapo": PolicyGradientConfig(clip_high=0.28, dual_clip=10.0, aggregation="token"),
    # arXiv 2505.24864: the loss; its coefficient of the penalty is not published.
    "prorl": PolicyGradientConfig(clip_high=0.4, aggregation="token", kl_coef=1e-3),
    # arXiv 2402.14740, with the clipped ratio of whole responses of TRL's trainer.
    "rloo": PolicyGradientConfig(
        reward_norm="leave_one_out",
        ratio="sequence",
        kl_coef=0.05,
        kl_estimator="k1",
        kl_in="reward",
    ),
    # arXiv 2501.03262.
    "reinforce_pp": PolicyGradientConfig(
        reward_norm="batch",
        aggregation="token",
        kl_coef=1e-3,
        kl_estimator="k1",
        kl_in="reward",
    ),
    "reinforce_pp_baseline": PolicyGradientConfig(
        reward_norm="center_batch", aggregation="token", kl_coef=1e-3, kl_estimator="k2"
    ),
    # arXiv 2507.18071.
    "gspo": PolicyGradientConfig(ratio="geometric", clip_low=3e-4, clip_high=4e-4),
    "gspo_token": PolicyGradientConfig(ratio="geometric_token", clip_low=3e-4, clip_high=4e-4),
    # arXiv 2507.20673.
    "gmpo": PolicyGradientConfig(ratio="geometric", clip="log", clip_low=0.4, clip_high=0.4),
    # arXiv 2506.13585; TRL's `epsilon_high=5` is the cap itself, verl clips on both sides.
    "cispo_trl": PolicyGradientConfig(
        clip="cispo", clip_low=1.0, clip_high=4.0, aggregation="token"
    ),
    "cispo_verl": PolicyGradientConfig(clip="cispo", aggregation="token"),
    # arXiv 1707.06347 with verl's defaults, and with those of TRL's trainer.
    "ppo": PPOConfig(),
    "ppo_trl": PPOConfig(lam=0.95, value_clip=0.2, value_coef=0.1, kl_coef=0.05),
    # arXiv 2209.12782 and, with windows of one token alone, arXiv 2111.09266.
    "subtb": SubTBConfig(),
    "detailed_balance": SubTBConfig(kind="detailed_balance"),
}
