"""Autoregressive sampling with continuous batching.

A prompt is read once for all the samples of its group. Rows decode in slots; when one ends, a row
that waits takes its slot before the next token. The device decodes on its own until the rows that
it was given are used up, the cache is full, or a segment's tokens are drawn; then the host gives
it others, and writes down what was drawn while the device goes on.

Where attention reads all columns there are, whatever a row has, short and long rows do not share
them: rows that outgrow a stage are put aside, and decoded together in the next one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowrl_jax.models.transformer import Transformer
from flowrl_jax.sampler.programs import Programs, programs_of
from flowrl_jax.sampler.schedule import Groups, Schedule, Stage
from flowrl_jax.sampler.settings import SamplerConfig
from flowrl_jax.sampler.slots import Log, Queue, Rows, Slots, Starts
from flowrl_jax.sampler.sources import Aside, ReadPrompts, Source
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
    responses = _Responses(limits, config, programs.shards, finished)
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

    def __init__(
        self, limits: np.ndarray, config: SamplerConfig, shards: int, finished: Finished | None
    ):
        shape = (len(limits), config.max_response_length)
        self.tokens = np.full(shape, config.pad_id, np.int32)
        self.logprobs = np.zeros(shape, np.float32)
        self.policy_logprobs = np.zeros(shape, np.float32)
        self.length = np.zeros(shape[0], np.int32)
        self.truncated = np.zeros(shape[0], bool)
        self._limits, self._shards, self._finished = limits, shards, finished

    def record(self, log: Log) -> None:
        """Writes down what a segment drew."""
        log = jax.device_get(log)
        slots = log.index.shape[1]
        first_row = np.arange(slots) // (slots // self._shards) * (len(self.length) // self._shards)
        # Slot after slot; in one, the rows that it had one after the other.
        drew = (log.index >= 0).T
        row = (log.index + first_row).T[drew]
        if not row.size:
            return
        begins = np.flatnonzero(np.diff(row, prepend=-1))
        counts = np.diff(begins, append=row.size)
        rows, lasts = row[begins], begins + counts - 1
        place = np.arange(row.size) - np.repeat(begins - self.length[rows], counts)
        self.tokens[row, place] = log.token.T[drew]
        self.logprobs[row, place] = log.logprob.T[drew]
        self.policy_logprobs[row, place] = log.policy_logprob.T[drew]
        self.length[rows] += counts
        stopped = log.stopped.T[drew][lasts]
        self.truncated[rows] = ~stopped & (self.length[rows] == self._limits[rows])
        ended = np.flatnonzero(stopped | self.truncated[rows])
        step = np.nonzero(drew)[1][lasts]
        for i in ended[np.argsort(step[ended], kind="stable")]:
            if self._finished:
                self._finished(int(rows[i]), self._response(int(rows[i])))

    def _response(self, row: int) -> Response:
        end = self.length[row]
        return Response(
            tokens=self.tokens[row, :end],
            logprobs=self.logprobs[row, :end],
            policy_logprobs=self.policy_logprobs[row, :end],
            truncated=bool(self.truncated[row]),
        )


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
        self.queues = self.slots * shards < count  # whether rows wait for slots
        self.rows = programs.rows(key, prompts, _put(limits, within))
        groups = Groups(count, config.group_size, shards, self.slots)
        # Nothing here refers back to the engine: its weights are to go as soon as it does, and not
        # when Python next looks for cycles.
        put = functools.partial(_put, layout=within)
        self.source = ReadPrompts(programs, params, prompts, groups, put)
        self.weights = programs.weights(params)

    def run(self, responses: _Responses) -> None:
        """Decodes every row to its end."""
        width, last = self.prompts.tokens.shape[1], None
        source: Source = self.source
        *stages, final = self.programs.stages(width, waiting=self.queues)
        for stage in (*stages, final):
            aside = None
            if stage is not final:
                width_aside = width + stage.limit
                aside = Aside(self.programs, self.programs.shards, self.slots, width_aside)
            decoding = _Decoding(self, stage, width + stage.drawn, source, aside)
            last = decoding.run(responses, last)
            if aside is None or not any(aside.waiting()):
                break
            source = aside
        assert last is not None
        responses.record(last)


class _Decoding:
    """A stage: its rows from when they enter until they end or are put aside."""

    def __init__(
        self, engine: _Engine, stage: Stage, width: int, source: Source, aside: Aside | None
    ):
        self.engine, self.programs = engine, engine.programs
        self.stage, self.width, self.source, self.aside = stage, width, source, aside
        limits = np.minimum(engine.limits, stage.limit)
        self.schedule = Schedule(source.waiting(), engine.slots, limits, shrink=engine.shrink)
        # Where another stage follows, the last rows do not keep the slots to themselves.
        self.too_few = self.schedule.slots // 2 if aside else 0
        self.column = width
        self._starts: Starts | None = None

    def run(self, responses: _Responses, last: Log | None) -> Log:
        """Decodes.

        Args:
            responses: what is drawn goes there.
            last: what the segment before drew, which has not been written down.

        Returns:
            What the last segment drew, which has not been written down.
        """
        schedule, engine, aside = self.schedule, self.engine, self.aside
        key_impl = jax.random.key_impl(engine.key)
        slots = self._empty()
        while schedule.busy:
            slots = self._admit(self._fit(slots))
            coming = self._coming()
            slots, shelf, log, seen = self.programs.segment(
                engine.weights,
                slots,
                aside.shelf(slots) if aside else None,
                coming,
                *schedule.floors(coming[-1] if coming else None, leave=self.too_few),
                key_impl,
                engine.stops,
            )
            coming = None  # what nobody waits for any more is freed
            if last:  # while the device decodes
                responses.record(last)
            last, seen = log, jax.device_get(seen)
            self.column = int(seen.column)
            schedule.follow(seen)
            if aside:
                aside.keep(shelf, seen.shelved)
                if not schedule.waits and schedule.most <= self.too_few:
                    self._put_aside(slots, aside)
        self.source.forget(before=None)
        assert last is not None
        return last

    def _put_aside(self, slots: Slots, aside: Aside) -> None:
        """Puts aside all rows that there are, on two shelves if they have to."""
        left = (self.schedule.row >= 0).sum(axis=1)
        while left.any():
            slots, shelf, shelved = self.programs.put_aside(slots, aside.shelf(slots))
            left -= aside.keep(shelf, jax.device_get(shelved))
        self.schedule.leave()
        aside.close()

    def _empty(self) -> Slots:
        schedule, sizes, engine = self.schedule, self.stage.columns, self.engine
        most = max(len(rows) for rows in self.source.waiting())
        columns = sizes[-1] if most > schedule.slots else sizes[0]
        count, until = schedule.slots * schedule.shards, np.int32(self.stage.limit)
        return self.programs.empty(self.source.starts(0), engine.rows, until, count, columns)

    def _admit(self, slots: Slots) -> Slots:
        """Lets rows into free slots, but for those that come in by themselves."""
        schedule = self.schedule
        while (chunk := schedule.urgent_chunk(queues=self.engine.queues)) is not None:
            queue, starts = schedule.queue(chunk, now=True), self.source.starts(chunk)
            slots = self.programs.enter(slots, starts, self.engine.rows, queue)
            schedule.enter(queue.count, self.column)
            self.source.forget(before=schedule.oldest_chunk())
        return slots

    def _coming(self) -> tuple[Starts, Rows, Queue] | None:
        """What comes in by itself: rows of one chunk. Its programs want a chunk when none waits."""
        schedule, source = self.schedule, self.source
        chunk = schedule.main_chunk()
        source.forget(before=schedule.oldest_chunk())
        if self.engine.queues and chunk is not None:
            self._starts = None  # before the next chunk is read
            self._starts = source.starts(chunk)
        if self._starts is None:
            return None
        return self._starts, self.engine.rows, schedule.queue(chunk)

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
        schedule.first -= shift
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
