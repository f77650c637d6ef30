"""The sampler: what it records, what a sample depends on, and what it costs."""

import dataclasses
import gc
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.models.transformer import Transformer, init_params
from flowrl_jax.sampler import SamplerConfig, StopTable, generate, programs, rollout_key
from flowrl_jax.sampler.schedule import Schedule
from flowrl_jax.sharding import Layout, MeshConfig, make_mesh, sampling_layout
from tests.native import NATIVE
from tests.tiny import (
    MESH_CONFIG,
    compilations,
    full_logits,
    prompt_batch,
    tiny_config,
    tiny_params,
)

generate_module = importlib.import_module("flowrl_jax.sampler.generate")
CONFIG = tiny_config(num_layers=1)  # how layers share a cache is transformer_test's business
PROMPT, LENGTH, GROUP = 6, 10, 3
KEY = rollout_key(0, 0)
# The cached and the full forward sum in different orders.
ROUNDING: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}

SETTINGS = SamplerConfig(
    max_response_length=LENGTH, eos_ids=(3, 5), group_size=GROUP, temperature=0.8, first_columns=5
)


PROMPTS = [3, 6, 1, 5]  # their lengths


def prompts():
    return prompt_batch(PROMPTS, GROUP, PROMPT, CONFIG.vocab_size)


def sample(
    batch=None,
    key=KEY,
    params=None,
    max_lengths=None,
    finished=None,
    stops=None,
    layout=None,
    kernel="auto",
    **changes,
):
    return generate(
        tiny_params(CONFIG) if params is None else params,
        prompts() if batch is None else batch,
        key,
        model=Transformer(dataclasses.replace(CONFIG, decode_kernel=kernel)),
        config=dataclasses.replace(SETTINGS, **changes),
        max_lengths=max_lengths,
        finished=finished,
        stops=stops,
        layout=layout,
    )


@pytest.fixture(scope="module")
def rollout():
    rollout = sample()
    # Both ways for a response to end occur, or the tests below would show less.
    assert 0 < rollout.truncated.sum() < len(rollout.truncated)
    return rollout


def responses(rollout):
    return np.asarray(rollout.tokens)[:, rollout.prompt_mask.shape[1] :]


def teacher_forced(rollout, temperature, config=CONFIG, params=None):
    """`[B, T, V]` log-probabilities that one pass over the whole rows gives."""
    mask = jnp.concatenate([rollout.prompt_mask, rollout.response_mask], 1)
    logits = full_logits(
        config, tiny_params(config) if params is None else params, rollout.tokens, mask
    )
    width = rollout.prompt_mask.shape[1]
    return np.asarray(jax.nn.log_softmax(logits[:, width - 1 : -1] / temperature))


@pytest.mark.slow
def test_logprobs_are_the_teacher_forced_ones(rollout):
    wanted = np.take_along_axis(teacher_forced(rollout, 0.8), responses(rollout)[..., None], 2)[
        ..., 0
    ]
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(np.asarray(rollout.sampler_logprobs)[mask], wanted[mask], **ROUNDING)
    assert not rollout.sampler_logprobs[~mask].any()


def test_the_end_is_part_of_the_response(rollout):
    """A peer drops it: then nobody learns to stop, and a finished row looks truncated."""
    tokens, lengths = responses(rollout), np.asarray(rollout.response_mask).sum(1)
    ends = np.isin(tokens, SETTINGS.eos_ids)
    for row in range(len(tokens)):
        n = lengths[row]
        assert n >= 1
        np.testing.assert_array_equal(rollout.response_mask[row], np.arange(LENGTH) < n)
        assert not ends[row, : n - 1].any()
        assert ends[row, n - 1] != rollout.truncated[row]
        assert n == LENGTH or not rollout.truncated[row]
        assert (tokens[row, n:] == SETTINGS.pad_id).all()
        assert rollout.sampler_logprobs[row, n - 1] < 0.0


def test_prompts_come_back_unchanged(rollout):
    given = prompts()
    np.testing.assert_array_equal(rollout.tokens[:, :PROMPT], given.tokens)
    np.testing.assert_array_equal(rollout.prompt_mask, given.mask)


