"""This package as a child of the benchmarks (see `common.serve`)."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import Work, serve, share_of_even
from flowrl_jax.learner import Learner, TrainStepConfig
from flowrl_jax.learning_batch import make_learning_batch
from flowrl_jax.models.transformer import Transformer, TransformerConfig
from flowrl_jax.objectives.grpo import GRPOConfig
from flowrl_jax.optimizer import OptimizerConfig, make_optimizer
from flowrl_jax.sampler import SamplerConfig, generate, rollout_key
from flowrl_jax.sharding import MeshConfig, make_layout, make_mesh
from flowrl_jax.train_step import init_state, make_score, make_train_step
from flowrl_jax.types import PromptBatch, Rollout, TrainBatch, TrainState


def cpu_devices(rows: int, wanted: int = 0) -> int:
    """Makes a CPU so many devices, unless jax has begun.

    XLA's CPU backend runs much of a step of decoding on one core of those that a device has.

    Args:
        rows: decoded at one time.
        wanted: devices; 0 means one a core.

    Returns:
        How many devices the rows can be cut over; 0 on what is no CPU.
    """
    with contextlib.suppress(RuntimeError):  # too late: jax has begun
        jax.config.update("jax_num_cpu_devices", wanted or len(os.sched_getaffinity(0)))
    return math.gcd(rows, len(jax.devices())) if jax.default_backend() == "cpu" else 0


def make_learner(work: Work, devices: int = 0) -> Learner:
    """Model, objective and optimiser of the work.

    Args:
        work: what to measure.
        devices: that rows are cut over, each with the whole model; 0 means all that there are, with
            the model cut over them too.
    """
    mesh = MeshConfig(data=devices) if devices else MeshConfig()
    model = TransformerConfig(
        vocab_size=work.vocab,
        num_layers=work.layers,
        embed_dim=work.width,
        num_heads=work.heads,
        num_kv_heads=work.kv_heads,
        head_dim=work.head_dim,
        mlp_dim=work.mlp,
        rope_theta=1e6,
        remat="dots",
    )
    optimizer = OptimizerConfig(
        learning_rate=work.learning_rate, warmup_steps=0, weight_decay=1e-4, clip_norm=0.0
    )
    return Learner(
        model=Transformer(model),
        objective=GRPOConfig(kl_coef=work.kl_coef),
        optimizer=make_optimizer(optimizer, 1, 1, train_log_z=False),
        group_size=work.group,
        temperature=1.0,
        config=TrainStepConfig(micro_batch_size=work.group, logprob_chunk=work.response_length),
        layout=make_layout(make_mesh(mesh, jax.devices()[: devices or None]), {}),
    )


def random_prompts(work: Work, seed: int) -> np.ndarray:
    """`[prompts, prompt_length]` int32."""
    shape = (work.prompts, work.prompt_length)
    return np.random.default_rng(seed).integers(3, work.vocab, shape, dtype=np.int32)


def draw_prompts(work: Work, learner: Learner, seed: int) -> PromptBatch:
    """Random prompts, each as often as its group has samples."""
    rows = {
        "tokens": np.repeat(random_prompts(work, seed), work.group, axis=0),
        "mask": np.ones((work.rows, work.prompt_length), bool),
        "prompt_id": np.repeat(np.arange(work.prompts, dtype=np.int32), work.group),
        "sample_id": np.tile(np.arange(work.group, dtype=np.int32), work.prompts),
    }
    return PromptBatch(**learner.layout.put_batch(rows))


def draw_batch(work: Work, learner: Learner) -> TrainBatch:
    """Random rows to learn from."""
    rng = np.random.default_rng(0)
    length = work.prompt_length + work.response_length
    logprobs = np.full((work.rows, work.response_length), -8.3, np.float32)
    rows = {
        "tokens": rng.integers(3, work.vocab, (work.rows, length), dtype=np.int32),
        "prompt_mask": np.ones((work.rows, work.prompt_length), bool),
        "response_mask": np.ones((work.rows, work.response_length), bool),
        "old_logprobs": logprobs,
        "ref_logprobs": logprobs,
        "reward": rng.normal(size=work.rows).astype(np.float32),
        "prompt_id": np.repeat(np.arange(work.prompts, dtype=np.int32), work.group),
        "row_id": np.arange(work.rows, dtype=np.int32),
    }
    return TrainBatch(**learner.layout.put_batch(rows))


def make_rollout(work: Work, learner: Learner) -> Callable[..., tuple[PromptBatch, Rollout]]:
    """A function of a policy and a number to prompts and the responses to them."""
    config = SamplerConfig(
        max_response_length=work.max_length,
        eos_ids=(),
        group_size=work.group,
        top_p=work.top_p,
        slots=work.slots,
    )
    lengths = np.array(work.lengths(), np.int32)
    limits = learner.layout.put_batch(lengths) if lengths.min() < work.max_length else None

    def rollout(policy, number):
        prompts = draw_prompts(work, learner, number)
        drawn = generate(
            policy,
            prompts,
            rollout_key(0, number),
            model=learner.model,
            config=config,
            layout=learner.layout,
            max_lengths=limits,
        )
        return prompts, drawn

    return rollout


def make_rl_step(
    work: Work, learner: Learner, reference
) -> Callable[[TrainState, int], TrainState]:
    """What one round of `flowrl_jax.train` does, without its files."""
    rollout, score = make_rollout(work, learner), make_score(learner)
    learning_batch = make_learning_batch(learner)
    train_step = make_train_step(learner, work.prompts)

    def step(state, number):
        prompts, drawn = rollout(state.params["policy"], number)
        ref_logprobs = score(reference, drawn.tokens, drawn.prompt_mask, drawn.response_mask)
        responses = np.asarray(drawn.tokens)[:, work.prompt_length :]
        texts = [" ".join(map(str, response.tolist())) for response in responses]
        rewards = np.array([share_of_even(text) for text in texts], np.float32)
        reward = learner.layout.put_batch(rewards)
        batch, _ = learning_batch(
            drawn, drawn.sampler_logprobs, ref_logprobs, reward, prompts.prompt_id
        )
        return train_step(state, batch, jax.random.key(0))[0]

    return step


def run(kind: str, work: Work, repetitions: Iterator[int]) -> dict[str, str]:
    """Does the work (see `common.serve`)."""
    devices = cpu_devices(work.slots or work.rows, work.devices)
    learner = make_learner(work, devices)
    state = init_state(learner, work.prompts, jax.random.key(0))
    if kind == "sampler":
        rollout = make_rollout(work, learner)
        for number in repetitions:
            jax.block_until_ready(rollout(state.params["policy"], number))
    elif kind == "train_step":
        train_step, batch = make_train_step(learner, work.prompts), draw_batch(work, learner)
        for _ in repetitions:
            state, _ = jax.block_until_ready(train_step(state, batch, jax.random.key(0)))
    else:
        reference = jax.tree.map(jnp.copy, state.params["policy"])
        step = make_rl_step(work, learner, reference)
        for number in repetitions:
            state = jax.block_until_ready(step(state, number))
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    serve(run)
