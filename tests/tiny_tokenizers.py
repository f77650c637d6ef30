"""Small tokenizers in the manner of well-known models, and texts and ids that are hard on them."""

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from flowrl_jax.tokenizers import StreamDecoder, Tokenizer

TRAINING = (
    "the quick brown fox jumps over the lazy dog and counts 1234567890 times",
    "def f(x):\n    return x**2 + 1  # the square",
    "naïve café über straße 数学は楽しい 😀 😃 it's we'll don't",
    "system user assistant model what is the answer to the question",
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

NASTY = (
    "",
    " ",
    "  two  and   three spaces ",
    "\n\n\n",
    "\t x\r\n\r y",
    "h\u00e9llo h\u0065\u0301llo \u1112\u1161\u11ab \ufb01 \u01c6",  # composed or not
    "日本語 中文字 한국어 မြန်မာ ไทย",
    "😀😃🏳️‍🌈 👩‍👩‍👧‍👦 ☃",
    "\x00\x01\x1b\x7f\x85",
    "123456789012345678901234567890 3.14159 1,000,000",
    "def f(x):\n    return x**2\n\n\n\nclass A:\n\tpass  # ok",
    "\u3000\u00a0\u200b\ufeff\u2028\u202e x",
    "It's we'LL I'M they'd",
    "\ufffd\uffff\U0010ffff",
    "a" * 300,
    " " * 300,
    "▁x ▁▁ <0x0A> Ġ",
    "<s>a</s> b<s><s>c</s> <unk>",
    "<|im_start|>user\nhi<|im_end|>  <|endoftext|>\n<tool_call>{}</tool_call><think>",
    "<start_of_turn>user\n2+2<end_of_turn>\n<bos><eos><pad>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "<|begin▁of▁sentence|><|User|>hi<|Assistant|>".replace("|", "\uff5c"),  # as DeepSeek writes it
    "<|im_end",
)


def mixtures(count: int, pieces: tuple[str, ...] = ()) -> list[str]:
    """Random texts of awkward characters and of the given pieces, the same ones every time."""
    rng = random.Random(count)
    letters = "abZ 09\n\t\r é\u0301日😀<>|_▁'.{}\u3000"
    alphabet = [*letters, *(piece for piece in pieces for _ in range(4))]
    return ["".join(rng.choices(alphabet, k=rng.randrange(30))) for _ in range(count)]


def write_config(folder: Path, **fields: Any) -> None:
    """Writes tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")


def byte_level(folder: Path, special: tuple[str, ...], **config: Any) -> Path:
    """A folder with byte-level BPE, split as Llama 3 splits."""
    tokenizer = Library(models.BPE(vocab=_byte_vocabulary(), merges=_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _save(tokenizer, folder, special, config)


def byte_fallback(folder: Path, special: tuple[str, ...], *, gemma: bool, **config: Any) -> Path:
    """A folder with pieces after "▁" and bytes for what they lack, as Gemma's or Llama 2's."""
    vocabulary = {name: i for i, name in enumerate(("<pad>", "<eos>", "<bos>", "<unk>"))}
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", *sorted({c for text in TRAINING for c in text if c.isascii()} - {" "})]
    for piece in [*pieces, "▁▁", "▁t", "▁th", "▁the", "er", "qu", "数学", "é", "日", "☃"]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [("▁", "▁"), ("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("e", "r"), ("q", "u")]
    tokenizer = Library(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return _save(tokenizer, folder, ("<pad>", "<eos>", "<bos>", "<unk>", *special), config)


def check_streaming(tokenizer: Tokenizer, rounds: int = 500) -> None:
    """Streams random ids, among them bytes and parts of characters, in random portions."""
    rng = random.Random(0)
    size = tokenizer.vocab_size
    looked_at = rng.sample(range(size), min(size, 2000))
    parts = [i for i in looked_at if not tokenizer.boundaries()(i)]
    assert parts
    for _ in range(rounds):
        few = rng.choices(parts, k=2)
        pools = (range(-2, size + 2), parts, few)
        ids = [rng.choice(rng.choice(pools)) for _ in range(rng.randrange(16))]
        stream = StreamDecoder(tokenizer)
        said, start = [], 0
        while start < len(ids):
            end = start + rng.randrange(1, 4)
            said.append(stream.push(ids[start:end]))
            start = end
        said.append(stream.finish())
        assert "".join(said) == tokenizer.decode(ids), ids
        assert stream.push(ids) + stream.finish() == tokenizer.decode(ids)  # it starts anew


def _save(tokenizer: Library, folder: Path, special: tuple[str, ...], config: Any) -> Path:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    write_config(folder, tokenizer_class="PreTrainedTokenizerFast", **config)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


_MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("e", "r"), ("i", "n"), ("1", "2"), ("ð", "Ł")]


def _byte_vocabulary() -> dict[str, int]:
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in _MERGES)]
    return {piece: i for i, piece in enumerate(pieces)}
