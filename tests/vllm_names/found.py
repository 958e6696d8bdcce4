"""What a vLLM has, read from its source: an installed one, or a wheel."""

from __future__ import annotations

import ast
import dataclasses
import functools
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.vllm_names.wanted import Name

_EVERYTHING = "*"
_Definition = ast.stmt | Name
"""What a name is in a module: a statement of it, or another module's name."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """A statement, and the module that it is in."""

    module: str
    node: ast.stmt


class Sources:
    """The source files of one vLLM. Never imported."""

    def __init__(self, root: zipfile.Path | Path) -> None:
        """root: the folder that has the package ``vllm`` in it."""
        self._root = root
        self.module = functools.cache(self._module)

    @classmethod
    def of_wheel(cls, wheel: Path) -> Sources:
        return cls(zipfile.Path(wheel))

    def has(self, name: Name) -> bool:
        """Say whether a module has a name, or objects of its class do."""
        module, (first, _, member) = name[0], name[1].partition(".")
        found = self._find(module, first)
        if found is None or not member:
            return found is not None
        if isinstance(found.node, ast.ClassDef):
            return member in self._members(found.module, found.node, ())
        if isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef):
            return found.node.args.kwarg is not None or member in _parameters(found.node)
        inside = f"{module}.{first}"
        return self.module(inside) is not None and self.has((inside, member))

    def is_open(self, name: Name) -> bool:
        """Say whether what a name stands for may have members that its source does not show: it is
        no class, or one that extends what is not vLLM's."""
        found = self._find(name[0], name[1].split(".", 1)[0])
        if found is None or not isinstance(found.node, ast.ClassDef):
            return True
        return self._is_open(found.module, found.node, ())

    def _module(self, module: str) -> dict[str, _Definition] | None:
        """Return a module's names; None where there is no such module."""
        path = self._root
        for part in module.split("."):
            path = path / part
        package, file = path / "__init__.py", path.parent / f"{module.split('.')[-1]}.py"
        source = package if package.is_file() else file
        if not source.is_file():
            return None
        names: dict[str, _Definition] = {}
        inside = module if package.is_file() else module.rpartition(".")[0]
        for node in _statements(ast.parse(source.read_text(encoding="utf-8")).body):
            if isinstance(node, ast.ImportFrom):
                home = _absolute(node, inside)
                for alias in node.names:
                    if alias.name == _EVERYTHING:
                        names |= {name: (home, name) for name in self.module(home) or ()}
                    else:
                        names[alias.asname or alias.name] = (home, alias.name)
            else:
                names |= dict.fromkeys(_defined(node), node)
        return names

    def _find(self, module: str, name: str) -> _Place | None:
        """Return where a name is defined, through whatever passes it on."""
        for _ in range(10):
            names = self.module(module)
            if names is None:
                return None
            if name not in names:
                is_module = self.module(f"{module}.{name}") is not None
                listed = _is_listed(names, name)
                return _Place(module, ast.Pass()) if is_module or listed else None
            found = names[name]
            if isinstance(found, ast.stmt):
                return _Place(module, found)
            if found[0].split(".")[0] != "vllm":
                return _Place(module, ast.Pass())
            module, name = found
        return None

    def _bases(self, module: str, node: ast.ClassDef) -> Iterator[_Place | None]:
        for base in node.bases:
            inner = base.value if isinstance(base, ast.Subscript) else base
            yield self._find(module, inner.id) if isinstance(inner, ast.Name) else None

    def _members(self, module: str, node: ast.ClassDef, seen: Sequence[str]) -> set[str]:
        members = set(_members_of(node))
        for base in self._bases(module, node):
            if base and isinstance(base.node, ast.ClassDef) and base.node.name not in seen:
                members |= self._members(base.module, base.node, (*seen, node.name))
        return members

    def _is_open(self, module: str, node: ast.ClassDef, seen: Sequence[str]) -> bool:
        return any(
            base is None
            or not isinstance(base.node, ast.ClassDef)
            or (
                base.node.name not in seen
                and self._is_open(base.module, base.node, (*seen, node.name))
            )
            for base in self._bases(module, node)
        )


def _is_listed(names: dict[str, _Definition], name: str) -> bool:
    """Whether a module that imports its names when they are asked for lists one."""
    table = names.get("MODULE_ATTRS")
    if not isinstance(table, ast.Assign | ast.AnnAssign) or table.value is None:
        return False
    return any(isinstance(n, ast.Constant) and n.value == name for n in ast.walk(table.value))


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return str(node.module)
    parts = package.split(".")
    base = ".".join(parts[: len(parts) - node.level + 1])
    return f"{base}.{node.module}" if node.module else base


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield what a body does, whatever it depends on."""
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
            for block in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, block, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)
        else:
            yield node


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import):
        yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    return [argument.arg for argument in every]


def _members_of(node: ast.ClassDef) -> Iterator[str]:
    """Yield what a class and its objects have: what it defines, and what methods set on self."""
    for child in _statements(node.body):
        yield from _defined(child)
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if child.name == "__init__":
                yield from _parameters(child)
            for inner in ast.walk(child):
                if (
                    isinstance(inner, ast.Attribute)
                    and isinstance(inner.ctx, ast.Store)
                    and isinstance(inner.value, ast.Name)
                    and inner.value.id == "self"
                ):
                    yield inner.attr
