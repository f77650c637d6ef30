"""transformers' `generate` as a child of the benchmarks (see `common.serve`), with our weights.

As fast as it goes on a CPU: all cores, no gradients, its fused attention, a cache of keys and
values, no log-probabilities.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from benchmarks.common import Work, serve
from benchmarks.ours import make_learner, random_prompts
from flowrl_jax.models.hf_save import save_policy
from flowrl_jax.train_step import init_state


def make_model(work: Work) -> Any:
    """The decoder that ours is at first."""
    learner = make_learner(work)
    policy = init_state(learner, work.prompts, jax.random.key(0)).params["policy"]
    with tempfile.TemporaryDirectory() as folder:
        save_policy(Path(folder) / "model", learner.model.config, policy)
        return transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=torch.float32, attn_implementation="sdpa"
        ).eval()


def run(kind: str, work: Work, repetitions: Iterator[int]) -> dict[str, str]:
    """Does the work (see `common.serve`); of the kinds it knows "sampler" alone."""
    assert kind == "sampler"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = make_model(work)
    for number in repetitions:
        prompts = torch.from_numpy(np.repeat(random_prompts(work, number), work.group, axis=0))
        for rows, longest in work.batches():
            ids = prompts[rows].long()
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=longest,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=work.top_p,
                    eos_token_id=None,
                    pad_token_id=0,
                    use_cache=True,
                )
    return {"device": "cpu", "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    serve(run)
