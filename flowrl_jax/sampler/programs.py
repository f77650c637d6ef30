"""The jitted programs of the sampler: read prompts, let rows in, decode, put rows aside.

Each is compiled once for every number of slots and columns that `schedule` lists. Nothing in them
depends on which row is in which slot.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flowrl_jax.masking import positions_from_mask
from flowrl_jax.models.cache import KVCache
from flowrl_jax.models.decode import (
    decode_params,
    decode_token,
    read_prompts,
    rotation_tables,
)
from flowrl_jax.models.decode_attention import Held, column_axes, decode_kernel, make_cache
from flowrl_jax.models.decode_kernel import CHUNK
from flowrl_jax.models.decode_triton import SPLIT
from flowrl_jax.models.rotary import Rotation
from flowrl_jax.models.transformer import TransformerConfig
from flowrl_jax.sampler.columns import copy_columns, drop_columns
from flowrl_jax.sampler.sampling import draw
from flowrl_jax.sampler.schedule import Stage, growing, one_stage, short_before_long
from flowrl_jax.sampler.settings import SamplerConfig
from flowrl_jax.sampler.slots import Log, Row, Rows, Slots, Starts
from flowrl_jax.sampler.stops import StopTable, advance
from flowrl_jax.sharding import Layout, constrain
from flowrl_jax.types import PromptBatch, Rollout

_MULTIPLES = {"pallas": CHUNK, "triton": SPLIT}  # of columns, that a kernel reads


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of one model, sampler and layout; jitted on first use.

    Attributes:
        shape: of the model.
        config: how to sample.
        layout: where prompts come from and the rollout goes to; None: where the inputs are.
        within: where weights, caches and activations live in the meantime.
    """

    shape: TransformerConfig
    config: SamplerConfig
    layout: Layout | None
    within: Layout | None

    @property
    def shards(self) -> int:
        """Parts that rows and slots are cut into."""
        return self.within.batch_shards if self.within else 1

    @property
    def cache_dtype(self) -> Any:
        """That keys and values are kept in."""
        return self.config.cache_dtype(self.shape.dtype)

    @functools.cached_property
    def kernel(self) -> str:
        """That attends, see `decode_kernel`."""
        with self.within.activate() if self.within else contextlib.nullcontext():
            return decode_kernel(self.shape, self.cache_dtype)

    @functools.cached_property
    def column_axes(self) -> KVCache:
        """The axis of columns in each array of a layer's cache."""
        return column_axes(self.kernel, self.cache_dtype)

    def _map_caches(self, function: Callable, *caches: tuple[KVCache, ...]) -> Any:
        """Of a function of the axis of columns and an array of each of the caches: caches."""
        return jax.tree.map(function, (self.column_axes,) * self.shape.num_layers, *caches)

    def stages(self, width: int, *, waiting: bool) -> list[Stage]:
        """What rows decode in, one after the other.

        Args:
            width: of the prompts' caches.
            waiting: whether rows come in later than others.
        """
        limit, first = self.config.max_response_length, self.config.first_columns
        if self.kernel in _MULTIPLES:  # It reads what rows have, and wants one size.
            return one_stage(width, limit, waiting=waiting, multiple=_MULTIPLES[self.kernel])
        return short_before_long(width, first, limit) if waiting else growing(width, first, limit)

    def shardings(self, kind: type) -> Any:
        """Of `Starts`, `Rows` or `Slots`; None without a layout.

        Args:
            kind: one of these.
        """
        if self.within is None:
            return None
        rows: Any = self.within.batch
        one: Any = self.within.replicated
        of: dict[int, Any] = {
            2: self.within.sharding("batch", "kv_heads", None, "head_dim"),
            3: self.within.sharding("batch", "kv_heads", "head_dim", None),
        }
        scale = self.within.sharding("batch", "kv_heads", None)
        axes = self.column_axes
        scales = [None if axis is None else scale for axis in axes[2:]]
        caches = (KVCache(of[axes.key], of[axes.value], *scales),) * self.shape.num_layers
        fixed = Rows(key=rows, limit=rows)
        names = ("token", "length", "drawn", "active", "stopped", "search")
        each: dict[str, Any] = dict.fromkeys(names, rows)
        row = Row(**each, fixed=fixed)
        return {
            Rows: fixed,
            Starts: Starts(caches, rows, rows, rows, rows),
            Slots: Slots(row=row, caches=caches, column=one),
        }[kind]

    def _jit(self, function: Callable, kind: type | None = None, **settings: Any) -> Any:
        if self.within is None:
            return jax.jit(function, **settings)
        if kind is not None:
            settings["out_shardings"] = self.shardings(kind)
        return self.within.jit(function, **settings)

    @functools.cached_property
    def weights(self) -> Callable:
        """Of the policy's parameters: what decoding wants."""
        return self._jit(lambda params: decode_params(params, self.shape, self.within))

    @functools.cached_property
    def rows(self) -> Callable:
        """Of a key, a `PromptBatch` and limits `[B]`: `Rows`."""

        def rows(key, prompts: PromptBatch, limit):
            places = jnp.arange(limit.shape[0], dtype=jnp.int32)
            group = self.config.group_size
            prompt = places // group if prompts.prompt_id is None else prompts.prompt_id
            sample = places % group if prompts.sample_id is None else prompts.sample_id
            fold = jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j))
            return Rows(jax.random.key_data(fold(prompt, sample)), limit)

        return self._jit(rows, Rows)

    @functools.cached_property
    def prefill(self) -> Callable:
        """Of parameters, a `PromptBatch` and rows of each shard `[D, w]`: `Starts`."""
        return self._jit(self.read, Starts)

    def read(self, params: Any, prompts: PromptBatch, pick: jax.Array) -> Starts:
        """What `prefill` jits."""

        def choose(x):
            parts = x.reshape(self.shards, -1, x.shape[1])
            parts = constrain(parts, "batch", None, None)
            chosen = jnp.take_along_axis(parts, pick[:, :, None], axis=1)
            return constrain(chosen.reshape(-1, x.shape[1]), "batch", None)

        tokens, mask = choose(prompts.tokens), choose(prompts.mask)
        last = tokens[:, -1]
        # A column of padding for the last token: chips want sizes that are multiples of theirs.
        shift = lambda x: jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]  # noqa: E731
        tokens, mask = shift(tokens), shift(mask)
        kept = read_prompts(params, self.shape, tokens, positions_from_mask(mask), mask)
        caches = tuple(make_cache(*one, self.cache_dtype, self.kernel) for one in kept)
        none = jnp.zeros_like(last)
        return Starts(caches, last, mask.sum(axis=1, dtype=jnp.int32), none, none)

    @functools.cached_property
    def empty(self) -> Callable:
        """Of `Starts`, `Rows` and static numbers of slots and columns: `Slots` without rows."""
        return self._jit(self.without_rows, Slots, static_argnums=(2, 3))

    def without_rows(self, starts: Starts, rows: Rows, slots: int, columns: int) -> Slots:
        """What `empty` jits."""
        room = self._room(starts, slots, columns)
        false = jnp.zeros(slots, bool)
        fixed = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), rows)
        width = starts.caches[0].value.shape[2]
        row = Row(room.token, room.length, room.drawn, false, false, room.search, fixed)
        return Slots(row, room.caches, jnp.int32(width))

    @functools.cached_property
    def room(self) -> Callable:
        """Of `Slots` and static numbers of rows and columns: `Starts` of this size, empty."""

        def room(slots: Slots, rows: int, columns: int) -> Starts:
            row = slots.row
            starts = Starts(slots.caches, row.token, row.length, row.drawn, row.search)
            return self._room(starts, rows, columns)

        return self._jit(room, Starts, static_argnums=(1, 2))

    def _room(self, starts: Starts, rows: int, columns: int) -> Starts:
        """`Starts` of another size, empty."""

        def cache(axis, x):
            shape = (rows, *x.shape[1:axis], columns, *x.shape[axis + 1 :])
            return jnp.zeros(shape, x.dtype)

        none = jnp.zeros(rows, jnp.int32)
        return Starts(self._map_caches(cache, starts.caches), none, none, none, none)

    @functools.cached_property
    def enter(self) -> Callable:
        """Of `Slots`, `Starts`, `Rows` and a `Refill`'s arrays: `Slots` with the rows let in."""
        return self._jit(self._enter, Slots, donate_argnums=0)

    def _enter(self, slots: Slots, starts: Starts, rows: Rows, slot, place, row, count) -> Slots:
        def local(slots, starts, rows, slot, place, row, count):
            width = starts.caches[0].value.shape[2]

            def one(i, slots):
                at, of, who = slot[0, i], place[0, i], row[0, i]
                values = Row(
                    token=starts.token[of],
                    length=starts.length[of],
                    drawn=starts.drawn[of],
                    active=jnp.bool(True),
                    stopped=jnp.bool(False),
                    search=starts.search[of],
                    fixed=jax.tree.map(lambda x: x[who], rows),
                )
                target = (at, slots.column - width)
                copy = functools.partial(copy_columns, (of, 0), target, width)
                return Slots(
                    row=jax.tree.map(lambda x, value: x.at[at].set(value), slots.row, values),
                    caches=self._map_caches(copy, starts.caches, slots.caches),
                    column=slots.column,
                )

            return jax.lax.fori_loop(0, count[0], one, slots)

        return self._by_shards(local, slots, starts, rows, slot, place, row, count)

    @functools.cached_property
    def put_aside(self) -> Callable:
        """Of `Starts`, `Slots`, and slots, places, columns that rows end before `[D, s]` and how
        many `[D]`: `Starts` with these rows in it."""
        return self._jit(self._put_aside, Starts, donate_argnums=0)

    def _put_aside(self, starts: Starts, slots: Slots, slot, place, end, count) -> Starts:
        def local(starts, slots, slot, place, end, count):
            width = starts.caches[0].value.shape[2]

            def one(i, starts):
                at, to = slot[0, i], place[0, i]
                first = end[0, i] - width
                copy = functools.partial(copy_columns, (at, first), (to, 0), width)
                names = ("token", "length", "drawn", "search")
                values = {
                    name: getattr(starts, name).at[to].set(getattr(slots.row, name)[at])
                    for name in names
                }
                return Starts(self._map_caches(copy, slots.caches, starts.caches), **values)

            return jax.lax.fori_loop(0, count[0], one, starts)

        return self._by_shards(local, starts, slots, slot, place, end, count)

    def _by_shards(self, local: Callable, changed: Any, *arguments: Any) -> Any:
        """Runs a function that changes slots or starts on every device for its own."""
        within = self.within
        if within is None:
            return local(changed, *arguments)
        kinds = (Slots, Starts, Rows)

        def spec(x):
            if isinstance(x, kinds):
                return jax.tree.map(lambda sharding: sharding.spec, self.shardings(type(x)))
            return within.batch.spec if x.ndim else PartitionSpec()

        return jax.shard_map(
            local,
            mesh=within.mesh,
            in_specs=tuple(spec(x) for x in (changed, *arguments)),
            out_specs=spec(changed),
            check_vma=False,
        )(changed, *arguments)

    @functools.cached_property
    def shift(self) -> Callable:
        """Of `Slots` and a number of columns: `Slots` without the first so many, in place.

        The columns that come free at the end hold anything.
        """
        return self._jit(self._shift, Slots, donate_argnums=0)

    def _shift(self, slots: Slots, shift) -> Slots:
        caches = self._map_caches(functools.partial(drop_columns, shift), slots.caches)
        return Slots(slots.row, caches, slots.column - shift)

    @functools.cached_property
    def resize(self) -> Callable:
        """Of `Slots`, slots to keep `[D, s]` and static columns: `Slots` of another size."""
        return self._jit(self._resize, Slots, static_argnums=2)

    def _resize(self, slots: Slots, take, columns: int) -> Slots:
        def local(slots, take):
            def cache(axis, x):
                kept = jax.lax.slice_in_dim(x[take[0]], 0, min(columns, x.shape[axis]), axis=axis)
                pad = [(0, 0)] * x.ndim
                pad[axis] = (0, columns - kept.shape[axis])
                return jnp.pad(kept, pad)

            row = jax.tree.map(lambda x: x[take[0]], slots.row)
            return Slots(row, self._map_caches(cache, slots.caches), slots.column)

        return self._by_shards(local, slots, take)

    @functools.cached_property
    def segment(self) -> Callable:
        """Decodes until the host is to be asked.

        Of weights, `Slots`, `floors` of a `Schedule` (two), the key's implementation, which is
        static, and a `StopTable` or None: `Slots`, a `Log`, and what the host looks at: each
        slot's `active`, `stopped` and `drawn`, and the column.
        """
        settings: dict[str, Any] = {}
        if self.within is not None:
            settings["out_shardings"] = (self.shardings(Slots), *[self.within.replicated] * 2)
        return self._jit(self._segment, donate_argnums=1, static_argnums=4, **settings)

    def _segment(self, weights, slots: Slots, refill, shrink, key_impl, stops):
        columns, count = slots.caches[0].value.shape[2], slots.row.token.shape[0]
        tables = rotation_tables(self.shape, columns)
        log = (self.config.segment, count)

        def going(carry):
            step, slots, _ = carry
            active = slots.row.active.reshape(self.shards, -1).sum(axis=1)
            room = (step < self.config.segment) & (slots.column < columns)
            return room & jnp.all(active > refill) & (jnp.max(active) > shrink)

        def body(carry):
            step, slots, log = carry
            slots, drawn = self.token(weights, slots, tables, key_impl, stops)
            log = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, step, 0), log, drawn
            )
            return step + 1, slots, log

        empty = Log(jnp.zeros(log, jnp.int32), jnp.zeros(log), jnp.zeros(log))
        _, slots, log = jax.lax.while_loop(going, body, (jnp.int32(0), slots, empty))
        row = slots.row
        return slots, log, (row.active, row.stopped, row.drawn, slots.column)

    def token(
        self,
        weights: Any,
        slots: Slots,
        tables: dict[bool, Rotation],
        key_impl: Any,
        stops: StopTable | None = None,
    ) -> tuple[Slots, Log]:
        """Draws a token for every row: a step of `segment`."""
        row, config = slots.row, self.config
        held = Held(slots.column, jnp.where(row.active, row.length + 1, 0))
        logits, caches = decode_token(
            weights, self.shape, row.token, row.length, tables, held, slots.caches
        )
        keys = jax.random.wrap_key_data(row.fixed.key, impl=key_impl)
        uniform = jax.vmap(lambda key, i: jax.random.uniform(jax.random.fold_in(key, i)))
        token, logprob, policy_logprob = draw(
            logits,
            uniform(keys, row.drawn),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
        )
        drawn = row.drawn + row.active
        stopped, search = jnp.isin(token, jnp.array(config.eos_ids, jnp.int32)), row.search
        if stops is not None:
            search, said = advance(stops, search, token)
            stopped |= said
        stopped &= row.active
        # A row that has come to its limit stays as it is: it may be put aside.
        row = Row(
            token=jnp.where(row.active, token, row.token),
            length=row.length + row.active,
            drawn=drawn,
            active=row.active & ~stopped & (drawn < row.fixed.limit),
            stopped=row.stopped | stopped,
            search=jnp.where(row.active, search, row.search),
            fixed=row.fixed,
        )
        return Slots(row, caches, slots.column + 1), Log(token, logprob, policy_logprob)

    @functools.cached_property
    def assemble(self) -> Callable:
        """Of a `PromptBatch`, `[B, T]` tokens and two kinds of log-probabilities, lengths and
        whether rows were cut short `[B]`: a `Rollout`."""

        def assemble(prompts: PromptBatch, tokens, logprobs, policy_logprobs, length, truncated):
            return Rollout(
                tokens=jnp.concatenate([prompts.tokens, tokens], axis=1),
                prompt_mask=prompts.mask,
                response_mask=jnp.arange(tokens.shape[1]) < length[:, None],
                sampler_logprobs=logprobs,
                policy_logprobs=policy_logprobs,
                truncated=truncated,
            )

        if self.layout is None:
            return jax.jit(assemble)
        return self.layout.jit(assemble, out_shardings=self.layout.batch)


@functools.lru_cache(maxsize=32)
def programs_of(
    shape: TransformerConfig, config: SamplerConfig, layout: Layout | None, within: Layout | None
) -> Programs:
    """The programs of these settings, the same ones for the same settings."""
    return Programs(shape, config, layout, within)
