"""Who imports whom, read off the sources without running them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """``source`` imports ``target``; both are dotted names."""

    source: str
    target: str
    line: int
    inside_a_function: bool = False

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def module_name(path: Path, root: Path) -> str:
    """``root/a/b.py`` -> ``a.b``; ``root/a/__init__.py`` -> ``a``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def imports_of(code: str, source: str, is_package: bool) -> Iterator[Import]:
    """Every import statement, relative ones resolved, and ``import_module("...")`` with a literal.

    Imports inside functions and under ``if TYPE_CHECKING`` count like all others.
    """
    package = source if is_package else source.rpartition(".")[0]

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        for target in _targets(node, package):
            yield Import(source, target, getattr(node, "lineno", 0), inside)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(code), False)


def _targets(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        for alias in node.names:  # `from package import module` imports the module
            yield f"{base}.{alias.name}"
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = node.func
        called = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
        argument = node.args[0].value
        if called in ("import_module", "__import__") and isinstance(argument, str):
            yield argument


def imports_in(folder: Path, root: Path) -> dict[str, list[Import]]:
    """The imports of every module in ``folder``, whose names begin at ``root``."""
    found = {}
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.pyi")]):
        name = module_name(path, root)
        found[name] = list(imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py"))
    return found


def circles(imports: Mapping[str, Iterable[Import]]) -> list[str]:
    """Modules that import one another in a circle, or lie between two circles; sorted.

    A module may import the package that it is in, of which it takes no name: that comes first anyway.
    """
    needs = {
        name: {_module_of(each.target, imports) for each in found if not within(name, each.target)}
        for name, found in imports.items()
    }
    rest = {name: (targets & needs.keys()) - {name} for name, targets in needs.items()}
    while True:
        used = set().union(*rest.values())
        kept = {name for name, targets in rest.items() if targets and name in used}
        if len(kept) == len(rest):
            return sorted(kept)
        rest = {name: rest[name] & kept for name in kept}


def _module_of(target: str, modules: Iterable[str]) -> str:
    """``a.b.Name`` -> ``a.b`` where that is a module."""
    name = target
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name
