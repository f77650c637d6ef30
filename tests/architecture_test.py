"""Keeps the layers of docs/architecture.md, and the size and documentation of the package.

Nothing is imported: the rules read the syntax trees of the source files.
"""

import ast
import dataclasses
import graphlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "flowrl_jax"

# A module imports modules of its own layer and of lower ones. A name here is a file or a folder.
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "types masking errors",
        "objectives",
        "models native sharding logprobs new_folder",
        "sampler learner train_step buckets optimizer learning_batch exact",
        "datasets tasks rewards sandbox tokenizers checkpoint integrity evaluation graded metrics"
        " metric_sinks progress reference replay report retention resampling alarm log_z_points",
        "config sampling_config cli assembly distributed rollouts grading settings planning"
        " evaluator loop benchmarking",
        "train evaluate sample sft convert plan certify quickstart judge experiments",
    )
)
CONFIG_READERS = {"config", "cli", *LAYERS[-1]}  # nothing else sees a ConfigDict
PURE_LAYERS = (0, 1)
PURE_IMPORTS = ("jax", "chex", "numpy", "flax.struct")  # flax.struct: the dataclasses of types.py
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FRAMEWORK_METHODS = {"setup"}  # Linen calls and documents them
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 70


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed source file of the package."""

    path: Path  # from the folder that holds the package: flowrl_jax/models/decode.py
    source: str
    tree: ast.Module

    @property
    def dotted(self) -> str:
        """The name it is imported by."""
        parts = self.path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def name(self) -> str:
        """The file or folder of the package it is, as LAYERS names it."""
        return self.path.parts[1].removesuffix(".py")

    @property
    def layer(self) -> int | None:
        """The layer it is assigned to; the package's own __init__ is in the lowest."""
        if self.name == "__init__":
            return 0
        return next((number for number, names in enumerate(LAYERS) if self.name in names), None)


def read_package(package: Path) -> list[Module]:
    """Parses every source file of a package."""
    modules = []
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        modules.append(Module(path.relative_to(package.parent), source, ast.parse(source)))
    return modules


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """Yields line and dotted name of everything imported, inside functions too."""
    inside = module.path.parent.parts
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) - node.level + 1] if node.level else ()
            prefix = [*start, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*prefix, alias.name])) for alias in node.names)


def assigned(module: Module) -> Iterator[str]:
    """Every module has a layer."""
    if module.layer is None:
        yield f"no layer: add {module.name!r} to LAYERS in this test and to docs/architecture.md"


def downward(module: Module) -> Iterator[str]:
    """A module imports no higher layer."""
    for line, name in imports(module):
        parts = name.split(".")
        if parts[0] == module.path.parts[0] and len(parts) > 1 and module.layer is not None:
            target = Module(Path(*parts[:2]), "", module.tree)
            if target.layer is not None and target.layer > module.layer:
                yield f"line {line}: layer {module.layer} imports {name} of layer {target.layer}"


def pure(module: Module) -> Iterator[str]:
    """The lowest layers need nothing but arrays: no modules, no host work, no configuration."""
    if module.layer not in PURE_LAYERS:
        return
    for line, name in imports(module):
        allowed = any(f"{name}.".startswith(f"{prefix}.") for prefix in PURE_IMPORTS)
        root = name.split(".")[0]
        if not allowed and root not in sys.stdlib_module_names and root != module.path.parts[0]:
            yield f"line {line}: layer {module.layer} imports {name}, not of {PURE_IMPORTS}"


def configured(module: Module) -> Iterator[str]:
    """ConfigDict stays in config.py, cli.py and the entry points."""
    if module.name in CONFIG_READERS:
        return
    for line, name in imports(module):
        if name.split(".")[0] == "ml_collections":
            yield f"line {line}: {name} is for config.py, cli.py and the entry points"


def documented(module: Module) -> Iterator[str]:
    """Modules and their public classes, functions and methods have docstrings.

    A method inherits the docstring that a method of its name has in another class of the file.
    """
    if ast.get_docstring(module.tree) is None:
        yield "line 1: the module has no docstring"
    classes = [node for node in module.tree.body if isinstance(node, ast.ClassDef)]
    methods = {owner.name: [f for f in owner.body if isinstance(f, FUNCTIONS)] for owner in classes}
    inherited = {f.name for owned in methods.values() for f in owned if ast.get_docstring(f)}
    inherited |= FRAMEWORK_METHODS
    for node in module.tree.body:
        if not isinstance(node, (ast.ClassDef, *FUNCTIONS)) or node.name.startswith("_"):
            continue
        own = [f for f in methods.get(node.name, []) if f.name not in inherited]
        for definition in (node, *own):
            if not definition.name.startswith("_") and ast.get_docstring(definition) is None:
                yield f"line {definition.lineno}: {definition.name} has no docstring"


