"""How the code is written: line length, docstrings, and the constructs the house does without."""

import ast
import itertools

from .source import ROOT, files_of_tests, package_files

MOST_COLUMNS = 100
# Signatures that another package calls and so dictates: (file, function).
DICTATED = {("model/recompute.py", "_policy")}
# Files that have to speak to the environment, with what for.
ENVIRONMENT: dict[str, str] = {
    "curate/scorers/judge.py": "the judge's key, a secret",
    "parallel/world.py": "the place that a launcher gives each process",
}

SOURCES, TESTS = package_files(), files_of_tests()
FILES = [*SOURCES, *TESTS]


def test_lines_are_at_most_100_columns() -> None:
    wide = [
        f"{source.name}:{number}: {len(line)} columns"
        for source in FILES
        for number, line in enumerate(source.text.splitlines(), 1)
        if len(line) > MOST_COLUMNS
    ]
    assert not wide, "\n".join(wide)


def test_every_module_says_what_it_is() -> None:
    silent = [source.name for source in FILES if not ast.get_docstring(source.tree)]
    assert not silent, f"no module docstring: {', '.join(silent)}"


def test_no_bare_except() -> None:
    bare = [
        f"{source.name}:{node.lineno}: bare except"
        for source in FILES
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not bare, "\n".join(bare)


def test_no_open_keyword_arguments() -> None:
    opened = [
        f"{source.name}:{node.lineno}: {name}(**{node.args.kwarg.arg})"
        for source in SOURCES
        for name, node in source.functions()
        if node.args.kwarg is not None and (source.name, name) not in DICTATED
    ]
    assert not opened, "\n".join(opened)


def test_no_dispatch_by_hasattr() -> None:
    found = [
        f"{source.name}:{node.lineno}: hasattr"
        for source in SOURCES
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Name) and node.id == "hasattr"
    ]
    assert not found, "\n".join(found)


def test_no_globals_and_no_configuration_by_environment() -> None:
    found: list[str] = []
    for source in SOURCES:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Global):
                found.append(f"{source.name}:{node.lineno}: global {', '.join(node.names)}")
            reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            if isinstance(node, ast.Attribute) and reads and source.name not in ENVIRONMENT:
                found.append(f"{source.name}:{node.lineno}: reads the environment")
    assert not found, "\n".join(found)


def test_tests_assert_what_can_fail_and_do_not_sleep() -> None:
    found: list[str] = []
    for source in TESTS:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant):
                found.append(f"{source.name}:{node.lineno}: asserts a constant")
            if isinstance(node, ast.Attribute) and node.attr == "sleep":
                found.append(f"{source.name}:{node.lineno}: sleeps")
    assert not found, "\n".join(found)


def test_test_files_have_names_of_their_own() -> None:
    """Two test files of one name collide unless their folders are packages."""
    loose = [s.path for s in TESTS if not (s.path.parent / "__init__.py").exists()]
    ordered = sorted(loose, key=lambda path: path.name)
    groups = {name: list(same) for name, same in itertools.groupby(ordered, lambda p: p.name)}
    twice = [
        ", ".join(path.relative_to(ROOT).as_posix() for path in same)
        for name, same in groups.items()
        if len(same) > 1 and name.startswith("test_")
    ]
    assert not twice, "rename one of each, or add __init__.py: " + "; ".join(twice)
