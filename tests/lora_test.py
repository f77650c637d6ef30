"""Adapters: off they change nothing, alone they are trained, and they leave merged or as PEFT's."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flowrl_jax.models.architecture import TARGETS, LoraConfig
from flowrl_jax.models.hf import load_policy
from flowrl_jax.models.hf_save import save_policy
from flowrl_jax.models.lora import init_lora, merged, with_adapters, without_adapters
from flowrl_jax.models.peft import write_adapter
from flowrl_jax.models.transformer import Transformer
from flowrl_jax.objectives.flowrl import FlowRLConfig
from flowrl_jax.optimizer import OptimizerConfig, make_optimizer
from flowrl_jax.sampler import SamplerConfig, generate
from flowrl_jax.train_step import init_state, make_score, make_train_step
from tests.tiny import (
    full_logits,
    make_learner,
    prompt_batch,
    tiny_config,
    tiny_params,
    train_batch,
)

LORA = LoraConfig(rank=3, alpha=5.0)
CONFIG = tiny_config(lora=LORA, qkv_bias=True)
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 9)).astype(np.int32)


def adapters(config=CONFIG, seed: int = 0) -> Any:
    """Adapters of which neither factor is zero."""
    shapes = nn.unbox(jax.eval_shape(lambda: init_lora(config, jax.random.key(0))))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


@pytest.mark.slow
def test_fresh_adapters_change_nothing():
    """To the bit: B is zero, and a number plus zero is that number."""
    base = tiny_params(CONFIG)
    policy = with_adapters(base, nn.unbox(init_lora(CONFIG, jax.random.key(0))))
    np.testing.assert_array_equal(
        full_logits(CONFIG, policy, TOKENS), full_logits(CONFIG, base, TOKENS)
    )
    a = policy["layers"]["attention"]["query_lora_a"]
    assert a.shape == (2, 16, 3) and 0.1 < np.std(a) < 0.4  # 16 ** -0.5


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_each_adapter_adds_its_product(target):
    """Against weights that have the product added to them by numpy."""
    config = dataclasses.replace(CONFIG, lora=dataclasses.replace(LORA, targets=(target,)))
    base, trained = tiny_params(CONFIG), adapters(config)
    (part,) = trained["layers"].values()
    a, b = (np.asarray(part[f"{target}_lora_{x}"], np.float64) for x in "ab")
    inputs = list(range(1, a.ndim - 1))
    product = np.stack([np.tensordot(a[i], b[i], 1) for i in range(2)])
    assert len(inputs) + b.ndim - 2 == product.ndim - 1
    added = jax.tree.map(lambda x: x, base)
    (where,) = trained["layers"]
    added["layers"][where] = dict(added["layers"][where])
    added["layers"][where][target] = jnp.asarray(
        np.asarray(base["layers"][where][target], np.float64) + 5.0 / 3 * product, jnp.float32
    )
    policy = with_adapters(base, trained)
    expected = full_logits(config, added, TOKENS)
    assert np.abs(expected - full_logits(config, base, TOKENS)).max() > 0.05
    # Products are summed in another order; logits are of size 5.
    np.testing.assert_allclose(full_logits(config, policy, TOKENS), expected, atol=5e-5)
    np.testing.assert_allclose(
        full_logits(config, merged(policy, config.lora), TOKENS), expected, atol=5e-5
    )


def test_policy_comes_apart_again():
    base, trained = tiny_params(CONFIG), adapters()
    policy = with_adapters(base, trained)
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, without_adapters(policy), base))
    assert with_adapters(None, base) is base
    assert jax.tree.structure(merged(policy, LORA)) == jax.tree.structure(base)


@pytest.mark.slow
def test_sampler_knows_adapters():
    """Its log-probabilities are the trainer's, adapters on."""
    policy = with_adapters(tiny_params(CONFIG), adapters())
    prompts = prompt_batch([3, 5], 2, 6, 17)
    sampler = SamplerConfig(max_response_length=12, eos_ids=(3,), group_size=2)
    rollout = generate(
        policy, prompts, jax.random.key(1), model=Transformer(CONFIG), config=sampler
    )
    learner = make_learner(CONFIG, FlowRLConfig(), temperature=1.0)
    arrays = rollout.tokens, rollout.prompt_mask, rollout.response_mask
    scores = make_score(learner)(policy, *arrays)
    np.testing.assert_allclose(rollout.sampler_logprobs, scores, atol=1e-5)
    off = make_score(learner)(without_adapters(policy), *arrays)
    assert np.abs(off - scores).max() > 0.05


