"""The fields of a Hugging Face config.json, taken one at a time.

What is left at the end must be known to leave the decoder's numbers alone, or be switched off; so
a field that a family does not read stops the import instead of being ignored.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl_jax.errors import InputError

# Say nothing about what the decoder computes: names, sizes of tables that no longer exist, hints
# for text generation, what transformers wrote for every model before its version 5, and what it
# does not read in released models (`sliding_window_size` of Gemma 2, `is_llama_config` of SmolLM2).
# Attention dropout and `pretraining_tp` are among them: the first acts only in transformers' own
# training, the second cuts the same matrix products into parts.
_NEUTRAL_TEXT = """
    _name_or_path attention_dropout dtype max_position_embeddings pretraining_tp torch_dtype
    transformers_version use_cache unsloth_fixed unsloth_version bos_token_id eos_token_id
    _attn_implementation _attn_implementation_autoset is_llama_config max_sequence_length
    model_max_length sliding_window_size transformers.js_config
    pad_token_id sep_token_id unk_token_id decoder_start_token_id add_cross_attention
    chunk_size_feed_forward cross_attention_hidden_size finetuning_task id2label is_decoder
    is_encoder_decoder label2id num_labels output_attentions output_hidden_states prefix
    problem_type pruned_heads return_dict task_specific_params tf_legacy_loss
    tie_encoder_decoder tokenizer_class torchscript use_bfloat16 bad_words_ids
    begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size
    cache_implementation num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature
    top_k top_p typical_p
"""
NEUTRAL = frozenset(_NEUTRAL_TEXT.split())

_REQUIRED = object()


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: the file is missing, is not JSON or holds something else than an object.
    """
    try:
        if file.exists() and not file.is_file():  # reading a pipe would wait for ever
            raise InputError(f"{file}: is not a file; give a Hugging Face checkpoint folder")
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}); give a Hugging Face checkpoint folder"
        ) from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        raise InputError(f"{file}: not JSON ({_one_line(error)}); download it again") from error
    if not isinstance(value, dict):
        raise InputError(
            f"{file}: holds a {type(value).__name__}, not a JSON object; download it again"
        )
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class Fields:
    """The fields of one config.json that have not been taken yet."""

    def __init__(self, file: Path, values: Mapping[str, Any] | None = None):
        """Takes the values given, or those of the file.

        Raises:
            InputError: the file is missing, is not JSON or holds something else than an object.
        """
        self.file = file
        self._left = dict(read_json(file) if values is None else values)

    def error(self, name: str, value: Any, rule: str) -> InputError:
        """An error that names the field, the rule and the remedy."""
        return InputError(f"{self.file}: {name}={json.dumps(value)[:120]} {rule}")

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """Takes a field; null counts as absent."""
        value = self._left.pop(name, None)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise InputError(f"{self.file}: lacks the field {name}; download the checkpoint again")
        return default

    def nullable(self, name: str, default: Any) -> Any:
        """Takes a field for which null is a value of its own, apart from absence."""
        return self._left.pop(name, default)

    def peek(self, name: str) -> Any:
        """Looks at a field and leaves it; None where it is absent."""
        return self._left.get(name)

    def peek_count(self, name: str) -> int:
        """Looks at a positive integer and leaves it."""
        return self.check_count(name, self.peek(name))

    def count(self, name: str, default: Any = _REQUIRED) -> int:
        """Takes a positive integer."""
        return self.check_count(name, self.take(name, default))

    def check_count(self, name: str, value: Any) -> int:
        """Checks an integer that was taken already."""
        if type(value) is not int or value < 1:
            raise self.error(name, value, "must be a positive integer")
        return value

    def positive(self, name: str, default: Any = _REQUIRED) -> float:
        """Takes a positive, finite number."""
        return self.check_positive(name, self.take(name, default))

    def check_positive(self, name: str, value: Any) -> float:
        """Checks a number that was taken already; the bounds keep out NaN and infinity."""
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.error(name, value, "must be a positive number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Takes true or false."""
        value = self.take(name, default)
        if type(value) is not bool:
            raise self.error(name, value, "must be true or false")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """Takes an object; an empty one where it is absent."""
        return self.check_mapping(name, self.take(name, {}))

    def check_mapping(self, name: str, value: Any) -> dict[str, Any]:
        """Checks an object that was taken already."""
        if not isinstance(value, dict):
            raise self.error(name, value, "must be an object or null")
        return value

    def cap(self, name: str, default: float | None) -> float:
        """Takes a positive number, or null for none, which is 0 here."""
        value = self.nullable(name, default)
        return 0.0 if value is None else self.check_positive(name, value)

    def only(self, name: str, allowed: Any) -> None:
        """Takes a field for which one value alone is supported, also where it is absent."""
        value = self.take(name, allowed)
        if type(value) is not type(allowed) or value != allowed:
            raise self.error(
                name, value, f"is not supported: this family has {name}={json.dumps(allowed)}"
            )

    def finish(self) -> None:
        """Checks that nothing which could change the decoder's numbers is left."""
        for name, value in self._left.items():
            off = value is None or value is False or value in ([], {}, "")
            if name not in NEUTRAL and not off:
                raise self.error(
                    name,
                    value,
                    "is not known to this decoder; remove the field if it does not change what"
                    " the model computes",
                )
