"""Who may import whom: the order of the rooms, as data; imports at the top; no circles."""

from .source import PACKAGE, own_modules, package_files

# What each room may import besides itself and config. Lines of rooms: each may use those above;
# a room that docs/design.md gives a bracket may use what stands in the bracket alone.
BELOW_MODEL = {"ops", "monitor"}
BELOW_OPTIM = BELOW_MODEL | {"model", "data", "curate"}
BELOW_TRAIN = BELOW_OPTIM | {"optim", "parallel", "checkpoint", "checkpoint/hf"}
BELOW_POST = BELOW_TRAIN | {"train", "infer"}
BELOW_RECIPES = BELOW_POST | {"eval", "post", "lab", "bench"}
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "ops": set(),
    "monitor": set(),
    "model": BELOW_MODEL,
    "data": BELOW_MODEL,
    "curate": {"data", "monitor"},
    "optim": {"ops"},
    "parallel": {"ops"},
    "checkpoint": {"ops", "parallel"},
    "checkpoint/hf": {"ops", "parallel", "model", "checkpoint"},
    "train": BELOW_TRAIN,
    "infer": BELOW_TRAIN,
    "eval": {"data", "infer", "model", "monitor"},
    "post": BELOW_POST,
    "lab": BELOW_POST,
    "bench": BELOW_POST,
    "recipes": BELOW_RECIPES,
    "cli": BELOW_RECIPES | {"recipes"},
    "__main__": {"cli"},
    "moebius": set(),
}

SOURCES = package_files()
MODULES = own_modules()


def room_of(module: str) -> str:
    """`moebius.optim.rules` -> optim; `moebius.checkpoint.hf.x` -> checkpoint/hf."""
    parts = module.split(".")
    if len(parts) == 1:
        return "moebius"
    nested = "/".join(parts[1:3])
    return nested if nested in MAY_IMPORT else parts[1]


def test_the_package_is_found() -> None:
    assert "moebius.config" in MODULES


def test_every_room_has_its_place_in_the_order() -> None:
    unplaced = {room_of(module) for module in MODULES} - MAY_IMPORT.keys()
    assert not unplaced, f"give these rooms of {PACKAGE} a line in MAY_IMPORT: {sorted(unplaced)}"


def test_imports_follow_the_order_of_the_rooms() -> None:
    wrong: list[str] = []
    for source in SOURCES:
        room = room_of(source.module)
        allowed = {"config", "moebius", room} | MAY_IMPORT.get(room, set())
        wrong += [
            f"{source.name}:{found.line}: {room} may not import {found.module}"
            for found in source.imports(MODULES)
            if room_of(found.module) not in allowed
        ]
    assert not wrong, "\n".join(wrong)


def test_own_imports_stand_at_the_top() -> None:
    inside = [
        f"{source.name}:{found.line}: {found.function}() imports {found.module}"
        for source in SOURCES
        for found in source.imports(MODULES)
        if found.function is not None
    ]
    assert not inside, "\n".join(inside)


def test_no_circle_of_modules() -> None:
    """A circle would make the order of imports matter; lazy tables are texts and do not count."""
    graph = {
        source.module: sorted({found.module for found in source.imports(MODULES)} & MODULES)
        for source in SOURCES
    }
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for imported in graph[module]:
            walk(imported, (*path, module))
        done.add(module)

    for module in graph:
        walk(module, ())
