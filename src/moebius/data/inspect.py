"""What a prepared corpus holds, as plain data and as a page for the terminal.

Sizes by source and side, the mixture that was asked for, everything that was left aside with its
reason, and samples decoded from the tokens that training really sees.
"""

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moebius.data.loader import Loader
from moebius.data.prepared import Prepared
from moebius.data.shards import SIDES

SAMPLE_TOKENS = 96
NUM_SAMPLES = 3


def inspect(prepared: Prepared, loader: Loader | None = None) -> dict[str, Any]:
    """Sizes, mixture, what was skipped, samples; with a loader, those of its first batch."""
    manifest = prepared.manifest
    sources = prepared.config.mixture()
    weight = sum(source.weight for source in sources)
    return {
        "folder": str(prepared.folder),
        "digest": prepared.digest,
        "tokenizer": manifest["tokenizer"],
        "bytes_per_token": {side: prepared.bytes_per_token(side) for side in SIDES},
        "sources": [
            {
                "path": source.path,
                "files": entry["files"],
                **{side: entry[side] for side in SIDES},
                "share": source.weight / weight,
                "max_epochs": source.max_epochs,
                "split": entry["split"],
                "skipped": {
                    reason: {"count": count, "bytes": num_bytes}
                    for reason, (count, num_bytes) in entry["skipped"].items()
                },
            }
            for source, entry in zip(sources, manifest["sources"], strict=True)
        ],
        "samples": _documents(prepared) if loader is None else _batch(prepared, loader),
    }


def _documents(prepared: Prepared) -> list[dict[str, str]]:
    samples = []
    for source in prepared.train:
        for i in source.epoch(0)[0][:NUM_SAMPLES].tolist():
            ids = source.shards.tokens(i, 0, SAMPLE_TOKENS).tolist()
            samples.append({"key": source.shards.key(i), "text": prepared.tokenizer.decode(ids)})
    return samples


def _batch(prepared: Prepared, loader: Loader) -> list[dict[str, str]]:
    rows = loader.batch(0).split(1)[:NUM_SAMPLES]
    return [
        {
            "key": ", ".join(row.keys()),
            "text": prepared.tokenizer.decode(row.tokens_BT[0, :SAMPLE_TOKENS].tolist()),
        }
        for row in rows
    ]


def render(facts: dict[str, Any]) -> RenderableType:
    """The facts of `inspect` as tables and samples."""
    sizes = Table(box=box.SIMPLE, title="Corpus", title_justify="left")
    for name in ("source", "share", "epochs up to", "side", "documents", "bytes", "tokens"):
        sizes.add_column(name, justify="left" if name in ("source", "side") else "right")
    for source in facts["sources"]:
        limit = source["max_epochs"]
        head = [source["path"], f"{source['share']:.1%}", "any" if limit is None else f"{limit:g}"]
        for side in SIDES:
            counts = (f"{source[side][name]:,}" for name in ("documents", "bytes", "tokens"))
            sizes.add_row(*map(Text, [*head, side, *counts]))
            head = ["", "", ""]
    aside = Table(box=box.SIMPLE, title="Left aside or split", title_justify="left")
    for name in ("source", "reason", "count", "bytes"):
        aside.add_column(name, justify="right" if name in ("count", "bytes") else "left")
    for source in facts["sources"]:
        for reason, entry in source["skipped"].items():
            cells = [source["path"], reason, f"{entry['count']:,}", f"{entry['bytes']:,}"]
            aside.add_row(*map(Text, cells))
        if source["split"]:
            cells = [source["path"], "large document split, all of it kept"]
            aside.add_row(*map(Text, [*cells, f"{source['split']:,}", ""]))
    parts: list[RenderableType] = [sizes]
    parts += [aside] if aside.row_count else [Text("Nothing was left aside.")]
    tokenizer, density = facts["tokenizer"], facts["bytes_per_token"]
    parts.append(
        Text(
            f"{tokenizer['vocab']:,} tokens, trained on {tokenizer['trained_bytes']:,} bytes; "
            f"{density['train']:.3f} bytes a token in training, {density['heldout']:.3f} held out"
        )
    )
    for sample in facts["samples"]:
        parts.append(Text(f"\n{sample['key']}", style="bold"))
        parts.append(Padding(Text(sample["text"]), (0, 0, 0, 2)))
    return Group(*parts)
