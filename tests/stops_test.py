"""Stop strings: tables against a search of the decoded text."""

import random
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.errors import InputError
from flowrl_jax.sampler.stops import StopTable, advance, cut_at_stop
from flowrl_jax.tokenizers import load_tokenizer, train_symbol_tokenizer
from tests.tiny_tokenizers import byte_fallback, byte_level

KINDS = ("symbols", "byte_level", "gemma", "llama2", "qwen2", "spm_llama2", "spm_t5")
STOPS = (
    ["ab", "abab", "b\n\n"],
    ["\n\n"],
    ["the", " th", "e e"],
    ["</answer>", "##", "12", "aab"],
    ["a"],
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Opens a tokenizer by kind; the real ones need the public data."""
    root = tmp_path_factory.mktemp("stops")

    def opened(kind, request):
        if kind == "symbols":
            train_symbol_tokenizer(root / "s.model", ["a", "b", "ab", "bab", "1", "12", "é"])
            return load_tokenizer(root / "s.model")
        if kind == "byte_level":
            return load_tokenizer(byte_level(root / kind, ("<|end|>",), eos_token="<|end|>"))
        if kind in ("gemma", "llama2"):
            folder = byte_fallback(root / kind, (), gemma=kind == "gemma", eos_token="<eos>")
            return load_tokenizer(folder)
        data = request.getfixturevalue("shared_data")
        if kind == "qwen2":
            (root / kind).mkdir()
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(data / "tokenizer_qwen2" / name, root / kind)
            return load_tokenizer(root / kind)
        file = {"spm_llama2": "spm_llama2_32k/tokenizer.model", "spm_t5": "spm_t5_32k/spiece.model"}
        return load_tokenizer(data / file[kind])

    return opened


@jax.jit
def run(table, tokens):
    """The step `[N]` of each row's first hit, T without one."""

    def step(state, token):
        state, hit = advance(table, state, token)
        return state, hit

    _, hits = jax.lax.scan(step, jnp.zeros(tokens.shape[0], jnp.int32), tokens.T)
    return jnp.where(hits.any(0), hits.argmax(0), tokens.shape[1])


def sequences(tokenizer, stops, count, length):
    """Ids that make matches likely: those of the stop strings' texts, and any at all."""
    rng = random.Random(0)
    texts = [s[i:j] for s in stops for i in range(len(s)) for j in range(i + 1, len(s) + 1)]
    near = [i for text in texts for i in tokenizer.encode("x" + text)]
    near += [i for text in texts for i in tokenizer.encode(text)]
    few = range(min(tokenizer.vocab_size, 300))  # among them bytes and special ids
    pools = (near, near, near, few, range(tokenizer.vocab_size))
    return [[rng.choice(rng.choice(pools)) for _ in range(length)] for _ in range(count)]


def first_hit(tokenizer, anchor, ids, stops):
    """The first step after which the decoded text holds a stop string."""
    said = len(tokenizer.decode(anchor))
    for step in range(len(ids)):
        text = tokenizer.decode([*anchor, *ids[: step + 1]])[said:]
        if any(stop in text for stop in stops):
            return step
    return len(ids)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_a_search_of_the_decoded_text(kind, tokenizers, request):
    tokenizer = tokenizers(kind, request)
    vocab = tokenizer.vocab_size + 3
    anchor = tokenizer.encode("1")[-1:]
    hits = 0
    for stops in STOPS[: 2 if vocab > 100_000 else None]:
        start = time.perf_counter()
        table = StopTable.build(tokenizer, stops, vocab)
        assert time.perf_counter() - start < 60  # seconds; 2 on an idle machine
        assert table.next_state.dtype == jnp.int8 and table.next_state.shape[1] == vocab
        count, length = 400, 12
        rows = sequences(tokenizer, stops, count, length)
        if kind in ("gemma", "llama2"):  # damaged UTF-8 beside an ASCII byte: see StopTable.build
            parts = {i for i in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.decode([i])}
            rows = [[i for i in row if i not in parts] for row in rows]
            rows = [row + [tokenizer.eos_ids[0]] * (length - len(row)) for row in rows]
        expected = [first_hit(tokenizer, anchor, row, stops) for row in rows]
        np.testing.assert_array_equal(run(table, jnp.asarray(rows)), expected)
        hits += sum(step < length for step in expected)
    assert hits


def test_within_one_token_and_over_many(tokenizers, request):
    tokenizer = tokenizers("symbols", request)
    a, b, ab, bab, one, _, e = (
        tokenizer.encode(t)[0] for t in ("a", "b", "ab", "bab", "1", "12", "é")
    )
    table = StopTable.build(tokenizer, ["abab", "ba1"], tokenizer.vocab_size)
    silent = tokenizer.eos_ids[0]
    for ids, step in (
        ([a, bab, one], 1),
        ([a, b, a, b], 3),
        ([ab, ab], 1),
        ([a, bab, e], 1),
        ([ab, a, one], 2),
        ([ab, silent, ab], 2),  # a special token adds nothing
        ([ab, e, ab], 3),
        ([a, a, bab], 2),
    ):
        assert run(table, jnp.asarray([ids]))[0] == step, ids


def test_state_starts_anew_after_a_hit(tokenizers, request):
    tokenizer = tokenizers("symbols", request)
    table = StopTable.build(tokenizer, ["aa"], tokenizer.vocab_size)
    token = jnp.asarray(tokenizer.encode("a"))
    state, found = jnp.zeros(1, jnp.int32), []
    for _ in range(4):
        state, hit = advance(table, state, token)
        found.append(bool(hit[0]))
    assert found == [False, True, False, True]


def test_many_states_take_a_wider_dtype(tokenizers, request):
    tokenizer = tokenizers("symbols", request)
    table = StopTable.build(tokenizer, ["a" * 200 + "b"], tokenizer.vocab_size)
    assert table.next_state.dtype == jnp.int16
    ids = tokenizer.encode("a" * 230 + "b")
    assert run(table, jnp.asarray([ids]))[0] == len(ids) - 1


@pytest.mark.parametrize(
    ("text", "stops", "cut"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("xabab", ["abab", "b"], "xa"),  # the one that ends first
        ("xab", ["b", "ab"], "x"),  # the longest of those
        ("abc", ["d"], "abc"),
        ("abc", ["a"], ""),
        ("abc", [], "abc"),
    ],
)
def test_cut_at_stop(text, stops, cut):
    assert cut_at_stop(text, stops) == cut


@pytest.mark.parametrize("stops", [[], "\n", [""], ["ok", ""], ["é"]])
def test_wrong_stop_strings_are_one_line(stops, tokenizers, request):
    with pytest.raises(InputError) as error:
        StopTable.build(tokenizers("symbols", request), stops, 10)
    assert "\n" not in str(error.value)
