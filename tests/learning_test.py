"""Sampler and optimiser step together: a policy that is paid for brevity learns to stop.

It can only if the end of a response is sampled, kept in the mask and trained on. In a peer whose
sampler drops the end token, two runs of three learned to fill the response instead.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.models.transformer import Transformer, init_params
from flowrl_jax.objectives.advantages import normalize_rewards
from flowrl_jax.objectives.presets import PRESETS
from flowrl_jax.optimizer import OptimizerConfig, make_optimizer
from flowrl_jax.sampler import SamplerConfig, generate, rollout_key
from flowrl_jax.train_step import init_state, make_score, make_train_step
from flowrl_jax.types import TrainBatch
from tests.tiny import make_learner, prompt_batch, tiny_config

GROUP, LENGTH, STEPS = 8, 16, 14
CONFIG = tiny_config(num_layers=1, init_std=0.02)  # ends after one token of 17, on average
MODEL = Transformer(CONFIG)
SAMPLER = SamplerConfig(max_response_length=LENGTH, eos_ids=(1,), group_size=GROUP)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["flowrl", "flowrl_paper", "grpo"])
def test_learns_to_stop(preset):
    """To about 2 tokens after 14 steps; the same runs stand at 8 where the mask omits the end."""
    objective = PRESETS[preset]
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=2e-2, warmup_steps=0, weight_decay=0.0),
        STEPS,
        1,
        train_log_z=True,
    )
    learner = make_learner(
        CONFIG, objective, optimizer=optimizer, group_size=GROUP, temperature=1.0
    )
    reference = nn.unbox(jax.jit(lambda key: init_params(CONFIG, key))(jax.random.key(1)))
    state = init_state(learner, 4, jax.random.key(0), policy=reference)
    program, score = make_train_step(learner, 4), make_score(learner)
    prompts = prompt_batch([3, 5, 2, 4], GROUP, 5, CONFIG.vocab_size)
    lengths = []
    for step in range(STEPS):
        key = rollout_key(0, step)
        rollout = generate(state.params["policy"], prompts, key, model=MODEL, config=SAMPLER)
        length = rollout.response_mask.sum(1)
        lengths.append(float(length.mean()))
        rows = rollout.tokens, rollout.prompt_mask, rollout.response_mask
        batch = TrainBatch(
            tokens=rollout.tokens,
            prompt_mask=rollout.prompt_mask,
            response_mask=rollout.response_mask,
            old_logprobs=rollout.sampler_logprobs,
            ref_logprobs=score(reference, *rows),
            reward=normalize_rewards(-length.astype(jnp.float32), GROUP, objective.reward_norm),
            prompt_id=prompts.prompt_id,
            row_id=jnp.arange(len(length)),
        )
        state, metrics = program(state, batch, key)
        # Sampled a moment ago by the same policy: the trainer sees the same log-probabilities.
        assert metrics["old_logprob_diff_max"] < 1e-5
    assert np.mean(lengths[:2]) > 8.0
    assert np.mean(lengths[-3:]) < 4.0, lengths
    assert state.skipped == 0