def assert_same(rollout, other, rows: Any = slice(None)):
    """The same responses, and log-probabilities to rounding, for some rows of the first."""
    np.testing.assert_array_equal(responses(rollout)[rows], responses(other))
    np.testing.assert_array_equal(rollout.response_mask[rows], other.response_mask)
    np.testing.assert_array_equal(rollout.truncated[rows], other.truncated)
    np.testing.assert_allclose(rollout.sampler_logprobs[rows], other.sampler_logprobs, **ROUNDING)


def take(batch, rows) -> Any:
    return jax.tree.map(lambda x: x[jnp.asarray(rows)], batch)


def test_order_of_prompts_does_not_matter(rollout):
    rows = np.arange(12).reshape(4, GROUP)[[2, 0, 3, 1]].ravel()
    assert_same(rollout, sample(take(prompts(), rows)), rows)


@pytest.mark.slow
def test_batch_size_and_group_do_not_matter(rollout):
    """Five rows of several groups, every prompt read anew for its row."""
    rows = np.array([7, 0, 11, 4, 1])
    assert_same(rollout, sample(take(prompts(), rows), group_size=1), rows)


@pytest.mark.slow
def test_segments_and_padding_do_not_matter(rollout):
    """One segment instead of two, and three more columns of padding before every prompt."""
    batch = prompts()
    pad = lambda x: jnp.pad(x, ((0, 0), (3, 0)))  # noqa: E731
    batch = batch.replace(tokens=pad(batch.tokens), mask=pad(batch.mask))
    assert_same(rollout, sample(batch, first_columns=64))


def test_noise_depends_on_step_seed_prompt_and_sample():
    """A peer repeats its noise at every call, so every step samples the same responses."""
    draws = [sample(key=rollout_key(seed, step)) for seed, step in ((0, 0), (0, 1), (1, 0))]
    batch = prompts()
    # All rows hold the prompt of the first; only their ids tell them apart.
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), batch)
    ids = batch.replace(tokens=same.tokens, mask=same.mask)
    draws.append(sample(ids))
    draws.append(sample(ids.replace(sample_id=ids.sample_id + 100)))
    noise = [tuple(map(tuple, responses(r))) for r in draws]
    assert len(set(noise)) == len(noise)
    # Noise without the prompt's id would leave 3 different responses, without the sample's 4; of
    # 12 independent ones a few may coincide by chance, for they are short.
    for rows in noise[3:]:
        assert len(set(rows)) > 6
    # And equal ids give equal responses.
    assert len(set(map(tuple, responses(sample(same))))) == 1


