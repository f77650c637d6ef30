"""Responses to prompts: `python -m flowrl_jax.sample --config=FILE --run=DIR --prompts=FILE`.

One JSON object a line, in the order of the prompts, the samples of a prompt adjacent; a prompt's
lines are written once its samples and those of all before it have ended:

    {"prompt": "3,5,8=24:", "sample": 0, "text": "(8-5)*8", "tokens": [...], "logprob": -3.1,
     "logprobs": [...], "policy_logprobs": [...], "finish_reason": "stop"}

`tokens` and log-probabilities include the end-of-sequence token and stop strings, `text` does not.
`logprobs` are those of the distribution that was sampled from, 0 for greedy decoding, and `logprob`
is their sum; `policy_logprobs` are the policy's own, at temperature 1 and with all tokens. A sample
depends on the seed and on its prompt's place among the prompts, not on what is sampled beside it.
"""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from flowrl_jax import cli
from flowrl_jax.assembly import SAMPLE_STREAM, Parts, assemble, configure_jax, load_run_policy
from flowrl_jax.config import Config
from flowrl_jax.datasets.files import prompt_text, read_records
from flowrl_jax.errors import InputError
from flowrl_jax.progress import Progress
from flowrl_jax.rollouts import (
    encode_prompt,
    fit_prompt,
    prompt_arrays,
    response_text,
    sample,
)
from flowrl_jax.sampler import Response, SamplerConfig, cut_at_stop, rollout_key

_BATCHES = 16  # of `eval.prompts_per_batch` prompts that the sampler is given at one time
_DECIMALS = 6  # of log-probabilities, which float32 carries no further


def read_prompts(path: str) -> list[str]:
    """Prompts of a .jsonl file (field "prompt"), or of a text file or stdin, one per line.

    Args:
        path: of the file; empty for stdin.

    Raises:
        InputError: the file is missing, holds no prompt or an empty one, or is not as it should be.
    """
    if path.endswith(".jsonl"):
        return [prompt_text(record, "prompt") for record in read_records(path)]
    if path and not Path(path).is_file():
        raise InputError(f"--prompts={path}: no such file; name a text or .jsonl file")
    name = path or "stdin"
    with open(path, encoding="utf-8") if path else contextlib.nullcontext(sys.stdin) as file:
        prompts = [line.removesuffix("\n") for line in file]
    if not prompts:
        raise InputError(f"{name} is empty: give one prompt per line")
    return prompts


class Lines:
    """Turns responses, as they end, into lines in the order of prompts.

    Args:
        parts: of the run.
        prompts: texts.
        count: samples of each.
        write: what takes the lines of a prompt.
    """

    def __init__(
        self,
        parts: Parts,
        prompts: Sequence[str],
        count: int,
        write: Callable[[list[dict[str, Any]]], None],
    ):
        self._parts, self._prompts, self._count, self._write = parts, prompts, count, write
        self._waiting: dict[int, dict[int, dict[str, Any]]] = {}

    def take(self, place: int, sample: int, response: Response) -> None:
        """Takes a response.

        Args:
            place: of its prompt.
            sample: its number among those of the prompt.
            response: from the sampler.
        """
        self._waiting.setdefault(place, {})[sample] = self._record(place, sample, response)

    def flush(self, place: int) -> int:
        """Writes the prompts that are complete, from `place` on; returns the first that is not."""
        while len(self._waiting.get(place, ())) == self._count:
            records = self._waiting.pop(place)
            self._write([records[sample] for sample in range(self._count)])
            place += 1
        return place

    def _record(self, place: int, sample: int, response: Response) -> dict[str, Any]:
        ids = response.tokens.tolist()
        text = response_text(self._parts, ids)
        logprobs = [round(float(x), _DECIMALS) for x in response.logprobs]
        return {
            "prompt": self._prompts[place],
            "sample": sample,
            "text": cut_at_stop(text, self._parts.config.rollout.stop),
            "tokens": ids,
            "logprob": round(float(response.logprobs.sum()), _DECIMALS),
            "logprobs": logprobs,
            "policy_logprobs": [round(float(x), _DECIMALS) for x in response.policy_logprobs],
            "finish_reason": "length" if response.truncated else "stop",
        }


