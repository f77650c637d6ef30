"""The arms of the comparison: each objective with a small grid of the knob that holds it back.

All arms but one have three settings of that knob, and all the same three learning rates. Of policy
gradients it is the weight of a KL penalty, so that each has a frontier and not a point; of the flow
family it is beta, from what keeps most to the published value.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flowrl_jax.objectives.policy_gradient import PolicyGradientConfig
from flowrl_jax.objectives.presets import PRESETS

_PENALTIES = (0.01, 0.1, 0.3)
_BALANCE_BETAS = (3.0, 6.0, 15.0)
_FLOWRL_BETAS = (0.5, 1.0, 15.0)
_RAW_BETAS = (1.0, 2.0, 6.0)
RESET_EVERY = 100
OURS: Any = PRESETS["flowrl"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """An objective in the comparison.

    Attributes:
        label: for the table.
        family: "policy gradient", "flow", "control" or "ablation".
        settings: objective configs by the name of their setting.
        learning: fields of `LearnConfig` that the arm sets.
    """

    label: str
    family: str
    settings: Mapping[str, Any]
    learning: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _sweep(objective: Any, field: str, values: tuple[float, ...]) -> dict[str, Any]:
    return {f"{field}={x:g}": dataclasses.replace(objective, **{field: x}) for x in values}


def _penalized(label: str, preset: Any, family: str = "policy gradient", **learning: Any) -> Arm:
    objective = PRESETS[preset] if isinstance(preset, str) else preset
    return Arm(label, family, _sweep(objective, "kl_coef", _PENALTIES), learning)


def _flow(label: str, objective: Any, betas: tuple[float, ...], family: str = "flow") -> Arm:
    return Arm(label, family, _sweep(objective, "beta", betas))


def _vary(**changes: Any) -> Any:
    """Ours with one part changed."""
    return dataclasses.replace(OURS, **changes)


# Plain, unclipped and without a penalty: what is left of FlowRL without its squared term.
_UNCLIPPED = PolicyGradientConfig(clip="none", aggregation="sequence")

ARMS: dict[str, Arm] = {
    "reinforce_pp": _penalized("REINFORCE++", "reinforce_pp"),
    "reinforce_pp_baseline": _penalized("REINFORCE++ baseline", "reinforce_pp_baseline"),
    "ppo": _penalized("PPO", "ppo"),
    "grpo": _penalized("GRPO", "grpo"),
    "dr_grpo": _penalized("Dr.GRPO", "dr_grpo"),
    "dapo": _penalized("DAPO", "dapo", only_varied=True),
    "gspo": _penalized("GSPO", "gspo"),
    "gmpo": _penalized("GMPO", "gmpo"),
    "cispo": _penalized("CISPO", "cispo_trl"),
    "prorl": _penalized("ProRL", "prorl", only_varied=True, reset_every=RESET_EVERY),
    "flowrl_paper": _flow("FlowRL, paper", PRESETS["flowrl_paper"], _FLOWRL_BETAS),
    "flowrl_recipe": _flow("FlowRL, recipe", PRESETS["flowrl_recipe"], _FLOWRL_BETAS),
    "flowrl_no_z": _flow("FlowRL, log Z = 0", PRESETS["flowrl_no_z"], _FLOWRL_BETAS),
    "gflowrl": _flow("GFlowRL, re-stated", PRESETS["gflowrl"], (1.0, 3.0, 8.0)),
    "gvpo": _flow("GVPO", PRESETS["gvpo"], _BALANCE_BETAS),
    "tb": _flow("TB, learned log Z", PRESETS["tb"], _BALANCE_BETAS),
    "tb_ema": _flow("TB, running mean", PRESETS["tb_ema"], _BALANCE_BETAS),
    "tb_vargrad": _flow("TB, VarGrad", PRESETS["tb_vargrad"], _BALANCE_BETAS),
    "ftb_forward_kl": _flow("TB, forward KL", PRESETS["ftb_forward_kl"], _BALANCE_BETAS),
    "ftb_jensen_shannon": _flow(
        "TB, Jensen-Shannon", PRESETS["ftb_jensen_shannon"], _BALANCE_BETAS
    ),
    "subtb": _flow("SubTB", PRESETS["subtb"], _BALANCE_BETAS),
    "detailed_balance": _flow("Detailed balance", PRESETS["detailed_balance"], _BALANCE_BETAS),
    "flowrl": _flow("FlowRL, ours", OURS, _BALANCE_BETAS),
    "flowrl_length": _flow(
        "ours, length-normalised", _vary(length_normalize=True), _RAW_BETAS, "ablation"
    ),
    "flowrl_group_norm": _flow(
        "ours, group-normalised rewards", _vary(reward_norm="group"), (1.0, 3.0, 15.0), "ablation"
    ),
    "flowrl_head": _flow(
        "ours, learned log Z",
        _vary(log_z=dataclasses.replace(OURS.log_z, kind="head")),
        _BALANCE_BETAS,
        "ablation",
    ),
    "flowrl_no_log_z": _flow(
        "ours, log Z = 0",
        _vary(log_z=dataclasses.replace(OURS.log_z, kind="zero")),
        _BALANCE_BETAS,
        "ablation",
    ),
    "flowrl_max": _flow(
        "ours, weights at most 10", _vary(weight="max", weight_max=10.0), _BALANCE_BETAS, "ablation"
    ),
    "rloo_kl": Arm(
        "RLOO + KL in the reward",
        "control",
        {
            f"beta={beta:g}": dataclasses.replace(PRESETS["rloo"], kl_coef=1.0 / beta)
            for beta in _BALANCE_BETAS
        },
    ),
    "grpo_kl": Arm(
        "GRPO, k3 KL between",
        "control",
        _sweep(PRESETS["grpo"], "kl_coef", (0.03, 0.06, 0.2)),
    ),
    "grpo_k2": Arm(
        "GRPO, k2 KL",
        "control",
        _sweep(PolicyGradientConfig(kl_estimator="k2"), "kl_coef", (0.1, 0.3, 1.0)),
    ),
    "grpo_entropy": Arm(
        "GRPO unclipped + entropy",
        "control",
        _sweep(_UNCLIPPED, "entropy_coef", (0.03, 0.1, 0.3)),
    ),
    "grpo_unclipped": Arm("FlowRL without its square", "control", {"": _UNCLIPPED}),
}

# Arms whose staleness is swept, with the setting that it is swept at.
STALE_ARMS = {
    "flowrl": "beta=6",
    "flowrl_max": "beta=6",
    "tb_vargrad": "beta=6",
    "rloo_kl": "beta=6",
    "flowrl_recipe": "beta=1",
    "grpo": "kl_coef=0.01",
    "gspo": "kl_coef=0.01",
}
STALENESS = (0, 1, 4, 16)