def test_rows_without_ids_are_known_by_their_place():
    rows = jnp.arange(12, dtype=jnp.int32)
    batch = prompts().replace(prompt_id=rows // GROUP, sample_id=rows % GROUP)
    assert_same(sample(batch), sample(batch.replace(prompt_id=None, sample_id=None)))


@pytest.mark.slow
def test_other_ends_are_respected(rollout):
    """A peer keeps the ends of its first call in the compiled loop. Padding may be an end."""
    other = sample(eos_ids=(7,), pad_id=7)
    tokens, mask = responses(other), np.asarray(other.response_mask)
    ends = (tokens == 7) & mask
    np.testing.assert_array_equal(ends.sum(1), ~other.truncated)
    np.testing.assert_array_equal(ends.argmax(1) + 1, np.where(ends.any(1), mask.sum(1), 1))
    assert (tokens[~mask] == 7).all() and (~mask).any()
    assert np.isin(tokens, (3, 5))[mask].any()
    # Up to the first end of either kind nothing differs.
    both = np.asarray(rollout.response_mask) & mask
    np.testing.assert_array_equal(responses(rollout)[both], tokens[both])
    assert_same(rollout, sample())


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_ids_that_do_not_exist_are_never_drawn(temperature):
    """Rows that pad the vocabulary, and ids that the tokenizer does not know."""
    config = dataclasses.replace(CONFIG, vocab_multiple=8, num_tokens=9)
    params = tiny_params(config)
    assert params["embedding"]["tokens"].shape[0] == 24 > config.vocab_size > config.drawable
    rollout = generate(
        params,
        prompt_batch(PROMPTS, GROUP, PROMPT, 9),
        KEY,
        model=Transformer(config),
        config=dataclasses.replace(SETTINGS, temperature=temperature, eos_ids=(3,)),
    )
    drawn = responses(rollout)[np.asarray(rollout.response_mask)]
    assert drawn.max() < 9 and len(np.unique(drawn)) > 4
    if temperature:
        wanted = teacher_forced(rollout, temperature, config, params)
        assert np.isneginf(wanted[..., 9:]).all()
        chosen = np.take_along_axis(wanted, responses(rollout)[..., None], 2)[..., 0]
        mask = np.asarray(rollout.response_mask)
        np.testing.assert_allclose(
            np.asarray(rollout.sampler_logprobs)[mask], chosen[mask], **ROUNDING
        )


@pytest.mark.slow
def test_windows_and_two_kinds_of_layers_are_cached_right():
    """A window shorter than the text, in one layer of two, with positions of its own."""
    config = tiny_config(
        window=3, windowed_layers=(True, False), local_rope_theta=50.0, attention_softcap=2.0,
        logit_softcap=3.0, sandwich_norm=True, norm_offset=1.0, qk_norm=True, embed_scale=4.0,
        query_scale=0.3, activation="gelu_tanh",
    )  # fmt: skip
    params = tiny_params(config)
    rollout = generate(params, prompts(), KEY, model=Transformer(config), config=SETTINGS)
    wanted = teacher_forced(rollout, 0.8, config, params)
    chosen = np.take_along_axis(wanted, responses(rollout)[..., None], 2)[..., 0]
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(np.asarray(rollout.sampler_logprobs)[mask], chosen[mask], **ROUNDING)
    other = dataclasses.replace(config, windowed_layers=(False, True))
    assert np.abs(teacher_forced(rollout, 0.8, other, params) - wanted)[mask].max() > 0.01


@pytest.mark.slow
def test_greedy_is_the_chain_of_most_likely_tokens():
    rollout = sample(temperature=0.0)
    best = teacher_forced(rollout, 1.0).argmax(2)
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_array_equal(responses(rollout)[mask], best[mask])
    np.testing.assert_array_equal(rollout.sampler_logprobs, 0.0)


@pytest.mark.slow
def test_truncated_sampling_records_what_it_sampled_from():
    """A peer returns log-probabilities of the whole distribution."""
    rollout = sample(top_k=4, top_p=0.9)
    probs = np.exp(teacher_forced(rollout, 0.8).astype(np.float64))
    mask = np.asarray(rollout.response_mask)
    for row, t in zip(*np.nonzero(mask), strict=True):
        p = probs[row, t]
        p = np.where(p >= np.sort(p)[-4], p, 0.0)
        p /= p.sum()
        ordered = np.sort(p)[::-1]
        p = np.where(p >= ordered[np.searchsorted(np.cumsum(ordered), 0.9)], p, 0.0)
        logprob = np.log(p[responses(rollout)[row, t]] / p.sum())
        assert float(rollout.sampler_logprobs[row, t]) == pytest.approx(logprob, abs=1e-5)


def test_repeated_calls_compile_nothing():
    sample(key=rollout_key(0, 7))
    other_params = jax.tree.map(lambda x: 1.1 * x, tiny_params(CONFIG))
    keys = [rollout_key(0, step) for step in (8, 9)]
    batches = [prompts(), take(prompts(), np.arange(12)[::-1])]
    with compilations() as compiled:
        for batch, key in zip(batches, keys, strict=True):
            jax.block_until_ready(sample(batch, key, other_params))
    assert compiled == []
    with compilations() as compiled:
        jax.jit(lambda x: x + 1)(1.0)
    assert compiled  # what one looks like


@pytest.fixture
def count_draws(monkeypatch):
    """Samples with programs that count how often a token per slot is drawn."""
    draws, plain = [], programs.draw

    def counting(logits, uniform, **settings):
        jax.debug.callback(lambda: draws.append(len(logits)))
        return plain(logits, uniform, **settings)

    monkeypatch.setattr(programs, "draw", counting)
    # Programs are kept by their settings: these are not to be taken for others.
    monkeypatch.setattr(generate_module, "programs_of", programs.Programs)

    def run(**changes):
        draws.clear()
        rollout = jax.block_until_ready(sample(**changes))
        jax.effects_barrier()
        return rollout, list(draws)

    return run


@pytest.mark.slow
def test_the_loop_ends_with_the_last_row(count_draws):
    rollout, draws = count_draws(
        eos_ids=tuple(range(2, 17)), max_response_length=512, first_columns=256
    )
    assert not rollout.truncated.any()
    assert 1 < len(draws) == rollout.response_mask.sum(1).max() < 20


LIMITS = np.array([10, 3, 1, 7, 7, 10, 2, 5, 9, 10, 1, 4])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"slots": 1, "first_columns": 3, "kernel": "xla"},
        {"slots": 5, "kernel": "xla"},
        {"slots": 5},
        {"slots": 4, "segment": 2},
    ],
    ids=str,
)
def test_rows_that_take_the_slots_of_others_are_the_same(changes):
    """One at a time, some at a time, with a look of the host at every second token."""
    together = sample(max_lengths=LIMITS)
    assert (together.response_mask.sum(1) <= LIMITS).all()
    ended = {}
    rollout = sample(max_lengths=LIMITS, finished=ended.__setitem__, **changes)
    assert_same(together, rollout)
    assert sorted(ended) == list(range(12))
    for row, response in ended.items():
        n = int(rollout.response_mask[row].sum())
        np.testing.assert_array_equal(response.tokens, responses(rollout)[row, :n])
        np.testing.assert_array_equal(response.logprobs, rollout.sampler_logprobs[row, :n])
        np.testing.assert_array_equal(response.policy_logprobs, rollout.policy_logprobs[row, :n])
        assert response.truncated == rollout.truncated[row]


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "first_columns"), [("xla", 4), ("xla", 64), ("auto", 64)])
def test_shards_that_drift_apart_are_the_same(kernel, first_columns):
    """Three slots of two devices, whose rows are short here and long there, in one stage or more:
    chunks of prompts and shelves are full on one and not on the other."""
    batch = prompt_batch([3, 6, 1, 5, 2, 4, 6, 1], GROUP, PROMPT, CONFIG.vocab_size)
    limits = np.random.default_rng(0).integers(1, 30, 24)
    limits[:12] = np.minimum(limits[:12], 5)
    settings = {"eos_ids": (5,), "max_response_length": 30, "max_lengths": limits}
    together = sample(batch, **settings)
    assert len(set(np.asarray(together.response_mask).sum(1))) > 8
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=1), jax.devices()[:2]))
    changes = {"slots": 6, "first_columns": first_columns, "layout": layout, "kernel": kernel}
    assert_same(together, sample(layout.put_batch(batch), **settings, **changes))


