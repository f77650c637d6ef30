"""The benchmarks of the paper: which data set, which task, and how their answers are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flowrl_jax.errors import InputError
from flowrl_jax.tasks.base import nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        samples: per prompt.
        temperature: 0 is greedy.
        top_p: 1 keeps all tokens.
        top_k: 0 keeps all tokens.
    """

    samples: int = 16
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0


PAPER = Sampling()
"""As arXiv 2509.15207 says it."""
RELEASE = Sampling(top_k=50)
"""As the released scripts draw: they leave top_k at their config's 50, which the paper does not
mention."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A data set with the task that asks and judges it.

    Attributes:
        dataset: name in `datasets.pipeline.BUILDERS`.
        task: name in `tasks.TASKS`.
        split: of the data set.
        dataset_options: settings of the data set.
        task_options: settings of the task.
        sampling: how responses are drawn.
    """

    dataset: str
    task: str
    split: str = "test"
    dataset_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: Sampling = PAPER


def _public(name: str, task: str, **options: Any) -> Benchmark:
    """A set of `datasets.catalog`."""
    return Benchmark(dataset="prompts", dataset_options={"test": name}, task=task, **options)


# The paper grades what it reports with math-verify, and not with the reward of training.
_SEMANTIC = {"verifier": "semantic"}
_MATH = ("gsm8k", "math500", "aime24", "aime25", "amc23", "minerva", "olympiadbench")
_CODE = ("humaneval", "humanevalplus", "mbpp", "livecodebench", "codeforces")

BENCHMARKS: Mapping[str, Benchmark] = {
    **{name: _public(name, "math", task_options=_SEMANTIC) for name in _MATH},
    **{name: _public(name, "code") for name in _CODE},
    "countdown": Benchmark(dataset="countdown", task="countdown"),
    "game24": _public("game24", "countdown"),
}
"""Name -> benchmark."""


def benchmarks(names: str) -> dict[str, Benchmark]:
    """The benchmarks that a command line names.

    Args:
        names: separated by commas, such as "aime24,math500".

    Returns:
        Name -> benchmark, in the order of the names.

    Raises:
        InputError: a name is unknown or occurs twice, or there is none.
    """
    found: dict[str, Benchmark] = {}
    for name in names.split(","):
        if name not in BENCHMARKS:
            raise InputError(f"benchmark {name!r}: unknown; {nearest(name, BENCHMARKS)}")
        if name in found:
            raise InputError(f"benchmark {name!r} is named twice: name it once")
        found[name] = BENCHMARKS[name]
    return found
