"""One trial of the comparison: an arm at one setting on one task, over learning rates and seeds."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowrl_jax.assembly import configure_jax
from flowrl_jax.exact.learn import LearnConfig, Run
from flowrl_jax.exact.measures import measure
from flowrl_jax.exact.paths import graph_routes, integer_paths, skewed_prior
from flowrl_jax.exact.problem import Network, Problem, fit, response_logprobs
from flowrl_jax.experiments.arms import ARMS

LANES = 9  # runs that are one program
# Programs that a process keeps: each has hundreds of memory mappings, and Linux allows 65,530.
_PROGRAMS = 16
RATES = (1e-3, 2.5e-3, 6e-3)
_SOLVED = 0.08  # probability of a right answer at the start
_SKEW = 1.0
_TEMPERATURES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
_POLICY = Network()


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task of the comparison.

    Attributes:
        title: for the table.
        build: gives the problem of all prompts.
        parts: sizes of the parts that prompts are cut into: learned from, chosen by, measured on;
            None: all three are all of them.
        rollouts: of a run.
        levels: accuracies at which arms are compared; settings are to end at the last or above.
    """

    title: str
    build: Callable[[], Problem]
    parts: tuple[int, int, int] | None
    rollouts: int
    levels: tuple[float, ...]


TASKS: dict[str, TaskSpec] = {
    "path": TaskSpec("Integer paths", integer_paths, None, 300, (0.5, 0.9)),
    "routes": TaskSpec(
        "Graph routes, held out",
        functools.partial(graph_routes, prompts=72),
        (24, 24, 24),
        600,
        (0.5, 0.7),
    ),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is run.

    Attributes:
        task: name in `TASKS`.
        arm: name in `ARMS`.
        setting: name in the arm's `settings`.
        part: 1: of the prompts that settings are chosen by; 2: of those that are measured.
        rates: learning rates.
        seeds: of samples; as many runs of each rate.
        rollouts: of a run.
        points: at which it is measured.
        staleness: see `LearnConfig`.
    """

    task: str
    arm: str
    setting: str
    part: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    rollouts: int
    points: int
    staleness: int = 0

    @property
    def name(self) -> str:
        """Of its file of results; what is run otherwise is another file."""
        setting = self.setting.replace("=", "") or "none"
        stale = f"-stale{self.staleness}" if self.staleness else ""
        part = ("learn", "choose", "measure")[self.part]
        arm = ARMS[self.arm]
        whole = repr((self, arm.settings[self.setting], sorted(arm.learning.items())))
        digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
        return f"{self.task}-{self.arm}-{setting}{stale}-{part}-{digest}"


def run_trial(trial: Trial, workdir: str) -> str:
    """Runs a trial and writes what was measured, unless it is there already.

    Args:
        trial: what to run.
        workdir: folder of the experiment.

    Returns:
        The file: arrays of `measure` by name, `[rates, seeds, points + 1, prompts]` each.
    """
    file = Path(workdir) / "trials" / f"{trial.name}.npz"
    if file.exists():
        return str(file)
    configure_jax(str(Path(workdir) / "compiled"))
    parts, reference = prepared(trial.task, workdir)
    config = LearnConfig(
        rollouts=trial.rollouts,
        points=trial.points,
        staleness=trial.staleness,
        **ARMS[trial.arm].learning,
    )
    keys = jnp.stack([jax.random.key(seed) for _ in trial.rates for seed in trial.seeds])
    rates = jnp.repeat(jnp.array(trial.rates, jnp.float32), len(trial.seeds))
    if _program.cache_info().currsize == _PROGRAMS:
        _program.cache_clear()
        jax.clear_caches()
    run = _program(ARMS[trial.arm].settings[trial.setting], config)
    measured = parts[trial.part]
    prior = response_logprobs(_POLICY, reference, measured)
    found, _ = run(parts[0], measured, reference, prior, keys, rates)
    shape = (len(trial.rates), len(trial.seeds))
    arrays = {k: np.asarray(v).reshape(*shape, *v.shape[1:]) for k, v in found.items()}
    part = file.with_suffix(".part.npz")
    np.savez_compressed(part, allow_pickle=False, **arrays)
    part.replace(file)
    return str(file)


@functools.cache
def _program(objective: Any, config: LearnConfig) -> Any:
    return jax.jit(
        jax.vmap(Run(_POLICY, objective, config), in_axes=(None, None, None, None, 0, 0))
    )


@functools.cache
def prepared(task: str, workdir: str) -> tuple[list[Problem], Any]:
    """The prompts to learn from, to choose settings by and to measure, and the fitted reference.

    Args:
        task: name in `TASKS`.
        workdir: of the experiment; the reference is kept there.
    """
    spec = TASKS[task]
    problem = spec.build()
    parts = [problem] * 3
    if spec.parts:
        ends = np.cumsum(spec.parts)
        bounds = zip(ends, spec.parts, strict=True)
        parts = [problem.take(np.arange(end - size, end)) for end, size in bounds]
    file = Path(workdir) / f"reference-{task}.npz"
    empty = jax.eval_shape(lambda: _POLICY.init(jax.random.key(0), problem, _width(problem)))
    if not file.exists():
        target = skewed_prior(parts[0], 0, solved=_SOLVED, skew=_SKEW)
        target = jnp.asarray(target, jnp.float32)
        params = fit(_POLICY, parts[0], target, jax.random.key(0), steps=600, rate=3e-3)
        part = file.with_suffix(".part.npz")
        np.savez(part, *map(np.asarray, jax.tree.leaves(params)))
        part.replace(file)
    with np.load(file) as arrays:
        leaves = [jnp.asarray(arrays[name]) for name in arrays.files]
    return parts, jax.tree.unflatten(jax.tree.structure(empty), leaves)


def _width(problem: Problem) -> int:
    return problem.language.symbols + 1


def base_at_temperatures(task: str, workdir: str) -> dict[float, dict[str, np.ndarray]]:
    """What the reference does when it is sampled more coldly: `measure`'s numbers, `[prompts]`."""
    parts, reference = prepared(task, workdir)
    prior = response_logprobs(_POLICY, reference, parts[2])
    found = {}
    for temperature in _TEMPERATURES:
        *hidden, last = reference
        cold = [*hidden, jax.tree.map(lambda x, t=temperature: x / t, last)]
        logprobs = response_logprobs(_POLICY, cold, parts[2])
        measures = measure(parts[2], logprobs, prior)
        found[temperature] = {name: np.asarray(x) for name, x in measures.items()}
    return found