def short(module: Module) -> Iterator[str]:
    """Files and functions can be read in one go."""
    lines = len(module.source.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{lines} lines, more than {MAX_FILE_LINES}"
    for node in ast.walk(module.tree):
        if isinstance(node, FUNCTIONS):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                excess = f"{length} lines, more than {MAX_FUNCTION_LINES}"
                yield f"line {node.lineno}: {node.name} has {excess}"


Rule = Callable[[Module], Iterator[str]]
RULES: tuple[Rule, ...] = (assigned, downward, pure, configured, documented, short)


def violations(package: Path, rule: Rule) -> list[str]:
    """Applies a rule to every module of a package."""
    return [f"{module.path}: {text}" for module in read_package(package) for text in rule(module)]


def cycle(package: Path) -> list[str]:
    """Returns the modules of an import cycle, empty if there is none."""
    modules = {module.dotted: module for module in read_package(package)}
    graph: dict[str, set[str]] = {}
    for dotted, module in modules.items():
        # `from package.module import name` may name a module or something in one.
        targets = {t for _, name in imports(module) for t in (name, name.rpartition(".")[0])}
        deepest = targets - {t.rpartition(".")[0] for t in targets if t in modules}
        graph[dotted] = (deepest & modules.keys()) - {dotted}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule: Rule) -> None:
    found = violations(PACKAGE, rule)
    assert not found, "\n".join(["", *found])


@pytest.mark.slow
def test_package_has_no_import_cycle() -> None:
    found = cycle(PACKAGE)
    assert not found, " imports ".join(reversed(found))


GOOD = '"""A module."""\n'
LONG_FUNCTION = GOOD + "def f():\n    '''Runs.'''\n" + "    pass\n" * 69
INTERFACE = """class A:
    "An A."
    def f(self):
        "Runs."
class B(A):
    "A B."
    def f(self): ...
class _C:
    def g(self): ...
"""
BROKEN = {
    "assigned": ("helpers.py", GOOD, "add 'helpers' to LAYERS"),
    "assigned_folder": ("helpers/text.py", GOOD, "add 'helpers' to LAYERS"),
    "downward": (
        "optimizer.py",
        GOOD + "import jax\nfrom flowrl_jax.metrics import log",
        "line 3: layer 3",
    ),
    "downward_module": ("masking.py", GOOD + "from flowrl_jax import sampler", "of layer 3"),
    "downward_relative": ("objectives/ppo.py", GOOD + "from .. import train", "of layer 6"),
    "downward_lazy": ("types.py", GOOD + "def _f():\n    import flowrl_jax.config", "of layer 5"),
    "pure": ("masking.py", GOOD + "import optax", "imports optax"),
    "pure_flax": ("objectives/ppo.py", GOOD + "from flax import linen", "imports flax.linen"),
    "pure_prefix": ("errors.py", GOOD + "import jaxtyping", "imports jaxtyping"),
    "configured": ("metrics.py", GOOD + "from ml_collections import ConfigDict", "entry points"),
    "configured_layer": ("rollouts.py", GOOD + "import ml_collections", "entry points"),
    "documented_module": ("types.py", "import jax", "the module has no docstring"),
    "documented_function": ("types.py", GOOD + "def f(): ...", "line 2: f has no docstring"),
    "documented_method": (
        "types.py",
        GOOD + "class A:\n    '''An A.'''\n    def f(self): ...",
        "line 4: f has no",
    ),
    "short_file": ("types.py", GOOD + "\n" * 450, "451 lines"),
    "short_function": ("types.py", LONG_FUNCTION, "f has 71 lines"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_rule_finds_a_violation(case: str, tmp_path: Path) -> None:
    name, source, message = BROKEN[case]
    path = tmp_path / "flowrl_jax" / name
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")

    by_rule = {
        rule.__name__: violations(path.parents[len(Path(name).parts) - 1], rule) for rule in RULES
    }
    found = by_rule.pop(case.split("_")[0])
    assert len(found) == 1
    assert message in found[0]
    assert not any(by_rule.values()), "another rule objects to the same file"


def test_rules_accept_what_they_should(tmp_path: Path) -> None:
    sources = {
        "__init__.py": GOOD,
        "types.py": GOOD + "import dataclasses\nimport jax.numpy as jnp\nfrom flax import struct",
        "objectives/__init__.py": GOOD + "from flowrl_jax.objectives.flowrl import loss",
        "objectives/flowrl.py": GOOD + "from flowrl_jax.objectives import advantages",
        "objectives/advantages.py": GOOD + "import flowrl_jax.types\nfrom .. import types",
        "metrics.py": GOOD + INTERFACE,
        "cli.py": GOOD + "import ml_collections\nimport flowrl_jax.config",
        "train.py": GOOD + "def main():\n    '''Runs.'''\n    def inner(): ...\ndef _f(): ...",
    }
    package = tmp_path / "flowrl_jax"
    for name, source in sources.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source, encoding="utf-8")
    assert [found for rule in RULES for found in violations(package, rule)] == []
    assert cycle(package) == []


def test_cycle_is_found(tmp_path: Path) -> None:
    package = tmp_path / "flowrl_jax"
    (package / "tasks").mkdir(parents=True)
    (package / "tasks" / "base.py").write_text(
        "from flowrl_jax.metrics import log", encoding="utf-8"
    )
    (package / "metrics.py").write_text("from flowrl_jax.tasks import base", encoding="utf-8")
    assert set(cycle(package)) == {"flowrl_jax.metrics", "flowrl_jax.tasks.base"}
