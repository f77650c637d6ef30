"""Every family against transformers: logits, greedy text, gradients, and back again."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.logprobs import token_logprobs
from flowrl_jax.models.families import FAMILIES
from flowrl_jax.models.hf import load_policy
from flowrl_jax.models.hf_names import leaves
from flowrl_jax.models.hf_save import save_policy
from flowrl_jax.models.transformer import Transformer, TransformerConfig
from flowrl_jax.sampler import SamplerConfig, generate
from flowrl_jax.types import PromptBatch

# Texts are up to 71 tokens long, so that windows, stretched waves and caps all take effect.
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24, "rope_theta": 5e5,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e3,
}  # fmt: skip
GEMMA = {"tied": True, "hidden_activation": "gelu_pytorch_tanh"}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
}

# Key heads 1, 2, 3, 6 of 6; head_dim apart from hidden / heads; tied and not.
PEERS: dict[str, dict[str, Any]] = {
    "llama-tied": {"num_key_value_heads": 2, "head_dim": 14, "rope": {"rope_theta": 700.0}},
    "llama-untied": {"num_key_value_heads": 1, "tied": False},
    "llama-3": {"num_key_value_heads": 3, "rope": LLAMA3},
    "llama-linear": {"rope": {"rope_type": "linear", "factor": 3.0}, "tied": False},
    "llama-biases": {
        "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu",
        "rope": YARN,
    },
    "qwen2-tied": {"num_key_value_heads": 3, "rope": {"rope_theta": 1e6}},
    "qwen2-untied": {"num_key_value_heads": 6, "rope": {"rope_theta": 50.0}, "tied": False},
    "qwen2-windows": {
        "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5,
        "max_window_layers": 1, "rope": YARN | {"attention_factor": 1.3, "truncate": False},
    },
    "qwen3-tied": {"num_key_value_heads": 1, "head_dim": 10, "rope": {"rope_theta": 1e6}},
    "qwen3-untied": {
        "num_key_value_heads": 2, "head_dim": 6, "attention_bias": True, "tied": False,
        "use_sliding_window": True, "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mistral-window": {"num_key_value_heads": 2, "sliding_window": 7, "head_dim": 12},
    "mistral": {"num_key_value_heads": 1, "sliding_window": None, "tied": False},
    "gemma": {"num_key_value_heads": 1, "head_dim": 10, "hidden_act": "gelu"},
    "gemma2": GEMMA | {
        "num_key_value_heads": 2, "head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 4.0, "final_logit_softcapping": 7.0,
    },
    "gemma2-uncapped": GEMMA | {
        "num_key_value_heads": 6, "head_dim": 8, "sliding_window": 64, "tied": False,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "gemma3": GEMMA | {
        "num_key_value_heads": 1, "head_dim": 14, "sliding_window": 6, "query_pre_attn_scalar": 9,
        "sliding_window_pattern": 2, "rope": TWO_ROPES,
    },
    "gemma3-plain": GEMMA | {
        "num_key_value_heads": 3, "head_dim": 8, "sliding_window": 9,
        "final_logit_softcapping": 5.0,
    },
}  # fmt: skip
PREFIXES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral",
            "gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3"}  # fmt: skip


@dataclasses.dataclass
class Peer:
    """The same random policy on both sides."""

    folder: Path
    theirs: Any
    config: TransformerConfig
    params: Any


def make_peer(name: str, folder: Path) -> Peer:
    """A random transformers model of `PEERS`, saved and loaded here."""
    import torch
    import transformers

    torch.set_num_threads(1)  # for models as small as these more of them only wait
    settings = dict(PEERS[name])
    prefix = PREFIXES[name.split("-")[0]]
    config_class = f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    if "rope" in settings:
        plain = {"rope_type": "default", "rope_theta": 10_000.0}
        own = settings.pop("rope")
        settings["rope_parameters"] = dict(own) if prefix == "Gemma3" else plain | own
    config = getattr(transformers, config_class)(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=52,
        num_hidden_layers=3,
        num_attention_heads=6,
        rms_norm_eps=3e-5,
        tie_word_embeddings=settings.pop("tied", True),
        max_position_embeddings=128,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
        **settings,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    gemma = name.startswith("gemma")
    for key, value in model.named_parameters():
        # Fresh norms multiply by 1 and fresh biases are 0: they would hide a mistake. The last
        # norm changes signs in Gemma, whose tied embedding else makes every token follow itself.
        around = 1.0 if "norm" in key and not gemma else 0.0
        around, spread = (-1.0, 1.0) if gemma and key == "model.norm.weight" else (around, 0.3)
        torch.nn.init.normal_(value, around, spread if value.ndim == 1 else 0.17)
    model.save_pretrained(folder)
    return Peer(folder, model, *load_policy(folder))


@pytest.fixture(scope="module")
def peers(parity_packages, tmp_path_factory) -> Callable[[str], Peer]:
    made: dict[str, Peer] = {}

    def peer(name: str) -> Peer:
        if name not in made:
            made[name] = make_peer(name, tmp_path_factory.mktemp(name))
        return made[name]

    return peer


def left_padded(lengths: tuple[int, ...], vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts `[B, P]` and their mask; what lies under the padding is random too."""
    tokens = np.random.default_rng(1).integers(0, vocab, (len(lengths), max(lengths)))
    mask = np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]
    return tokens.astype(np.int32), mask