def step_with(mesh, micro_batch_size=0, optimizer=None):
    config = dataclasses.replace(CONFIG, vocab_size=32, num_heads=8, num_kv_heads=8)
    learner = make_learner(
        config, FlowRLConfig(), mesh=mesh, micro_batch_size=micro_batch_size, optimizer=optimizer
    )
    batch = learner.layout.put_batch(train_batch(config, 8, 2))
    base = tiny_params(config)
    state = init_state(learner, 8, jax.random.key(0))
    state = state.replace(params=state.params | {"policy": adapters(config)})
    kept = jax.tree.map(np.array, base)
    after, metrics = make_train_step(learner, 8)(state, batch, jax.random.key(1), base)
    jax.tree.map(np.testing.assert_array_equal, base, kept)
    return jax.device_get((after, metrics))


@pytest.mark.slow
def test_adapters_alone_are_trained():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 10, 1, train_log_z=True)
    after, metrics = step_with((1, 1, 1), optimizer=optimizer)
    trained = jax.tree.leaves(after.params["policy"])
    assert len(trained) == 2 * len(TARGETS) and metrics["grad_norm"] > 0
    size = sum(x.size for x in trained)
    moments = [x for x in jax.tree.leaves(after.opt_state) if x.ndim]
    # Two moments of the adapters and of log Z, and none of the frozen weights.
    log_z = sum(x.size for x in jax.tree.leaves(after.params["log_z"]))
    assert sum(x.size for x in moments) == 2 * (size + log_z)
    before = adapters(dataclasses.replace(CONFIG, vocab_size=32, num_heads=8, num_kv_heads=8))
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), after.params["policy"], before)
    assert jax.tree.all(changed)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 2, 4), (2, 2, 2)])
def test_gradient_does_not_depend_on_mesh_and_micro_batches(mesh):
    (ours, _), (alone, _) = step_with(mesh, micro_batch_size=4), step_with((1, 1, 1))
    paths = jax.tree_util.tree_leaves_with_path(alone.opt_state)
    for (path, expected), found in zip(paths, jax.tree.leaves(ours.opt_state), strict=True):
        bound = 2e-5 * np.abs(expected).max() + 1e-8  # float32 sums in another order
        np.testing.assert_allclose(found, expected, atol=bound, err_msg=str(path))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rank": -1}, "rank=-1"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"targets": ("query", "norm")}, "name at least one of query"),
        ({"targets": ()}, "name at least one"),
        ({"targets": ("up", "up")}, "each once"),
    ],
)
def test_wrong_settings_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        LoraConfig(**changes)


@pytest.mark.slow
def test_peft_loads_the_adapter(parity_packages, tmp_path):
    """PEFT over the saved base, and the merged policy alone, give the logits that we have."""
    import torch
    import transformers

    peft = pytest.importorskip("peft")
    policy = with_adapters(tiny_params(CONFIG), adapters())
    save_policy(tmp_path / "base", CONFIG, without_adapters(policy))
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", CONFIG, policy, str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = np.asarray(full_logits(CONFIG, policy, TOKENS))
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS).long()).logits.numpy()
    assert np.abs(expected - full_logits(CONFIG, tiny_params(CONFIG), TOKENS)).max() > 0.5
    np.testing.assert_allclose(theirs, expected, atol=2e-4)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 5.0)

    save_policy(tmp_path / "merged", CONFIG, merged(policy, LORA))
    config, params = load_policy(tmp_path / "merged")
    np.testing.assert_allclose(full_logits(config, params, TOKENS), expected, atol=2e-4)
