"""Autoregressive sampling with continuous batching.

A prompt is read once for all the samples of its group. Rows decode in slots; when one ends, a row
that waits takes its slot. The device decodes on its own until enough rows have ended, the cache is
full, or a segment's tokens are drawn; then the host lets rows in, and writes down what was drawn
while the device goes on.

Where attention reads all columns there are, whatever a row has, short and long rows do not share
them: rows that outgrow a stage are put aside, and decoded together in the next one.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowrl_jax.models.transformer import Transformer
from flowrl_jax.sampler.programs import Programs, programs_of
from flowrl_jax.sampler.schedule import Groups, Schedule, Stage
from flowrl_jax.sampler.settings import SamplerConfig
from flowrl_jax.sampler.slots import Slots
from flowrl_jax.sampler.sources import Aside, Leaving, ReadPrompts, Source
from flowrl_jax.sampler.stops import StopTable
from flowrl_jax.sharding import Layout
from flowrl_jax.types import PromptBatch, Rollout


@dataclasses.dataclass(frozen=True)
class Response:
    """A row that has ended.

    Attributes:
        tokens: `[n]` int32, the one that ended it included.
        logprobs: `[n]` float32, see `Rollout.sampler_logprobs`.
        policy_logprobs: `[n]` float32, see `Rollout.policy_logprobs`.
        truncated: whether its limit ended it.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    policy_logprobs: np.ndarray
    truncated: bool


Finished = Callable[[int, Response], None]


@jax.jit
def rollout_key(seed: int, step: int) -> jax.Array:
    """The key of a rollout step; prompts, samples and positions are folded in by `generate`."""
    return jax.random.fold_in(jax.random.key(seed), step)


def generate(
    params: Any,
    prompts: PromptBatch,
    key: jax.Array,
    *,
    model: Transformer,
    config: SamplerConfig,
    layout: Layout | None = None,
    sampling_layout: Layout | None = None,
    stops: StopTable | None = None,
    max_lengths: np.ndarray | None = None,
    finished: Finished | None = None,
) -> Rollout:
    """Samples one response per row.

    A row's response depends on its prompt, the policy, `key`, its prompt id and its sample id,
    and on nothing else: not on the other rows, the batch size, its slot or the mesh (up to the
    rounding of the logits).

    Args:
        params: the policy's parameters, unboxed.
        prompts: B rows; each `config.group_size` adjacent rows hold the same prompt.
        key: from `rollout_key`, consumed.
        model: the policy's architecture.
        config: how to sample.
        layout: where parameters, prompts and the rollout live; without one they are where the
            inputs' shardings lead.
        sampling_layout: where weights, cache and activations live in the meantime; `layout` by
            default.
        stops: strings that end a response; the token that completes one is part of it.
        max_lengths: `[B]` int, tokens that each response may have, all B on every host;
            `config.max_response_length` by default.
        finished: called with a row's place in the batch and its `Response` once it has ended, while
            others go on; on every host for all B rows.

    Returns:
        A `Rollout` with T = `config.max_response_length`.

    Raises:
        ValueError: if the rows do not divide into groups or over the devices, or a limit is not
            in 1..T.
    """
    programs = programs_of(model.config, config, layout, sampling_layout or layout)
    limits = _limits(prompts, config, programs.shards, max_lengths)
    responses = _Responses(limits, config, finished)
    _Engine(programs, params, prompts, key, limits, stops).run(responses)
    arrays = (responses.tokens, responses.logprobs, responses.policy_logprobs)
    arrays = (*arrays, responses.length, responses.truncated)
    return programs.assemble(prompts, *(_put(x, layout) for x in arrays))


def _limits(
    prompts: PromptBatch, config: SamplerConfig, shards: int, max_lengths: np.ndarray | None
) -> np.ndarray:
    """Tokens that each row may have, once everything is found to fit."""
    rows = prompts.tokens.shape[0]
    if rows % config.group_size:
        raise ValueError(
            f"{rows} rows do not divide into groups of sampler.group_size={config.group_size}: pass"
            " every prompt that many times, in adjacent rows"
        )
    if rows % shards:
        raise ValueError(
            f"{rows} rows do not divide over {shards} parts of the batch: add rows, or choose"
            " another mesh"
        )
    if max_lengths is None:
        return np.full(rows, config.max_response_length, np.int32)
    limits = np.asarray(max_lengths, np.int32)
    if limits.shape != (rows,) or limits.min() < 1 or limits.max() > config.max_response_length:
        raise ValueError(
            f"max_lengths of shape {limits.shape} in {limits.min()}..{limits.max()}: give each of"
            f" the {rows} rows a number in 1..sampler.max_response_length="
            f"{config.max_response_length}"
        )
    return limits