def generate_lines(
    parts: Parts,
    policy: Any,
    prompts: Sequence[str],
    config: SamplerConfig,
    done: int,
    lines: Lines,
    progress: Callable[[int, int], None],
) -> None:
    """Samples; as many prompts at one time as `eval.prompts_per_batch`, and others when these end.

    Args:
        parts: of the run.
        policy: parameters.
        prompts: texts that fit `rollout.max_prompt_length`.
        config: how to sample; `group_size` samples of each prompt.
        done: prompts at the beginning that are left out.
        lines: takes the responses.
        progress: told how many prompts are complete, and how many tokens a response had.
    """
    count = config.group_size
    size = parts.round_up_prompts(min(parts.config.eval.prompts_per_batch, len(prompts)), count)
    config = dataclasses.replace(config, slots=config.slots or size * count)
    key = rollout_key(parts.config.seed, SAMPLE_STREAM)
    # Equal batches, so that the last one is filled up with little.
    batches = -(-(len(prompts) - done) // (_BATCHES * size))
    batch = -(-(len(prompts) - done) // (batches * size)) * size
    for start in range(done, len(prompts), batch):
        places = list(range(start, min(start + batch, len(prompts))))
        # The last batch is filled up with rows that end at once: the same programs serve it.
        filled = places + places[-1:] * (batch - len(places))
        ids = [_fit(parts, prompts, i)[0] for i in filled]
        limits = np.full(batch * count, config.max_response_length)
        limits[len(places) * count :] = 1
        written = start

        def finished(row: int, response: Response, start: int = start, end: int = len(places)):
            nonlocal written
            place, number = divmod(row, count)
            if place < end:
                lines.take(start + place, number, response)
                before, written = written, lines.flush(written)
                progress(written - before, len(response.tokens))

        arrays = prompt_arrays(parts, ids, filled, count)
        sample(parts, policy, arrays, key, config, finished=finished, max_lengths=limits)


def _fit(parts: Parts, prompts: Sequence[str], i: int) -> tuple[list[int], bool]:
    """Tokens of a prompt, and whether some had to be cut off."""
    name = f"prompt {i + 1} ({prompts[i][:40]!r})"
    return fit_prompt(parts, encode_prompt(parts, prompts[i]), name)


def completed(path: str, prompts: Sequence[str], count: int) -> int:
    """Prepares a file of samples to be continued where an interrupted command stopped.

    Args:
        path: of the file, which is cut after its last complete prompt, or made.
        prompts: all prompts.
        count: samples per prompt.

    Returns:
        How many of the prompts the file holds.

    Raises:
        InputError: it holds something else, or cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.seek(0)
            lines = file.readlines()
    except OSError as error:
        raise InputError(
            f"--out={path} cannot be written ({error.strerror}): name another file"
        ) from error
    if lines and not lines[-1].endswith(b"\n"):  # cut off in writing
        lines.pop()
    for number, line in enumerate(lines):
        prompt, place = divmod(number, count)
        if prompt == len(prompts) or not _is_sample(line, prompts[prompt], place):
            raise InputError(
                f"--out={path} line {number + 1} is not sample {place} of prompt {prompt + 1}: name"
                " another file, or the prompts and --n that this one was written with"
            )
    done = len(lines) // count
    os.truncate(path, sum(map(len, lines[: done * count])))
    return done


def _is_sample(line: bytes, prompt: str, place: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return (
        isinstance(record, dict)
        and record.get("prompt") == prompt
        and record.get("sample") == place
    )


def write_samples(
    config: Config, run: str, prompts: Sequence[str], sampling: dict[str, Any], out: str = ""
) -> None:
    """Samples responses and writes them.

    Args:
        config: the run's settings.
        run: the run's folder; empty for the policy that training would start from.
        prompts: texts.
        sampling: fields of `SamplerConfig`.
        out: file to write to, or to continue; empty for stdout.

    Raises:
        InputError: for whatever of the config, prompts or files is wrong, before compiling.
    """
    if jax.process_count() > 1:
        raise InputError(f"sample runs on one host, not on {jax.process_count()}: start it alone")
    with tempfile.TemporaryDirectory() as scratch:
        parts = assemble(config, Path(run or scratch))
    settings = parts.sampler(**sampling)
    cut = sum(_fit(parts, prompts, i)[1] for i in range(len(prompts)))
    if cut:
        print(f"{cut} prompts are too long: only their last tokens are read", file=sys.stderr)
    done = completed(out, prompts, settings.group_size) if out else 0
    if done == len(prompts):
        return
    policy = load_run_policy(parts, run)
    with (
        open(out, "a", encoding="utf-8") if out else contextlib.nullcontext(sys.stdout) as file,
        Progress(len(prompts), "sample", initial=done, unit="prompt") as progress,
    ):
        began, tokens = time.perf_counter(), 0

        def write(records: list[dict[str, Any]]) -> None:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()

        def update(complete: int, drawn: int) -> None:
            nonlocal tokens
            tokens += drawn
            rate = tokens / (time.perf_counter() - began)
            progress.update(complete, tokens_per_second=f"{rate:.0f}")

        lines = Lines(parts, prompts, settings.group_size, write)
        generate_lines(parts, policy, prompts, settings, done, lines, update)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    values = cli.config_flag_values("Samples responses to prompts, as JSON lines.")
    flags.DEFINE_string(
        "run",
        "",
        "folder of a run; empty: the policy training would start from",
        flag_values=values,
    )
    flags.DEFINE_string(
        "prompts",
        "",
        "text file, one prompt per line, or .jsonl with the field prompt; empty: stdin",
        flag_values=values,
    )
    flags.DEFINE_string(
        "out", "", "file to write, or to continue; empty: stdout", flag_values=values
    )
    flags.DEFINE_integer("n", 1, "samples per prompt", flag_values=values)
    flags.DEFINE_integer(
        "max_tokens", None, "default: rollout.max_response_length", flag_values=values
    )
    flags.DEFINE_float(
        "temperature", None, "0 is greedy; default: eval.temperature", flag_values=values
    )
    flags.DEFINE_integer("top_k", None, "default: eval.top_k", flag_values=values)
    flags.DEFINE_float("top_p", None, "default: eval.top_p", flag_values=values)
    flags.DEFINE_float("min_p", None, "default: eval.min_p", flag_values=values)
    flags.DEFINE_multi_string(
        "stop", None, "text that ends a response; default: rollout.stop", flag_values=values
    )

    def start(config: Config, values: flags.FlagValues) -> None:
        configure_jax()
        run = values["run"].value
        if run and not Path(run).is_dir():
            raise InputError(f"--run={run}: no such folder; name the folder of a run")
        sampling = {
            "group_size": values["n"].value,
            "max_response_length": values["max_tokens"].value,
        }
        for name in ("temperature", "top_k", "top_p", "min_p"):
            given = values[name].value
            sampling[name] = getattr(config.eval, name) if given is None else given
        sampling = {name: value for name, value in sampling.items() if value is not None}
        if values["stop"].value:
            rollout = dataclasses.replace(config.rollout, stop=tuple(values["stop"].value))
            config = dataclasses.replace(config, rollout=rollout)
        prompts = read_prompts(str(values["prompts"].value))
        try:
            write_samples(config, str(run), prompts, sampling, str(values["out"].value))
        except BrokenPipeError:
            # Whoever read our output has seen enough; what is buffered has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return cli.run(start, values, arguments)


if __name__ == "__main__":
    sys.exit(main())
