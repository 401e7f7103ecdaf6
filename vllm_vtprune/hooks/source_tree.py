# SPDX-License-Identifier: Apache-2.0
"""Looks a name up in a tree of Python sources, through re-exports and base classes; imports nothing of it."""

from __future__ import annotations

import ast
import copy
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
#: Re-exports and base classes are followed this far.
_DEEPEST = 8


@dataclass(frozen=True)
class State:
    """How a name stands in one tree.

    Attributes:
        module: where it is defined.
        signature: a function's parameters without annotations, a class's bases; empty for anything else.
        body: a digest of a function's code without docstrings and annotations; empty for anything else.
    """

    module: str
    signature: str
    body: str


class SourceTree:
    """A folder that holds a package's sources.

    Args:
        root: the folder in which the package's own folder lies, such as site-packages or an unpacked wheel.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        # per instance, as a tree's files do not change while it is read
        self._parsed = cache(self._parse)
        self._named = cache(self._names)

    def state(self, symbol: str) -> State | None:
        """How `symbol` ("module:name" or "module:Class.member") stands here; None where it is gone."""
        module, _, path = symbol.partition(":")
        name, _, member = path.partition(".")
        found = self.member(module, name, member) if member else self.resolve(module, name)
        if found is None:
            return None
        where, node = found
        if isinstance(node, _FUNCTIONS):
            clean = _Bare().visit(copy.deepcopy(node))
            prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
            digest = hashlib.sha256(ast.unparse(clean).encode()).hexdigest()[:12]
            return State(where, prefix + ast.unparse(clean.args), digest)
        bases = ", ".join(map(ast.unparse, node.bases)) if isinstance(node, ast.ClassDef) else ""
        return State(where, bases, "")

    def resolve(self, module: str, name: str, depth: int = 0) -> tuple[str, ast.AST] | None:
        """(module, node) in which a module's name is defined; for a submodule (its name, its tree)."""
        if depth > _DEEPEST or (tree := self._parsed(module)) is None:
            return None
        node = self._named(module).get(name)
        if isinstance(node, ast.ImportFrom):
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            return self.resolve(self._absolute(module, node), original, depth + 1)
        if node is not None:
            return None if isinstance(node, ast.Import) else (module, node)
        if (submodule := self._parsed(f"{module}.{name}")) is not None:
            return f"{module}.{name}", submodule
        for statement in tree.body:
            if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
                found = self.resolve(self._absolute(module, statement), name, depth + 1)
                if found is not None:
                    return found
        return self._lazy(module, name, depth)

    def member(self, module: str, name: str, member: str, depth: int = 0) -> tuple[str, ast.AST] | None:
        """(module, node) that defines a class's method or attribute, its base classes followed."""
        found = self.resolve(module, name)
        if depth > _DEEPEST or found is None:
            return None
        where, cls = found
        if not isinstance(cls, ast.ClassDef):
            return None
        own: ast.AST | None = next((n for n in cls.body if member in _targets(n)), None)
        if own is None:
            own = next((n for n in ast.walk(cls) if _sets_on_self(n, member)), None)
        if own is not None:
            return where, own
        for base in cls.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                inherited = self.member(where, base.id, member, depth + 1)
                if inherited is not None:
                    return inherited
        return None

    def text(self, module: str) -> str | None:
        """A module's source; None where there is no such module."""
        path = self._path(module)
        return None if path is None else path.read_text()

    def places(self, name: str) -> list[str]:
        """Modules that define a function or class of this name, at any depth; at most four."""
        pattern = re.compile(rf"^[ \t]*(?:async def|def|class) {re.escape(name)}\b", re.M)
        found = (path for path in sorted(self.root.glob("vllm/**/*.py")) if pattern.search(path.read_text()))
        return [
            ".".join(p.relative_to(self.root).with_suffix("").parts)
            for p, _ in zip(found, range(4), strict=False)
        ]

    def _path(self, module: str) -> Path | None:
        path = self.root.joinpath(*module.split("."))
        return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)

    def _parse(self, module: str) -> ast.Module | None:
        text = self.text(module)
        return None if text is None else ast.parse(text)

    def _names(self, module: str) -> dict[str, ast.stmt]:
        """What stands at a module's top level, under `if` and `try` too; each name's first definition."""
        tree = self._parsed(module)
        found: dict[str, ast.stmt] = {}

        def collect(body: list[ast.stmt]) -> None:
            for statement in body:
                for name in _targets(statement):
                    found.setdefault(name, statement)
                for inner in ("body", "orelse", "finalbody"):
                    if isinstance(statement, ast.If | ast.Try):
                        collect(getattr(statement, inner, []))
                for handler in getattr(statement, "handlers", []):
                    collect(handler.body)

        collect([] if tree is None else tree.body)
        return found

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self._path(module)
        package = (
            module.split(".") if path is not None and path.name == "__init__.py" else module.split(".")[:-1]
        )
        base = package[: len(package) - (node.level - 1)]
        return ".".join([*base, *([node.module] if node.module else [])])

    def _lazy(self, module: str, name: str, depth: int) -> tuple[str, ast.AST] | None:
        """A name of a lazy table, as in vLLM's own `__init__`: ``"LLM": ".entrypoints.llm:LLM"``."""
        entry = re.search(rf'"{re.escape(name)}":\s*"([.\w]+):(\w+)"', self.text(module) or "")
        if entry is None:
            return None
        target = module + entry[1] if entry[1].startswith(".") else entry[1]
        return self.resolve(target, entry[2], depth + 1)


class _Bare(ast.NodeTransformer):
    """Takes out what no caller depends on: annotations and docstrings."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._stripped(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._stripped(node)

    def _stripped(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        arguments = node.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            argument.annotation = None
        for variadic in (arguments.vararg, arguments.kwarg):
            if variadic is not None:
                variadic.annotation = None
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node


def _targets(node: ast.stmt) -> list[str]:
    """The names that a statement binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    return []


def _sets_on_self(node: ast.AST, member: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == member
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )
