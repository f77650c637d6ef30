"""Hugging Face checkpoints: equal to transformers, refused if damaged, the same bits on return."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from flowrl_jax.errors import InputError
from flowrl_jax.models import hf, hf_names
from flowrl_jax.models.hf import check_vocabulary, load_policy
from flowrl_jax.models.hf_files import open_checkpoint
from flowrl_jax.models.hf_names import leaves
from flowrl_jax.models.hf_save import save_policy
from flowrl_jax.models.transformer import Transformer, TransformerConfig, init_params
from flowrl_jax.sharding import MeshConfig, make_mesh

TINY = TransformerConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    mlp_dim=40,
    rope_theta=5_000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
)


def random_params(config: TransformerConfig, seed: int = 0) -> Any:
    """Parameters of which no two are alike, norms and biases included."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: nn.meta.unbox(init_params(config, jax.random.key(0))))
    draw = lambda x: jnp.asarray(rng.normal(0.2, 0.5, x.shape), x.dtype)  # noqa: E731
    return jax.tree.map(draw, shapes)


def assert_identical(left: Any, right: Any) -> None:
    """Same tree, dtypes and bits."""
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.dtype, y.dtype), left, right)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(
            np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8)
        ),
        left,
        right,
    )


def edit_json(file: Path, **fields: Any) -> None:
    """Sets fields of a JSON object; `...` removes one."""
    value = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def edit_tensors(file: Path, **tensors: Any) -> None:
    """Replaces tensors, named without dots; None removes one."""
    held = load_file(file)
    for name, change in tensors.items():
        name = name.replace("__", ".")
        if change is None:
            del held[name]
        else:
            held[name] = change(held.get(name))
    save_file(held, file)


# --- Out and in again


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard_bytes", [2**30, 9_000], ids=["one-file", "sharded"])
def test_reload_is_bit_identical(dtype, tied, shard_bytes, tmp_path):
    config = dataclasses.replace(
        TINY, dtype=dtype, param_dtype=dtype, tie_embeddings=tied, qkv_bias=tied
    )
    params = random_params(config)
    save_policy(tmp_path / "a", config, params, shard_bytes=shard_bytes)
    sharded = (tmp_path / "a" / "model.safetensors.index.json").exists()
    assert sharded == (shard_bytes == 9_000) != (tmp_path / "a" / "model.safetensors").exists()
    again, loaded = load_policy(tmp_path / "a", dtype=dtype)
    assert again == dataclasses.replace(config, family=again.family)
    assert_identical(loaded, params)


def test_cast_rounds_to_nearest(tmp_path):
    params = random_params(TINY)
    save_policy(tmp_path / "a", TINY, params)
    config, loaded = load_policy(tmp_path / "a", dtype=jnp.bfloat16)
    assert config.dtype == config.param_dtype == jnp.bfloat16
    expected = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), params)
    assert_identical(loaded, expected)


# --- On a mesh


def test_mesh_gets_equal_arrays_and_its_own_shards(tmp_path):
    params = random_params(TINY)
    save_policy(tmp_path / "a", TINY, params, shard_bytes=9_000)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    _, loaded = load_policy(tmp_path / "a", mesh=mesh)
    assert_identical(loaded, params)
    specs = {
        ("embedding", "tokens"): (PartitionSpec("tensor", "fsdp"), (32, 8)),
        ("embedding", "output"): (PartitionSpec("fsdp", "tensor"), (8, 32)),
        ("final_norm", "scale"): (PartitionSpec(None), (32,)),
        ("layers", "attention_norm", "scale"): (PartitionSpec(None, None), (2, 32)),
        ("layers", "mlp_norm", "scale"): (PartitionSpec(None, None), (2, 32)),
        ("layers", "attention", "query"): (PartitionSpec(None, "fsdp", "tensor"), (2, 8, 3, 10)),
        ("layers", "attention", "key"): (PartitionSpec(None, "fsdp", "tensor"), (2, 8, 1, 10)),
        ("layers", "attention", "value"): (PartitionSpec(None, "fsdp", "tensor"), (2, 8, 1, 10)),
        ("layers", "attention", "out"): (
            PartitionSpec(None, "tensor", None, "fsdp"),
            (2, 3, 10, 8),
        ),
        ("layers", "mlp", "gate"): (PartitionSpec(None, "fsdp", "tensor"), (2, 8, 20)),
        ("layers", "mlp", "up"): (PartitionSpec(None, "fsdp", "tensor"), (2, 8, 20)),
        ("layers", "mlp", "down"): (PartitionSpec(None, "tensor", "fsdp"), (2, 20, 8)),
    }
    assert {leaf.path for leaf in leaves(TINY)} == specs.keys()
    for path, (spec, shape) in specs.items():
        value = loaded
        for key in path:
            value = value[key]
        expected = jax.sharding.NamedSharding(mesh, spec)
        assert value.sharding.is_equivalent_to(expected, value.ndim), path
        assert {shard.data.shape for shard in value.addressable_shards} == {shape}, path
    save_policy(tmp_path / "b", TINY, loaded)
    assert_identical(load_policy(tmp_path / "b")[1], params)


