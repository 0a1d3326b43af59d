"""The source files as the rules see them: paths, syntax trees, module names and own imports.

Nothing here imports moebius: the rules hold for files that would not even import.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "moebius"


@dataclass(frozen=True)
class Import:
    """One own module that a file imports, where, and inside which function (None: outside)."""

    module: str
    line: int
    function: str | None


@dataclass(frozen=True)
class Source:
    """One Python file, by its path from `base`."""

    base: Path
    path: Path

    @property
    def name(self) -> str:
        """The path as the reports and the lists of exceptions write it: `train/loop.py`."""
        return self.path.relative_to(self.base).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    @property
    def module(self) -> str:
        """The dotted module name of a file of the package."""
        parts = self.path.relative_to(PACKAGE.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def functions(self) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        """Every function with its dotted name (`Class.method`), nested ones included."""
        yield from _functions(self.tree, "")

    def classes(self) -> Iterator[ast.ClassDef]:
        """Every class, nested ones included."""
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef))

    def imports(self, modules: frozenset[str]) -> list[Import]:
        """The own modules among `modules` that this file imports, `from x import y` seen as x.y."""
        found: list[Import] = []
        for node, function in _with_function(self.tree, None):
            if not isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
                continue
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                full = [f"{base}.{alias.name}" for alias in node.names]
                names = [name if name in modules else base for name in full]
            elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
                names = [text for arg in node.args if (text := _text(arg))]
            own = dict.fromkeys(name for name in names if name.split(".")[0] == "moebius")
            found += [Import(name, node.lineno, function) for name in own]
        return found

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.path.name == "__init__.py"
        parts = self.module.split(".")
        parents = parts[: len(parts) - node.level + is_package]
        return ".".join([*parents, *([node.module] if node.module else [])])


def package_files() -> list[Source]:
    """Every file of the package."""
    return [Source(PACKAGE, path) for path in sorted(PACKAGE.rglob("*.py"))]


def files_of_tests() -> list[Source]:
    """Every file of the tests."""
    return [Source(ROOT, path) for path in sorted((ROOT / "tests").rglob("*.py"))]


def own_modules() -> frozenset[str]:
    """The names of all modules of the package."""
    return frozenset(source.module for source in package_files())


def _functions(
    node: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)


def _with_function(node: ast.AST, function: str | None) -> Iterator[tuple[ast.AST, str | None]]:
    for child in ast.iter_child_nodes(node):
        yield child, function
        inside = function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = child.name
        elif isinstance(child, ast.Lambda):
            inside = function or "<lambda>"
        yield from _with_function(child, inside)


def _called(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _text(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
