"""What the benchmarks share: the work, the children that do it, and the comparison of their times.

Every engine runs in a child process of its own, so that its peak memory is its own. The parent
asks for one repetition at a time, ours and the others' in turn, so that whatever else the machine
does meets all. This module imports neither jax nor flowrl_jax: the peers' environments read it.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The peers: the package that each is, and the interpreter that has it unless one is named.
PEERS = {
    "tunix": str(ROOT / ".venv-peers" / "bin" / "python"),
    "transformers": sys.executable,
}
# Shapes of decoders, by what --model calls them.
MODELS: dict[str, dict[str, int]] = {
    "5m": {},
    "25m": {"layers": 8, "width": 512, "mlp": 1376, "heads": 8, "kv_heads": 4},
    "260k": {
        "layers": 5,
        "width": 64,
        "mlp": 172,
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 8,
        "vocab": 512,
    },
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured: a decoder with random weights, and one batch of GRPO.

    Attributes:
        layers: blocks.
        width: of the residual stream.
        mlp: width of the SwiGLU's hidden layer.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        vocab: tokens; the unembedding is the embedding transposed.
        prompts: different prompts of a batch.
        group: responses to each prompt.
        prompt_length: tokens of every prompt.
        response_length: tokens of every response, or of the mean one; nothing but its length ends
            a response.
        limit: tokens of a response that the sampler is to expect; 0 means `response_length`.
        spread: standard deviation of the logarithm of log-normal lengths, which `limit` cuts; 0
            makes them equal.
        slots: responses drawn at one time; 0 means all.
        devices: that ours cuts rows over on a CPU; 0 means one a core, or as divide the rows.
        top_p: share of the most likely tokens that are drawn from.
        kl_coef: of the penalty for leaving the reference.
        learning_rate: of AdamW.
    """

    layers: int = 4
    width: int = 256
    mlp: int = 1024
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 4096
    prompts: int = 8
    group: int = 4
    prompt_length: int = 64
    response_length: int = 128
    limit: int = 0
    spread: float = 0.0
    slots: int = 0
    devices: int = 1
    top_p: float = 1.0
    kl_coef: float = 0.04
    learning_rate: float = 1e-4

    @property
    def rows(self) -> int:
        """Responses of a batch."""
        return self.prompts * self.group

    @property
    def max_length(self) -> int:
        """Tokens of a response that the sampler is to expect."""
        return self.limit or self.response_length

    def lengths(self) -> list[int]:
        """Tokens of each response, the same in every repetition."""
        rng, mean = random.Random(0), math.log(self.response_length) - self.spread**2 / 2
        drawn = [round(rng.lognormvariate(mean, self.spread)) for _ in range(self.rows)]
        return [min(max(length, 1), self.max_length) for length in drawn]

    def batches(self) -> Iterator[tuple[slice, int]]:
        """For a sampler without slots: the rows that fill them, and their longest response."""
        lengths, size = self.lengths(), self.slots or self.rows
        for first in range(0, self.rows, size):
            rows = slice(first, first + size)
            yield rows, max(lengths[rows])

    def tokens(self, kind: str) -> int:
        """Tokens of one repetition: those drawn, or those of the rows that are learnt from."""
        drawn = sum(self.lengths())
        return drawn if kind != "train_step" else drawn + self.rows * self.prompt_length


def share_of_even(text: str) -> float:
    """The reward that both engines earn: the share of even numbers in a text of numbers."""
    numbers = [int(word) for word in text.split()]
    return sum(number % 2 == 0 for number in numbers) / max(len(numbers), 1)