@pytest.mark.slow
def test_a_row_that_finds_the_shelf_full_does_not_stay(monkeypatch):
    """Two rows whose columns are the oldest outgrow the first stage as one place is left: while one
    of them waited, no column could be dropped, and nothing went on."""
    limits = np.array([97, 65, 60, 97, 8, 97, 20, 97, 56, 54, 97, 97, 14, 74, *[97] * 14])
    limits[[16, 18, 22]] = 63, 70, 26
    settings = {"eos_ids": (), "group_size": 1, "max_response_length": 97, "max_lengths": limits}
    batch = prompt_batch([3] * 28, 1, PROMPT, CONFIG.vocab_size)
    looks, follow = [], Schedule.follow

    def counted(self, seen):
        looks.append(int(seen.column))
        assert len(looks) < 200
        follow(self, seen)

    together = sample(batch, **settings)
    monkeypatch.setattr(Schedule, "follow", counted)
    assert_same(together, sample(batch, slots=8, first_columns=96, kernel="xla", **settings))


@pytest.mark.parametrize("slots", [0, 4])
@pytest.mark.parametrize("kernel", ["xla", pytest.param("native", marks=NATIVE)])
def test_nothing_of_a_rollout_is_left(kernel, slots):
    """Its weights and caches are not kept until Python next looks for cycles: training wants their
    room."""
    sample(kernel=kernel, slots=slots)
    held = lambda: sum(x.nbytes for x in jax.live_arrays())  # noqa: E731
    gc.collect()
    gc.disable()
    try:
        before = held()
        jax.block_until_ready(sample(kernel=kernel, slots=slots))
        assert held() == before
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "idle"),
    [
        ("xla", 0),  # the long one is put aside and goes on when there are no others
        pytest.param("native", 10, marks=NATIVE),  # it goes on beside three, then three and two
    ],
)
def test_slots_do_the_work_of_rows_that_go_on(count_draws, kernel, idle):
    """Twelve rows, four at a time, one of them long: no step draws for rows that have ended."""
    limits = np.where(np.arange(12) == 2, 150, 10)
    settings = {"eos_ids": (), "max_response_length": 150, "max_lengths": limits}
    rollout, draws = count_draws(slots=4, kernel=kernel, **settings)
    np.testing.assert_array_equal(rollout.response_mask.sum(1), limits)
    assert draws[0] == 4 and draws[-1] == 1  # slots: fewer when nobody waits
    assert sum(draws) == 11 * 10 + 150 + idle
    assert_same(sample(**settings), rollout)


