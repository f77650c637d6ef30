"""Public data sets by name: where their files are, and what makes a row of a record.

docs/data.md has the same table with licences and what was checked on real files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from flowrl_jax.datasets import rows, verl
from flowrl_jax.errors import InputError
from flowrl_jax.tasks.base import nearest


@dataclasses.dataclass(frozen=True)
class File:
    """A file on the web.

    Attributes:
        url: its address.
        sha256: of its content where the address names one revision; else empty.
    """

    url: str
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """A public data set.

    Attributes:
        files: split -> the files it is read from.
        row: makes a row of a record.
        identity: fields that make two rows the same.
    """

    files: Mapping[str, tuple[File, ...]]
    row: rows.RowFunction
    identity: tuple[str, ...] = ("prompt",)


def source(name: str, split: str) -> Source:
    """Returns the data set of a name.

    Raises:
        InputError: there is none, or it has no such split.
    """
    if name not in SOURCES:
        raise InputError(f"data set {name!r}: unknown; {nearest(name, SOURCES)}")
    found = SOURCES[name]
    if split not in found.files:
        raise InputError(
            f"data set {name!r}: has no split {split!r}; it has {', '.join(found.files)}"
        )
    return found


def _github(repository: str, commit: str, path: str, sha256: str) -> tuple[File, ...]:
    return (File(f"https://raw.githubusercontent.com/{repository}/{commit}/{path}", sha256),)


def _hub(dataset: str, *paths: str) -> tuple[File, ...]:
    place = f"https://huggingface.co/datasets/{dataset}/resolve/main"
    return tuple(File(f"{place}/{path}") for path in paths)


def _parts(path: str, count: int) -> tuple[str, ...]:
    return tuple(f"{path}-{i:05d}-of-{count:05d}.parquet" for i in range(count))


_GSM8K = ("openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c")
_QWEN_MATH = ("QwenLM/Qwen2.5-Math", "a45202bd16f1ec06f433442dc1152d0074773465")
_RLLM = ("agentica-project/rllm", "874daa4acb7f451dc2a4b2b6e8ce28f5aa88d1f5")
_TINYZERO = ("Jiayi-Pan/TinyZero", "c5cdbbe253b9db880f3e7ff17a161cbd0d8b42b0")
_FLOWRL = "xuekai/flowrl-data-collection"
_DEEPCODER = "agentica-org/DeepCoder-Preview-Dataset"

_MATH: Mapping[str, Source] = {
    "gsm8k": Source(
        {
            "train": _github(
                *_GSM8K,
                "grade_school_math/data/train.jsonl",
                "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
            ),
            "test": _github(
                *_GSM8K,
                "grade_school_math/data/test.jsonl",
                "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
            ),
        },
        rows.gsm8k,
    ),
    "math": Source(
        {
            "train": _github(
                *_RLLM,
                "rllm/data/train/math/math.json",
                "569230b362fd501e1a33d8f29aae3b4b989d32e2b91b07c3f48493528c3bf6d2",
            )
        },
        rows.problem("math", extras={"level": "difficulty", "subject": "type"}),
    ),
    "dapo_math_17k": Source(
        {"train": _hub("BytedTsinghua-SIA/DAPO-Math-17k", "data/dapo-math-17k.parquet")},
        rows.dapo,
    ),
    "aime24": Source(
        {
            "test": _github(
                *_QWEN_MATH,
                "evaluation/data/aime24/test.jsonl",
                "af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac",
            )
        },
        rows.problem("aime2024", extras={"solution": "solution"}),
    ),
    "aime25": Source({"test": _hub("math-ai/aime25", "test.jsonl")}, rows.problem("aime2025")),
    "amc23": Source(
        {
            "test": _github(
                *_QWEN_MATH,
                "evaluation/data/amc23/test.jsonl",
                "43707e1ca784602d8479de24ee8ce36609dbebc46dd152b0b12a46611aa898a4",
            )
        },
        rows.problem("amc23"),
    ),
    "math500": Source(
        {
            "test": _github(
                "inclusionAI/AReaL",
                "1b0306631b01becc329af59df560efb754be34af",
                "evaluation/data/math_500/test.jsonl",
                "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
            )
        },
        rows.problem(
            "math500",
            extras={
                **{name: name for name in ("solution", "level", "subject")},
                "task_id": "unique_id",
            },
        ),
    ),
    "minerva": Source(
        {"test": _hub("math-ai/minervamath", "test.jsonl")},
        rows.problem("minerva", prompt="question"),
    ),
    "olympiadbench": Source(
        {
            "test": _github(
                *_QWEN_MATH,
                "evaluation/data/olympiadbench/test.jsonl",
                "bb8c1e38a16ea9eacb77530315a674d883f267fbff79183effc53681b4fcc416",
            )
        },
        rows.problem(
            "olympiadbench",
            prompt="question",
            answer="final_answer",
            extras={
                "subject": "subfield",
                "unit": "unit",
                "answer_type": "answer_type",
                "tolerance": "error",
            },
        ),
    ),
}
_CODE: Mapping[str, Source] = {
    "deepcoder": Source(
        {
            "train": _hub(
                _DEEPCODER,
                *_parts("primeintellect/train", 5),
                *_parts("taco/train", 4),
                *_parts("lcbv5/train", 11),
            ),
            "test": _hub(_DEEPCODER, *_parts("lcbv5/test", 8)),
        },
        rows.contest("deepcoder"),
    ),
    "flowrl_code": Source(
        {
            "train": _hub(_FLOWRL, *_parts("code_data/deepcoder_train", 5)),
            "test": _hub(_FLOWRL, *_parts("code_data/test_livecodebench", 5)),
        },
        verl.code_problem(),
    ),
    "humaneval": Source(
        {
            "test": _github(
                "openai/human-eval",
                "6d43fb980f9fee3c892a914eda09951f772ad10d",
                "data/HumanEval.jsonl.gz",
                "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
            )
        },
        rows.humaneval("humaneval"),
    ),
    "humanevalplus": Source(
        {
            "test": _github(
                "evalplus/humanevalplus_release",
                "200defce9e3429d28ca215b6dd061c0f7f31c18b",
                "HumanEvalPlus-OriginFmt.jsonl.gz",
                "daa7661c8189924068069b0872a440b491edb60f8bdf431d5957adc88d18bae5",
            )
        },
        rows.humaneval("humanevalplus"),
    ),
    "mbpp": Source(
        dict.fromkeys(
            ("train", "test"),
            _github(
                "deepseek-ai/DeepSeek-Coder",
                "2f9fd85927c669dae3c0fbb2d607274023af243e",
                "Evaluation/MBPP/data/mbpp.jsonl",
                "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
            ),
        ),
        rows.mbpp,
    ),
    "livecodebench": Source(
        {
            "test": _hub(
                "livecodebench/code_generation_lite",
                "test.jsonl",
                *(f"test{i}.jsonl" for i in range(2, 7)),
            )
        },
        rows.livecodebench,
    ),
    "codeforces": Source(
        {
            "test": _github(
                *_RLLM,
                "rllm/data/test/code/codeforces.json",
                "8e9eab7fce7e432abe4437dd997c16f1514be51d224f2d72a7bd07d58cce476a",
            )
        },
        rows.contest("codeforces"),
    ),
}
_NUMBERS: Mapping[str, Source] = {
    "countdown": Source(
        {
            "train": _github(
                *_TINYZERO,
                "data/countdown/train.parquet",
                "b886dc058b19c46956c3bbd5ee2f44fcb234137876937483e8a69d360d041360",
            ),
            "test": _github(
                *_TINYZERO,
                "data/countdown/test.parquet",
                "9f7d481e4a081238f6db3607c622472e58126e16bd7f0614786b804550b9df94",
            ),
        },
        rows.countdown,
        identity=("numbers", "target"),
    ),
    "game24": Source(
        dict.fromkeys(
            ("train", "test"),
            _github(
                "princeton-nlp/tree-of-thought-llm",
                "ab400345c5ea39d28ea6d7d3be0e417b11113c87",
                "src/tot/data/24/24.csv",
                "b9f12b3e36d987a3c714c4cef17d89a137d7c59da26532fcfb93b4821d8111b5",
            ),
        ),
        rows.game24,
        identity=("numbers", "target"),
    ),
}
SOURCES: Mapping[str, Source] = {**_MATH, **_CODE, **_NUMBERS}
"""Name -> data set."""