def _put(x: np.ndarray, layout: Layout | None) -> jax.Array:
    """An array that every host holds whole, cut over the batch."""
    if layout is None:
        return jnp.asarray(x)
    return jax.make_array_from_callback(x.shape, layout.batch, lambda index: x[index])


class _Responses:
    """What has been drawn, on the host."""

    def __init__(self, limits: np.ndarray, config: SamplerConfig, finished: Finished | None):
        shape = (len(limits), config.max_response_length)
        self.tokens = np.full(shape, config.pad_id, np.int32)
        self.logprobs = np.zeros(shape, np.float32)
        self.policy_logprobs = np.zeros(shape, np.float32)
        self.length = np.zeros(shape[0], np.int32)
        self.truncated = np.zeros(shape[0], bool)
        self._finished = finished

    def record(self, segment: "_Segment") -> None:
        """Writes down what a segment drew."""
        log = jax.device_get(segment.log)
        drawn = [x.T for x in (log.token, log.logprob, log.policy_logprob)]
        kept = (self.tokens, self.logprobs, self.policy_logprobs)
        for slot in np.nonzero(segment.row >= 0)[0]:
            row, start, end = segment.row[slot], segment.before[slot], segment.after[slot]
            for whole, new in zip(kept, drawn, strict=True):
                whole[row, start:end] = new[slot, : end - start]
            self.length[row] = end
            if segment.ended[slot]:
                self.truncated[row] = not segment.stopped[slot]
                if self._finished:
                    self._finished(int(row), self._response(row))

    def _response(self, row: int) -> Response:
        end = self.length[row]
        return Response(
            tokens=self.tokens[row, :end],
            logprobs=self.logprobs[row, :end],
            policy_logprobs=self.policy_logprobs[row, :end],
            truncated=bool(self.truncated[row]),
        )


@dataclasses.dataclass(frozen=True)
class _Segment:
    """What a segment did: slot by slot its row, or -1, and the row's tokens before and after."""

    row: np.ndarray
    before: np.ndarray
    after: np.ndarray
    ended: np.ndarray
    stopped: np.ndarray
    log: Any


