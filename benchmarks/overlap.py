"""What judging costs where it waits for something, a sandbox or an endpoint, and what hides it.

The quickstart's step with a judge that sleeps: judged while other responses are drawn, and with
`rollout.ahead` while the next rollout is drawn too. Beside them a step whose judge does not sleep;
with all judging put after that, it would take as much longer as the sleep is long. No learning is
measured: the policy is a new one, and a judge that sleeps takes no processor from the device.

python -m benchmarks.overlap [--judge=0.02] [--parallel=8] [--steps=8] [--json=FILE]
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write_report
from configs import quickstart
from flowrl_jax import tasks
from flowrl_jax.config import parse_config
from flowrl_jax.metrics import read_metrics
from flowrl_jax.tasks.countdown import Countdown, CountdownConfig
from flowrl_jax.train import train

COMPILING = 2  # steps that are not counted


def slow_countdown(seconds: float, parallel: int) -> type[Countdown]:
    """Countdown whose judge waits.

    Args:
        seconds: for each response.
        parallel: responses that are judged at one time.
    """

    class SlowCountdown(Countdown):
        def __init__(self, config: CountdownConfig):
            super().__init__(config)
            self.parallel = parallel

        def judge(self, response: str, row: Any) -> Any:
            time.sleep(seconds)
            return super().judge(response, row)

    return SlowCountdown


def step_seconds(slots: int, steps: int, *, ahead: bool = False) -> dict[str, float]:
    """Medians of a step's seconds, its sampling, and what of its judging was waited for."""
    config = quickstart.get_config()
    config.steps = COMPILING + steps
    config.rollout.update(slots=slots, ahead=ahead)
    config.eval.every = config.checkpoint.every = 0
    with tempfile.TemporaryDirectory() as folder:
        train(parse_config(config), folder)
        lines = read_metrics(folder)[COMPILING:]
    return {
        name: statistics.median(float(line[name]) for line in lines)
        for name in ("time/step", "time/rollout", "time/judging_waited")
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="A step with a judge that waits.")
    parser.add_argument("--judge", type=float, default=0.02, help="seconds that a judge waits")
    parser.add_argument("--parallel", type=int, default=8, help="responses judged at one time")
    parser.add_argument("--slots", type=int, default=64, help="responses drawn at one time, of 512")
    parser.add_argument("--steps", type=int, default=8, help="measured")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    values = parser.parse_args(arguments)
    registered: Any = tasks.TASKS
    config_class, plain = registered["countdown"]
    found = {}
    try:
        for name, seconds, ahead in (
            ("no wait", 0.0, False),
            ("while sampling", values.judge, False),
            ("ahead", values.judge, True),
        ):
            registered["countdown"] = (config_class, slow_countdown(seconds, values.parallel))
            found[name] = step_seconds(values.slots, values.steps, ahead=ahead)
    finally:
        registered["countdown"] = (config_class, plain)
    rollout = quickstart.get_config().rollout
    judging = values.judge * rollout.prompts_per_step * rollout.group_size / values.parallel
    least = found["no wait"]["time/step"]
    print(f"judging takes {judging:.2f} s a step where nothing else goes on")
    for name, row in found.items():
        hidden = 1 - (row["time/step"] - least) / judging
        print(
            f"{name:>15}: step {row['time/step']:.2f} s, sampling {row['time/rollout']:.2f} s,"
            f" waited {row['time/judging_waited']:.2f} s, {hidden:.0%} of judging hidden"
        )
    write_report(values.json, {"benchmark": "overlap", "judging": judging, **found, **machine()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
