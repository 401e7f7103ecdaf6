# SPDX-License-Identifier: Apache-2.0
"""What our own sources import from vLLM and override of its classes, read off them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vllm_vtprune.hooks.source_tree import SourceTree

#: The packages that ship and touch vLLM.
PACKAGES = ("vllm_vtprune", "vtprune_server")


@dataclass(frozen=True, order=True)
class Use:
    """One dependence on vLLM.

    Attributes:
        symbol: "module:name" or "module:Class.member" of vLLM.
        kind: "import", "override", or what `declared` says.
        where: our file, relative to the folder of its package.
        why: what is relied on, where that is more than the name.
    """

    symbol: str
    kind: str
    where: str
    why: str = ""


def uses(tree: SourceTree) -> list[Use]:
    """Imports and overrides of our packages.

    Args:
        tree: a vLLM in which the base classes are looked up; what is gone there counts as overridden still.

    Returns:
        Each once per file, sorted.
    """
    found: set[Use] = set()
    for where, module in _modules():
        names: dict[str, str] = {}
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    symbol = f"{node.module}:{alias.name}"
                    names[alias.asname or alias.name] = symbol
                    found.add(Use(symbol, "import", where))
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                found |= set(_overrides(node, names, where, tree))
    return sorted(found)


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py")):
            yield f"{package}/{path.relative_to(folder)}", ast.parse(path.read_text())


def _overrides(node: ast.ClassDef, names: dict[str, str], where: str, tree: SourceTree) -> Iterator[Use]:
    for base in node.bases:
        base = base.value if isinstance(base, ast.Subscript) else base
        symbol = names.get(base.id) if isinstance(base, ast.Name) else None
        if symbol is None:
            continue
        module, _, name = symbol.partition(":")
        for statement in node.body:
            if (
                isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
                and statement.name != "__init__"
                and tree.member(module, name, statement.name) is not None
            ):
                yield Use(f"{symbol}.{statement.name}", "override", where)
