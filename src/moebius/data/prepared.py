"""What `prepare` leaves: a tokenizer, and the shards of each source's train and held-out side."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebius.data.config import DataConfig
from moebius.data.packing import TokenSource
from moebius.data.shards import SIDES, Shards
from moebius.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """A corpus ready to train on. `digest` names its exact tokens, `config` order and mixture."""

    config: DataConfig
    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: tuple[TokenSource, ...]
    heldout: tuple[TokenSource, ...]
    digest: str

    def side(self, split: str) -> tuple[TokenSource, ...]:
        """The sources of `train` or of `heldout`."""
        if split not in SIDES:
            raise ValueError(f"there is no split {split!r}; it is train or heldout")
        return self.train if split == "train" else self.heldout

    def train_documents(self) -> Iterator[tuple[str, bytes]]:
        """Key and text (its original bytes) of each training document, in reading order."""
        return self._documents("train")

    def heldout_documents(self) -> Iterator[tuple[str, bytes]]:
        """Key and text (its original bytes) of each held-out document, in reading order."""
        return self._documents("heldout")

    def _documents(self, split: str) -> Iterator[tuple[str, bytes]]:
        token_bytes = self.tokenizer.token_bytes
        for source in self.side(split):
            for i in source.shards:
                ids = source.shards.tokens(i).tolist()
                yield source.shards.key(i), b"".join(map(token_bytes, ids))

    def describe(self) -> list[str]:
        """A line a source: what was read, what is held out, what was skipped and why."""
        lines: list[str] = []
        for entry in self.manifest["sources"]:
            train, heldout = entry["train"], entry["heldout"]
            skipped = [f"{count} {why}" for why, (count, _) in entry["skipped"].items()]
            lines.append(
                f"{entry['name']}: {train['documents']:,} documents, "
                f"{train['bytes'] / 1e6:.2f} MB, {train['tokens'] / 1e6:.2f}M tokens; "
                f"held out {heldout['documents']:,}, "
                f"{heldout['bytes'] / 1e6:.2f} MB; skipped {', '.join(skipped) or 'nothing'}"
            )
        return lines

    def bytes_per_token(self, split: str) -> float:
        """Text bytes for each target, `<|document|>` targets counted: bits per byte are the mean
        loss in bits, divided by this."""
        sources = self.side(split)
        num_bytes = sum(source.shards.num_bytes for source in sources)
        return num_bytes / sum(source.num_tokens for source in sources)


def load_tokenizer(config: DataConfig, path: Path) -> Tokenizer:
    """The tokenizer in a file, its documents opened by the token that `config` names."""
    return Tokenizer.load(path, config.document)


def open_prepared(config: DataConfig, folder: Path, manifest: dict[str, Any]) -> Prepared:
    """The corpus in `folder`, whose manifest is `manifest`."""
    tokenizer = load_tokenizer(config, folder / "tokenizer.json")
    sides: dict[str, tuple[TokenSource, ...]] = {}
    for side in SIDES:
        sides[side] = tuple(
            TokenSource(
                Shards(folder / f"source-{i}", side, entry["parts"], manifest["dtype"]),
                tokenizer.document,
                config.seed,
                i,
            )
            for i, entry in enumerate(manifest["sources"])
        )
    digest = manifest["digest"]
    return Prepared(config, folder, manifest, tokenizer, sides["train"], sides["heldout"], digest)


def digest_of(tokenizer: Tokenizer, sources: list[dict[str, Any]]) -> str:
    """The sha256 over the tokenizer and the hashes of all shards, in order."""
    hashes = [[[part[side]["sha256"] for side in SIDES] for part in s["parts"]] for s in sources]
    text = json.dumps([tokenizer.to_json(), hashes])
    return hashlib.sha256(text.encode()).hexdigest()
