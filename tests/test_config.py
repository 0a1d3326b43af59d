"""The config idiom: dataclasses to JSON and back, strict keys and types, overrides, identity."""

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebius.config import (
    Variant,
    differences,
    fingerprint,
    flatten,
    from_json,
    identity,
    kept_file,
    kept_name,
    map_user_files,
    nearest,
    override,
    resolve,
    runtime,
    to_json,
    user_file,
)
from moebius.recipes import TABLE, recipe
from moebius.train.run import Run, from_folder_json, to_folder_json


@dataclasses.dataclass(frozen=True)
class Shape(Variant, ABC):
    """A seam of this file."""

    TABLE: ClassVar[Mapping[str, str]] = {
        "circle": f"{__name__}:Circle",
        "box": f"{__name__}:Box",
    }
    SEAM: ClassVar[str] = "shape"

    @abstractmethod
    def area(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Circle(Shape):
    radius: float = 1.0

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ValueError(f"radius={self.radius} must not be negative")

    def area(self) -> float:
        return math.pi * self.radius**2


@dataclasses.dataclass(frozen=True)
class Box(Shape):
    width: int
    height: int
    inside: Shape | None = None

    def area(self) -> float:
        return float(self.width * self.height)


@dataclasses.dataclass(frozen=True)
class Part:
    count: int = 1
    label: str = ""
    pace: int = runtime(1)


@dataclasses.dataclass(frozen=True)
class Whole:
    shape: Shape
    parts: tuple[Part, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    ramp: tuple[tuple[int, int], ...] = ()
    by_name: Mapping[str, Part] = dataclasses.field(default_factory=dict)
    mode: Literal["fast", "slow", 3] = "fast"
    limit: int | None = None
    length: str | int = "5%"
    rate: float = 0.5
    deep: bool = False
    name: str = ""
    threads: int | None = runtime(None)
    watched: Shape = runtime(Circle())


WHOLE = Whole(
    shape=Box(2, 3, inside=Circle(0.5)),
    parts=(Part(), Part(2, "two")),
    by_name={"left": Part(3), "right": Part(4)},
)


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- there and back -------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
circles = st.builds(Circle, st.floats(0, 1e300))
shapes = st.recursive(
    circles,
    lambda inner: st.builds(Box, st.integers(), st.integers(), st.none() | inner),
    max_leaves=4,
)
parts = st.builds(Part, st.integers(), st.text(), st.integers())
wholes = st.builds(
    Whole,
    shape=shapes,
    parts=st.lists(parts, max_size=3).map(tuple),
    pair=st.tuples(st.integers(), finite),
    ramp=st.lists(st.tuples(st.integers(), st.integers()), max_size=3).map(tuple),
    by_name=st.dictionaries(st.text(), parts, max_size=3),
    mode=st.sampled_from(["fast", "slow", 3]),
    limit=st.none() | st.integers(),
    length=st.text() | st.integers(),
    rate=finite,
    deep=st.booleans(),
    name=st.text(),
    threads=st.none() | st.integers(),
    watched=shapes,
)


@given(wholes)
def test_json_round_trip(whole: Whole) -> None:
    text = json.dumps(to_json(whole), allow_nan=False)
    assert from_json(Whole, json.loads(text)) == whole


@given(wholes)
def test_every_leaf_can_be_assigned_its_own_value(whole: Whole) -> None:
    again = override(
        whole,
        [
            f"rate={whole.rate!r}",
            f"limit={'none' if whole.limit is None else whole.limit}",
            f"deep={json.dumps(whole.deep)}",
            f"mode={whole.mode}",
            f"name={whole.name}",
            f"pair={json.dumps(whole.pair)}",
            f"ramp={json.dumps(whole.ramp)}",
            f"parts={json.dumps(to_json(whole.parts))}",
            f"shape={json.dumps(to_json(whole.shape))}",
        ],
    )
    assert again == whole


@given(wholes, wholes)
def test_differences_are_those_of_the_leaves(left: Whole, right: Whole) -> None:
    found = differences(to_json(left), to_json(right))
    assert differences(to_json(left), to_json(left)) == []
    flat = flatten(to_json(left)), flatten(to_json(right))
    paths = {
        path
        for path in flat[0].keys() | flat[1].keys()
        if flat[0].get(path, ...) != flat[1].get(path, ...)
    }
    assert len(found) == len(paths)


@given(wholes, st.none() | st.integers(), shapes, st.integers())
def test_identity_is_blind_to_runtime_fields(
    whole: Whole, threads: int | None, watched: Shape, pace: int
) -> None:
    parts = tuple(dataclasses.replace(part, pace=pace) for part in whole.parts)
    other = dataclasses.replace(whole, threads=threads, watched=watched, parts=parts)
    assert identity(other) == identity(whole) and fingerprint(other) == fingerprint(whole)
    changed = dataclasses.replace(whole, deep=not whole.deep)
    assert fingerprint(changed) != fingerprint(whole)


def test_what_json_looks_like() -> None:
    data = to_json(WHOLE)
    assert data["shape"] == {
        "use": "box",
        "width": 2,
        "height": 3,
        "inside": {"use": "circle", "radius": 0.5},
    }
    assert data["parts"][1] == {"count": 2, "label": "two", "pace": 1}
    assert "pace" not in identity(WHOLE)["parts"][1] and "watched" not in identity(WHOLE)
    assert from_json(Shape, "circle") == Circle()
    assert from_json(float, 3) == 3.0 and isinstance(from_json(float, 3), float)


def test_defaults_are_filled_in() -> None:
    assert from_json(Whole, {"shape": {"use": "circle"}}) == Whole(Circle())


# --- strictness -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shap": 1}, "Whole has no field 'shap'; did you mean 'shape'?"),
        ({"shape": {"use": "circel"}}, "shape: unknown shape 'circel'; did you mean 'circle'?"),
        ({"shape": {"radius": 1}}, 'shape: a shape needs "use"'),
        ({"shape": {"use": "box", "width": 1}}, "shape: Box needs height; write"),
        ({"shape": {"use": "circle", "r": 1}}, "shape: Circle has no field 'r'"),
        ({"shape": {"use": "circle", "radius": -1}}, "shape: radius=-1.0 must not be negative"),
        ({"shape": {"use": f"{__name__}:Part"}}, "is not a shape (a subclass of Shape)"),
        ({"shape": {"use": "box", "width": 1.5, "height": 1}}, "shape.width: expected an integer"),
        ({"shape": 3}, "shape: expected an object of Shape, got 3"),
        ({"parts": {}}, "parts: expected a list"),
        ({"parts": [{}, {"count": "1"}]}, "parts.1.count: expected an integer, got '1'"),
        ({"parts": [{"count": True}]}, "parts.0.count: expected an integer, got True"),
        ({"pair": [1, 2, 3]}, "pair: expected 2 items, got 3"),
        ({"ramp": [[1, 2], [3]]}, "ramp.1: expected 2 items, got 1"),
        ({"by_name": []}, "by_name: expected an object"),
        ({"by_name": {"a": {"counts": 1}}}, "by_name.a: Part has no field 'counts'"),
        ({"mode": "fst"}, "mode: 'fst' is not valid; did you mean 'fast'?"),
        ({"limit": "none"}, "limit: expected an integer, got 'none'"),
        ({"rate": None}, "rate: expected a number, got None"),
        ({"rate": math.nan}, "rate: expected a number, got nan"),
        ({"rate": math.inf}, "rate: expected a number, got inf"),
        ({"deep": 1}, "deep: expected true or false, got 1"),
        ({"name": 1}, "name: expected a text, got 1"),
    ],
)
def test_bad_json(change: dict[str, Any], said: str) -> None:
    data = {"shape": {"use": "circle"}, **change}
    assert said in error_of(lambda: from_json(Whole, data))


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "field", "value"),
    [
        ("rate=6e-4", "rate", 6e-4),
        ("rate=2", "rate", 2.0),
        ("limit=7", "limit", 7),
        ("limit=none", "limit", None),
        ("mode=3", "mode", 3),
        ("name=a=b", "name", "a=b"),
        ("name=", "name", ""),
        ("name=none", "name", "none"),
        ("length=200", "length", "200"),
        ("deep=true", "deep", True),
        ("pair.1=3", "pair", (1, 3.0)),
        ("ramp=[[5, 2]]", "ramp", ((5, 2),)),
        ("shape=circle", "shape", Circle()),
        ('shape={"use": "circle", "radius": 2}', "shape", Circle(2.0)),
        ("shape.inside=none", "shape", Box(2, 3)),
        ("shape.inside.radius=4", "shape", Box(2, 3, Circle(4.0))),
        ("shape=box", "shape", WHOLE.shape),
        ("parts.1.count=9", "parts", (Part(), Part(9, "two"))),
        ("parts.*.count=9", "parts", (Part(9), Part(9, "two"))),
        ("parts=[]", "parts", ()),
        ("by_name.left.count=9", "by_name", {"left": Part(9), "right": Part(4)}),
    ],
)
def test_an_override(assignment: str, field: str, value: object) -> None:
    changed = override(WHOLE, [assignment])
    assert getattr(changed, field) == value
    assert type(getattr(changed, field)) is type(value)
    assert dataclasses.replace(changed, **{field: getattr(WHOLE, field)}) == WHOLE


