"""Sizes: files of 600 lines at most, few above 400, functions of 60 but for written-out loops."""

import pytest

from .source import PACKAGE, Source, files_of_tests, package_files

MOST_LINES = 600
LONG_FILE, FEW = 400, 5
FUNCTION_LINES = 60
# Loops that read better from top to bottom than in pieces: (file, function).
WRITTEN_OUT = {("train/loop.py", "train")}

SOURCES = package_files()


def longer_than(limit: int, sources: list[Source]) -> list[str]:
    lengths = [(source.name, len(source.text.splitlines())) for source in sources]
    return [f"{name}: {length} lines" for name, length in lengths if length > limit]


def test_no_file_is_too_long() -> None:
    long = longer_than(MOST_LINES, [*SOURCES, *files_of_tests()])
    assert not long, f"divide what is above {MOST_LINES}: {', '.join(long)}"


def test_few_files_are_long() -> None:
    long = longer_than(LONG_FILE, SOURCES)
    assert len(long) <= FEW, f"more than {FEW} files above {LONG_FILE} lines: {', '.join(long)}"


def test_functions_are_short() -> None:
    long = [
        f"{source.name}:{node.lineno}: {name} has {length} lines"
        for source in SOURCES
        for name, node in source.functions()
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES
        and (source.name, name) not in WRITTEN_OUT
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize(("file", "function"), sorted(WRITTEN_OUT))
def test_the_exceptions_exist(file: str, function: str) -> None:
    path = PACKAGE / file
    names = [name for name, _ in Source(PACKAGE, path).functions()]
    assert function in names, f"{file} has no {function}; remove it from WRITTEN_OUT"
