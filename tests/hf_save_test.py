"""What is written of a policy, and what is refused; `hf_test.py` compares it with transformers."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from flowrl_jax import new_folder
from flowrl_jax.errors import InputError
from flowrl_jax.models.hf import load_policy
from flowrl_jax.models.hf_config import write_config
from flowrl_jax.models.hf_save import carried_fields, count_tensors, save_policy
from flowrl_jax.models.transformer import TransformerConfig
from flowrl_jax.sharding import Layout, MeshConfig, make_mesh
from tests.tiny import MESH_CONFIG, tiny_config, tiny_params

TINY = tiny_config(tie_embeddings=False)
FILE = "model.safetensors"


def params_of(config: TransformerConfig) -> Any:
    """Parameters whose leaves may be replaced."""
    return jax.tree.map(lambda x: x, tiny_params(config))


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def assert_same_bits(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, x in left.items():
        assert x.dtype == right[name].dtype, name
        np.testing.assert_array_equal(x.view(np.uint8), right[name].view(np.uint8), name)


def test_boxed_parameters_and_a_tokenizer_are_saved(tmp_path):
    box = lambda x: nn.LogicallyPartitioned(x, (None,) * x.ndim)  # noqa: E731
    (tmp_path / "vocabulary.model").write_bytes(b"pieces")
    save_policy(
        tmp_path / "deep" / "a",
        TINY,
        jax.tree.map(box, params_of(TINY)),
        tokenizer_path=tmp_path / "vocabulary.model",
        fields={"eos_token_id": 1, "max_position_embeddings": 512},
        generation={"eos_token_id": [1, 3]},
    )
    loaded = load_policy(tmp_path / "deep" / "a")[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, params_of(TINY))
    assert (tmp_path / "deep" / "a" / "tokenizer.model").read_bytes() == b"pieces"
    config = read_json(tmp_path / "deep" / "a" / "config.json")
    assert (config["eos_token_id"], config["max_position_embeddings"]) == (1, 512)
    # The other way to name a tokenizer: a folder that holds one.
    save_policy(tmp_path / "b", TINY, params_of(TINY), tokenizer_path=tmp_path / "deep" / "a")
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == b"pieces"
    assert read_json(tmp_path / "b" / "generation_config.json") == {"eos_token_id": [1, 3]}
    # What is given goes before what lies in the tokenizer's folder.
    save_policy(
        tmp_path / "c",
        TINY,
        params_of(TINY),
        tokenizer_path=tmp_path / "b",
        generation={"eos_token_id": 2},
    )
    assert read_json(tmp_path / "c" / "generation_config.json") == {"eos_token_id": 2}


def test_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(new_folder.os, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        save_policy(tmp_path / "a", TINY, params_of(TINY))
    assert list(tmp_path.iterdir()) == []


def test_save_refuses(tmp_path):
    params = params_of(TINY)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "empty").mkdir()
    other = dataclasses.replace(TINY, num_layers=3)
    without = params | {"embedding": {"tokens": params["embedding"]["tokens"]}}
    save = lambda *words, **options: lambda: save_policy(tmp_path / words[0], *words[1:], **options)  # noqa: E731
    refused: list[tuple[str, Callable[[], None]]] = [
        ("exists already", save("full", TINY, params)),
        (r"key: has shape \(2, ", save("a", other, params)),
        (r"embedding/output: has shape None", save("a", TINY, without)),
        (r"embedding/output: has .* asks for None", save("a", tiny_config(), params)),
        ("no tokenizer", save("a", TINY, params, tokenizer_path="no")),
        ("hidden_size", save("a", TINY, params, fields={"hidden_size": 1})),
        ("dtype 'int8': not known", save("a", TINY, params, dtype="int8")),
    ]
    for message, call in refused:
        with pytest.raises(InputError, match=message):
            call()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]
    assert (tmp_path / "full" / "precious").read_text() == "x"
    save_policy(tmp_path / "empty", TINY, params)
    assert (tmp_path / "empty" / FILE).exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_are_rounded_to_the_dtype(dtype, tmp_path):
    save_policy(tmp_path / "a", TINY, params_of(TINY))
    save_policy(tmp_path / "b", TINY, params_of(TINY), dtype=dtype)
    expected = {
        name: np.asarray(jnp.asarray(x, dtype))
        for name, x in load_file(tmp_path / "a" / FILE).items()
    }
    assert_same_bits(load_file(tmp_path / "b" / FILE), expected)
    assert read_json(tmp_path / "b" / "config.json")["torch_dtype"] == dtype
    # What has come from this dtype goes back into it bit by bit.
    config, params = load_policy(tmp_path / "b")
    assert params["final_norm"]["scale"].dtype == jnp.float32
    save_policy(tmp_path / "c", config, params, dtype=dtype)
    assert_same_bits(load_file(tmp_path / "c" / FILE), expected)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e5, "float16", "model.norm.weight: holds 1e[+]05, too large for float16"),
        (
            np.inf,
            None,
            "model.norm.weight: holds numbers that are not finite; the run has diverged",
        ),
        (np.nan, "bfloat16", "not finite"),
    ],
)
def test_numbers_that_cannot_be_written_are_refused(value, dtype, message, tmp_path):
    params = params_of(TINY)
    params["final_norm"] = {"scale": params["final_norm"]["scale"].at[3].set(value)}
    with pytest.raises(InputError, match=message):
        save_policy(tmp_path / "a", TINY, params, dtype=dtype)
    assert list(tmp_path.iterdir()) == []
    if np.isfinite(value):
        save_policy(tmp_path / "a", TINY, params, dtype="bfloat16")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_that_fill_the_vocabulary_up_are_not_written(tied, tmp_path):
    config = tiny_config(tie_embeddings=tied)
    params = params_of(config)
    padded = params | {"embedding": dict(params["embedding"])}
    more = lambda x, axis: jnp.pad(x, [(0, 7 * (i == axis)) for i in range(2)], constant_values=9.0)  # noqa: E731
    padded["embedding"]["tokens"] = more(params["embedding"]["tokens"], 0)
    if not tied:
        padded["embedding"]["output"] = more(params["embedding"]["output"], 1)
    save_policy(tmp_path / "a", config, params)
    save_policy(tmp_path / "b", dataclasses.replace(config, vocab_multiple=8), padded)
    assert_same_bits(load_file(tmp_path / "b" / FILE), load_file(tmp_path / "a" / FILE))
    assert read_json(tmp_path / "b" / "config.json") == read_json(tmp_path / "a" / "config.json")
    with pytest.raises(InputError, match="embedding/.*: has shape"):
        save_policy(tmp_path / "c", config, padded)


def test_arrays_on_a_mesh_give_the_same_files(tmp_path):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    config = MESH_CONFIG
    save_policy(tmp_path / "a", config, params_of(config), shard_bytes=3_000)
    params = load_policy(tmp_path / "a", mesh=mesh)[1]
    assert not params["layers"]["mlp"]["up"].is_fully_replicated and Layout(mesh).batch_shards == 4
    tensors: list[None] = []
    save_policy(
        tmp_path / "b", config, params, shard_bytes=3_000, on_tensor=lambda: tensors.append(None)
    )
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) > 5 and len(tensors) == count_tensors(config)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_fields_that_the_decoder_does_not_determine_are_carried(tmp_path):
    fields = {"eos_token_id": [2, 3], "max_position_embeddings": 77, "pad_token_id": 5}
    save_policy(tmp_path / "a", TINY, params_of(TINY), fields=fields)
    about_files = {"transformers_version": "4.0", "_name_or_path": "x", "dtype": "float16"}
    file = tmp_path / "a" / "config.json"
    file.write_text(json.dumps(read_json(file) | about_files))
    config = load_policy(tmp_path / "a")[0]
    carried = carried_fields(tmp_path / "a", config)
    assert carried.items() >= fields.items()
    assert not carried.keys() & {*about_files, "hidden_size", "torch_dtype", "model_type"}
    save_policy(tmp_path / "b", TINY, params_of(TINY), fields=carried)
    assert {k: v for k, v in read_json(file).items() if k not in about_files} == read_json(
        tmp_path / "b" / "config.json"
    )


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gemma_without_windows_names_one_all_the_same(family):
    """transformers makes the mask of a window for every Gemma, and fails where it has no size."""
    gemma = {"norm_offset": 1.0, "sandwich_norm": True, "activation": "gelu_tanh"}
    config = tiny_config(family=family, embed_scale=4.0, qk_norm=family == "gemma3_text", **gemma)
    entries = write_config(config, "float32")
    assert entries["sliding_window"] == 4096
    assert entries["layer_types"] == ["full_attention"] * 2
