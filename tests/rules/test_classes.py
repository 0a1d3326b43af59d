"""Classes are abstract or final: what another own class derives from must be abstract.

Abstract is a class that derives from ABC or Protocol, or is `Variant`, the base of all seams, or an
exception. What merely inherits from an abstract class, and declares no abstract method of its own,
counts as concrete.
"""

import ast
import builtins

from .source import Source, own_modules, package_files

ABSTRACT_BASES = {"ABC", "Protocol", "ABCMeta"}
BASE_OF_ALL_SEAMS = "moebius.config:Variant"

MODULES = own_modules()


def named(source: Source) -> dict[str, str]:
    """What the names of a file mean: its own classes, and what it imports from own modules."""
    meaning = {node.name: f"{source.module}:{node.name}" for node in source.classes()}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                meaning[alias.asname or alias.name] = f"{node.module}:{alias.name}"
    return meaning


def base_name(node: ast.expr) -> str:
    """`Generic[T]` -> Generic, `abc.ABC` -> ABC, `rules.Rule` -> Rule."""
    if isinstance(node, ast.Subscript):
        return base_name(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def is_abstract(node: ast.ClassDef) -> bool:
    if ABSTRACT_BASES & {base_name(base) for base in node.bases}:
        return True
    if any(base_name(keyword.value) in ABSTRACT_BASES for keyword in node.keywords):
        return True
    return any(
        base_name(decorator) == "abstractmethod"
        for item in node.body
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
        for decorator in item.decorator_list
    )


def is_exception(node: ast.ClassDef) -> bool:
    kinds = [getattr(builtins, base_name(base), object) for base in node.bases]
    return any(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds)


SOURCES = package_files()
CLASSES = {f"{s.module}:{node.name}": node for s in SOURCES for node in s.classes()}


def test_concrete_classes_are_never_subclassed() -> None:
    wrong: list[str] = []
    for source in SOURCES:
        meaning = named(source)
        for node in source.classes():
            parents = [meaning.get(base_name(base), "") for base in node.bases]
            wrong += [
                f"{source.name}:{node.lineno}: {node.name} derives from {parent}"
                for parent in parents
                if parent in CLASSES
                and parent != BASE_OF_ALL_SEAMS
                and not (is_abstract(CLASSES[parent]) or is_exception(CLASSES[parent]))
            ]
    assert not wrong, "\n".join([*wrong, "compose them, or make the base abstract (ABC)"])