def torch_logits(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch

    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            torch.tensor(tokens).long(),
            attention_mask=torch.tensor(mask).long(),
            position_ids=torch.tensor(positions),
        )
    return out.logits.float().numpy()


def our_logits(config: TransformerConfig, params: Any, tokens: Any, mask: Any) -> np.ndarray:
    model = Transformer(config)
    run = jax.jit(lambda p: model.apply({"params": p}, tokens, mask, method="logits"))
    return np.asarray(run(params))


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_logits_equal_transformers(peers, name):
    peer = peers(name)
    tokens, mask = left_padded((51, 9, 1), peer.config.vocab_size)
    ours = our_logits(peer.config, peer.params, tokens, mask)
    theirs = torch_logits(peer.theirs, tokens, mask)
    assert np.abs(theirs[mask]).max() > 3.0  # or else the bound would say little
    assert np.abs(ours - theirs)[mask].max() < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_greedy_text_equals_transformers(peers, name):
    import torch

    peer = peers(name)
    tokens, mask = left_padded((7, 3, 1), peer.config.vocab_size)
    theirs = peer.theirs.generate(
        torch.tensor(tokens).long(),
        attention_mask=torch.tensor(mask).long(),
        generation_config=greedy(64),
    )
    rows = jnp.arange(3, dtype=jnp.int32)
    rollout = generate(
        peer.params,
        PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), rows, rows * 0),
        jax.random.key(0),
        model=Transformer(peer.config),
        config=SamplerConfig(max_response_length=64, eos_ids=(), temperature=0.0),
    )
    np.testing.assert_array_equal(rollout.tokens, theirs.numpy())
    assert len(np.unique(np.asarray(rollout.tokens)[:, 7:])) > 8  # not one token over and over


