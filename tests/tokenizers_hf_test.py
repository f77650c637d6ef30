"""tokenizer.json against transformers: ids, texts, special tokens; damaged files."""

import json
import random
import shutil

import pytest
from tokenizers import Tokenizer, models

from flowrl_jax.errors import InputError
from flowrl_jax.tokenizers import HuggingFaceTokenizer, StreamDecoder, load_tokenizer
from tests.tiny_tokenizers import (
    NASTY,
    byte_fallback,
    byte_level,
    check_streaming,
    mixtures,
    write_config,
)

LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>")
GEMMA = ("<start_of_turn>", "<end_of_turn>")
R1 = "tokenizer_config.deepseek-r1-distill-qwen.json"
FAMILIES = ("qwen2_5", "qwen3", "r1", "llama3", "llama2", "gemma")
SPECIAL = ("<|im_end|>", "<s>", "</s>", "<bos>", "<eos>", *LLAMA3, *GEMMA, "<think>", "<unk>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Gives the folder of a family's tokenizer; Qwen's and R1's need the public data."""
    root = tmp_path_factory.mktemp("tokenizers")

    def llama3():
        named = {"bos_token": LLAMA3[0], "eos_token": "<|eot_id|>"}
        return byte_level(root / "llama3", LLAMA3, clean_up_tokenization_spaces=True, **named)

    def pieces(name, gemma):
        named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
        return byte_fallback(root / name, GEMMA, gemma=gemma, unk_token="<unk>", **named)

    def qwen(name, config, request):
        source = request.getfixturevalue("shared_data") / "tokenizer_qwen2"
        (root / name).mkdir(exist_ok=True)
        shutil.copy(source / "tokenizer.json", root / name)
        shutil.copy(source / config, root / name / "tokenizer_config.json")
        return root / name

    def folder(name, request):
        return {
            "llama3": llama3,
            "llama2": lambda: pieces("llama2", gemma=False),
            "gemma": lambda: pieces("gemma", gemma=True),
            "qwen2_5": lambda: qwen("qwen2_5", "tokenizer_config.json", request),
            "qwen3": lambda: qwen("qwen3", "tokenizer_config.qwen3.json", request),
            "r1": lambda: qwen("r1", R1, request),
        }[name]()

    return folder


@pytest.fixture(scope="module")
def texts():
    return [*NASTY, *mixtures(200, SPECIAL)]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_transformers(family, folders, texts, request, parity_packages):
    from transformers import AutoTokenizer

    folder = folders(family, request)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    assert theirs.pad_token_id in (ours.pad_id, None)
    added = theirs.added_tokens_decoder.values()
    special = [token.content for token in added if token.special]
    rng = random.Random(0)
    for text in texts:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, special=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        # Without special=True nothing of a text is special.
        plain = ours.encode(text)
        assert not {ours.bos_id, *ours.eos_ids} & set(plain)
        assert plain == ids or any(token in text for token in special)
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(12))]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_qwen_reads_questions_as_transformers_does(shared_data, parity_packages):
    from transformers import AutoTokenizer

    folder = shared_data / "tokenizer_qwen2"
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert (ours.vocab_size, ours.pad_id, ours.bos_id, ours.eos_ids) == (
        151665, 151643, None, (151645,)
    )  # fmt: skip
    for name in ("gsm8k", "math500"):
        lines = (shared_data / name / "test.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines[:100]:
            for text in [line, *(v for v in json.loads(line).values() if isinstance(v, str))]:
                ids = ours.encode(text)
                assert ids == theirs(text, add_special_tokens=False)["input_ids"]
                assert ours.decode(ids) == theirs.decode(ids)


def test_special_texts_are_plain_unless_asked_for(folders, request):
    tokenizer = load_tokenizer(folders("llama3", request))
    text = "a<|eot_id|>"
    (eos,) = tokenizer.eos_ids
    assert tokenizer.encode(text, special=True)[-1] == eos
    assert eos not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, special=True)) == "a"