def serve(engine: Callable[[str, Work, Iterator[int]], dict[str, str]]) -> None:
    """The main function of a child: does a repetition for every line it reads.

    Args:
        engine: given the kind of benchmark, the work and an iterator, it does one repetition to its
            end for each number that it takes from the iterator. It returns what it is: names and
            versions.
    """
    # Whatever a library prints goes to stderr; stdout carries the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    kind, work = sys.argv[1], Work(**json.loads(sys.argv[2]))

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    def repetitions() -> Iterator[int]:
        for number, _ in enumerate(sys.stdin):
            busy, cpu, wall = _machine_cpu_seconds(), time.process_time(), time.perf_counter()
            yield number
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            others = max(_machine_cpu_seconds() - busy - cpu, 0.0) / wall
            answer(seconds=wall, cpu_seconds=cpu, busy_cores_of_others=others)

    about = engine(kind, work, repetitions())
    answer(peak_rss_bytes=_peak_rss(), about={"python": platform.python_version(), **about})


def _peak_rss() -> int:
    """Bytes of memory that this program has held at most."""
    try:
        # Since it began: Linux's ru_maxrss also counts the process that started it.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _machine_cpu_seconds() -> float:
    """CPU seconds that all processes of this machine have used; nan where it does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return float("nan")
    user, nice, system, _, _, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


class Child:
    """A process that repeats the work on demand."""

    def __init__(self, module: str, python: str, kind: str, work: Work):
        """Starts `python -m benchmarks.<module>`."""
        self.module = module
        self.samples: list[dict[str, float]] = []
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.{module}", kind, json.dumps(dataclasses.asdict(work))],
            cwd=ROOT,
            env={"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", **os.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def repeat(self) -> None:
        """Does the work once more and keeps the sample."""
        assert self._process.stdin is not None
        # Should the child be dead, its missing answer says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("again\n")
            self._process.stdin.flush()
        self.samples.append(self._answer())

    def finish(self) -> dict[str, Any]:
        """Ends the process; returns its peak memory and what it is."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        answer = self._answer()
        self._process.wait()
        return answer

    def kill(self) -> None:
        """Ends the process if it still runs."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise SystemExit(f"benchmarks.{self.module} ended with exit code {code}: see above")
        return json.loads(line)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A comparison of ours with others on one work.

    Attributes:
        name: of the benchmark.
        description: what it measures.
        kind: what a repetition does: "train_step", "sampler" or "rl_step".
        peers: that it is compared with, some of `PEERS`.
        variants: ours on other work, by what to call it: what it is compared with as well.
        work: what to do unless the command line says otherwise.
        at_least: what we want of ours / another's, by its name: so much of a rate.
        at_most: so much of a cost.
    """

    name: str
    description: str
    kind: str
    peers: tuple[str, ...] = ("tunix",)
    variants: dict[str, Callable[[Work], Work]] = dataclasses.field(default_factory=dict)
    work: Work = Work()
    at_least: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    at_most: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Engine:
    """What does the work: a module here, the interpreter that runs it, and the work."""

    module: str
    python: str
    work: Work


def measure(kind: str, engines: dict[str, Engine], repeats: int) -> dict[str, dict[str, Any]]:
    """Runs engines in turn.

    Args:
        kind: "train_step", "sampler" or "rl_step".
        engines: by name.
        repeats: measured repetitions; two more before them compile and warm up.

    Returns:
        For each engine its medians, its samples and what it is.
    """
    results = {}
    with contextlib.ExitStack() as stack:
        children = {
            name: Child(engine.module, engine.python, kind, engine.work)
            for name, engine in engines.items()
        }
        for child in children.values():
            stack.callback(child.kill)
        for _ in range(repeats + 2):
            for child in children.values():
                child.repeat()
        for name, child in children.items():
            first, _, *samples = child.samples
            median = {name: statistics.median(sample[name] for sample in samples) for name in first}
            results[name] = {
                **median,
                "tokens_per_second": engines[name].work.tokens(kind) / median["seconds"],
                "first_seconds": first["seconds"],
                "all_seconds": [sample["seconds"] for sample in samples],
                **child.finish(),
            }
    return results


RATIOS = ("seconds", "cpu_seconds", "tokens_per_second", "peak_rss_bytes")