def test_mesh_that_does_not_divide_the_model_is_refused(tmp_path):
    save_policy(tmp_path / "a", TINY, random_params(TINY))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4), jax.devices()[:8])
    with pytest.raises(InputError, match="heads axis of 6 does not divide over mesh.tensor=4"):
        load_policy(tmp_path / "a", mesh=mesh)


def everything(config: TransformerConfig = TINY) -> TransformerConfig:
    """A decoder with every kind of leaf, and rows that pad the vocabulary."""
    return dataclasses.replace(
        config, qkv_bias=True, out_bias=True, qk_norm=True, family="qwen3", vocab_multiple=24
    )


@pytest.mark.parametrize("leaf", leaves(everything()), ids=lambda leaf: leaf.path[-1])
def test_parts_of_a_tensor_are_parts_of_the_leaf(leaf, tmp_path, monkeypatch):
    """A leaf's tensor holds all of it; any part of the tensor is read, and nothing beyond."""
    value = np.zeros(leaf.shape, np.float32)
    value[tuple(slice(size) for size in leaf.saved)] = np.random.default_rng(0).random(leaf.saved)
    tensor = leaf.write(value)
    assert tensor.shape == leaf.tensor_shape and tensor.flags.c_contiguous
    save_file({"other": np.ones(5, np.float32), leaf.name(0): tensor}, tmp_path / FILE)
    cuts = [
        tuple(slice(0, n) for n in leaf.shape),
        tuple(slice(0, n) if n == TINY.head_dim else slice(n // 2, n) for n in leaf.shape),
        # Within a head too the values are right, though no mesh cuts there.
        tuple(slice(1, n - 1 if n > 2 else n) for n in leaf.shape),
    ]
    with open_checkpoint(tmp_path) as checkpoint:
        for pieces in (7, 2**19):
            monkeypatch.setattr(hf_names, "_PIECE_ELEMENTS", pieces)
            for cut in cuts:
                part = leaf.read(
                    lambda index: checkpoint.read(leaf.name(0), index), cut, np.dtype(np.float32)
                )
                np.testing.assert_array_equal(part, value[cut])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_seen(value, dtype):
    numbers = np.random.default_rng(0).normal(0, 1e3, 50).astype(dtype)
    assert hf._all_finite(numbers)
    numbers[37] = value
    assert not hf._all_finite(numbers)


@pytest.mark.slow
def test_vocabulary_is_padded_for_the_mesh_and_saved_without(tmp_path):
    config = dataclasses.replace(TINY, vocab_size=61)
    params = random_params(config)
    save_policy(tmp_path / "a", config, params)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    padded, loaded = load_policy(tmp_path / "a", mesh=mesh)
    assert (padded.vocab_size, padded.vocab_rows, padded.drawable) == (61, 62, 61)
    assert not np.asarray(loaded["embedding"]["tokens"])[61:].any()
    tokens = np.arange(12).reshape(1, 12)
    logits = our_logits(padded, loaded, tokens)
    np.testing.assert_allclose(logits[..., :61], our_logits(config, params, tokens), atol=1e-5)
    assert np.isneginf(logits[..., 61:]).all()
    save_policy(tmp_path / "b", padded, loaded)
    assert_identical(load_policy(tmp_path / "b")[1], params)


def our_logits(config: TransformerConfig, params: Any, tokens: Any) -> np.ndarray:
    model = Transformer(config)
    run = jax.jit(lambda p: model.apply({"params": p}, tokens, method="logits"))
    return np.asarray(run(params))


# --- Damaged and unsupported checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Holds `single`, `sharded` (files of one large tensor or a few small ones) and `tied`."""
    folder = tmp_path_factory.mktemp("saved")
    save_policy(folder / "single", TINY, random_params(TINY))
    save_policy(folder / "sharded", TINY, random_params(TINY), shard_bytes=9_000)
    tied = dataclasses.replace(TINY, tie_embeddings=True, qkv_bias=True)
    save_policy(folder / "tied", tied, random_params(tied))
    return folder


def refuse(folder: Path, match: str = "") -> None:
    with pytest.raises(InputError, match=match) as info:
        load_policy(folder)
    assert "\n" not in str(info.value) and len(str(info.value)) < 700


CONFIG_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"model_type": "mamba"}, 'model_type="mamba" is not supported'),
    "no family": ({"model_type": ...}, "lacks the field model_type"),
    "architecture": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
    "rope kind": ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope_scaling="),
    "dynamic rope": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "supported are the types",
    ),
    "rope as text": ({"rope_scaling": "linear"}, "must be an object"),
    "no rope factor": ({"rope_scaling": {"type": "linear"}}, "lacks the field rope_scaling.factor"),
    "rope factor": ({"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling.factor=-1"),
    "rope without type": (
        {"rope_scaling": {"factor": 2.0}},
        "rope_scaling.factor=2.0 is not known",
    ),
    "rope bounds": (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
            }
        },
        "high_freq_factor above",
    ),
    "rope length": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "original_max_position_embeddings=null must be",
    ),
    "two scalings": (
        {
            "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
        "contradict",
    ),
    "rope by layer": ({"rope_parameters": {"full_attention": {}}}, "one kind of positions"),
    "partial rotary": (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "partial rotary field": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "two bases": ({"rope_parameters": {"rope_theta": 9.0}}, "contradict"),
    "base": ({"rope_theta": 0}, "rope_theta=0 must be a positive number"),
    "base not finite": ({"rope_theta": float("inf")}, "rope_theta=Infinity"),
    "attention bias": ({"attention_bias": True}, "lacks the tensor model.layers.0.self_attn.*bias"),
    "mlp bias": ({"mlp_bias": True}, "lacks the tensor model.layers.0.mlp.*bias"),
    "bias as text": ({"mlp_bias": "no"}, "must be true or false"),
    "activation": ({"hidden_act": "quick_gelu"}, 'hidden_act="quick_gelu" is not supported'),
    "window": ({"sliding_window": 4096}, "sliding_window=4096 is not known"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config="),
    "soft cap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    "multiplier": ({"embedding_multiplier": 12}, "embedding_multiplier=12"),
    "layers as text": ({"num_hidden_layers": "2"}, "must be a positive integer"),
    "layers as float": ({"num_hidden_layers": 2.0}, "must be a positive integer"),
    "no layers": ({"num_hidden_layers": 0}, "must be a positive integer"),
    "many layers": ({"num_hidden_layers": 10**12}, "must be at most"),
    "more layers": ({"num_hidden_layers": 99}, "lacks the tensor model.layers.2."),
    "one layer": ({"num_hidden_layers": 1}, "layers.1.* is not part of the model"),
    "no width": ({"hidden_size": ...}, "lacks the field hidden_size"),
    "width": ({"hidden_size": 36}, "asks for"),
    "huge width": ({"hidden_size": 10**30}, "asks for"),
    "heads": ({"num_attention_heads": 4}, "asks for"),
    "kv heads": ({"num_key_value_heads": 4}, "num_kv_heads=4 must divide"),
    "kv heads off": ({"num_key_value_heads": 3}, "asks for"),
    "odd head": ({"head_dim": 5}, "head_dim=5 must be even"),
    "no head": ({"head_dim": None}, "hidden_size=32 must be a multiple"),
    "head": ({"head_dim": "ten"}, 'head_dim="ten"'),
    "vocabulary": ({"vocab_size": 65}, "asks for"),
    "eps": ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06"),
    "no eps": ({"rms_norm_eps": ...}, "lacks the field rms_norm_eps"),
    "tied as number": ({"tie_word_embeddings": 1}, "must be true or false"),
    "tied": ({"tie_word_embeddings": True}, "differs from model.embed_tokens.weight"),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_config_is_refused(case, saved, tmp_path):
    fields, match = CONFIG_ERRORS[case]
    shutil.copytree(saved / "single", tmp_path / "a")
    edit_json(tmp_path / "a" / "config.json", **fields)
    refuse(tmp_path / "a", match)


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": 8.5, "use_sliding_window": True, "max_window_layers": 1},
        {"max_window_layers": "all", "use_sliding_window": True, "sliding_window": 8},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["full_attention", "chunked_attention"]},
        {"num_kv_heads": 1},
        {"use_mrope": True},
    ],
    ids=str,
)
def test_qwen2_config_is_refused(fields, saved, tmp_path):
    shutil.copytree(saved / "tied", tmp_path / "a")
    edit_json(tmp_path / "a" / "config.json", **fields)
    refuse(tmp_path / "a", next(iter(fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 5_000.0}},
        {"rope_scaling": {"type": "default"}, "use_mrope": False, "quantization_config": None},
        {"architectures": ..., "torch_dtype": "bfloat16", "max_length": 20, "temperature": 0.7},
        {"sliding_window_size": 4096, "_attn_implementation": "eager"},  # Gemma 2 27B
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": 1}},
    ],
    ids=str,
)
def test_fields_that_change_no_number_are_accepted(fields, saved, tmp_path):
    expected = load_policy(saved / "tied")[0]
    shutil.copytree(saved / "tied", tmp_path / "a")
    edit_json(tmp_path / "a" / "config.json", **fields)
    assert load_policy(tmp_path / "a")[0] == expected