def test_added_tokens_that_are_not_special_are_found_either_way(folders, request):
    folder = folders("qwen3", request)
    tokenizer = load_tokenizer(folder)
    think = tokenizer.encode("<think>")
    assert think == tokenizer.encode("<think>", special=True) == [151667]
    assert tokenizer.decode(think) == "<think>"


def test_ids_without_a_token_say_nothing(folders, request):
    tokenizer = load_tokenizer(folders("gemma", request))
    ids = tokenizer.encode("the dog")
    assert tokenizer.decode([-1, *ids, tokenizer.vocab_size, 10**12]) == "the dog"


def test_vocabulary_with_holes(tmp_path):
    library = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="b"))
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 8
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_ids) == (0, None, ())
    assert tokenizer.decode([0, 3]) == "a"


def test_end_ids_that_are_asked_for(folders, request):
    folder = folders("llama3", request)
    e = load_tokenizer(folder).encode("e")
    tokenizer = load_tokenizer(folder, eos_ids=e)
    assert tokenizer.eos_ids == tuple(e)
    assert tokenizer.decode([*tokenizer.encode("th"), *e]) == "th"
    with pytest.raises(InputError, match="eos id 10000: outside the .* ids"):
        load_tokenizer(folder, eos_ids=[10000])


def test_older_special_tokens_map(folders, request, tmp_path):
    shutil.copy(folders("llama3", request) / "tokenizer.json", tmp_path)
    tokens = {"bos_token": {"content": LLAMA3[0], "lstrip": False}, "eos_token": LLAMA3[1]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": LLAMA3[0], "eos_token": LLAMA3[1]}
    assert tokenizer.pad_id == tokenizer.eos_ids[0] != tokenizer.bos_id
    # A token that the vocabulary lacks gets the next id, as transformers gives it.
    write_config(tmp_path, pad_token="[PAD]", eos_token="<|eot_id|>")
    padded = load_tokenizer(tmp_path)
    assert padded.pad_id == tokenizer.vocab_size == padded.vocab_size - 1
    assert padded.encode("[PAD]", special=True) == [padded.pad_id]


def test_both_kinds_in_one_folder(folders, request, tmp_path):
    shutil.copy(folders("llama3", request) / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not looked at")
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)


def test_what_tokenizer_json_cuts_and_pads_is_not_cut_and_padded(folders, request, tmp_path):
    library = Tokenizer.from_file(str(folders("llama3", request) / "tokenizer.json"))
    library.enable_truncation(2)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox"
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 2 < len(tokenizer.encode(text)) < 50


@pytest.mark.parametrize("family", ["qwen2_5", "llama3", "llama2", "gemma"])
def test_streaming_says_what_decoding_says(family, folders, request):
    check_streaming(load_tokenizer(folders(family, request)))


@pytest.mark.parametrize("family", ["qwen2_5", "llama3", "llama2", "gemma"])
def test_streaming_breaks_no_character(family, folders, request):
    tokenizer = load_tokenizer(folders(family, request))
    text = "naïve 数学 😀😃 မြန်မာ 🏳️‍🌈 end"
    stream = StreamDecoder(tokenizer)
    said = [stream.push([i]) for i in tokenizer.encode(text)] + [stream.finish()]
    assert "".join(said) == text
    assert "\ufffd" not in "".join(said)
    assert sum(map(bool, said)) > 4  # and it does come bit by bit


class Counted:
    """A tokenizer that counts the ids it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("family", ["llama3", "llama2", "gemma"])
def test_streaming_costs_as_much_as_decoding(family, folders, request):
    tokenizer = Counted(load_tokenizer(folders(family, request)))
    length = 3000
    bad = tokenizer.encode("\U0010ffff")[0]
    assert tokenizer.boundaries()(bad) is False
    for unit in ("the ", "    ", "数😀", "\U0010ffff"):
        ids = (tokenizer.encode(unit) * length)[:length]
        for row in (ids, [bad] * length, [*tokenizer.eos_ids] * length):
            tokenizer.decoded = 0
            stream = StreamDecoder(tokenizer)
            assert "".join([stream.push([i]) for i in row] + [stream.finish()]) is not None
            assert tokenizer.decoded <= 4 * length


DAMAGE = {
    "empty": (b"", "not a tokenizer.json"),
    "cut": (b'{"version": "1.0", "model": {"type": "BPE", "voc', "not a tokenizer.json"),
    "list": (b"[]", "not a tokenizer.json"),
    "no model": (b"{}", "not a tokenizer.json"),
    "wrong type": (b'{"model": 5}', "not a tokenizer.json"),
    "no text": (bytes(range(256)), "not a tokenizer.json"),
    "nested": (b"[" * 100_000, "not a tokenizer.json"),
    "nested objects": (b'{"model":' * 100_000, "not a tokenizer.json"),
    "merge of nothing": (
        b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[["a","b"]]}}',
        "not a tokenizer.json",
    ),
    "panic": (
        b'{"version":"1.0","model":{"type":"BPE","continuing_subword_prefix":"#####",'
        b'"vocab":{"a":0,"bc":1,"abc":2},"merges":[["a","bc"]]}}',
        "not a tokenizer.json",
    ),
    "strips the end": (
        b'{"version":"1.0","decoder":{"type":"Strip","content":" ","start":0,"stop":9},'
        b'"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}',
        "strips the end",
    ),
    "no tokens": (b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}', "no tokens"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tokenizer_json(case, tmp_path):
    content, message = DAMAGE[case]
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_tokenizer_json_cut_or_changed_anywhere(folders, request, tmp_path):
    """Damage is noticed, or there is a tokenizer that works."""
    content = (folders("gemma", request) / "tokenizer.json").read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.sample(range(len(content)), 3):
            damaged[place] = rng.randrange(256)
        end = rng.choice([len(content), rng.randrange(len(content))])
        (tmp_path / "tokenizer.json").write_bytes(damaged[:end])
        try:
            tokenizer = load_tokenizer(tmp_path)
            tokenizer.decode(tokenizer.encode("the dog ☃ <bos>", special=True))
            StreamDecoder(tokenizer).push(range(300))
        except InputError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
    assert refused > 75


CONFIG_DAMAGE = {
    "cut": ('{"bos_token": "<bo', "not JSON"),
    "list": ("[]", "holds a list, not a JSON object"),
    "nested": ("[" * 100_000, "not JSON"),
    "number": ('{"eos_token": 5}', "eos_token=5 is neither text nor a token"),
    "no content": ('{"eos_token": {"lstrip": true}}', "is neither text nor a token"),
    "flag": ('{"eos_token": {"content": "a", "lstrip": 3}}', "flags are not true or false"),
    "extra": ('{"additional_special_tokens": 3}', "additional_special_tokens=3 is no list"),
    "added": ('{"added_tokens_decoder": []}', "added_tokens_decoder is a JSON list"),
    "added id": ('{"added_tokens_decoder": {"x": {"content": "a"}}}', "'x' is not an id"),
    "long": (json.dumps({"eos_token": [9] * 10**5}), "is neither text nor a token"),
    "added entry": ('{"added_tokens_decoder": {"1": 2}}', "is not an object"),
}


@pytest.mark.parametrize("case", CONFIG_DAMAGE)
def test_damaged_tokenizer_config(case, folders, request, tmp_path):
    content, message = CONFIG_DAMAGE[case]
    shutil.copy(folders("gemma", request) / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000


def test_text_that_is_not_unicode(folders, request):
    tokenizer = load_tokenizer(folders("llama3", request))
    with pytest.raises(InputError, match="half of a surrogate pair"):
        tokenizer.encode("a\ud800")