def test_overrides_apply_in_order() -> None:
    changed = override(WHOLE, ["shape=circle", "shape.radius=2", "shape.radius=3"])
    assert changed.shape == Circle(3.0)
    assert WHOLE.shape == Box(2, 3, Circle(0.5))
    assert override(WHOLE, []) is WHOLE


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("rate", "'rate' is not an override; write field.name=value"),
        ("=1", "is not an override"),
        (".rate=1", "Whole has no field ''"),
        ("rat=1", "rat: Whole has no field 'rat'; did you mean 'rate'?"),
        ("rate.x=1", "rate.x: nothing lies under 0.5"),
        ("rate=fast", "rate: expected a number, got 'fast'"),
        ("rate=inf", "rate: expected a number, got 'inf'"),
        ("rate=none", "rate: expected a number, got 'none'"),
        ("limit=1.0", "limit: expected an integer, got '1.0'"),
        ("deep=yes", "deep: expected true or false, got 'yes'"),
        ("mode=quick", "mode: 'quick' is not valid"),
        ("parts.2.count=1", "parts.2.count: '2' is not an index below 2, nor *"),
        ("parts.-1.count=1", "'-1' is not an index below 2"),
        ("parts.*.cnt=1", "parts.*.cnt: Part has no field 'cnt'"),
        ("parts.0=1", "parts.0: expected an object of Part, got 1"),
        ("pair=1,2", "pair: expected"),
        ("by_name.middle.count=1", "by_name.middle.count: there is no 'middle'"),
        ("shape.radius=1", "shape.radius: Box has no field 'radius'"),
        ("shape.inside.radius=-1", "radius=-1.0 must not be negative"),
        ("shape=ball", "shape: unknown shape 'ball'"),
        ('shape={"use": "box"}', "shape: Box needs width, height; write"),
        ('shape={"use": "box"', "shape: expected"),
        ("limit.x=1", "limit.x: nothing lies under None"),
    ],
)
def test_a_bad_override(assignment: str, said: str) -> None:
    assert said in error_of(lambda: override(WHOLE, [assignment]))