def compare(name: str, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a benchmark writes: ours, the others, and ours divided by each of theirs."""
    others = dict(results)
    ours = others.pop("ours")
    ratios = {
        other: {name: ours[name] / result[name] for name in RATIOS}
        for other, result in others.items()
    }
    return {"benchmark": name, "ours": ours, "peers": others, "ratios": ratios}


def _table(report: dict[str, Any], benchmark: Benchmark) -> Iterator[str]:
    """The report's lines for people."""
    columns = ("seconds", "CPU s", "tokens/s", "peak MB", "first s")
    yield f"{benchmark.name:24}" + "".join(f"{column:>10}" for column in columns)
    for name, result in {"ours": report["ours"], **report["peers"]}.items():
        yield (
            f"{name:24}{result['seconds']:10.3f}{result['cpu_seconds']:10.3f}"
            f"{result['tokens_per_second']:10.0f}{result['peak_rss_bytes'] / 1e6:10.0f}"
            f"{result['first_seconds']:10.2f}"
        )
    for other, ratio in report["ratios"].items():
        yield f"{'ours / ' + other:24}" + "".join(f"{ratio[name]:10.2f}" for name in RATIOS)
        for name, bound in benchmark.at_least.get(other, {}).items():
            yield f"{name}: {ratio[name]:.2f}, wanted at least {bound}"
        for name, bound in benchmark.at_most.get(other, {}).items():
            yield f"{name}: {ratio[name]:.2f}, wanted at most {bound}"
    for peer in benchmark.peers:
        if peer not in report["peers"]:
            yield f"without {peer}: benchmarks/README.md says how to install it"
    others = max(
        result["busy_cores_of_others"] for result in (report["ours"], *report["peers"].values())
    )
    if others > 0.2:
        yield f"beware: other processes kept {others:.1f} cores busy; times are too long"


def _parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=benchmark.description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file for the numbers")
    for peer in benchmark.peers:
        parser.add_argument(
            f"--{peer}-python", default=PEERS[peer], help=f"with {peer}; empty for none"
        )
    parser.add_argument("--repeats", type=int, default=7, help="measured repetitions")
    parser.add_argument("--model", choices=MODELS, default="5m", help="shape of the decoder")
    for field in dataclasses.fields(Work):
        default = getattr(benchmark.work, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=default, help="work")
    return parser


def _has(python: str, package: str) -> bool:
    """Whether an interpreter is there and has a package."""
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return (
        Path(python).exists() and not subprocess.run([python, "-c", look], check=False).returncode
    )


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """The command line of a benchmark.

    Args:
        benchmark: what it measures.
        arguments: of the command line.

    Returns:
        The exit code.
    """
    parser = _parser(benchmark)
    parser.set_defaults(**MODELS[parser.parse_known_args(arguments)[0].model])
    values = vars(parser.parse_args(arguments))
    work = Work(**{field.name: values[field.name] for field in dataclasses.fields(Work)})
    if values["repeats"] < 1:
        parser.error(f"--repeats={values['repeats']} must be at least 1")
    engines = {"ours": Engine("ours", sys.executable, work)}
    for name, change in benchmark.variants.items():
        engines[name] = Engine("ours", sys.executable, change(work))
    for peer in benchmark.peers:
        python = values[f"{peer}_python"]
        if python and _has(python, peer):
            engines[peer] = Engine(f"{peer}_peer", python, work)
        elif python not in ("", PEERS[peer]):
            parser.error(f"--{peer}-python={python} is no interpreter with {peer}: name one")

    report = compare(benchmark.name, measure(benchmark.kind, engines, values["repeats"]))
    report["work"] = dataclasses.asdict(work)
    report["machine"] = machine()
    print("\n".join(_table(report, benchmark)))
    write_report(values["json"], report)
    return 0


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    return {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0))}


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Keeps the numbers in a file, where one is named."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