class _Engine:
    """What all stages of a batch share."""

    def __init__(
        self,
        programs: Programs,
        params: Any,
        prompts: PromptBatch,
        key: jax.Array,
        limits: np.ndarray,
        stops: StopTable | None,
    ):
        config, within = programs.config, programs.within
        platform = within.mesh.devices.flat[0].platform if within else jax.default_backend()
        self.programs, self.prompts, self.key, self.limits = programs, prompts, key, limits
        self.stops = stops if within is None else jax.device_put(stops, within.replicated)
        # Few rows take a CPU less time; elsewhere weights have to be read for one as for many.
        self.shrink = platform == "cpu"
        count, shards = len(limits), programs.shards
        self.slots = -(-min(config.slots or count, count) // shards)
        groups = Groups(count, config.group_size, shards, self.slots)
        self.source = ReadPrompts(programs, params, prompts, groups, self.put)
        self.weights = programs.weights(params)

    def run(self, responses: _Responses) -> None:
        """Decodes every row to its end."""
        width, source, last = self.prompts.tokens.shape[1], self.source, None
        waiting = self.slots * self.programs.shards < len(self.limits)
        for stage in self.programs.stages(width, waiting=waiting):
            aside = Aside(self.programs, self.programs.shards, self.slots, width + stage.limit)
            decoding = _Decoding(self, stage, width + stage.drawn, source)
            last = decoding.run(responses, aside, last)
            source = aside
            if not any(source.waiting()):
                break
        assert last is not None
        responses.record(last)

    def put(self, x: np.ndarray) -> jax.Array:
        """An array with the shards, or the rows, as its first axis.

        For programs with arguments of two meshes: others take numbers as they are, which is faster.
        """
        return _put(x, self.programs.within)


class _Decoding:
    """A stage: its rows from when they enter until they end or are put aside."""

    def __init__(self, engine: _Engine, stage: Stage, width: int, source: Source):
        self.engine, self.programs = engine, engine.programs
        self.stage, self.width, self.source = stage, width, source
        limits = np.minimum(engine.limits, stage.limit)
        self.schedule = Schedule(source.waiting(), engine.slots, limits, shrink=engine.shrink)
        # Where another stage follows, the last rows do not keep the slots to themselves.
        last = stage.limit == self.programs.config.max_response_length
        self.too_few = 0 if last else self.schedule.slots // 2
        self.column = width
        self.rows = self.programs.rows(engine.key, engine.prompts, engine.put(limits))

    def run(self, responses: _Responses, aside: Aside, last: _Segment | None) -> _Segment:
        """Decodes.

        Args:
            responses: what is drawn goes there.
            aside: rows that outgrow the stage go there.
            last: the segment before, which has not been written down.

        Returns:
            The last segment, which has not been written down.
        """
        schedule, engine = self.schedule, self.engine
        key_impl = jax.random.key_impl(engine.key)
        slots = self._empty()
        while schedule.busy:
            slots = self._admit(self._fit(slots))
            row, before = schedule.row.copy(), schedule.drawn.copy()
            slots, log, seen = self.programs.segment(
                engine.weights,
                slots,
                *schedule.floors(leave=self.too_few),
                key_impl,
                engine.stops,
            )
            if last:  # while the device decodes
                responses.record(last)
            active, stopped, after, column = jax.device_get(seen)
            self.column = int(column)
            schedule.ended(active, after)
            leaves = self._leaves(row, stopped.reshape(row.shape))
            aside.add(slots, self._leaving(row, leaves))
            schedule.row[leaves] = -1
            ended = ~active & ~leaves.ravel()
            last = _Segment(row.ravel(), before.ravel(), after, ended, stopped, log)
        assert last is not None
        return last

    def _leaves(self, row: np.ndarray, stopped: np.ndarray) -> np.ndarray:
        """Slots `[D, s]` of rows that have come to the stage's limit, not to their own, or of all
        rows once they are too few."""
        schedule = self.schedule
        goes_on = self.engine.limits[row] > self.stage.limit
        outgrown = (row >= 0) & ~stopped & (schedule.drawn == self.stage.limit) & goes_on
        active = schedule.row >= 0
        if schedule.waits or active.sum(axis=1).max() > self.too_few:
            return outgrown
        return outgrown | active

    def _leaving(self, row: np.ndarray, leaves: np.ndarray) -> Iterator[Leaving]:
        """Of these rows, what `Aside` wants to know."""
        schedule = self.schedule
        per_shard = len(self.engine.limits) // schedule.shards
        for at in zip(*np.nonzero(leaves), strict=True):
            shard, slot = map(int, at)
            drawn = int(schedule.drawn[at])
            end = int(schedule.entered[at]) + drawn - int(schedule.began[at])
            yield Leaving(shard, slot, end, int(row[at]) - shard * per_shard, drawn)

    def _empty(self) -> Slots:
        schedule, sizes = self.schedule, self.stage.columns
        most = max(len(rows) for rows in self.source.waiting())
        columns = sizes[-1] if most > schedule.slots else sizes[0]
        count = schedule.slots * schedule.shards
        return self.programs.empty(self.source.starts(0), self.rows, count, columns)

    def _admit(self, slots: Slots) -> Slots:
        """Lets waiting rows in."""
        for refill in self.schedule.refill(self.column):
            arrays = (refill.slot, refill.place, refill.row, refill.count)
            starts = self.source.starts(refill.chunk)
            slots = self.programs.enter(slots, starts, self.rows, *arrays)
        self.source.forget(before=self.schedule.oldest_chunk())
        return slots

    def _fit(self, slots: Slots) -> Slots:
        """Makes slots fewer where many are empty, and room where the cache is full."""
        schedule, columns = self.schedule, slots.caches[0].value.shape[2]
        take = schedule.shrink()
        if take is None and self.column < columns:
            return slots
        # Rows that come in write `width` columns before the next one.
        unused = schedule.oldest(self.column) - self.engine.prompts.tokens.shape[1]
        shift = min(unused, self.column - self.width)
        self.column -= shift
        schedule.entered -= shift
        slots = self.programs.shift(slots, np.int32(shift)) if shift else slots
        wanted = self.column + min(
            max(schedule.remaining(), 1), max(self.programs.config.first_columns // 2, 1)
        )
        sizes = self.stage.columns
        wanted = next((size for size in sizes if size >= wanted), sizes[-1])
        if take is None and wanted == columns:
            return slots
        if take is None:
            take = np.tile(np.arange(schedule.slots, dtype=np.int32), (schedule.shards, 1))
        return self.programs.resize(slots, take, wanted)
