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
from flowrl_jax.models.decode_native import Prompts
from flowrl_jax.models.decode_triton import SPLIT
from flowrl_jax.models.rotary import Rotation
from flowrl_jax.models.transformer import TransformerConfig
from flowrl_jax.sampler.columns import drop_columns
from flowrl_jax.sampler.exchange import let_in, let_out
from flowrl_jax.sampler.sampling import draw
from flowrl_jax.sampler.schedule import Stage, growing, one_stage, short_before_long
from flowrl_jax.sampler.settings import SamplerConfig
from flowrl_jax.sampler.slots import (
    Log,
    Queue,
    Row,
    Rows,
    Seen,
    Shelf,
    Shelved,
    Slots,
    Starts,
)
from flowrl_jax.sampler.stops import StopTable, advance
from flowrl_jax.sharding import Layout, constrain
from flowrl_jax.types import PromptBatch, Rollout

_MULTIPLES = {"pallas": CHUNK, "triton": SPLIT, "native": 1}  # of columns, that a kernel reads


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

    @property
    def _axes(self) -> tuple[KVCache, ...]:
        return (self.column_axes,) * self.shape.num_layers

    def _map_caches(self, function: Callable, *caches: tuple[KVCache, ...]) -> Any:
        """Of a function of the axis of columns and an array of each of the caches: caches."""
        return jax.tree.map(function, self._axes, *caches)

    def stages(self, width: int, *, waiting: bool) -> list[Stage]:
        """What rows decode in, one after the other.

        Args:
            width: of the prompts' caches.
            waiting: whether rows come in later than others.
        """
        limit, first = self.config.max_response_length, self.config.first_columns
        if self.kernel == "xla" and waiting:
            return short_before_long(width, first, limit)
        if self.kernel == "xla":
            return growing(width, first, limit, by=1.5)
        if self.kernel == "native" and not waiting:
            return growing(width, first, limit, by=4)  # making columns is all that they cost
        return one_stage(width, limit, waiting=waiting, multiple=_MULTIPLES[self.kernel])

    def shardings(self, kind: type) -> Any:
        """Of `Starts`, `Rows`, `Slots`, `Queue` or `Shelf`; None without a layout.

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
        fixed = Rows(rows, rows, rows)
        starts = Starts(caches, rows, rows, rows, rows)
        row = Row(*[rows] * 6, fixed=fixed)
        return {
            Rows: fixed,
            Starts: starts,
            Slots: Slots(row=row, caches=caches, column=one, until=one),
            Queue: Queue(rows, rows, rows),
            Shelf: Shelf(starts, rows, rows),
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
            group, member = jnp.divmod(places, self.config.group_size)
            prompt = group if prompts.prompt_id is None else prompts.prompt_id
            sample = member if prompts.sample_id is None else prompts.sample_id
            fold = jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j))
            return Rows(jax.random.key_data(fold(prompt, sample)), limit, group)

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
        """Of `Starts`, `Rows`, a stage's limit and static numbers of slots and columns: `Slots`
        without rows."""
        return self._jit(self.without_rows, Slots, static_argnums=(3, 4))

    def without_rows(self, starts: Starts, rows: Rows, until, slots: int, columns: int) -> Slots:
        """What `empty` jits."""
        zero = jnp.zeros(slots, jnp.int32)
        fixed = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), rows)
        width = starts.caches[0].value.shape[2]
        caches = self._empty_caches(starts.caches, slots, columns)
        row = Row(zero - 1, *[zero] * 5, fixed=fixed)
        return Slots(row, caches, jnp.int32(width), jnp.asarray(until, jnp.int32))

    @functools.cached_property
    def shelf(self) -> Callable:
        """Of `Slots` and static numbers of rows and columns: a `Shelf` of this size, empty."""

        def shelf(slots: Slots, rows: int, columns: int) -> Shelf:
            zero = jnp.zeros(rows, jnp.int32)
            starts = Starts(self._empty_caches(slots.caches, rows, columns), *[zero] * 4)
            return Shelf(starts, zero, jnp.zeros(self.shards, jnp.int32))

        return self._jit(shelf, Shelf, static_argnums=(1, 2))

    def _empty_caches(self, caches: tuple[KVCache, ...], rows: int, columns: int) -> Any:
        """Caches of another size."""

        def empty(axis, x):
            shape = (rows, *x.shape[1:axis], columns, *x.shape[axis + 1 :])
            return jnp.zeros(shape, x.dtype)

        return self._map_caches(empty, caches)

    @functools.cached_property
    def enter(self) -> Callable:
        """Of `Slots`, `Starts`, `Rows` and a `Queue`: `Slots` with rows in those that were free."""

        def enter(slots: Slots, *arguments) -> Slots:
            return self._let_in(slots, jnp.zeros(self.shards, jnp.int32), *arguments)[0]

        return self._jit(enter, Slots, donate_argnums=0)

    @functools.cached_property
    def put_aside(self) -> Callable:
        """Of `Slots` and a `Shelf`: both with all rows put aside for which there is room, and what
        the host is to know of the shelf."""

        def put_aside(slots: Slots, shelf: Shelf):
            slots, shelf = self._let_out(slots, shelf, all_rows=True)
            return slots, shelf, _shelved(shelf)

        settings: dict[str, Any] = {}
        if self.within is not None:
            moved = (self.shardings(Slots), self.shardings(Shelf))
            settings["out_shardings"] = (*moved, self.within.replicated)
        return self._jit(put_aside, donate_argnums=(0, 1), **settings)

    def _let_in(self, *arguments) -> tuple[Slots, jax.Array]:
        return self._by_shards(functools.partial(let_in, self._axes), 2, *arguments)

    def _let_out(self, *arguments, all_rows: bool) -> tuple[Slots, Shelf]:
        local = functools.partial(let_out, self._axes, all_rows=all_rows)
        return self._by_shards(local, 2, *arguments)

    def _by_shards(self, local: Callable, changed: int, *arguments: Any) -> Any:
        """Runs a function on every device for its own; it returns its first arguments, changed."""
        within = self.within
        if within is None:
            return local(*arguments)

        def spec(x):
            if isinstance(x, jax.Array):
                return within.batch.spec
            return jax.tree.map(lambda sharding: sharding.spec, self.shardings(type(x)))

        specs = tuple(spec(x) for x in arguments)
        return jax.shard_map(
            local, mesh=within.mesh, in_specs=specs, out_specs=specs[:changed], check_vma=False
        )(*arguments)

    @functools.cached_property
    def shift(self) -> Callable:
        """Of `Slots` and a number of columns: `Slots` without the first so many, in place.

        The columns that come free at the end hold anything.
        """
        return self._jit(self._shift, Slots, donate_argnums=0)

    def _shift(self, slots: Slots, shift) -> Slots:
        caches = self._map_caches(functools.partial(drop_columns, shift), slots.caches)
        row = dataclasses.replace(slots.row, first=slots.row.first - shift)
        return dataclasses.replace(slots, row=row, caches=caches, column=slots.column - shift)

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
            caches = self._map_caches(cache, slots.caches)
            return (dataclasses.replace(slots, row=row, caches=caches),)

        return self._by_shards(local, 1, slots, take)[0]

    @functools.cached_property
    def segment(self) -> Callable:
        """Decodes until the host is to be asked, and lets rows out and in meanwhile.

        Of weights, `Slots`, a `Shelf` or None, what is to come in (`Starts`, `Rows` and a `Queue`)
        or None, `floors` of a `Schedule` (two), the key's implementation, which is static, and a
        `StopTable` or None: `Slots`, the `Shelf`, a `Log`, and what the host looks at, `Seen`.
        """
        settings: dict[str, Any] = {}
        if self.within is not None:
            told = [self.within.replicated] * 2
            settings["out_shardings"] = (self.shardings(Slots), None, *told)
        return self._jit(self._segment, donate_argnums=(1, 2), static_argnums=6, **settings)

    def _segment(
        self, weights, slots: Slots, shelf: Shelf | None, coming, refill, shrink, key_impl, stops
    ):
        columns, count = slots.caches[0].value.shape[2], slots.row.token.shape[0]
        tables = rotation_tables(self.shape, columns)
        shards = lambda x: x.reshape(self.shards, -1).sum(axis=1)  # noqa: E731

        def going(carry):
            step, slots, _, taken, _ = carry
            rows = shards(slots.decodes)
            if coming is not None:
                rows += jnp.minimum(shards(slots.free), coming[-1].count - taken)
            asked = jnp.any(rows <= refill) | (jnp.max(rows) <= shrink)
            # The shelf is full. A row that stayed would keep its columns from being dropped.
            asked |= jnp.any(slots.leaves)
            # The first step lets in who waits, and out who found no room, however few there are.
            room = (step < self.config.segment) & (slots.column < columns)
            return room & ((step == 0) | ~asked)

        def body(carry):
            step, slots, shelf, taken, log = carry
            if coming is not None:
                slots, taken = self._let_in(slots, taken, *coming)
            slots, drawn = self.token(weights, slots, tables, key_impl, stops)
            if shelf is not None:
                slots, shelf = self._let_out(slots, shelf, all_rows=False)
            log = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, step, 0), log, drawn
            )
            return step + 1, slots, shelf, taken, log

        of = (self.config.segment, count)
        number, probability = jnp.zeros(of, jnp.int32), jnp.zeros(of)
        log = Log(number - 1, number, probability, probability, jnp.zeros(of, bool))
        none = jnp.zeros(self.shards, jnp.int32)
        _, slots, shelf, taken, log = jax.lax.while_loop(
            going, body, (jnp.int32(0), slots, shelf, none, log)
        )
        row = slots.row
        shelved = None
        if shelf is not None:
            shelved = _shelved(shelf)
            if self.within is not None:
                shelf = jax.lax.with_sharding_constraint(shelf, self.shardings(Shelf))
        seen = Seen(row.index, row.first, row.drawn, slots.column, taken, shelved)
        return slots, shelf, log, seen

    def token(
        self,
        weights: Any,
        slots: Slots,
        tables: dict[bool, Rotation],
        key_impl: Any,
        stops: StopTable | None = None,
    ) -> tuple[Slots, Log]:
        """Draws a token for every row: a step of `segment`."""
        row, config, active = slots.row, self.config, slots.decodes
        prompts = Prompts(row.fixed.group, row.length - row.drawn)
        held = Held(slots.column, jnp.where(active, row.length + 1, 0), prompts)
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
        drawn = row.drawn + active
        stopped, search = jnp.isin(token, jnp.array(config.eos_ids, jnp.int32)), row.search
        if stops is not None:
            search, said = advance(stops, search, token)
            stopped |= said
        stopped &= active
        ended = active & (stopped | (drawn >= row.fixed.limit))
        log = Log(jnp.where(active, row.index, -1), token, logprob, policy_logprob, stopped)
        # A row that waits to be put aside stays as it is.
        row = dataclasses.replace(
            row,
            index=jnp.where(ended, -1, row.index),
            token=jnp.where(active, token, row.token),
            length=row.length + active,
            drawn=drawn,
            search=jnp.where(active, search, row.search),
        )
        return dataclasses.replace(slots, row=row, caches=caches, column=slots.column + 1), log

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


def _shelved(shelf: Shelf) -> Shelved:
    return Shelved(shelf.row, shelf.starts.drawn, shelf.count)


@functools.lru_cache(maxsize=32)
def programs_of(
    shape: TransformerConfig, config: SamplerConfig, layout: Layout | None, within: Layout | None
) -> Programs:
    """The programs of these settings, the same ones for the same settings."""
    return Programs(shape, config, layout, within)
