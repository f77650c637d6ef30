"""Between text and arrays: prompts for the sampler, responses for the judge."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flowrl_jax.assembly import Parts
from flowrl_jax.datasets.pipeline import PromptSource
from flowrl_jax.distributed import RowShare, row_share
from flowrl_jax.errors import InputError
from flowrl_jax.sampler import Finished, Response, SamplerConfig, generate
from flowrl_jax.sampling_config import RolloutConfig
from flowrl_jax.sharding import Layout, local_rows
from flowrl_jax.tasks import Row
from flowrl_jax.types import PromptBatch, Rollout


def check_rollouts(
    rollout: RolloutConfig,
    share: RowShare,
    layout: Layout,
    sampling_layout: Layout,
    replayed: int = 0,
) -> None:
    """Refuses numbers of prompts that do not divide.

    Args:
        rollout: the config's section.
        share: which hosts hold which rows.
        layout: of training.
        sampling_layout: of sampling.
        replayed: prompts of a step that are not sampled.

    Raises:
        InputError: with the sizes, the rule and the remedy.
    """
    hosts = len(share.leaders)
    shards = math.lcm(layout.batch_shards, sampling_layout.batch_shards)
    names = {name: getattr(rollout, name) for name in ("prompts_per_step", "prompts_per_batch")}
    if replayed:
        names["prompts_per_step*(1 - replay.fraction)"] = rollout.prompts_per_step - replayed
    for name, prompts in names.items():
        if prompts % hosts or prompts * rollout.group_size % shards:
            raise InputError(
                f"rollout.{name}={prompts} times rollout.group_size={rollout.group_size} does not"
                f" divide over {hosts} hosts and the {shards} parts of the batch (data x fsdp):"
                " choose a multiple"
            )


def encode_prompt(parts: Parts, text: str) -> list[int]:
    """Token ids of a prompt, opened and put into a conversation as the tokenizer's config says.

    Raises:
        InputError: the chat template refuses the prompt, or the tokenizer cannot encode it.
    """
    tokenizer, settings = parts.tokenizer, parts.config.tokenizer
    if parts.chat is None:
        ids = tokenizer.encode(text)
    else:
        chat = parts.chat.render(settings.conversation(text), options=settings.chat_options)
        ids = tokenizer.encode(chat, special=True)
    if settings.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    return ids


def fit_prompt(parts: Parts, ids: list[int], name: str) -> tuple[list[int], bool]:
    """Makes a prompt fit `rollout.max_prompt_length`.

    Args:
        parts: of the run.
        ids: the prompt's tokens.
        name: what to call the prompt in a message.

    Returns:
        The tokens, and whether some were cut off.

    Raises:
        InputError: the prompt is empty, or too long and `rollout.long_prompts` is "error".
    """
    limit = parts.config.rollout.max_prompt_length
    if not ids:
        raise InputError(f"{name} has no tokens: a prompt needs at least one")
    if len(ids) <= limit:
        return ids, False
    if parts.config.rollout.long_prompts == "truncate":
        return ids[-limit:], True
    raise InputError(
        f"{name} has {len(ids)} tokens, more than rollout.max_prompt_length={limit}: raise the"
        " limit, or set rollout.long_prompts='truncate' to keep the last tokens"
    )


def check_prompts(parts: Parts, source: PromptSource, count: int) -> None:
    """Encodes the rows that a run will read, so that one that is too long stops it at once.

    Args:
        parts: of the run.
        source: of the rows.
        count: positions that will be read; an epoch at most is looked at.

    Raises:
        InputError: as `fit_prompt`.
    """
    for position in range(min(count, len(source))):
        _encode_row(parts, source.rows(position, 1)[0])


def _encode_row(parts: Parts, row: Row) -> tuple[list[int], bool]:
    ids = encode_prompt(parts, parts.task.prompt(row))
    return fit_prompt(parts, ids, f"prompt {row['prompt_id']}")


def encode_rows(
    parts: Parts, rows: Sequence[Row], group_size: int
) -> tuple[dict[str, np.ndarray], int]:
    """Arrays of a `PromptBatch` for rows of a data set, `group_size` samples of each.

    Args:
        parts: of the run.
        rows: of the data set.
        group_size: samples per prompt.

    Returns:
        The fields of a `PromptBatch` as host arrays, and the number of truncated prompts.
    """
    encoded = [_encode_row(parts, row) for row in rows]
    arrays = prompt_arrays(
        parts, [ids for ids, _ in encoded], [row["prompt_id"] for row in rows], group_size
    )
    return arrays, sum(cut for _, cut in encoded)


def prompt_arrays(
    parts: Parts, prompts: Sequence[list[int]], prompt_ids: Sequence[int], group_size: int
) -> dict[str, np.ndarray]:
    """Arrays of a `PromptBatch`, `group_size` samples of each prompt.

    Args:
        parts: of the run.
        prompts: token ids that fit `rollout.max_prompt_length`.
        prompt_ids: what the noise of each prompt's samples derives from.
        group_size: samples per prompt.

    Returns:
        The fields of a `PromptBatch` as host arrays.
    """
    width = parts.config.rollout.max_prompt_length
    tokens = np.full((len(prompts), width), parts.tokenizer.pad_id, np.int32)
    mask = np.zeros((len(prompts), width), bool)
    for i, ids in enumerate(prompts):
        tokens[i, width - len(ids) :] = ids
        mask[i, width - len(ids) :] = True
    return {
        "tokens": np.repeat(tokens, group_size, axis=0),
        "mask": np.repeat(mask, group_size, axis=0),
        "prompt_id": np.repeat(np.array(prompt_ids, np.int32), group_size),
        "sample_id": np.tile(np.arange(group_size, dtype=np.int32), len(prompts)),
    }


def sample(
    parts: Parts,
    params: Any,
    arrays: dict[str, np.ndarray],
    key: jax.Array,
    sampler: SamplerConfig,
    prompts_per_batch: int = 0,
    finished: Finished | None = None,
    max_lengths: np.ndarray | None = None,
) -> Rollout:
    """Draws the responses of this host's rows, together with the other hosts'.

    Args:
        parts: of the run.
        params: the policy's parameters.
        arrays: from `encode_rows`.
        key: of the rollout.
        sampler: how to sample.
        prompts_per_batch: prompts sampled at one time on this host; 0 means all.
        finished: called with the place of one of this host's rows, and its response, once it has
            ended, while others go on.
        max_lengths: tokens that each response may have, where all are sampled at one time by one
            host.

    Returns:
        The rollout of all rows, on the mesh.
    """
    rows = arrays["tokens"].shape[0]
    size = prompts_per_batch * sampler.group_size or rows
    share = row_share(parts.layout)
    pieces = []
    for start in range(0, rows, size):
        piece = {name: x[start : start + size] for name, x in arrays.items()}
        batch = PromptBatch(**parts.layout.put_batch(piece))
        count = len(piece["tokens"])
        pieces.append(
            generate(
                params,
                batch,
                key,
                model=parts.model,
                config=sampler,
                layout=parts.layout,
                sampling_layout=parts.sampling_layout,
                stops=parts.stops,
                max_lengths=max_lengths,
                finished=finished and _on_this_host(finished, share.index * count, start, count),
            )
        )
    if len(pieces) == 1:
        return pieces[0]
    return _concatenate(pieces, parts.layout.batch)


def _on_this_host(finished: Finished, first: int, start: int, count: int) -> Finished:
    """Of all hosts' rows, those from `first` on: this host calls them from `start` on."""

    def own(place: int, response: Response) -> None:
        if first <= place < first + count:
            finished(start + place - first, response)

    return own


def _concatenate(pieces: list[Rollout], sharding: jax.sharding.Sharding) -> Rollout:
    join = lambda *xs: jax.make_array_from_process_local_data(  # noqa: E731
        sharding, np.concatenate([local_rows(x) for x in xs])
    )
    return jax.tree.map(join, *pieces)


def response_text(parts: Parts, ids: Sequence[int]) -> str:
    """The text of a response, the end-of-sequence token left out."""
    kept = ids[:-1] if ids[-1] in parts.eos_ids else ids
    return parts.tokenizer.decode(kept)
