"""The documents against the house: the annotated tree, and every command that they show.

The tree is a fenced block of README.md with a line `src/moebius/`; under it, deeper by indentation,
one folder or file a line, its name first. Commands are looked for in fenced blocks and in
backquotes.
"""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from typer.core import TyperGroup
from typer.main import get_command

from ..recipes.widths import widths
from .source import PACKAGE, ROOT

README = ROOT / "README.md"
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
COMMAND = re.compile(r"^(?:\$ )?(?:\S*/bin/)?moebius (.+)$")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def tree_paths(readme: str) -> list[str]:
    """The paths of the annotated tree, as `optim/` or `optim/rules/` or `config.py`."""
    blocks = [
        block for block in FENCED.findall(readme) if re.search(r"^\W*src/moebius/", block, re.M)
    ]
    assert len(blocks) == 1, "README.md needs one annotated tree, a block with a line src/moebius/"
    lines = [re.sub("[│├└─]", " ", line) for line in blocks[0].splitlines() if line.strip()]
    start = next(i for i, line in enumerate(lines) if line.split()[0] == "src/moebius/")
    stack: list[tuple[int, str]] = [(indent(lines[start]), "")]
    paths: list[str] = []
    for line in lines[start + 1 :]:
        if indent(line) <= stack[0][0]:
            break
        name = line.split()[0]
        if not re.fullmatch(r"[\w/.-]+(/|\.py)", name):
            continue  # the rest of a longer annotation
        while indent(line) <= stack[-1][0]:
            stack.pop()
        paths.append(stack[-1][1] + name)
        if name.endswith("/"):
            stack.append((indent(line), stack[-1][1] + name))
    return paths


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def test_the_tree_of_the_readme_is_the_tree_on_disk() -> None:
    shown = tree_paths(read(README))
    absent = [path for path in shown if not (PACKAGE / path).exists()]
    rooms = [f"{path.parent.name}/" for path in sorted(PACKAGE.glob("*/__init__.py"))]
    files = [path.name for path in sorted(PACKAGE.glob("*.py")) if path.name != "__init__.py"]
    missing = [path for path in [*rooms, *files] if path not in shown]
    assert not absent, f"README.md shows what is not there: {', '.join(absent)}"
    assert not missing, f"README.md's tree lacks {', '.join(missing)}"


def test_a_tree_is_read_by_indentation() -> None:
    text = "```\nsrc/moebius/\n  cli.py     verbs\n  model/     lm.py\n    mixers/  one\n"
    text += "             file each\n  ops/       naive\ntests/       mirrors src/\n```\n"
    assert tree_paths(text) == ["cli.py", "model/", "model/mixers/", "ops/"]


def documents() -> list[Path]:
    return [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> Iterator[list[str]]:
    """The words after `moebius` of every command shown, comments and continuations resolved."""
    shown = [
        line for block in FENCED.findall(text) for line in block.replace("\\\n", "").splitlines()
    ]
    shown += INLINE.findall(FENCED.sub("", text))
    for line in shown:
        match = COMMAND.match(line.strip())
        if match:
            yield shlex.split(match[1], comments=True)


def test_commands_are_found_in_blocks_and_backquotes() -> None:
    block = "```\n$ moebius data inspect x \\\n  --json  # shows\nmake test\n```\n"
    text = f"Type `moebius runs` or\n{block}"
    assert list(commands(text)) == [["data", "inspect", "x", "--json"], ["runs"]]


def unknown(words: list[str]) -> str | None:
    """Why the command line would not know `moebius WORDS`; None if it does."""
    command = get_command(importlib.import_module("moebius.cli").app)
    words = list(words)
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return f"there is no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    options = {"--help"}.union(*({*item.opts, *item.secondary_opts} for item in command.params))
    used = [word.partition("=")[0] for word in words if re.match("--?[a-zA-Z]", word)]
    return next((f"there is no option {word}" for word in used if word not in options), None)


def test_commands_of_the_documents_exist() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: moebius {' '.join(words)}: {reason}"
        for path in documents()
        for words in commands(path.read_text(encoding="utf-8"))
        if (reason := unknown(words)) is not None
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_of_recipes_is_what_the_recipes_are() -> None:
    text = read(ROOT / "docs" / "architectures.md")
    rows = ["| " + " | ".join([f"`{row.pop('recipe')}`", *row.values()]) + " |" for row in widths()]
    missing = [row for row in rows if row not in text]
    assert not missing, "docs/architectures.md lacks\n" + "\n".join(missing)