def greedy(length: int) -> Any:
    """transformers' settings for greedy text of exactly this length."""
    import transformers

    return transformers.GenerationConfig(
        max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-biases", "qwen3-untied", "gemma2", "gemma3"])
def test_logprob_gradients_equal_torch(peers, name):
    """Of every parameter: of the log-probabilities, at a temperature, and through the caps."""
    import torch

    peer = peers(name)
    tokens, _ = left_padded((17, 17), peer.config.vocab_size)
    peer.theirs.zero_grad()
    rows = torch.tensor(tokens).long()
    logprobs = torch.log_softmax(peer.theirs(rows).logits[:, :-1] / 0.7, dim=-1)
    logprobs.gather(2, rows[:, 1:, None]).sum().backward()
    theirs = {key: value.grad.numpy() for key, value in peer.theirs.named_parameters()}

    @jax.jit
    @jax.grad
    def gradient(params):
        model = Transformer(peer.config)
        hidden: Any = model.apply({"params": params}, tokens)
        weight: Any = model.apply({"params": params}, method="unembedding")
        targets = jnp.asarray(tokens[:, 1:])
        cap = peer.config.logit_softcap
        return jnp.sum(token_logprobs(hidden[:, :-1], weight, targets, 0.7, 5, cap))

    ours = gradient(peer.params)
    compared = 0
    for leaf in leaves(peer.config):
        value = ours
        for key in leaf.path:
            value = value[key]
        for layer in range(3 if leaf.stacked else 1):
            tensor = leaf.write(np.asarray(value[layer] if leaf.stacked else value))
            expected = theirs.pop(leaf.name(layer))
            # Sums over 32 tokens of float32 products: relative to the largest entry.
            bound = 2e-5 * np.abs(expected).max()
            np.testing.assert_allclose(tensor, expected, rtol=2e-4, atol=bound)
            compared += 1
    assert compared > 30 and not theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2-tied", "gemma2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_equal_transformers(peers, dtype, name, tmp_path):
    import torch

    peer = peers(name)
    kind = type(peer.theirs)
    half = kind.from_pretrained(peer.folder, dtype=getattr(torch, dtype))
    half.save_pretrained(tmp_path)
    theirs = kind.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens, mask = left_padded((12,), peer.config.vocab_size)
    config, params = load_policy(tmp_path)
    assert not np.array_equal(params["embedding"]["tokens"], peer.params["embedding"]["tokens"])
    ours = our_logits(config, params, tokens, mask)
    assert np.abs(ours - torch_logits(theirs, tokens, mask)).max() < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-3", "qwen2-untied", "qwen3-tied", "gemma2", "gemma3"])
def test_bfloat16_is_as_exact_as_transformers(peers, name, tmp_path):
    """Both round at every step, in places of their own: judged by the float32 logits."""
    import torch

    peer = peers(name)
    half = type(peer.theirs).from_pretrained(
        peer.folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    half.save_pretrained(tmp_path)
    exact = type(peer.theirs).from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    tokens, mask = left_padded((40, 40, 23, 31), peer.config.vocab_size)
    config, params = load_policy(tmp_path, dtype=jnp.bfloat16)
    expected = torch_logits(exact.eval(), tokens, mask)[mask]
    ours = our_logits(config, params, tokens, mask)[mask] - expected
    theirs = torch_logits(half.eval(), tokens, mask)[mask] - expected
    # Root mean squares over 134 x 101 logits are known to a few per cent.
    assert np.sqrt((ours**2).mean()) < 1.2 * np.sqrt((theirs**2).mean())
    assert np.sqrt((ours**2).mean()) > 1e-4  # it was bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_transformers_loads_what_we_save(peers, name, tmp_path):
    import transformers

    peer = peers(name)
    save_policy(tmp_path / "out", peer.config, peer.params, shard_bytes=20_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    assert type(model) is type(peer.theirs)
    assert model.config.eos_token_id is None and model.config.bos_token_id is None
    tokens, mask = left_padded((32, 5), peer.config.vocab_size)
    expected = torch_logits(peer.theirs, tokens, mask)
    np.testing.assert_allclose(torch_logits(model, tokens, mask)[mask], expected[mask], atol=2e-5)
    config, params = load_policy(tmp_path / "out")
    assert config == peer.config
    jax.tree.map(np.testing.assert_array_equal, params, peer.params)


def test_every_family_has_a_peer():
    assert {name.split("-")[0] for name in PEERS} == {
        name.removesuffix("_text") for name in FAMILIES
    }