def test_a_variant_that_needs_fields_says_how_to_give_them() -> None:
    said = error_of(lambda: override(Whole(Circle()), ["shape=box"]))
    assert said == 'shape: Box needs width, height; write {"use": "box", "width": ...}'
    given = 'shape={"use": "box", "width": 1, "height": 2}'
    assert override(Whole(Circle()), [given]).shape == Box(1, 2)


@given(st.text())
def test_no_assignment_is_anything_but_a_value_error(text: str) -> None:
    try:
        override(WHOLE, [text])
    except ValueError as error:
        assert str(error)


@given(st.sampled_from(sorted(flatten(to_json(WHOLE)))), st.text())
def test_no_value_is_anything_but_a_value_error(path: str, text: str) -> None:
    try:
        changed = override(WHOLE, [f"{path}={text}"])
    except ValueError as error:
        assert path.split(".")[0] in str(error)
    else:
        assert from_json(Whole, to_json(changed)) == changed


# --- a user's own files ---------------------------------------------------------------------------

OWN = """
import dataclasses
from {module} import Shape

@dataclasses.dataclass(frozen=True)
class Star(Shape):
    points: int = 5

    def area(self):
        return 1.0
"""


def test_a_users_file(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN.format(module=__name__))
    whole = override(WHOLE, [f"shape={path}:Star", "shape.points=7"])
    star = resolve(f"{path}:Star")
    assert whole.shape == star(7) and user_file(star) == path and user_file(Circle) is None
    data = to_json(whole)
    assert data["shape"] == {"use": f"{path}:Star", "points": 7}
    assert from_json(Whole, json.loads(json.dumps(data))) == whole
    moved = map_user_files(data, lambda file: f"kept/{Path(file).name}")
    assert moved["shape"]["use"] == "kept/own.py:Star"
    assert differences(data, moved) == [
        f"shape.use: '{path}:Star' -> 'kept/own.py:Star'",
    ]


