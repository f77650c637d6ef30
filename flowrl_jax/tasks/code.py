"""Programming problems, judged by running what the policy wrote against tests.

The prompt has the structure of LiveCodeBench's, which the DeepCoder data uses; the wording is ours.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from flowrl_jax.errors import InputError, require
from flowrl_jax.rewards import code as reward
from flowrl_jax.rewards.remote import Endpoint, EndpointConfig, Unavailable
from flowrl_jax.sandbox.limits import Limits
from flowrl_jax.sandbox.runner import Sandbox
from flowrl_jax.tasks.base import Row, Task, Verdict
from flowrl_jax.tasks.program_form import canonical_program

OUTCOMES = ("correct", "wrong", "error", "timeout", "limit", "refused")


@dataclasses.dataclass(frozen=True)
class CodeConfig:
    """Settings of the task.

    Attributes:
        wrap: put the instruction and the form of the answer around the problem.
        reward_correct: reward of a program that passes all tests; 1 as released.
        reward_wrong: reward of anything else; 0 as released.
        parallel: programs that run at one time.
        isolation: "auto", "required" or "none", see `flowrl_jax.sandbox.runner.Sandbox`.
        seconds: time of one test; 0: what the tests say, and `Limits.seconds` where they do not.
        memory_mb: see `flowrl_jax.sandbox.limits.Limits`, as all that follow.
        disk_mb: what a program may write.
        output_mb: what it may print.
        processes: processes and threads it may have.
        endpoint: URL that judges instead of the sandbox; see docs/rewards.md for what it is sent.
        endpoint_token_env: name of the environment variable with its token; empty for none.
        endpoint_seconds: time of a request with all its retries.
        unavailable: "raise": end the run when the endpoint gives no verdict. "wrong": count the
            response as "refused", with the reward of a wrong one.
    """

    wrap: bool = True
    reward_correct: float = 1.0
    reward_wrong: float = 0.0
    parallel: int = 8
    isolation: str = "auto"
    seconds: float = 0.0
    memory_mb: int = 2048
    disk_mb: int = 64
    output_mb: int = 16
    processes: int = 32
    endpoint: str = ""
    endpoint_token_env: str = ""
    endpoint_seconds: float = 300.0
    unavailable: str = "raise"

    def __post_init__(self):
        require(self.parallel >= 1, f"code parallel={self.parallel}: give 1 or more")
        require(
            self.unavailable in ("raise", "wrong"),
            f"code unavailable={self.unavailable!r}: unknown; give raise or wrong",
        )
        for name in ("reward_correct", "reward_wrong"):
            value = getattr(self, name)
            require(math.isfinite(value), f"code {name}={value}: give a finite number")
        self.limits(0.0)

    def limits(self, seconds: float) -> Limits:
        """Returns the limits of a program.

        Args:
            seconds: of one test, as the tests say; 0 where they do not.
        """
        return Limits(
            seconds=self.seconds or seconds or Limits.seconds,
            memory_mb=self.memory_mb,
            disk_mb=self.disk_mb,
            output_mb=self.output_mb,
            processes=self.processes,
        )


class Code(Task):
    """The code task.

    Rows have `prompt` (the problem) and `tests` (any form that `rewards.code.parse` knows), and may
    have `data_source` ("taco", "livecodebench", ...), `starter_code` and `solution`.

    Args:
        config: the settings.

    Raises:
        InputError: isolation is required and this machine refuses it.
    """

    name = "code"

    def __init__(self, config: CodeConfig):
        self.config = config
        self.parallel = config.parallel
        self._endpoint = None
        self._sandbox = None
        if config.endpoint:
            self._endpoint = Endpoint(
                EndpointConfig(
                    url=config.endpoint,
                    token_env=config.endpoint_token_env,
                    total_seconds=config.endpoint_seconds,
                )
            )
        else:
            self._sandbox = Sandbox(config.isolation)

    def prompt(self, row: Row) -> str:
        """Returns the problem, with instruction and form of the answer where the config says so.

        Raises:
            InputError: the row has no tests; better now than when a response is there to judge.
        """
        tests = _tests(row)
        if not self.config.wrap:
            return row["prompt"]
        return question(row["prompt"], row.get("starter_code") or "", tests.kind == "stdin")

    def judge(self, response: str, row: Row) -> Verdict:
        """Returns the verdict on the last fenced block of a response; safe to call from threads.

        Raises:
            InputError: the row has no tests, or the endpoint gives no verdict and the config says
                to raise.
        """
        program, wrong = reward.extract(response), self.config.reward_wrong
        if program is None:
            return Verdict(wrong, None, "no_code")
        outcome = self._outcome(program, row)
        if outcome != "correct":
            return Verdict(wrong, None, outcome)
        form = canonical_program(program) or program
        return Verdict(self.config.reward_correct, form, outcome)

    def demonstration(self, row: Row, rng: np.random.Generator) -> str:
        """Returns the row's `solution` in a fenced block.

        Raises:
            InputError: the row has no solution.
        """
        del rng  # There is one solution.
        solution = row.get("solution")
        if not isinstance(solution, str) or not solution.strip():
            raise InputError(
                f"code prompt {row.get('prompt_id')}: no 'solution' to imitate; add this field to"
                " the data, or train without demonstrations"
            )
        if reward.extract(solution) is not None:
            return solution
        return f"```python\n{solution.strip()}\n```"

    def close(self) -> None:
        """Ends the programs that run."""
        if self._sandbox is not None:
            self._sandbox.close()

    def _outcome(self, program: str, row: Row) -> str:
        tests = _tests(row)
        if self._endpoint is None:
            limits = self.config.limits(tests.seconds)
            return reward.run_tests(program, tests, limits=limits, sandbox=self._sandbox).outcome
        try:
            reply: dict[str, Any] = self._endpoint.ask(
                {"program": program, "tests": reward.dump(tests)}
            )
            if reply.get("outcome") in OUTCOMES:
                return reply["outcome"]
            cause = f"the reply has the outcome {reply.get('outcome')!r}, none of {OUTCOMES}"
        except Unavailable as error:
            cause = str(error)
        if self.config.unavailable == "raise":
            raise InputError(
                f"task code: the endpoint gives no verdict ({cause}); mend it and resume, or set"
                " task.options.unavailable=wrong"
            )
        return "refused"


def question(problem: str, starter_code: str, reads: bool) -> str:
    """Returns a problem with an instruction before it and the form of the answer after it.

    Args:
        problem: as the data set has it.
        starter_code: to complete; empty for none.
        reads: whether the program reads its input and prints, rather than defines functions.
    """
    if starter_code:
        form = "Complete the starter code below. Answer with the whole program in one code block:"
        block = starter_code.strip("\n")
    elif reads:
        form = (
            "The program reads its input from standard input and prints nothing but the result to"
            " standard output. Answer with the whole program in one code block:"
        )
        block = "# the program"
    else:
        form = "Answer with the whole program, no tests included, in one code block:"
        block = "# the program"
    return (
        "You write Python 3 programs that are correct and fast. Below is a programming problem;"
        " write a program that meets its statement and passes all of its tests.\n\n"
        f"{problem.strip()}\n\n"
        f"### Format\n{form}\n\n```python\n{block}\n```\n\n"
        "### Answer\n"
    )


def _tests(row: Row) -> reward.Tests:
    truth = row.get("tests")
    if not truth:
        raise InputError(
            f"code prompt {row.get('prompt_id')}: no 'tests' to judge by; give every row some, and"
            " name their field in data.options"
        )
    return reward.parse(truth, str(row.get("data_source") or "").lower())
