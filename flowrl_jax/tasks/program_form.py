"""The canonical form of a Python program: what is left when its names and looks are taken away."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable, Iterator

MAX_CHARACTERS = 65_536  # of a program; a form of more is of no use, and costs time to find

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def canonical_program(source: str) -> str | None:
    """A text that two programs share if they differ in looks and chosen names alone.

    Layout, comments, docstrings and the annotations of functions and variables are dropped. Names
    that the program itself binds, such as variables, parameters, functions and classes, are
    numbered in the order in which they appear, each in its own scope. Names it imports are
    replaced by what they stand for. Attributes, methods, names of builtins and names that some call
    passes an argument by are kept, so that two programs with one form compute the same; the
    opposite is not true: `a + b` and `b + a`, a loop and a comprehension are different forms.
    The program is not run.

    Args:
        source: a Python program.

    Returns:
        The form; None where the source is no Python program, or longer than `MAX_CHARACTERS`.
    """
    if len(source) > MAX_CHARACTERS:
        return None
    try:
        tree = ast.parse(source)
        _Bare().visit(tree)
        _Scopes(tree).rename()
        return ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


class _Bare(ast.NodeTransformer):
    """Drops what a program computes nothing with."""

    def visit(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, _FUNCTIONS):
            node.returns = None
        if not isinstance(node, ast.ClassDef):  # of whose annotations dataclasses are made
            _drop_annotations(node)
        for name in ("body", "orelse", "finalbody"):
            lines = getattr(node, name, None)
            if isinstance(lines, list):
                kept = [line for line in lines if not _is_text(line)]
                needed = name == "body" and lines and not isinstance(node, ast.Module)
                setattr(node, name, kept or ([ast.Pass()] if needed else []))
        return node


def _drop_annotations(node: ast.AST) -> None:
    for name in ("body", "orelse", "finalbody"):
        lines = getattr(node, name, None)
        if isinstance(lines, list):
            for i, line in enumerate(lines):
                if isinstance(line, ast.AnnAssign) and line.value is not None:
                    lines[i] = ast.Assign(targets=[line.target], value=line.value, lineno=0)


def _is_text(line: ast.AST) -> bool:
    """Whether a line is a docstring, or a text used as a comment."""
    return (
        isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    )


@dataclasses.dataclass(eq=False)
class _Scope:
    """Where names are bound: the module, a class, a function, a lambda or a comprehension."""

    kind: str
    parent: _Scope | None
    bound: set[str] = dataclasses.field(default_factory=set)
    imported: dict[str, str] = dataclasses.field(default_factory=dict)
    outer: dict[str, str] = dataclasses.field(default_factory=dict)  # global and nonlocal names

    def owner(self, name: str) -> _Scope | None:
        """The scope that binds what a name means here; None for a builtin."""
        kind = self.outer.get(name)
        if kind == "global":
            return self.module()
        if kind is None and name in self.bound:
            return self
        scope = self.parent
        while scope is not None:
            # The names of a class are not seen from the functions in it.
            if name in scope.bound and name not in scope.outer and scope.kind != "class":
                return scope
            if scope.outer.get(name) == "global":
                return self.module()
            scope = scope.parent
        return None

    def module(self) -> _Scope:
        """The outermost scope."""
        return self if self.parent is None else self.parent.module()


@dataclasses.dataclass
class _Use:
    """A place in the tree where a name stands: a field of a node, or an item of it."""

    node: ast.AST
    field: str
    scope: _Scope
    item: int | None = None

    @property
    def name(self) -> str:
        value = getattr(self.node, self.field)
        return value if self.item is None else value[self.item]

    def rename(self, name: str) -> None:
        if self.item is None:
            setattr(self.node, self.field, name)
        else:
            getattr(self.node, self.field)[self.item] = name


class _Scopes:
    """The scopes of a program and all places where names stand, in the order of the text."""

    def __init__(self, tree: ast.Module):
        self.uses: list[_Use] = []
        self.keywords: set[str] = set()
        self._aliases: list[tuple[ast.alias, _Scope, str]] = []
        self._walk_all(tree.body, _Scope("module", None))

    def rename(self) -> None:
        """Numbers the names that the program binds and spells out those that it imports."""
        numbers: dict[tuple[int, str], str] = {}
        # All names are looked up before any is changed, as looking up reads them.
        found = [(use, use.name, use.scope.owner(use.name)) for use in self.uses]
        for use, name, owner in found:
            if owner is None or owner.kind == "class":
                continue
            if name in owner.imported:
                # A name that is imported and assigned as well may mean either.
                if owner.imported[name]:
                    use.rename(owner.imported[name])
            elif name not in self.keywords:
                # No name of a program can be "$1": nothing is ever confused with it.
                use.rename(numbers.setdefault((id(owner), name), f"${len(numbers)}"))
        for alias, scope, name in self._aliases:
            if scope.imported[name]:
                alias.asname = None

    def _walk_all(self, nodes: Iterable[ast.AST | None], scope: _Scope) -> None:
        for node in nodes:
            if node is not None:
                self._walk(node, scope)

    def _walk(self, node: ast.AST, scope: _Scope) -> None:
        if isinstance(node, (*_FUNCTIONS, ast.Lambda)):
            self._function(node, scope)
        elif isinstance(node, ast.ClassDef):
            self._bind(node, "name", scope)
            self._walk_all([*node.decorator_list, *node.bases, *node.keywords], scope)
            self._walk_all(node.body, _Scope("class", scope))
        elif isinstance(node, _COMPREHENSIONS):
            self._comprehension(node, scope)
        elif isinstance(node, ast.NamedExpr):
            self._walk(node.value, scope)
            target = scope
            while target.kind == "comprehension" and target.parent is not None:
                target = target.parent
            self._bind(node.target, "id", target)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            self._import(node, scope)
        else:
            self._names(node, scope)
            self._walk_all(_children(node), scope)

    def _names(self, node: ast.AST, scope: _Scope) -> None:
        """Notes the names that stand in a node itself."""
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                self.uses.append(_Use(node, "id", scope))
            else:
                self._bind(node, "id", scope)
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
            if node.name is not None:
                self._bind(node, "name", scope)
        elif isinstance(node, ast.MatchMapping):
            if node.rest is not None:
                self._bind(node, "rest", scope)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            kind = "global" if isinstance(node, ast.Global) else "nonlocal"
            for i, name in enumerate(node.names):
                scope.outer[name] = kind
                if kind == "global":
                    scope.module().bound.add(name)
                self.uses.append(_Use(node, "names", scope, i))
        elif isinstance(node, ast.keyword) and node.arg is not None:
            self.keywords.add(node.arg)
        elif isinstance(node, ast.MatchClass):
            self.keywords.update(node.kwd_attrs)

    def _bind(self, node: ast.AST, field: str, scope: _Scope) -> None:
        name = getattr(node, field)
        if name in scope.imported:
            scope.imported[name] = ""
        scope.bound.add(name)
        self.uses.append(_Use(node, field, scope))

    def _function(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, scope: _Scope
    ) -> None:
        inner = _Scope("function", scope)
        given = node.args
        if isinstance(node, _FUNCTIONS):
            self._bind(node, "name", scope)
            self._walk_all(node.decorator_list, scope)
        self._walk_all([*given.defaults, *given.kw_defaults], scope)
        named = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
        for argument in named:
            if argument is not None:
                self._bind(argument, "arg", inner)
        body = node.body if isinstance(node.body, list) else [node.body]
        self._walk_all(body, inner)

    def _comprehension(self, node: ast.AST, scope: _Scope) -> None:
        """The first iterable is evaluated outside, all else within."""
        inner = _Scope("comprehension", scope)
        generators: list[ast.comprehension] = node.generators  # type: ignore[attr-defined]
        for i, generator in enumerate(generators):
            self._walk(generator.iter, inner if i else scope)
            self._walk_all([generator.target, *generator.ifs], inner)
        results = ("key", "value") if isinstance(node, ast.DictComp) else ("elt",)
        self._walk_all((getattr(node, name) for name in results), inner)

    def _import(self, node: ast.Import | ast.ImportFrom, scope: _Scope) -> None:
        """Notes what imported names stand for, and drops the names that the program chose."""
        prefix = ""
        if isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "") + "."
        for alias in node.names:
            if alias.name == "*":
                continue
            name = alias.asname or (alias.name if prefix else alias.name.split(".")[0])
            whole = prefix + alias.name if alias.asname or prefix else name
            if name in scope.bound and scope.imported.get(name) != whole:
                whole = ""
            if name in scope.outer:  # bound elsewhere; what it means there is not known here
                continue
            scope.bound.add(name)
            scope.imported[name] = whole
            self._aliases.append((alias, scope, name))


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Children in the order in which names count: what is assigned comes after its value."""
    if isinstance(node, (ast.Assign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield node.value
        yield from targets
    else:
        yield from ast.iter_child_nodes(node)
