"""Complete runs: functions that return a frozen `Run`, by name in `TABLE`.

A user's own recipe is such a function in any file: `moebius train my_idea.py:run`.
"""

import inspect
import types
from collections.abc import Mapping

from moebius.config import nearest, resolve
from moebius.train.run import Run

TABLE: Mapping[str, str] = {
    "quickstart": "moebius.recipes.quickstart:quickstart",
}


def recipe(name: str) -> Run:
    """The run of a recipe: a name of the table, `module:function` or `file.py:function`."""
    if name not in TABLE and ":" not in name:
        raise ValueError(
            f"unknown recipe {name!r}{nearest(name, TABLE)}; or write file.py:function"
        )
    function = resolve(TABLE.get(name, name))
    if not isinstance(function, types.FunctionType) or _needs_arguments(function):
        raise ValueError(f"{name} is no recipe: a function without arguments that returns a Run")
    run = function()
    if not isinstance(run, Run):
        raise ValueError(f"{name} returned {type(run).__name__}, not a moebius.train.run.Run")
    return run


def _needs_arguments(function: types.FunctionType) -> bool:
    given = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return any(p.default is p.empty and p.kind not in given for p in parameters)


def listing() -> list[dict[str, str]]:
    """Every recipe of the table with the first line of its docstring."""
    named = ((name, resolve(spec).__doc__ or "") for name, spec in sorted(TABLE.items()))
    return [{"name": name, "what": doc.strip().splitlines()[0]} for name, doc in named]
