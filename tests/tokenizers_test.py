"""Tokenizers against sentencepiece itself, and the symbol vocabulary by its properties."""

import hashlib
import shutil
import time

import numpy as np
import pytest
import sentencepiece

from flowrl_jax.errors import InputError
from flowrl_jax.tasks import countdown
from flowrl_jax.tasks import countdown_solver as solver
from flowrl_jax.tokenizers import (
    SentencePieceTokenizer,
    load_tokenizer,
    train_symbol_tokenizer,
)

MODELS = (
    "spm_test_models/test_model.model",
    "spm_test_models/test_ja_model.model",
    "stories260K/tok512.model",
    "spm_llama2_32k/tokenizer.model",
    "spm_t5_32k/spiece.model",
)
TEXTS = (
    "Once upon a time, there was a dog.",
    "  two  spaces and a tab\tand\na newline ",
    "数学は楽しい。",
    "x = (3+5)*(8-5) </s> <s>",
    "",
)


@pytest.fixture
def symbols_path(tmp_path):
    path = tmp_path / "folder" / "symbols.model"
    train_symbol_tokenizer(path, countdown.symbols(50))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_sentencepiece(shared_data, name):
    ours = SentencePieceTokenizer(shared_data / name)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / name))
    assert ours.vocab_size == theirs.get_piece_size()
    assert ours.bos_id == theirs.bos_id() and ours.eos_ids == (theirs.eos_id(),)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert not {ours.bos_id, *ours.eos_ids} & set(ids)
        assert ours.decode(ids) == theirs.decode(ids)
        wrapped = [ours.bos_id, *ids, *ours.eos_ids, ours.pad_id]
        assert ours.decode(list(np.array(wrapped))) == theirs.decode(ids)


def test_special_ids(shared_data):
    llama = SentencePieceTokenizer(shared_data / "spm_llama2_32k/tokenizer.model")
    assert (llama.bos_id, llama.eos_ids) == (1, (2,))
    # Llama 2 has no padding id, so the end id stands in.
    assert llama.pad_id == 2
    t5 = SentencePieceTokenizer(shared_data / "spm_t5_32k/spiece.model")
    assert (t5.pad_id, t5.bos_id, t5.eos_ids) == (0, 2, (1,))
    stories = SentencePieceTokenizer(shared_data / "stories260K/tok512.model", eos_ids=(1, 2))
    assert stories.eos_ids == (1, 2)
    assert stories.decode([1, 403, 2]) == stories.decode([403]) != ""
    with pytest.raises(InputError, match="give ids from 0 to 511"):
        SentencePieceTokenizer(shared_data / "stories260K/tok512.model", eos_ids=(512,))


def test_an_ordinary_piece_may_end_a_response(symbols_path):
    tokenizer = load_tokenizer(symbols_path, eos_ids=(7,))
    assert tokenizer.decode([0, 1, *tokenizer.encode("8+5"), 7]) == "8+5"
    assert load_tokenizer(symbols_path).decode([7]) == "3"


def test_ids_beyond_the_vocabulary_read_as_unknown(symbols_path):
    tokenizer = load_tokenizer(symbols_path)
    text = tokenizer.decode([*tokenizer.encode("3+5"), tokenizer.vocab_size, 10**6])
    assert text.startswith("3+5") and "⁇" in text


def test_symbol_vocabulary(symbols_path):
    known = countdown.symbols(50)
    tokenizer = load_tokenizer(symbols_path)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_ids) == (0, 1, (2,))
    assert tokenizer.vocab_size == len(known) + 4
    for i, symbol in enumerate(known):
        assert tokenizer.encode(symbol) == [i + 4]
    assert len(tokenizer.encode("3,5,10,50=24:")) == 10
    assert tokenizer.encode("35") != tokenizer.encode("3,5")
    assert len(tokenizer.encode("35")) == 1
    assert len(tokenizer.encode("120")) == 2


def test_symbol_round_trip(symbols_path):
    tokenizer = load_tokenizer(symbols_path)
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("0123456789+-*/()=,:"), rng.integers(0, 30)))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for forms in solver.solve_all((3, 5, 5, 8), range(1, 51)).values():
        for form in forms:
            # Prompt and response are encoded apart and read back together.
            ids = [*tokenizer.encode("3,5,5,8=24:"), *tokenizer.encode(form)]
            assert tokenizer.decode(ids) == "3,5,5,8=24:" + form
            assert ids == tokenizer.encode("3,5,5,8=24:" + form)


def test_symbol_training_is_fast_and_repeatable(tmp_path, capfd):
    start = time.perf_counter()
    for name in ("a.model", "longer_name.model"):
        train_symbol_tokenizer(tmp_path / name, countdown.symbols(100))
    assert time.perf_counter() - start < 10
    digests = {hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()}
    assert len(digests) == 1 and len(list(tmp_path.iterdir())) == 2
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ([], "at least one"),
        (["a", "a"], "given twice"),
        (["a", ""], "empty or has white space"),
        (["a", "b c"], "empty or has white space"),
    ],
)
def test_wrong_symbols(tmp_path, symbols, message):
    with pytest.raises(InputError, match=message):
        train_symbol_tokenizer(tmp_path / "x.model", symbols)
    assert list(tmp_path.iterdir()) == []


def test_load_tokenizer_picks_by_what_lies_there(symbols_path):
    shutil.copy(symbols_path, symbols_path.parent / "tokenizer.model")
    for path in (symbols_path, symbols_path.parent, str(symbols_path)):
        assert load_tokenizer(path).encode("3") == [7]
    assert load_tokenizer(symbols_path, eos_ids=[1]).eos_ids == (1,)


def test_unusable_paths(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(InputError, match=r"no tokenizer\.json or tokenizer\.model inside"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match=r"vocab\.json without tokenizer\.json.*AutoTokenizer"):
        load_tokenizer(tmp_path)
    for content in (b"", b"garbage", bytes(range(256)) * 10):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.model: not a sentencepiece model"):
            load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(InputError, match="no such file"):
        SentencePieceTokenizer(tmp_path / "none.model")
