"""Complete runs: functions that return a frozen `Run`, by name in `TABLE`; curations beside them.

A user's own recipe is such a function in any file: `moebius train my_idea.py:run`,
`moebius curate my_corpus.py:books`.
"""

import inspect
import types
from collections.abc import Mapping
from typing import TypeVar

from moebius.config import nearest, resolve
from moebius.curate.config import Curation
from moebius.train.run import Run

TABLE: Mapping[str, str] = {
    "quickstart": "moebius.recipes.quickstart:quickstart",
    "pico": "moebius.recipes.pico:pico",
    "bench-longcat": "moebius.recipes.bench:bench_longcat",
    "bench-qwen3moe": "moebius.recipes.bench:bench_qwen3moe",
    "bench-llama": "moebius.recipes.bench:bench_llama",
    "longcat-flash": "moebius.recipes.longcat:longcat_flash",
    "longcat-nano": "moebius.recipes.longcat:longcat_nano",
    "longcat-small": "moebius.recipes.longcat:longcat_small",
    "hunyuan-large": "moebius.recipes.hunyuan:hunyuan_large",
    "hunyuan-nano": "moebius.recipes.hunyuan:hunyuan_nano",
    "hunyuan-small": "moebius.recipes.hunyuan:hunyuan_small",
    "llama3-8b": "moebius.recipes.llama:llama3_8b",
    "llama3-70b": "moebius.recipes.llama:llama3_70b",
    "llama3-405b": "moebius.recipes.llama:llama3_405b",
    "llama3-nano": "moebius.recipes.llama:llama3_nano",
    "llama3-small": "moebius.recipes.llama:llama3_small",
    "deepseek-v3": "moebius.recipes.deepseek:deepseek_v3",
    "moonlight-16b-a3b": "moebius.recipes.deepseek:moonlight",
    "deepseek-nano": "moebius.recipes.deepseek:deepseek_nano",
    "deepseek-small": "moebius.recipes.deepseek:deepseek_small",
    "qwen3-30b-a3b": "moebius.recipes.qwen:qwen3_30b_a3b",
    "qwen3-nano": "moebius.recipes.qwen:qwen3_nano",
    "qwen3-small": "moebius.recipes.qwen:qwen3_small",
    "olmoe-1b-7b": "moebius.recipes.olmoe:olmoe_1b_7b",
    "olmoe-nano": "moebius.recipes.olmoe:olmoe_nano",
    "olmoe-small": "moebius.recipes.olmoe:olmoe_small",
    "kimi-linear-48b-a3b": "moebius.recipes.kimi:kimi_linear",
    "kimi-linear-nano": "moebius.recipes.kimi:kimi_linear_nano",
    "kimi-linear-small": "moebius.recipes.kimi:kimi_linear_small",
    "nsa-nano": "moebius.recipes.nsa:nsa_nano",
    "nsa-small": "moebius.recipes.nsa:nsa_small",
}


CURATIONS: Mapping[str, str] = {
    "web": "moebius.recipes.curation:web",
    "crawl": "moebius.recipes.curation:crawl",
    "library": "moebius.recipes.curation:library",
    "dirtied": "moebius.recipes.curation:dirtied",
}

R = TypeVar("R", Run, Curation)


def recipe(name: str) -> Run:
    """The run of a recipe: a name of the table, `module:function` or `file.py:function`."""
    return _recipe(name, TABLE, Run, "a moebius.train.run.Run")


def curation(name: str) -> Curation:
    """The curation of a recipe, named in the same ways."""
    return _recipe(name, CURATIONS, Curation, "a moebius.curate.config.Curation")


def _recipe(name: str, table: Mapping[str, str], kind: type[R], what: str) -> R:
    if name not in table and ":" not in name:
        raise ValueError(
            f"unknown recipe {name!r}{nearest(name, table)}; or write file.py:function"
        )
    function = resolve(table.get(name, name))
    if not isinstance(function, types.FunctionType) or _needs_arguments(function):
        raise ValueError(f"{name} is no recipe: a function without arguments that returns {what}")
    made = function()
    if not isinstance(made, kind):
        raise ValueError(f"{name} returned {type(made).__name__}, not {what}")
    return made


def _needs_arguments(function: types.FunctionType) -> bool:
    given = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return any(p.default is p.empty and p.kind not in given for p in parameters)


def listing() -> list[dict[str, str]]:
    """Every recipe of the tables with the verb that takes it and its docstring's first line."""
    tables = {"train": TABLE, "curate": CURATIONS}
    named = [(n, verb, spec) for verb, table in tables.items() for n, spec in sorted(table.items())]
    return [
        {"name": name, "verb": verb, "what": (resolve(spec).__doc__ or "").strip().splitlines()[0]}
        for name, verb, spec in named
    ]
