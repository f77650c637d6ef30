"""Runs every shell and Python snippet of README.md and docs/*.md.

A comment on the line before the fence changes what is done with a snippet:

    <!-- test: slow -->                  run it, but not in `make test-fast`
    <!-- test: parse -->                 check programs, config files, overrides; run nothing
    <!-- test: skip because REASON -->   do nothing; the reason is shown

Snippets of one page run in order in a scratch folder that looks like the repository, so a later one
finds what an earlier one wrote. Snippets of make commands are checked, never run.
"""

import ast
import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [
    page
    for page in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
    if page.exists()
]
NOT_LINKED = (".git", ".venv", "runs", ".pytest_cache", ".ruff_cache")
TIMEOUT = 1800  # seconds; the quickstart's ten minutes on a slow machine
SNIPPET = re.compile(
    r"^(?:(?P<comment><!-- test.*?-->)\n+)?"
    r"(?P<fence>(?P<indent> *)```)(?P<language>bash|sh|python)\b[^\n]*\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
COMMENT = re.compile(r"<!-- test: (?P<action>slow|parse|skip)(?: because (?P<reason>.+))? -->")


@dataclasses.dataclass(frozen=True)
class Snippet:
    """A piece of code on a page."""

    page: str
    line: int
    language: str
    code: str
    action: str = "run"  # or slow, parse, skip
    reason: str | None = None


def read_snippets(page: str, text: str) -> Iterator[Snippet]:
    """Yields the snippets of a page of Markdown."""
    found = 0
    for match in SNIPPET.finditer(text):
        line = text.count("\n", 0, match.start("fence")) + 1
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        language = "python" if match["language"] == "python" else "sh"
        action, reason = "run", None
        if match["comment"]:
            found += 1
            comment = COMMENT.fullmatch(match["comment"])
            if not comment or (comment["action"] == "skip") != bool(comment["reason"]):
                raise ValueError(f"{page}:{line}: not one of the comments: {match['comment']}")
            action, reason = comment["action"], comment["reason"]
        yield Snippet(page, line, language, code, action, reason)
    if found != text.count("<!-- test"):
        raise ValueError(f"{page}: a test comment stands before no snippet")


def commands(snippet: Snippet) -> list[str]:
    """Splits shell code into commands, without comments and assignments of variables."""
    lines = re.sub(r"(^|\s)#.*", "", snippet.code.replace("\\\n", " "), flags=re.MULTILINE)
    parts = (part.strip() for part in re.split(r"&&|;|\n", lines))
    bare = (re.sub(r"^(\w+=\S*\s+)+", "", part) for part in parts)
    return [command for command in bare if command]


def check_make(words: list[str], root: Path) -> None:
    """Checks that the goals of a make command are targets of the Makefile."""
    targets = re.findall(r"^([\w-]+):", (root / "Makefile").read_text("utf-8"), re.MULTILINE)
    for goal in words[1:]:
        if not goal.startswith("-") and "=" not in goal:
            assert goal in targets, f"the Makefile has no target {goal!r}"


def check_python(words: list[str], root: Path) -> None:
    """Checks that a Python command names a program of the repository, and a config that fits."""
    program = words[2].replace(".", "/") if words[1] == "-m" else words[1]
    if words[1] != "-m" or program.startswith("flowrl_jax"):
        paths = (root / program, root / f"{program}.py", root / program / "__main__.py")
        assert any(path.is_file() for path in paths), f"there is no program {program}"
    assert "--config" not in words, "write --config=FILE"
    config = next((word for word in words if word.startswith("--config=")), None)
    if config:
        path = config.removeprefix("--config=").partition(":")[0]
        assert (root / path).is_file(), f"there is no config file {path}"
        overrides = [word for word in words if word.startswith("--config.")]
        arguments = ["", config.replace(path, str(root / path), 1), *overrides]
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
        values(arguments)


def check(snippet: Snippet, root: Path) -> None:
    """Checks what can be known of a snippet without running it."""
    if snippet.language == "python":
        ast.parse(snippet.code)
        return
    subprocess.run(["bash", "-n", "-c", snippet.code], check=True)
    for command in commands(snippet):
        words = shlex.split(command)
        if words[0] == "make":
            check_make(words, root)
        elif Path(words[0]).name in ("python", "python3") and len(words) > 2:
            check_python(words, root)


def run(snippet: Snippet, folder: Path) -> None:
    """Runs a snippet in a folder, with the Python of the tests first on the path."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("XLA_FLAGS", None)  # the virtual devices of the tests; a reader has none
    # What one snippet compiled, the next one reads; none of them is killed while it writes.
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    shell = ["bash", "-euo", "pipefail"]
    result = subprocess.run(
        [*(shell if snippet.language == "sh" else [sys.executable]), "-c", snippet.code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    output = f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    assert result.returncode == 0, f"exit code {result.returncode}:\n{snippet.code}\n{output}"


def perform(snippet: Snippet, root: Path, folder: Path) -> None:
    """Runs, checks or skips a snippet."""
    if snippet.action == "skip":
        pytest.skip(str(snippet.reason))
    setup_only = snippet.language == "sh" and all(
        re.match(r"(make|cd|git clone)\b", command) for command in commands(snippet)
    )
    if snippet.action == "parse" or setup_only:
        check(snippet, root)
    else:
        run(snippet, folder)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each page a folder of links to the repository: what its snippets write stays there."""
    folders = {page.name: tmp_path_factory.mktemp(page.stem) for page in PAGES}
    for folder in folders.values():
        for entry in REPOSITORY.iterdir():
            if entry.name not in NOT_LINKED:
                (folder / entry.name).symlink_to(entry)
        (folder / ".venv").symlink_to(sys.prefix)
    return folders


@pytest.mark.parametrize(
    "snippet",
    [
        pytest.param(
            snippet,
            id=f"{snippet.page}:{snippet.line}",
            marks=[pytest.mark.slow] if snippet.action == "slow" else [],
        )
        for page in PAGES
        for snippet in read_snippets(page.name, page.read_text(encoding="utf-8"))
    ],
)
def test_snippet(snippet: Snippet, scratch: dict[str, Path]) -> None:
    perform(snippet, REPOSITORY, scratch[snippet.page])


PAGE = """# A page
```text
make nothing
```
```bash
make test SEED=1  # a comment
```
1. In a list:

<!-- test: skip because it needs a pod -->

   ```sh
   ssh pod
   ```
<!-- test: slow -->
```python
print(1)
```
"""


def test_snippets_are_read() -> None:
    found = list(read_snippets("page.md", PAGE))
    assert found == [
        Snippet("page.md", 5, "sh", "make test SEED=1  # a comment\n"),
        Snippet("page.md", 12, "sh", "ssh pod\n", "skip", "it needs a pod"),
        Snippet("page.md", 16, "python", "print(1)\n", "slow"),
    ]
    assert commands(found[0]) == ["make test SEED=1"]


@pytest.mark.parametrize("comment", ["skip", "slow because it is", "skipped because x", "parse\n#"])
def test_comment_is_refused(comment: str) -> None:
    with pytest.raises(ValueError, match="comment"):
        list(read_snippets("page.md", f"<!-- test: {comment} -->\n```sh\nls\n```\n"))


@pytest.fixture
def small_repository(tmp_path: Path) -> Path:
    """A Makefile with one target, a program and a config file."""
    files = {
        "Makefile": "VARIABLE := 1\nquickstart: prerequisite\n\techo\n",
        "flowrl_jax/train.py": "",
        "configs/one.py": "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'loss': {'beta': 15.0}})\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


TRAIN = "python -m flowrl_jax.train --workdir=x"
CHECKS = [  # code, and what is wrong with it: part of the message, or nothing
    ("git clone somewhere && cd there && make quickstart SEED=3", None),
    ("make quickstrat", "no target 'quickstrat'"),
    ("make VARIABLE", "no target 'VARIABLE'"),
    (f"XLA_FLAGS=1 {TRAIN} \\\n  --config=configs/one.py --config.loss.beta=5", None),
    (f"{TRAIN} --config=configs/one.py --config.loss.bta=5", "bta"),
    (f"{TRAIN} --config=configs/one.py --config.loss.beta=high", "high"),
    (f"{TRAIN} --config=configs/two.py", "no config file configs/two.py"),
    (f"{TRAIN} --config configs/one.py", "write --config=FILE"),
    ("cd . && .venv/bin/python -m flowrl_jax.tarin --resume", "no program flowrl_jax/tarin"),
    ("python benchmarks/none.py --json=x", "no program benchmarks/none.py"),
    ("ls (", "exit status 2"),
]


@pytest.mark.parametrize(("code", "fault"), CHECKS)
def test_check_finds(code: str, fault: str | None, small_repository: Path) -> None:
    snippet = Snippet("page.md", 1, "sh", code, action="parse")
    if fault is None:
        perform(snippet, small_repository, small_repository)
    else:
        with pytest.raises(Exception, match=re.escape(fault)):
            perform(snippet, small_repository, small_repository)


@pytest.mark.parametrize(
    ("language", "code"), [("sh", "false\ntrue"), ("sh", "ls none | cat"), ("python", "1 / 0")]
)
def test_run_fails_with_the_snippet(language: str, code: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit code"):
        perform(Snippet("page.md", 1, language, code), tmp_path, tmp_path)


def test_run_happens_in_the_folder(tmp_path: Path) -> None:
    perform(Snippet("page.md", 1, "sh", "python -c 'print(5)' > written"), tmp_path, tmp_path)
    assert (tmp_path / "written").read_text(encoding="utf-8") == "5\n"


def test_make_is_not_run(small_repository: Path) -> None:
    snippet = Snippet("page.md", 1, "sh", "ACCELERATOR=tpu make quickstart # ten minutes")
    perform(snippet, small_repository, small_repository / "absent")
