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
            return list(found) if isinstance(found, list) else [found]
    return []


def token_id(tokenizer: Mapping[str, Any], token: str) -> int | None:
    """The id of a token of a `tokenizer.json`."""
    added = tokenizer.get("added_tokens") or []
    plain = tokenizer.get("model", {}).get("vocab", {}).get(token)
    return next((item["id"] for item in added if item["content"] == token), plain)


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
    for inner in processor.get("processors") or []:
        found = _prepended(inner)
        if found is not None:
            return found
    single = processor.get("single")
    first = single[0] if isinstance(single, list) and single else {}
    return first.get("SpecialToken", {}).get("id") if isinstance(first, Mapping) else None


def _by_id(tokenizer: Mapping[str, Any], eos: Any) -> str | None:
    wanted = eos[0] if isinstance(eos, list) and eos else eos
    added = tokenizer.get("added_tokens") or []
    return next((item["content"] for item in added if item["id"] == wanted), None)
