"""The lazy tables: every entry is a class of its seam; importing a seam imports none of them."""

import ast
import importlib
import json
import subprocess
import sys

import pytest

from moebius.config import Variant, variant_class

from .source import package_files


def declares_table(node: ast.ClassDef) -> bool:
    targets = [
        target
        for item in node.body
        for target in ([item.target] if isinstance(item, ast.AnnAssign) else [])
        + (item.targets if isinstance(item, ast.Assign) else [])
    ]
    return any(isinstance(target, ast.Name) and target.id == "TABLE" for target in targets)


def seams() -> list[tuple[str, str]]:
    """Module and class of every seam: found in the text, so that none can be forgotten."""
    found = [
        (source.module, node.name)
        for source in package_files()
        for node in source.classes()
        if declares_table(node)
    ]
    return [seam for seam in found if seam != ("moebius.config", "Variant")]


def base_of(module: str, name: str) -> type[Variant]:
    return getattr(importlib.import_module(module), name)


SEAMS = seams()
ENTRIES = [
    (module, name, entry) for module, name in SEAMS for entry in sorted(base_of(module, name).TABLE)
]


def test_seams_are_found() -> None:
    assert ("moebius.optim.rules", "Rule") in SEAMS


@pytest.mark.parametrize(("module", "name"), SEAMS)
def test_a_seam_says_its_name_and_has_entries(module: str, name: str) -> None:
    base = base_of(module, name)
    assert issubclass(base, Variant)
    assert base.TABLE, f"{name} has an empty table"
    assert base.SEAM != Variant.SEAM, f"{name} needs a SEAM, the word its errors call it by"


@pytest.mark.parametrize(("module", "name", "entry"), ENTRIES)
def test_an_entry_is_a_class_of_its_seam(module: str, name: str, entry: str) -> None:
    base = base_of(module, name)
    cls = variant_class(base, entry)
    assert issubclass(cls, base) and cls is not base
    home, _, written = base.TABLE[entry].partition(":")
    assert (cls.__module__, cls.__qualname__) == (home, written), "name the file that defines it"
    assert "__dataclass_fields__" in vars(cls), f"{written} must be a dataclass of its own"


IMPORT_SEAMS = """
import importlib, json, sys
seams, early = json.loads(sys.argv[1]), []
for module, name in seams:
    base = getattr(importlib.import_module(module), name)
    homes = {spec.partition(":")[0] for spec in base.TABLE.values()} - {module}
    early += [f"{module} imports {home}" for home in sorted(homes & sys.modules.keys())]
print(json.dumps(early))
"""


def run_python(code: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_seams_imports_no_variant() -> None:
    """One after the other in a fresh process; a table's file may hold its variants itself."""
    early = json.loads(run_python(IMPORT_SEAMS, json.dumps(SEAMS)))
    assert not early, "\n".join(early)


@pytest.mark.parametrize("module", ["moebius", "moebius.config", "moebius.optim.schedules"])
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"
