"""What a HF folder says of its tokens: which one opens a document, and which end one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebius.checkpoint.hf.folder import CONFIG, read_object

TOKENIZER = "tokenizer.json"


def document_token(folder: Path) -> str | None:
    """The token that stands before a document: the one that the tokenizer adds, else the one that
    ends a text. None where the files name neither.
    """
    read = {name: _optional(folder / name) for name in (TOKENIZER, "tokenizer_config.json", CONFIG)}
    settings = {**_optional(folder / "special_tokens_map.json"), **read["tokenizer_config.json"]}
    added = _prepended(read[TOKENIZER].get("post_processor"))
    if added is None and settings.get("add_bos_token"):
        added = _content(settings.get("bos_token"))
    ends = _content(settings.get("eos_token"))
    return added or ends or _by_id(read[TOKENIZER], read[CONFIG].get("eos_token_id"))


def end_tokens(folder: Path) -> list[int]:
    """The ids at which generation stops."""
    for name in ("generation_config.json", CONFIG):
        found = _optional(folder / name).get("eos_token_id")
        if found is not None:
            tokens = found if isinstance(found, list) else [found]
            if not all(type(token) is int for token in tokens):
                raise ValueError(
                    f"{folder / name}: eos_token_id must be a whole number or a list of them, not "
                    f"{found!r}"
                )
            return tokens
    return []


def token_id(tokenizer: Mapping[str, Any], token: str) -> int | None:
    """The id of a token of a `tokenizer.json`."""
    plain = tokenizer.get("model", {}).get("vocab", {}).get(token)
    return next((number for text, number in _added(tokenizer) if text == token), plain)


def with_document_first(tokenizer: Mapping[str, Any], token: str) -> dict[str, Any]:
    """A `tokenizer.json` whose encoder puts a token before each text, as our training does."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    special = {"id": token, "ids": [token_id(tokenizer, token)], "tokens": [token]}
    template = {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, b],
        "special_tokens": {token: special},
    }
    return {**tokenizer, "post_processor": template}


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """A token that is written as text, or as an object with its content."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _prepended(processor: Any) -> str | None:
    """The special token that a post-processor puts first."""
    if not isinstance(processor, Mapping):
        return None
    inners = processor.get("processors")
    for inner in inners if isinstance(inners, list) else []:
        found = _prepended(inner)
        if found is not None:
            return found
    single = processor.get("single")
    first = single[0] if isinstance(single, list) and single else None
    special = first.get("SpecialToken") if isinstance(first, Mapping) else None
    found = special.get("id") if isinstance(special, Mapping) else None
    return found if isinstance(found, str) else None


def _by_id(tokenizer: Mapping[str, Any], eos: Any) -> str | None:
    wanted = eos[0] if isinstance(eos, list) and eos else eos
    return next((text for text, number in _added(tokenizer) if number == wanted), None)


def _added(tokenizer: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Content and id of the tokens that were added to a vocabulary; none from a damaged list."""
    added = tokenizer.get("added_tokens")
    items = [item for item in added if isinstance(item, dict)] if isinstance(added, list) else []
    return [(item["content"], item["id"]) for item in items if {"content", "id"} <= item.keys()]
