"""Tokenizers against sentencepiece itself, and the symbol vocabulary by its properties."""

import hashlib
import json
import random
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
    StreamDecoder,
    generation_eos,
    load_tokenizer,
    train_symbol_tokenizer,
)
from tests.tiny_tokenizers import check_streaming, write_config

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


def test_unusable_paths(tmp_path, symbols_path):
    symbols = symbols_path.read_bytes()
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
    with pytest.raises(InputError, match=r"bad\.model: not a sentencepiece model"):
        (tmp_path / "bad.model").write_bytes(symbols.replace(b"35", b"\xff5"))
        load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(InputError, match="no such file"):
        SentencePieceTokenizer(tmp_path / "none.model")


@pytest.fixture
def llama_folder(shared_data, tmp_path):
    """Llama 2's vocabulary; the test writes tokenizer_config.json."""
    shutil.copy(shared_data / "spm_llama2_32k/tokenizer.model", tmp_path)
    return tmp_path


@pytest.mark.parametrize("legacy", [False, True])
def test_special_texts_as_transformers_reads_them(llama_folder, legacy, parity_packages):
    from transformers import AutoTokenizer

    pad = {"content": "<pad>", "lstrip": False, "rstrip": True, "special": True}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_config(
        llama_folder, tokenizer_class="LlamaTokenizer", legacy=legacy,
        added_tokens_decoder={"32000": pad}, **named,
    )  # fmt: skip
    ours, theirs = load_tokenizer(llama_folder), AutoTokenizer.from_pretrained(llama_folder)
    assert ours.vocab_size == len(theirs) == 32001
    assert ours.pad_id == theirs.pad_token_id == 32000
    assert ours.special_tokens == theirs.special_tokens_map == named
    rng = random.Random(0)
    # One space at a time: of several, sentencepiece and transformers make different pieces.
    words = ("<s>", "</s>", "<pad>", "<unk>", "hello", " hello", " [INST]", "x\u00e9", "\U0001f600")
    for _ in range(300):
        text = "".join(rng.choices(words, k=rng.randrange(8)))
        if text.startswith(" "):
            continue
        assert (
            ours.encode(text, special=True) == theirs(text, add_special_tokens=False)["input_ids"]
        )
        plain = ours.encode(text)
        assert not {0, 1, 2, 32000} & set(plain)
        assert ours.decode(plain) == text
    assert ours.decode(ours.encode("a</s><pad>  b", special=True)) == ("a b" if legacy else "ab")


def test_special_pieces_without_a_config(shared_data):
    tokenizer = SentencePieceTokenizer(shared_data / "spm_llama2_32k/tokenizer.model")
    assert tokenizer.special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    hello, world = tokenizer.encode("hello"), tokenizer.encode(" world")
    assert tokenizer.encode("<s>", special=True) == [1]
    assert tokenizer.encode("hello</s>", special=True) == [*hello, 2]
    assert tokenizer.encode("</s>world", special=True) != [2, *world]  # no space, no leading "▁"
    assert tokenizer.decode(tokenizer.encode("<s>hello</s>", special=True)) == "hello"


def test_added_tokens_beside_a_sentencepiece_model(symbols_path):
    size = load_tokenizer(symbols_path).vocab_size
    added = {
        size: {"content": "<note>", "special": False},
        size + 1: {"content": "<turn>", "rstrip": True, "special": True},
    }
    write_config(symbols_path.parent, added_tokens_decoder=added, eos_token="<turn>")
    tokenizer = load_tokenizer(symbols_path)
    assert (tokenizer.vocab_size, tokenizer.eos_ids) == (size + 2, (size + 1,))
    ids = tokenizer.encode("3<note>5<turn>  8", special=True)
    assert ids == [7, size, 9, size + 1, 12]
    assert tokenizer.decode(ids) == "3<note>58"
    assert tokenizer.encode("3<note>")[1:] == [size]
    assert size + 1 not in tokenizer.encode("<turn>")
    check_streaming(tokenizer)
    write_config(symbols_path.parent, added_tokens_decoder={5: {"content": "3"}})
    with pytest.raises(InputError, match="'3' is id 7 here and id 5 in the files beside it"):
        load_tokenizer(symbols_path)


def test_older_files_beside_a_sentencepiece_model(symbols_path):
    size = load_tokenizer(symbols_path).vocab_size
    folder = symbols_path.parent
    (folder / "added_tokens.json").write_text(json.dumps({"<turn>": size}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<turn>"}))
    tokenizer = load_tokenizer(symbols_path)
    assert tokenizer.eos_ids == (size,) and tokenizer.vocab_size == size + 1
    for content in ('{"<turn>": "x"}', '{"<turn>": -1}', '{"": 30}'):
        (folder / "added_tokens.json").write_text(content)
        with pytest.raises(InputError, match="has the id"):
            load_tokenizer(symbols_path)


@pytest.mark.parametrize("name", MODELS)
def test_streaming_says_what_decoding_says(shared_data, name):
    check_streaming(SentencePieceTokenizer(shared_data / name))


@pytest.mark.parametrize("name", ["spm_llama2_32k/tokenizer.model", "stories260K/tok512.model"])
def test_streaming_breaks_no_character(shared_data, name):
    tokenizer = SentencePieceTokenizer(shared_data / name)
    text = "na\u00efve \u6570\u5b66 \U0001f600\U0001f603 end"
    stream = StreamDecoder(tokenizer)
    said = [stream.push([i]) for i in tokenizer.encode(text)] + [stream.finish()]
    assert "".join(said) == text
    assert "\ufffd" not in "".join(said)


def test_ends_of_responses_that_generation_config_names(tmp_path):
    file = tmp_path / "generation_config.json"
    assert generation_eos(tmp_path) is None
    for content, wanted in (
        ("{}", None), ('{"eos_token_id": null}', None), ('{"eos_token_id": 2}', (2,)),
        ('{"eos_token_id": [7, 2, 7]}', (7, 2)),
    ):  # fmt: skip
        file.write_text(content)
        assert generation_eos(tmp_path) == wanted
    for content, message in (
        ('{"eos_token_id": 2', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "holds a int, not a JSON object"),
        ('{"eos_token_id": "2"}', "eos_token_id='2' is neither an id nor a list of ids"),
        ('{"eos_token_id": true}', "is neither an id"),
        ('{"eos_token_id": []}', "is neither an id"),
        ('{"eos_token_id": [2, 2.5]}', "is neither an id"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=message) as caught:
            generation_eos(tmp_path)
        assert len(str(caught.value).splitlines()) == 1


def test_text_that_is_not_unicode(symbols_path):
    with pytest.raises(InputError, match="half of a surrogate pair"):
        load_tokenizer(symbols_path).encode("3\ud800")
