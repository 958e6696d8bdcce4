"""The names of vLLM's that the package's source uses, found without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "vllm_pd_plugin"

Name = tuple[str, str]
"""A module of vLLM's, and a name in it; with a dot, what objects of a class there have, or
a parameter of a function."""


def wanted(package: Path = PACKAGE) -> tuple[set[Name], set[Name]]:
    """Return what must be there, and which methods are defined in classes that extend vLLM's: some
    of these take the place of vLLM's own."""
    used: set[Name] = set()
    overridden: set[Name] = set()
    for path in package.rglob("*.py"):
        source = _Source(ast.parse(path.read_text()))
        used |= source.used
        overridden |= source.overridden
    return used, overridden


class _Source:
    """One module of ours: what it imports, and what it reaches in what it has imported.

    An object is known to be of a class where an annotation of a parameter or a variable says so.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.used: set[Name] = set()
        self.overridden: set[Name] = set()
        self._homes: dict[str, Name] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and _is_vllm(node.module):
                for alias in node.names:
                    name = (str(node.module), alias.name)
                    self.used.add(name)
                    self._homes[alias.asname or alias.name] = name
        node: Any
        for node in ast.walk(tree):
            if _is_read(node):
                self._reach(node.value.id, node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                for keyword in node.keywords:
                    if keyword.arg:
                        self._reach(node.func.id, keyword.arg)
            elif isinstance(node, ast.ClassDef):
                self._extend(node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self._follow(node)

    def _reach(self, local: str, member: str) -> None:
        if local in self._homes:
            module, name = self._homes[local]
            self.used.add((module, f"{name}.{member}"))

    def _extend(self, node: ast.ClassDef) -> None:
        bases = [self._homes[base.id] for base in node.bases if _is_name(base, self._homes)]
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                for module, name in bases:
                    self.overridden.add((module, f"{name}.{child.name}"))

    def _follow(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        kinds = dict(self._parameters(function.args))
        node: Any
        for node in ast.walk(function):
            is_told = isinstance(node, ast.AnnAssign) and _is_name(node.annotation, self._homes)
            if is_told and isinstance(node.target, ast.Name):
                kinds[node.target.id] = node.annotation.id
        for node in ast.walk(function):
            if _is_read(node) and node.value.id in kinds:
                self._reach(kinds[node.value.id], node.attr)
            elif _replaces(node) and getattr(node.args[0], "id", "") in kinds:
                for keyword in node.keywords:
                    if keyword.arg:
                        self._reach(kinds[node.args[0].id], keyword.arg)

    def _parameters(self, arguments: ast.arguments) -> Iterator[tuple[str, str]]:
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            if argument.annotation is not None and _is_name(argument.annotation, self._homes):
                assert isinstance(argument.annotation, ast.Name)
                yield argument.arg, argument.annotation.id


def _is_read(node: Any) -> bool:
    """Say whether it reads an attribute of what a name stands for."""
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name)
    )


def _replaces(node: Any) -> bool:
    """Say whether it copies an object with other fields, as ``dataclasses.replace`` does."""
    return (
        isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) == "replace"
        and bool(node.args)
    )


def _is_vllm(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "vllm"


def _is_name(node: ast.expr, known: dict[str, Name]) -> bool:
    return isinstance(node, ast.Name) and node.id in known