def test_a_changed_file_is_another_class(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN.format(module=__name__))
    first = resolve(f"{path}:Star")
    assert resolve(f"{path}:Star") is first
    path.write_text(path.read_text().replace("= 5", "= 6"))
    assert resolve(f"{path}:Star")().points == 6 and first().points == 5


def test_objects_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("Sun = 1")
    assert "did you mean 'Sun'?" in error_of(lambda: resolve(f"{path}:Son"))
    assert "there is no file" in error_of(lambda: resolve(f"{tmp_path}/other.py:Sun"))
    assert "there is no module" in error_of(lambda: resolve("no_such_module:Sun"))
    assert "names no object" in error_of(lambda: resolve("own.py"))
    assert "neither a module" in error_of(lambda: resolve("../own:Sun"))


def test_a_file_whose_code_fails_can_be_mended(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("Sun = 1 / 0")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            resolve(f"{path}:Sun")
    path.write_text("Sun = 1")
    assert resolve(f"{path}:Sun") == 1


def test_a_kept_file_is_known_by_its_hash(tmp_path: Path) -> None:
    kept = tmp_path / kept_name("my-own", b"x = 1")
    assert kept.name.startswith("my-own-") and kept.suffix == ".py"
    assert "is not as the run kept it" in error_of(lambda: kept_file(kept))
    kept.write_bytes(b"x = 1")
    assert kept_file(kept) == str(kept)
    kept.write_bytes(b"x = 2")
    assert "is not as the run kept it" in error_of(lambda: kept_file(kept))


# --- the recipes of the table ---------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TABLE))
def test_recipes_go_through_json(name: str, tmp_path: Path) -> None:
    run = recipe(name)
    data = json.loads(json.dumps(to_folder_json(run, str)))
    assert from_folder_json(data, tmp_path) == run
    assert override(run, ["stop_at=3", "threads=1", "log_every=7"]) != run
    changed = override(run, ["stop_at=3", "threads=1", "data.cache=elsewhere", "device=cpu"])
    assert fingerprint(changed) == fingerprint(run)
    assert fingerprint(override(run, ["seed=1"])) != fingerprint(run)


def test_the_fields_that_identify_a_run() -> None:
    """The issue names them: the schedule's horizon among those that do, `stop_at` not."""
    known = identity(recipe("quickstart")).keys()
    assert {"steps", "seed", "precision", "batch", "sequence_length", "vocab", "optim"} <= known
    runtime_fields = {field.name for field in dataclasses.fields(Run)} - known
    assert runtime_fields >= {"stop_at", "log_every", "checkpoint_every", "threads", "micro_batch"}


def test_nearest() -> None:
    assert nearest("qga", ["gqa", "mla"]) == "; did you mean 'gqa'? (valid: gqa, mla)"
    assert nearest("zzz", ["gqa"]) == " (valid: gqa)"
    assert nearest("zzz", map(str, range(30))) == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [("def run(:\n", "invalid syntax"), ("import no_such_module_here\n", "no_such_module_here")],
)
def test_a_file_that_cannot_be_loaded_is_said_in_one_line(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "idea.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        resolve(f"{path}:run")
    assert "\n" not in str(caught.value) and "idea.py" in str(caught.value)
