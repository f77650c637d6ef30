"""The sections of a config that say what is sampled: for training, and to evaluate."""

import dataclasses

from flowrl_jax.errors import require
from flowrl_jax.objectives.correction import CorrectionConfig


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What is sampled for each step of training.

    Attributes:
        prompts_per_step: prompts that a step learns from, over all hosts; all of them are sampled
            but those that are replayed.
        group_size: samples per prompt.
        max_prompt_length: tokens, the opening id included.
        max_response_length: tokens, the end-of-sequence token included.
        long_prompts: what happens to prompts that are longer: "error" stops, "truncate" keeps
            their last tokens and counts them in the metrics.
        temperature: of sampling and of all log-probabilities; training needs it above 0.
        top_k: 0 keeps all tokens.
        top_p: 1 keeps all tokens.
        min_p: keeps tokens at least this share as likely as the most likely one; 0 keeps all.
        stop: texts that end a response, besides the tokens that do; it keeps them.
        slots: responses decoded at one time, over all hosts; one that has ended leaves its slot to
            one that waits. 0 means all at once. Bounds the KV cache.
        cache: what keys and values are kept in: "bfloat16", "float32", "int8", or empty for the
            model's compute dtype.
        prompts_per_batch: prompts sampled at one time; 0 means all.
        ahead: whether the next rollout is sampled before the policy learns from this one, while
            the host still judges; its policy is one step old then, and `old_logprobs` are its own.
        dynamic_sampling: whether other prompts are drawn in place of those whose rewards are all
            equal, see `resampling`.
        max_batches: of dynamic sampling: batches of `prompts_per_step` prompts that a step draws at
            most; what is missing then is filled up with what was drawn. 10 as in DAPO's recipe.
        tensor: parts of heads, mlp and vocabulary while sampling, see `sampling_layout`.
        old_logprobs: of the policy that sampled: "trainer" computes them again as the released
            code does, "sampler" takes the sampler's. Their largest difference is logged.
        correction: weights for that difference, see `CorrectionConfig`.
    """

    prompts_per_step: int = 512
    group_size: int = 8
    max_prompt_length: int = 2048
    max_response_length: int = 8192
    long_prompts: str = "error"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    slots: int = 0
    cache: str = ""
    prompts_per_batch: int = 0
    ahead: bool = False
    dynamic_sampling: bool = False
    max_batches: int = 10
    tensor: int = 0
    old_logprobs: str = "trainer"
    correction: CorrectionConfig = CorrectionConfig()

    def __post_init__(self):
        sizes = ("prompts_per_step", "group_size", "max_prompt_length", "max_response_length")
        for field in (*sizes, "max_batches"):
            require(
                getattr(self, field) >= 1,
                f"rollout.{field}={getattr(self, field)} must be at least 1",
            )
        require(
            self.temperature > 0.0,
            f"rollout.temperature={self.temperature} must be positive: training needs a"
            " distribution; `evaluate` and `sample` accept 0",
        )
        require(
            self.tensor >= -1,
            f"rollout.tensor={self.tensor} must be a number of parts, 0 for the mesh's, or -1 for"
            " as many as the key heads allow",
        )
        for field, known in (
            ("long_prompts", ("error", "truncate")),
            ("old_logprobs", ("trainer", "sampler")),
        ):
            require(
                getattr(self, field) in known,
                f"rollout.{field}={getattr(self, field)!r} is not known: use one of {known}",
            )
        require(
            self.prompts_per_batch >= 0
            and (not self.prompts_per_batch or self.prompts_per_step % self.prompts_per_batch == 0),
            f"rollout.prompts_per_batch={self.prompts_per_batch} must divide"
            f" rollout.prompts_per_step={self.prompts_per_step}, or be 0",
        )
        require(
            not (self.dynamic_sampling and self.ahead),
            "rollout.dynamic_sampling=True with rollout.ahead=True: what is drawn again is known"
            " once all is judged, so there is nothing to do meanwhile; set one of them to False",
        )
        require(
            not self.dynamic_sampling or self.group_size > 1,
            "rollout.dynamic_sampling=True with rollout.group_size=1: rewards of a single response"
            " never differ; set group_size to 2 or more, or dynamic_sampling=False",
        )
        require(
            self.old_logprobs == "trainer" or (self.top_k, self.top_p, self.min_p) == (0, 1.0, 0.0),
            f"rollout.old_logprobs='sampler' with top_k={self.top_k}, top_p={self.top_p},"
            f" min_p={self.min_p}: the sampler's log-probabilities are of the truncated"
            " distribution, which the trainer's are not; set old_logprobs='trainer', or top_k=0,"
            " top_p=1 and min_p=0",
        )
        require(
            self.old_logprobs == "trainer" or self.correction.kind == "none",
            f"rollout.correction.kind={self.correction.kind!r} with old_logprobs='sampler' has"
            " nothing to correct, all weights being 1: set old_logprobs='trainer', or kind='none'",
        )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How a policy is evaluated, during training and by `python -m flowrl_jax.evaluate`.

    Attributes:
        every: rollout steps between evaluations during training; 0 means never.
        split: of the data set.
        prompts: how many, from the start of the split; 0 means all.
        samples: per prompt.
        k: of pass@k and of the number of distinct correct solutions in k samples.
        temperature: 0 is greedy.
        top_k: 0 keeps all tokens.
        top_p: 1 keeps all tokens.
        min_p: 0 keeps all tokens.
        prompts_per_batch: prompts sampled at one time.
    """

    every: int = 0
    split: str = "test"
    prompts: int = 0
    samples: int = 16
    k: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    prompts_per_batch: int = 64

    def __post_init__(self):
        require(
            1 <= self.k <= self.samples,
            f"eval.k={self.k} must lie in 1..eval.samples={self.samples}",
        )
        require(
            self.every >= 0 and self.prompts >= 0 and self.prompts_per_batch >= 1,
            f"eval.every={self.every} and eval.prompts={self.prompts} must not be negative and"
            f" eval.prompts_per_batch={self.prompts_per_batch} must be at least 1",
        )
