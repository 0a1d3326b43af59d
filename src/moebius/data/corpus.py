"""Reading a corpus in order: its documents up to `max_bytes`, its split, its groups, a sample.

What is left aside is counted in the tally that is handed in. Nothing here depends on how many
workers read, nor on what was read before.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moebius.data.config import DataConfig
from moebius.data.documents import Corpus, Document, File, Split, Tally, digest, find_split
from moebius.data.readers import read

GROUP_BYTES = 16 << 20
SAMPLE_FILE_BYTES = 4 << 20


@dataclass
class Budget:
    """The bytes a source may still give; None is no limit."""

    left: int | None
    spent: bool = False

    def take(self, num_bytes: int) -> bool:
        if self.left is not None:
            self.spent = self.spent or num_bytes > self.left
            self.left -= 0 if self.spent else num_bytes
        return not self.spent


def documents_of(
    files: tuple[File, ...], corpus: Corpus, config: DataConfig, budget: Budget, tally: Tally
) -> Iterator[Document]:
    """The documents of some files, until the budget is spent; what is left aside is counted."""
    for file in files:
        if budget.spent:
            tally.skip("file beyond data.max_bytes", file.size)
            continue
        for document in read(file, tally, config.max_document_bytes, corpus.piece):
            size = len(document.text.encode())
            if not budget.take(size):
                tally.skip("document at which data.max_bytes was reached", size)
                break
            yield document


def split_of(corpus: Corpus, config: DataConfig) -> Split:
    """Who is held out; reads until both sides have a document."""
    budget = Budget(config.max_bytes)
    documents = documents_of(corpus.files, corpus, config, budget, Tally())
    cap = "" if config.max_bytes is None else f" within data.max_bytes={config.max_bytes}"
    return find_split((document.origin for document in documents), f"{corpus.name!r}{cap}")


def groups_of(files: tuple[File, ...]) -> list[tuple[File, ...]]:
    """Consecutive files, up to GROUP_BYTES together; a larger file is a group of its own."""
    groups: list[list[File]] = []
    size = 0
    for file in files:
        if not groups or size + file.size > GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.size
    return [tuple(group) for group in groups]


def sample_of(corpus: Corpus, split: Split, config: DataConfig, share: int) -> Iterator[str]:
    """Training text for the tokenizer: all of it, or files in an order by hash, each in part."""
    files, each = corpus.files, share
    budget = Budget(config.max_bytes)
    if config.max_bytes is None and sum(file.size for file in files) > share:
        files = tuple(sorted(files, key=lambda file: digest(file.key)))
        each = max(SAMPLE_FILE_BYTES, share // len(files))
    for file in files:
        taken = 0
        for document in documents_of((file,), corpus, config, budget, Tally()):
            if not split.held_out(document.origin):
                yield document.text
            size = len(document.text.encode())
            taken, share = taken + size, share - size
            if taken >= each or share <= 0:
                break
        if share <= 0:
            return
