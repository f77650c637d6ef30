"""What the benchmarks share: the work, the children that do it, and the comparison of their times.

Every engine runs in a child process of its own, so that its peak memory is its own. The parent
asks for one repetition at a time, ours and the peer's in turn, so that whatever else the machine
does meets both. This module imports neither jax nor flowrl_jax: the peer's environment reads it.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"

# What we want of ours / the peer's: at least so much of a rate, at most so much of a cost.
AT_LEAST = {"sampler": {"tokens_per_second": 1.5}}
AT_MOST = {
    "train_step": {"seconds": 0.7, "peak_rss_bytes": 0.5},
    "rl_step": {"seconds": 0.65},
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured: a Qwen3-shaped decoder with random weights, and one batch of GRPO.

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
        response_length: tokens of every response; nothing ends a response earlier.
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
    kl_coef: float = 0.04
    learning_rate: float = 1e-4

    @property
    def rows(self) -> int:
        """Responses of a batch."""
        return self.prompts * self.group

    def tokens(self, kind: str) -> int:
        """Tokens of one repetition: those drawn, or those of the rows that are learnt from."""
        drawn = self.rows * self.response_length
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
    # Linux counts KiB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    answer(peak_rss_bytes=peak, about={"python": platform.python_version(), **about})


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


def measure(
    kind: str, work: Work, pythons: dict[str, str], repeats: int
) -> dict[str, dict[str, Any]]:
    """Runs engines in turn.

    Args:
        kind: "train_step", "sampler" or "rl_step".
        work: what to do.
        pythons: the interpreter of each engine, by the name of its module here.
        repeats: measured repetitions; two more before them compile and warm up.

    Returns:
        For each engine its medians, its samples and what it is.
    """
    results = {}
    with contextlib.ExitStack() as stack:
        children = [Child(module, python, kind, work) for module, python in pythons.items()]
        for child in children:
            stack.callback(child.kill)
        for _ in range(repeats + 2):
            for child in children:
                child.repeat()
        for child in children:
            first, _, *samples = child.samples
            median = {name: statistics.median(sample[name] for sample in samples) for name in first}
            results[child.module] = {
                **median,
                "tokens_per_second": work.tokens(kind) / median["seconds"],
                "first_seconds": first["seconds"],
                "all_seconds": [sample["seconds"] for sample in samples],
                **child.finish(),
            }
    return results


RATIOS = ("seconds", "cpu_seconds", "tokens_per_second", "peak_rss_bytes")


def compare(kind: str, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a benchmark writes: ours, the peers, and ours divided by each peer's."""
    ours = results.pop("ours")
    peers = {module.removesuffix("_peer"): result for module, result in results.items()}
    ratios = {
        peer: {name: ours[name] / result[name] for name in RATIOS} for peer, result in peers.items()
    }
    return {"benchmark": kind, "ours": ours, "peers": peers, "ratios": ratios}


def _table(report: dict[str, Any]) -> Iterator[str]:
    """The report's lines for people."""
    kind = report["benchmark"]
    yield f"{kind:24}{'seconds':>10}{'CPU s':>10}{'tokens/s':>10}{'peak MB':>10}{'first s':>10}"
    for name, result in {"ours": report["ours"], **report["peers"]}.items():
        yield (
            f"{name:24}{result['seconds']:10.3f}{result['cpu_seconds']:10.3f}"
            f"{result['tokens_per_second']:10.0f}{result['peak_rss_bytes'] / 1e6:10.0f}"
            f"{result['first_seconds']:10.2f}"
        )
    for peer, ratio in report["ratios"].items():
        yield f"{'ours / ' + peer:24}" + "".join(f"{ratio[name]:10.2f}" for name in RATIOS)
        for name, bound in AT_LEAST.get(kind, {}).items():
            yield f"{name}: {ratio[name]:.2f}, wanted at least {bound}"
        for name, bound in AT_MOST.get(kind, {}).items():
            yield f"{name}: {ratio[name]:.2f}, wanted at most {bound}"
    if not report["ratios"]:
        yield "no peer: `make benchmark-peers` installs one, or name its --peer-python"
    others = max(
        result["busy_cores_of_others"] for result in (report["ours"], *report["peers"].values())
    )
    if others > 0.2:
        yield f"beware: other processes kept {others:.1f} cores busy; times are too long"


def main(kind: str, description: str, arguments: Sequence[str] | None = None) -> int:
    """The command line of a benchmark.

    Args:
        kind: "train_step", "sampler" or "rl_step".
        description: what it measures.
        arguments: of the command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument(
        "--peer-python", default=str(PEER_PYTHON), help="with Tunix; empty for none"
    )
    parser.add_argument("--repeats", type=int, default=7, help="measured repetitions")
    for field in dataclasses.fields(Work):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default, help="work")
    values = vars(parser.parse_args(arguments))
    work = Work(**{field.name: values[field.name] for field in dataclasses.fields(Work)})
    if values["repeats"] < 1:
        parser.error(f"--repeats={values['repeats']} must be at least 1")
    pythons = {"ours": sys.executable}
    peer = values["peer_python"]
    if peer and Path(peer).exists():
        pythons["tunix_peer"] = peer
    elif peer not in ("", str(PEER_PYTHON)):
        parser.error(f"--peer-python={peer} does not exist: name an interpreter with Tunix")

    report = compare(kind, measure(kind, work, pythons, values["repeats"]))
    report["work"] = dataclasses.asdict(work)
    report["machine"] = {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0))}
    print("\n".join(_table(report)))
    if values["json"]:
        values["json"].parent.mkdir(parents=True, exist_ok=True)
        values["json"].write_text(json.dumps(report, indent=2) + "\n")
    return 0
