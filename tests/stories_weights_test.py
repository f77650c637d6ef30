"""stories260K, a real pretrained Llama: transformers' numbers, and the story it is known for."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from flowrl_jax.models.hf import check_vocabulary, load_policy
from flowrl_jax.models.hf_save import save_policy
from flowrl_jax.models.transformer import Transformer
from flowrl_jax.sampler import SamplerConfig, generate
from flowrl_jax.sharding import MeshConfig, make_mesh
from flowrl_jax.tokenizers import load_tokenizer
from flowrl_jax.types import PromptBatch

# The beginning of the story that llama2.c prints for this model at temperature 0.
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
)
BOS = 1


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    path = shared_data / "stories260K" / "hf"
    if not path.is_dir():
        pytest.skip(f"needs {path}")
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path, parity_packages: None) -> Any:
    import torch
    import transformers

    torch.set_num_threads(1)  # for a model as small as this more of them only wait
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy_story(folder: Path, length: int, mesh: Mesh | None = None) -> np.ndarray:
    """Greedy tokens `[length]` after the opening id."""
    config, params = load_policy(folder, mesh=mesh)
    zero = jnp.zeros(1, jnp.int32)
    rollout = generate(
        params,
        PromptBatch(jnp.full((1, 1), BOS), jnp.ones((1, 1), bool), zero, zero),
        jax.random.key(0),
        model=Transformer(config),
        config=SamplerConfig(max_response_length=length, eos_ids=(BOS,), temperature=0.0),
    )
    assert rollout.response_mask.all(), "the story ended early"
    return np.asarray(rollout.tokens[0, 1:])


@pytest.fixture(scope="module")
def story(folder: Path) -> np.ndarray:
    return greedy_story(folder, 200)


@pytest.mark.slow
def test_story_is_the_known_one(folder, story):
    tokenizer = load_tokenizer(folder)
    config, _ = load_policy(folder)
    check_vocabulary(tokenizer.vocab_size, config)
    assert tokenizer.bos_id == BOS
    assert tokenizer.decode(story.tolist()).startswith(STORY)


def test_story_equals_transformers_token_for_token(story, theirs):
    import torch
    import transformers

    theirs.generation_config.eos_token_id = None  # generate() would fill it in
    settings = transformers.GenerationConfig(
        max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    expected = theirs.generate(torch.tensor([[BOS]]), generation_config=settings)[0, 1:]
    np.testing.assert_array_equal(story, expected.numpy())


def test_logits_equal_transformers(folder, theirs):
    import torch

    config, params = load_policy(folder)
    tokenizer = load_tokenizer(folder)
    texts = [STORY, "Tom and the dog saw a big red ball in the garden", "xyzzy 123 !?"]
    rows = [[BOS, *tokenizer.encode(text)] for text in texts]
    mask = np.arange(max(map(len, rows))) < np.array([[len(row)] for row in rows])
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(rows)
    run = jax.jit(lambda p: Transformer(config).apply({"params": p}, tokens, mask, method="logits"))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens).long()).logits.numpy()  # causal: needs no mask
    assert np.abs(np.asarray(run(params)) - expected)[mask].max() < 1e-4


def test_exported_weights_tell_the_same_story(folder, tmp_path):
    config, params = load_policy(folder)
    save_policy(tmp_path / "out", config, params, tokenizer_path=folder)
    again, loaded = load_policy(tmp_path / "out")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
def test_story_on_a_mesh(folder):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    text = load_tokenizer(folder).decode(greedy_story(folder, 60, mesh).tolist())
    assert text.startswith(STORY)
