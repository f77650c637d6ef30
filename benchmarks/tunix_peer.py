"""Tunix (google-tunix 0.1.7) as a child of the benchmarks (see `common.serve`).

The only file that imports Tunix; it runs in an environment of its own.
"""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from benchmarks.common import Work, serve, share_of_even

BOS = 1


class Numbers:
    """A tokenizer whose texts are token ids in decimal; its end of sequence never occurs."""

    def __init__(self, vocab: int):
        self._vocab = vocab

    def encode(self, text: str, **_: Any) -> list[int]:
        """Token ids."""
        return [int(word) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        """Text."""
        return " ".join(str(int(i)) for i in ids)

    def pad_id(self) -> int:
        """Fills rows."""
        return 0

    def bos_id(self) -> int:
        """Put before every prompt by Tunix' sampler."""
        return BOS

    def eos_id(self) -> int:
        """Outside the vocabulary."""
        return self._vocab + 1


def make_model(work: Work, seed: int) -> nnx.Module:
    """A policy with random weights."""
    config = qwen3.ModelConfig(
        num_layers=work.layers,
        vocab_size=work.vocab,
        embed_dim=work.width,
        hidden_dim=work.mlp,
        num_heads=work.heads,
        head_dim=work.head_dim,
        num_kv_heads=work.kv_heads,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(params=seed))
    # Its MLP starts at zero, waiting for weights to be loaded.
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            shape = linear.kernel[...].shape
            linear.kernel[...] = jnp.asarray(rng.normal(0, 0.02, shape), jnp.float32)
    return model


def make_cluster(work: Work) -> rl_cluster.RLCluster:
    """Policy, reference, optimiser and sampler, all on one device as in Tunix' examples."""
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(work.learning_rate),
        eval_every_n_steps=10**9,
        max_steps=10**9,
        mini_batch_size=work.prompts,
        train_micro_batch_size=work.prompts,
        rollout_micro_batch_size=work.prompts,
        compute_logps_micro_batch_size=work.prompts,
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=work.max_length,
        max_prompt_length=work.prompt_length,
        kv_cache_size=work.prompt_length + work.max_length,
        temperature=1.0,
        top_p=work.top_p,
        return_logprobs=True,
    )
    with mesh:
        return rl_cluster.RLCluster(
            actor=make_model(work, 0),
            reference=make_model(work, 1),
            tokenizer=Numbers(work.vocab),
            cluster_config=rl_cluster.ClusterConfig(
                role_to_mesh=dict.fromkeys(roles, mesh),
                rollout_engine="vanilla",
                training_config=training,
                rollout_config=rollout,
            ),
        )


def make_learner(work: Work, cluster: rl_cluster.RLCluster) -> grpo_learner.GRPOLearner:
    """GRPO over the cluster."""

    def reward(prompts, completions, **_):
        return [share_of_even(text) for text in completions]

    return grpo_learner.GRPOLearner(
        cluster,
        grpo_learner.GRPOConfig(
            num_generations=work.group, num_iterations=1, beta=work.kl_coef, epsilon=0.2
        ),
        reward_fns=reward,
    )


def draw_prompts(work: Work, seed: int) -> np.ndarray:
    """Random prompts, one token short: the sampler adds its first."""
    shape = (work.prompts, work.prompt_length - 1)
    rows = np.random.default_rng(seed).integers(3, work.vocab, shape)
    return np.array([" ".join(map(str, row)) for row in rows])


def draw_batch(work: Work) -> grpo_learner.TrainExample:
    """Random rows to learn from."""
    rng = np.random.default_rng(0)
    prompts = jnp.asarray(rng.integers(3, work.vocab, (work.rows, work.prompt_length)), jnp.int32)
    shape = (work.rows, work.response_length)
    responses = jnp.asarray(rng.integers(3, work.vocab, shape), jnp.int32)
    logprobs = jnp.full(shape, -8.3, jnp.float32)
    return grpo_learner.TrainExample(
        prompt_ids=prompts,
        prompt_mask=jnp.ones(prompts.shape, bool),
        completion_ids=responses,
        completion_mask=jnp.ones(shape, bool),
        advantages=jnp.asarray(rng.normal(size=work.rows), jnp.float32),
        ref_per_token_logps=logprobs,
        old_per_token_logps=logprobs,
    )


def wait(cluster: rl_cluster.RLCluster) -> None:
    """Waits for the policy's last update."""
    jax.block_until_ready(nnx.state(cluster.actor_trainer.model))


def run(kind: str, work: Work, repetitions: Iterator[int]) -> dict[str, str]:
    """Does the work (see `common.serve`)."""
    cluster = make_cluster(work)
    if kind == "sampler":
        for number in repetitions:
            prompts = np.repeat(draw_prompts(work, number), work.group)
            for rows, longest in work.batches():
                cluster.generate(prompts[rows].tolist(), max_generation_steps=longest)
    elif kind == "train_step":
        # The learner tells the trainer which loss to use.
        make_learner(work, cluster)
        batch = draw_batch(work)
        for _ in repetitions:
            cluster.update_actor([batch], None)
            wait(cluster)
    else:

        def batches():
            # The trainer asks for the next prompts after it has learnt from the last.
            for number in repetitions:
                yield {"prompts": draw_prompts(work, number)}
                wait(cluster)

        make_learner(work, cluster).train(batches())
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "google-tunix": version("google-tunix"),
    }


if __name__ == "__main__":
    serve(run)
