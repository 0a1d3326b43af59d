"""A local HF folder: its config, its tensors unread, the files that go along; damage by name."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from moebius.checkpoint.stored import Stored, once, stored_in

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
# What is kept beside the weights, by pattern.
SIDE_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
    "tiktoken.model",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@final
@dataclass(frozen=True)
class HFFolder:
    """A folder whose files are all there and whole as far as their headers say."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]

    def side_files(self) -> list[Path]:
        """The config, tokenizer, templates and generation settings that are there."""
        return side_files(self.path)


def side_files(path: Path) -> list[Path]:
    """The files of a HF folder that go along with its weights. Code never does."""
    found = {file for pattern in SIDE_FILES for file in path.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.suffix != ".py")


def open_folder(path: Path) -> HFFolder:
    """Read what a folder holds but for the numbers; ValueError naming what is missing or odd."""
    if not path.is_dir():
        raise ValueError(
            f"there is no folder {path}; download the model first, then name its folder"
        )
    config = read_object(path / CONFIG, strict=True)
    return HFFolder(path, config, _tensors(path))


def read_object(path: Path, *, strict: bool = False) -> dict[str, Any]:
    """The JSON object in a file; `strict` takes no key twice."""
    try:
        data = json.loads(path.read_bytes(), object_pairs_hook=once if strict else None)
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object")
    return data


def _tensors(path: Path) -> dict[str, Stored]:
    if not (path / INDEX).is_file():
        return stored_in(_single(path))
    placed = read_object(path / INDEX, strict=True).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(x, str) for x in placed.values()):
        raise ValueError(f"{path / INDEX} is damaged: it has no weight_map of texts")
    shards = sorted(set(placed.values()))
    for shard in shards:
        if Path(shard).name != shard or not (path / shard).is_file():
            raise ValueError(f"{path} lacks the file {shard!r} that {INDEX} names; fetch it again")
    if (path / SINGLE).is_file() and SINGLE not in shards:
        raise ValueError(f"{path} holds {SINGLE} and {INDEX}, which does not name it; remove one")
    tensors: dict[str, Stored] = {}
    for shard in shards:
        for name, tensor in stored_in(path / shard).items():
            if placed.get(name) != shard:
                where = f"puts it in {placed[name]}" if name in placed else "does not name it"
                raise ValueError(f"{path / shard} holds {name}, but {INDEX} {where}")
            tensors[name] = tensor
    missing = sorted(placed.keys() - tensors.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(f"{placed[missing[0]]} lacks {missing[0]}{more}, which {INDEX} puts there")
    return tensors


def _single(path: Path) -> Path:
    if (path / SINGLE).is_file():
        return path / SINGLE
    others = sorted(path.glob("*.safetensors"))
    if (path / SINGLE).is_symlink() or (path / SINGLE).exists():
        raise ValueError(f"{path / SINGLE} is no file, or a link to none; fetch it again")
    if others:
        raise ValueError(
            f"{path} holds {others[0].name}, but neither {SINGLE} nor {INDEX}; fetch the index, or "
            "merge the adapter into its model first"
        )
    pickles = sorted(_pickles(path))
    if pickles:
        raise ValueError(
            f"{path} has its weights as pickle ({pickles[0].name}), which can run any code when it "
            "is read; take the safetensors version of the model"
        )
    raise ValueError(f"{path} holds no weights ({SINGLE}, or shards with {INDEX})")


def _pickles(path: Path) -> Iterator[Path]:
    for pattern in _PICKLES:
        yield from path.glob(pattern)