@NATIVE
@pytest.mark.slow
@pytest.mark.parametrize("slots", [0, 5])
def test_samples_of_a_group_read_one_copy_of_their_prompt(slots, monkeypatch):
    """Every other copy in the cache may hold anything, whichever slots the rows are in."""
    settings = {"kernel": "native", "slots": slots, "max_lengths": LIMITS}
    wanted = sample(group_size=1, **settings)  # which nobody shares
    plain = programs.Programs.token
    sizes = jnp.array(PROMPTS) - 1  # a prompt's last token comes with the response

    def spoil(slots):
        row = slots.row
        group, begin = row.index // GROUP, slots.column - row.length
        columns = jnp.arange(slots.caches[0].key.shape[2]) - begin[:, None]
        prompt = (columns >= 0) & (columns < sizes[group][:, None])
        twins = (group[:, None] == group) & ~slots.free
        other = prompt & jnp.any(jnp.tril(twins, -1), axis=1)[:, None]
        cache = jax.tree.map(lambda x: jnp.where(other[:, None, :, None], jnp.nan, x), slots.caches)
        return dataclasses.replace(slots, caches=cache)

    # What is left behind is not spoilt: when its twin has ended, a row reads what it has itself.
    def token(self, weights, slots, *arguments):
        drawn = plain(self, weights, spoil(slots), *arguments)[1]
        return plain(self, weights, slots, *arguments)[0], drawn

    monkeypatch.setattr(programs.Programs, "token", token)
    monkeypatch.setattr(generate_module, "programs_of", programs.Programs)
    assert_same(wanted, sample(**settings))


@pytest.mark.slow
def test_log_probabilities_of_the_policy_itself(rollout):
    cut = sample(top_k=4, temperature=0.5)
    for one in (rollout, cut):
        wanted = np.take_along_axis(teacher_forced(one, 1.0), responses(one)[..., None], 2)[..., 0]
        mask = np.asarray(one.response_mask)
        found = np.asarray(one.policy_logprobs)
        np.testing.assert_allclose(found[mask], wanted[mask], **ROUNDING)
        assert not found[~mask].any()
        assert np.abs(found - one.sampler_logprobs)[mask].max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "changes"),
    [
        ("pallas", {}),
        ("triton", {"head_dim": 16, "window": 5}),
        pytest.param("native", {"window": 5, "attention_softcap": 3.0}, marks=NATIVE),
    ],
)
def test_a_kernel_draws_the_same(kernel, changes):
    """Interpreted, if not a CPU's own; the cache is one size for all lengths."""
    config = dataclasses.replace(CONFIG, **changes)
    settings = dataclasses.replace(SETTINGS, slots=6)
    params = tiny_params(config)
    one, other = (
        generate(
            params,
            prompts(),
            KEY,
            model=Transformer(dataclasses.replace(config, decode_kernel=name)),
            config=settings,
        )
        for name in ("xla", kernel)
    )
    assert_same(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "within"), [("bfloat16", 0.03), ("int8", 0.03)])
def test_small_caches_round_a_little(cache, within):
    """Keys and values lose all but 8 bits: log-probabilities move in the second digit."""
    small = sample(cache=cache)
    wanted = np.take_along_axis(teacher_forced(small, 0.8), responses(small)[..., None], 2)[..., 0]
    mask = np.asarray(small.response_mask)
    difference = np.abs(np.asarray(small.sampler_logprobs) - wanted)[mask]
    assert 1e-5 < difference.max() < within


