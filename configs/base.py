"""Every setting once, with its unit and why it has this value.

The other configs start from this one and change what they need; a command line changes single
settings (`--config.loss.beta=5`). A name that is not here is refused.
"""

import ml_collections

from flowrl_jax.config import loss_fields
from flowrl_jax.objectives.presets import PRESETS


def _optimizer() -> dict:
    """Settings of an AdamW."""
    return {
        "learning_rate": 1e-6,  # peak; the released value for 7B and 32B
        "log_z_learning_rate": 0.0,  # 0: the policy's, as released; its own is often 100x larger
        "value_learning_rate": 0.0,  # 0: the policy's; of objectives with values, PPO's critic
        "schedule": "constant",  # after warm-up: constant, linear or cosine
        "warmup_steps": 10,  # rollout steps
        "b1": 0.9,  # decay of the first moment
        "b2": 0.999,  # decay of the second moment
        "eps": 1e-8,  # added to the root of the second moment
        "weight_decay": 0.1,  # decoupled, all parameters, as released
        "clip_norm": 1.0,  # largest global gradient norm; 0 does not clip
        "clip_jointly": True,  # one norm over policy and log Z, as released
        "moments": "float32",  # or bfloat16, rounded at random: 4 bytes a parameter less
    }


def get_config() -> ml_collections.ConfigDict:
    """The defaults: the recommended objective, the released sizes."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # of initialisation, sampling, data order and dropout
    config.steps = 200  # rollout steps; the released runs were evaluated at 200 to 300

    config.model = {
        "path": "",  # Hugging Face folder; empty: random weights of the shape below
        "start_from": "",  # run folder (of sft, say) whose latest policy to start from
        "dtype": "float32",  # of activations; bfloat16 on TPU and GPU; master weights are float32
        "remat": "full",  # compute a block again in the backward pass: none, dots, full
        "decode_kernel": "auto",  # pallas on TPU, triton on NVIDIA GPUs, native on CPUs; else xla
        "attention": "xla",  # flash attention: splash on TPU, cudnn (bfloat16) on NVIDIA GPUs
        "vocab_size": 0,  # 0: the tokenizer's
        "num_layers": 4,  # blocks
        "embed_dim": 128,  # width of the residual stream
        "num_heads": 4,  # query heads
        "num_kv_heads": 4,  # fewer than num_heads: grouped-query attention
        "head_dim": 32,  # even: rotary pairs
        "mlp_dim": 512,  # of the SwiGLU
        "rope_theta": 10_000.0,  # base of the rotary frequencies
        "norm_eps": 1e-6,  # of RMSNorm
        "tie_embeddings": True,  # the unembedding is the embedding transposed
        "qkv_bias": False,  # Qwen2 has it
        "init_std": 0.02,  # of the random initialisation
        "lora": {
            "rank": 0,  # 0: all weights are trained; 16 to 64 is usual
            "alpha": 32.0,  # adapters are scaled by alpha / rank
            "targets": ("query", "key", "value", "out", "gate", "up", "down"),
        },
    }
    config.tokenizer = {
        "path": "",  # folder, tokenizer.json or .model; empty: model.path, else made for Countdown
        "max_number": 100,  # numbers up to this are one token of the Countdown vocabulary
        "eos_ids": (),  # empty: what generation_config.json or the tokenizer says
        "add_bos": False,  # Llama 2 style models want it; never doubles a chat template's
        "chat": False,  # prompts become the user's message, rendered by the chat template
        "system_prompt": "",  # of the conversation; empty: what the template itself adds, if any
        "chat_template": "",  # file of another template; empty: the tokenizer's own
        "chat_options": {},  # what the template knows by name, e.g. enable_thinking
    }
    config.task = {
        "name": "countdown",  # code, countdown, math or stories
        "options": {},  # fields of the task's own config
    }
    config.data = {
        "builder": "countdown",  # countdown, stories, or prompts (docs/data.md)
        "options": {},  # fields of the builder's own config
        "data_dir": "runs/data",  # prepared once, as array_record
        "split": "train",  # or a slice, train[:1000]
        "seed": 0,  # of the shuffle; entry points set it to config.seed
        "shuffle": True,  # each epoch in its own random order
    }
    config.rollout = {
        "prompts_per_step": 512,  # over all hosts; released 512 (math), 64 (code)
        "group_size": 8,  # samples per prompt
        "max_prompt_length": 2048,  # tokens
        "max_response_length": 8192,  # tokens, end-of-sequence included
        "long_prompts": "error",  # or truncate: keep the last tokens and count them
        "temperature": 1.0,  # of sampling and of all log-probabilities
        "top_k": 0,  # 0: all tokens
        "top_p": 1.0,  # 1: all tokens
        "min_p": 0.0,  # 0: all tokens
        "stop": (),  # texts that end a response, e.g. ("</answer>",); it keeps them
        "slots": 0,  # responses decoded at one time, others wait; 0: all
        "cache": "",  # bfloat16, float32 or int8; empty: the compute dtype
        "prompts_per_batch": 0,  # sampled at one time; 0: all
        "ahead": False,  # the next rollout is sampled before this one is learnt from
        "dynamic_sampling": False,  # draw again where a prompt's rewards are all equal; DAPO's
        "max_batches": 10,  # of dynamic sampling: batches that a step draws at most; DAPO's 10
        "tensor": 0,  # parts of heads while sampling; 0: as the mesh, -1: as key heads allow
        "old_logprobs": "trainer",  # computed again, as released; sampler saves a forward pass
        "correction": {
            "kind": "none",  # of sampler to trainer: token, sequence, token_mask, sequence_mask
            "low": 0.0,  # of masks: lower weights are left out
            "high": 2.0,  # greatest weight; masks leave out greater ones
        },
    }
    config.replay = {
        "fraction": 0.0,  # of the prompts of each optimiser step, not sampled but replayed
        "size": 1024,  # prompts that are kept, over all hosts
        "max_age": 16,  # rollout steps after which a group is not replayed any more
        "priority": "uniform",  # or reward, variance: by rank of the group's mean or variance
    }
    config.reference = {
        "reset_every": 0,  # rollout steps after which the policy becomes its own reference; 0: none
        "on_plateau": 0,  # the same after so many evaluations without a new best; ProRL's; 0: none
        "metric": "eval/pass_at_1",  # of evaluations; higher is better
        "reset_optimizer": True,  # its moments start anew too
    }
    config.loss = loss_fields("flowrl", PRESETS["flowrl"])  # see docs/objective.md
    config.optimizer = _optimizer()
    config.train = {
        "updates_per_rollout": 16,  # optimiser steps a rollout is cut into; released 16 (math)
        "epochs": 1,  # passes over a rollout
        "micro_batch_size": 0,  # responses held at one time on all devices; 0: all, -1: one a shard
        "logprob_chunk": 256,  # logits held at one time, counted in tokens of each response
        "length_buckets": (),  # what responses are cut to in learning besides their limit
    }
    config.sft = {
        "steps": 100,  # optimiser steps
        "batch_size": 64,  # demonstrations per step, over all hosts
        "optimizer": _optimizer(),
    }
    config.eval = {
        "every": 0,  # rollout steps between evaluations during training; 0: never
        "split": "test",  # held out
        "prompts": 0,  # from the start of the split; 0: all
        "samples": 16,  # per prompt
        "k": 16,  # of pass@k and of distinct correct solutions in k samples
        "temperature": 1.0,  # 0: greedy
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "prompts_per_batch": 64,  # sampled at one time
    }
    config.mesh = {
        "data": 1,  # copies of the parameters
        "fsdp": -1,  # shards of parameters and optimiser; -1: all devices that are left
        "tensor": 1,  # shards of heads, mlp and vocabulary
        "context": 1,  # shards of long rows along their tokens, and of the parameters
        "optimizer_over_data": False,  # the optimiser's state is cut over data as well
    }
    config.checkpoint = {
        "every": 50,  # rollout steps; 0: only at the end
        "keep": 2,  # latest ones
        "keep_best": 0,  # best ones by best_metric
        "best_metric": "",  # e.g. eval/pass_at_1; higher is better
        "asynchronous": True,  # training goes on while files are written
    }
    config.metrics = {
        "tensorboard": True,  # event files in DIR/tensorboard
        "table": True,  # one line per step on stdout
        "wandb_project": None,  # Weights & Biases, with the extra flowrl_jax[wandb]
        "wandb_name": None,  # of the run there
    }
    config.alarm = {
        "enabled": True,  # one line for what looks like a collapse; 0 leaves one below out
        "stop": False,  # a new alarm saves a checkpoint and ends the run with exit code 3
        "window": 10,  # rollout steps that means are over
        "entropy": 0.2,  # least, as a share of what the run began with
        "length": 0.25,  # least mean length, as a share of what the run began with
        "groups": 0.05,  # least share of groups with signal
        "truncated": 0.5,  # greatest share of truncated responses
        "kl": 0.5,  # greatest KL to the reference, nats per token
        "ess": 0.1,  # least effective share of importance weights
        "diversity": 0.8,  # least distinct correct solutions, of the most so far, at more accuracy
        "reward": True,  # a mean reward that stands still for a window
        "skipped": 1,  # optimiser steps skipped within a window
    }
    return config
