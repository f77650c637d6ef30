"""Gradings of math answers per second and core, on real answers in responses of real length.

Reads GSM8K, MATH-500 and MATH's training answers from a folder. Each answer is
stated by a response of some thousand characters, once as it is and once with a digit changed. The
fast path is what needs no worker; the whole counts the workers' CPU time too.

python -m benchmarks.grading --data=FOLDER [--answers=2000] [--json=FILE]
"""

import argparse
import json
import random
import re
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import write_report
from flowrl_jax.rewards import math as released
from flowrl_jax.rewards.verify import Verifier, VerifierConfig

AT_LEAST = 2_000
FILES = (("gsm8k/test.jsonl", "answer"), ("math500/test.jsonl", "answer"))
TRAIN = "math_train_7474/train.json"
STATED = ("\nAnswer: {}", "\nThe answer is \\[\\boxed{{{}}}\\]", "\n**Answer:** ${}$")


def read_answers(folder: Path) -> list[str]:
    """Returns the reference answers in a folder."""
    found = []
    for name, field in FILES:
        rows = [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]
        found += [row[field].rpartition("####")[2].strip() for row in rows]
    rows = json.loads((folder / TRAIN).read_text("utf-8"))
    return found + [row["answer"] for row in rows if row["answer"]]


def work(answers: Sequence[str], rng: random.Random) -> list[tuple[str, str]]:
    """Returns responses and the answers they are judged by."""
    filler = "We add $x_1 = 3$ and 4, then simplify: \\[ x^2 + 2x = \\frac{1}{2} \\] and go on.\n"
    pairs = []
    for answer in answers:
        digit = re.search(r"\d", answer)
        other = (
            f"{answer[: digit.start()]}{9 - int(digit[0])}{answer[digit.end() :]}" if digit else "7"
        )
        for stated in (answer, other):
            text = filler * rng.randint(5, 80) + rng.choice(STATED).format(stated)
            pairs.append((text, answer))
    return pairs


def cpu_seconds() -> float:
    """Of this process and of the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Returns gradings per second of CPU time of the released rule, the fast path and the whole."""
    began = time.process_time()
    for response, answer in pairs:
        released.grade(response, answer)
    rates = {"released": len(pairs) / (time.process_time() - began)}
    start = cpu_seconds()
    idle = Verifier(VerifierConfig(workers=1))
    idle.judge("\\boxed{x+1}", "1+x")
    idle.close()
    starting = cpu_seconds() - start

    whole, start = Verifier(VerifierConfig(workers=1)), cpu_seconds()
    fast, fast_seconds = 0, 0.0
    for response, answer in pairs:
        began = time.thread_time()
        if whole.judge(response, answer).fast:
            fast += 1
            fast_seconds += time.thread_time() - began
    whole.close()
    rates["whole"] = len(pairs) / max(cpu_seconds() - start - starting, 1e-9)
    rates["fast"] = fast / fast_seconds
    rates["fast_share"] = fast / len(pairs)
    return rates


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Math gradings per second and core.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--answers", type=int, default=2_000, help="reference answers")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    values = parser.parse_args(arguments)
    rng = random.Random(0)
    answers = read_answers(values.data)
    pairs = work(rng.sample(answers, min(values.answers, len(answers))), rng)
    rates = measure(pairs)
    print(
        f"{len(pairs)} gradings; per second and core: released rule {rates['released']:,.0f},"
        f" fast path {rates['fast']:,.0f} ({rates['fast_share']:.1%} of all, wanted at least"
        f" {AT_LEAST:,}), all {rates['whole']:,.0f}"
    )
    write_report(values.json, {"benchmark": "grading", "gradings": len(pairs), "rates": rates})
    return 0


if __name__ == "__main__":
    sys.exit(main())