@pytest.mark.slow
def test_stop_strings_end_a_response():
    """Letters for tokens: a row ends where its text has said one of the strings."""

    class Letters:
        def decode(self, ids):
            return "".join(chr(ord("a") + i) for i in ids)

        def boundaries(self):
            return lambda i: True

    free = sample(eos_ids=(), max_response_length=30)
    texts = [Letters().decode(ids) for ids in responses(free)]
    stop = (texts[0][3:5], texts[4][7:10])
    stopped = sample(
        eos_ids=(), max_response_length=30, slots=5,
        stops=StopTable.build(Letters(), stop, CONFIG.drawable),
    )  # fmt: skip
    mask = np.asarray(stopped.response_mask)
    ends = [min(text.find(s) + len(s) if s in text else 30 for s in stop) for text in texts]
    said = [any(s in text for s in stop) for text in texts]
    assert sum(said) > 1 and min(ends) < 6
    np.testing.assert_array_equal(mask.sum(1), ends)
    np.testing.assert_array_equal(stopped.truncated, ~np.array(said))
    np.testing.assert_array_equal(responses(stopped)[mask], responses(free)[mask])


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 6])
def test_lengths_around_a_segment(length, rollout):
    """The first tokens are those of a longer response; one token needs no cache at all."""
    other = sample(max_response_length=length)
    mask = np.asarray(rollout.response_mask)[:, :length]
    np.testing.assert_array_equal(other.response_mask, mask)
    np.testing.assert_array_equal(responses(other), responses(rollout)[:, :length])
    np.testing.assert_array_equal(other.truncated, ~np.isin(responses(other), (3, 5)).any(1))


MESHES = [  # fsdp, tensor, and tensor while sampling
    (8, 1, 4),
    pytest.param((2, 4, 0), marks=pytest.mark.slow),
    pytest.param((8, 1, 0), marks=pytest.mark.slow),
    pytest.param((1, 8, -1), marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=lambda s: "x".join(map(str, s)))
def test_mesh_does_not_matter(shape):
    """Rows over 8 devices, 2 x 4, heads and vocabulary over 8: the same responses."""
    model = Transformer(MESH_CONFIG)
    params = tiny_params(MESH_CONFIG)
    batch = prompt_batch([3, 6, 1, 5], 4, PROMPT, MESH_CONFIG.vocab_size)
    config = dataclasses.replace(SETTINGS, group_size=4, max_response_length=6, slots=8)
    static = dataclasses.replace(config, slots=0)
    alone = generate(params, batch, KEY, model=model, config=static)
    layout = Layout(make_mesh(MeshConfig(data=1, fsdp=shape[0], tensor=shape[1])))
    boxed = jax.eval_shape(lambda: init_params(MESH_CONFIG, jax.random.key(0)))
    placed = jax.device_put(params, layout.tree_shardings(boxed))
    within = sampling_layout(layout, MESH_CONFIG.axis_sizes, shape[2])
    assert within.mesh.shape["tensor"] == {-1: 8, 0: shape[1], 4: 4}[shape[2]]
    sharded = generate(
        placed,
        layout.put_batch(batch),
        KEY,
        model=model,
        config=config,
        layout=layout,
        sampling_layout=within,
    )
    assert all(x.sharding.is_equivalent_to(layout.batch, x.ndim) for x in jax.tree.leaves(sharded))
    assert 0 < alone.truncated.sum() < 16
    assert_same(alone, sharded)


@pytest.mark.parametrize(
    "changes",
    [{"max_response_length": 0}, {"group_size": 0}, {"first_columns": 0}, {"temperature": -1.0},
     {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 1.5}, {"slots": -1},
     {"cache": "int4"}, {"segment": 0}],
    ids=str,
)  # fmt: skip
def test_wrong_settings_are_named(changes):
    (field,) = changes
    with pytest.raises(ValueError, match=f"sampler.{field}"):
        dataclasses.replace(SETTINGS, **changes)


@pytest.mark.parametrize("limits", [np.ones(3), np.zeros(12), np.full(12, LENGTH + 1)], ids=len)
def test_limits_must_fit(limits):
    with pytest.raises(ValueError, match="max_lengths"):
        sample(max_lengths=limits)


@pytest.mark.slow
def test_rows_must_fill_their_groups():
    batch = take(prompts(), np.arange(10))
    with pytest.raises(ValueError, match="group"):
        sample(batch)