def drop(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def pipe(name: str) -> Callable[[Path], object]:
    """A file that would never end: nobody writes into it."""
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def tensors(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder / "model.safetensors", **changes)


def poke(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x.flat[7] = value
        return x

    return change


def index(change: Callable[[dict[str, str]], dict[str, Any]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        edit_json(file, weight_map=change(json.loads(file.read_text())["weight_map"]))

    return damage


FILE = "model.safetensors"
QUERY, SCALE = "model.layers.1.self_attn.q_proj.weight", "model__norm__weight"
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no folder": ("single", shutil.rmtree, "no such folder"),
    "no config": ("single", drop("config.json"), "config.json: cannot be read"),
    "config not json": ("single", write("config.json", b"{'a': 1}"), "not JSON"),
    "config not text": ("single", write("config.json", b"\xff\xfe\x00{"), "not JSON"),
    "config nested": ("single", write("config.json", b"[" * 100_000), "not JSON"),
    "config a list": ("single", write("config.json", b"[]"), "not a JSON object"),
    "config a pipe": ("single", pipe("config.json"), "config.json: is not a file"),
    "weights a pipe": ("single", pipe(FILE), "safetensors: is not a file"),
    "no weights": ("single", drop(FILE), "neither model.safetensors nor"),
    "empty": ("single", write(FILE, b""), "not a whole safetensors file"),
    "pointer": ("single", write(FILE, b"version https://git-lfs.github.com"), "not a whole"),
    "pickle": ("single", write(FILE, b"\x80\x02}q\x00." * 50), "not a whole"),
    "missing": ("single", tensors(model__norm__weight=None), "lacks the tensor model.norm"),
    "extra": ("single", tensors(proj_z__weight=lambda _: np.zeros(3)), "proj_z.weight is not part"),
    "shape": ("single", tensors(model__norm__weight=lambda x: x[:-1]), r"has shape \[31\]"),
    "transposed": (
        "single",
        tensors(lm_head__weight=lambda x: np.ascontiguousarray(x.T)),
        r"\[32, 64\]",
    ),
    "integers": ("single", tensors(model__norm__weight=np.int32), "dtype I32"),
    "nan": ("single", tensors(model__norm__weight=poke(np.nan)), "not finite in float32"),
    "infinite": ("single", tensors(lm_head__weight=poke(-np.inf)), "lm_head.weight holds"),
    "wide": (
        "single",
        tensors(lm_head__weight=lambda x: poke(1e300)(x.astype(np.float64))),
        "finite",
    ),
    "shard absent": ("sharded", drop("model-00003-of-00014.safetensors"), "which is absent"),
    "shard empty": ("sharded", write("model-00003-of-00014.safetensors", b""), "not a whole"),
    "index not json": ("sharded", write(f"{FILE}.index.json", b"{"), "not JSON"),
    "index empty": ("sharded", index(lambda _: {}), "no weight_map"),
    "index a list": ("sharded", index(lambda place: list(place)), "no weight_map"),  # type: ignore[arg-type, return-value]
    "index wrong": (
        "sharded",
        index(lambda place: place | {QUERY: place["lm_head.weight"]}),
        "q_proj",
    ),
    "index lacks one": (
        "sharded",
        index(lambda place: {k: v for k, v in place.items() if k != QUERY}),
        "q_proj",
    ),
    "index invents one": (
        "sharded",
        index(lambda place: place | {"a.b": place[QUERY]}),
        "lacks the tensor a.b",
    ),
    "index to elsewhere": (
        "sharded",
        index(lambda place: place | {QUERY: "../single/model.safetensors"}),
        "file's name",
    ),
    "index to a number": ("sharded", index(lambda place: place | {QUERY: 3}), "not a file's name"),
}


@pytest.mark.filterwarnings("error")  # they would be further lines
@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_checkpoint_is_refused(case, saved, tmp_path):
    kind, damage, match = DAMAGES[case]
    shutil.copytree(saved / kind, tmp_path / kind)
    load_policy(tmp_path / kind)
    damage(tmp_path / kind)
    refuse(tmp_path / kind, match)


def test_a_file_is_not_a_folder(saved):
    refuse(saved / "single" / "config.json", "is a file; give a downloaded")


def test_numbers_too_large_for_the_dtype_are_refused(saved, tmp_path):
    shutil.copytree(saved / "single", tmp_path / "a")
    edit_tensors(tmp_path / "a" / FILE, lm_head__weight=poke(1e6))
    load_policy(tmp_path / "a")
    with pytest.raises(InputError, match="not finite in float16"):
        load_policy(tmp_path / "a", dtype=jnp.float16)


def test_superfluous_but_harmless_tensors_are_accepted(saved, tmp_path):
    shutil.copytree(saved / "tied", tmp_path / "a")
    embedding = load_file(tmp_path / "a" / FILE)["model.embed_tokens.weight"]
    edit_tensors(
        tmp_path / "a" / FILE,
        lm_head__weight=lambda _: embedding,
        model__layers__0__self_attn__rotary_emb__inv_freq=lambda _: np.ones(5, np.float32),
    )
    assert_identical(load_policy(tmp_path / "a")[1], load_policy(saved / "tied")[1])


def test_every_truncation_is_refused(saved, tmp_path):
    shutil.copytree(saved / "single", tmp_path / "a")
    file = tmp_path / "a" / FILE
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    ends = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(content) - 1}
    for end in ends | set(rng.integers(0, len(content), 20).tolist()):
        file.write_bytes(content[:end])
        refuse(tmp_path / "a", "not a whole safetensors file")
    file.write_bytes(content + b"x")
    refuse(tmp_path / "a", "not a whole safetensors file")


@pytest.mark.parametrize("name", ["config.json", FILE, f"{FILE}.index.json"])
def test_flipped_bits_never_end_in_a_traceback(name, saved, tmp_path):
    shutil.copytree(saved / ("sharded" if "index" in name else "single"), tmp_path / "a")
    file = tmp_path / "a" / name
    content = bytearray(file.read_bytes())
    head = 8 + int.from_bytes(content[:8], "little") if name == FILE else len(content)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        changed = bytearray(content)
        changed[rng.integers(head)] ^= 1 << int(rng.integers(8))
        file.write_bytes(changed)
        try:  # a flip may be harmless, or give another valid number
            load_policy(tmp_path / "a")
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 30


def test_vocabulary_must_fit():
    check_vocabulary(64, TINY)
    check_vocabulary(60, TINY)
    with pytest.raises(InputError, match="tokenizer has 65 ids, the model 64 rows"):
        check_vocabulary(65, TINY)
