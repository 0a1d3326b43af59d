"""Documents -> tokenizer and token shards, in parallel, resumable, counted.

All is checked before the first byte is written. The tokenizer is trained on at most 64 MiB of the
training side, unless the configuration names one; then the groups of files are tokenised. After a
kill, finished parts stay and the rest is done. The folder's name is the fingerprint of the
configuration, the file listing (path, size, time), the vocabulary and the named tokenizer's bytes.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moebius.data import hub
from moebius.data.config import DataConfig
from moebius.data.corpus import sample_of, split_of
from moebius.data.documents import Corpus, Split, open_corpus
from moebius.data.prepared import Prepared, digest_of, load_tokenizer, open_prepared
from moebius.data.shards import ASIDE, part_is_whole, write_aside
from moebius.data.tokenizer import MIN_VOCAB, Tokenizer, train_tokenizer
from moebius.data.work import Meter, Progress, Work

VERSION = 1
SAMPLE_BYTES = 64 << 20


def prepare(config: DataConfig, vocab: int, *, progress: Progress | None = None) -> Prepared:
    """Tokenise a corpus, or find it done. `progress` gets (stage, bytes done, bytes in all).

    Raises ValueError, before writing anything, where a source has nothing to read, the cache
    cannot be written, or a tokenizer that the configuration names has more tokens than `vocab`.
    """
    named = None if config.tokenizer is None else named_tokenizer(config, vocab)
    if named is None and vocab < MIN_VOCAB:
        raise ValueError(
            f"vocab must be at least {MIN_VOCAB} (256 bytes and one more), not {vocab}"
        )
    corpora = [open_corpus(source.path) for source in config.mixture()]
    fingerprint = _fingerprint(config, corpora, vocab, named)
    folder = Path(config.cache).expanduser() / fingerprint[:16]
    manifest = _finished(folder)
    if manifest is None:
        for corpus in corpora:
            hub.check(corpus) if corpus.hub else split_of(corpus, config)
        with _folder(folder):
            manifest = _finished(folder) or _Job(config, vocab, folder, progress, named).run(
                corpora, fingerprint
            )
    return open_prepared(config, folder, manifest)


def named_tokenizer(config: DataConfig, vocab: int) -> bytes:
    """The file of the tokenizer that `config` names; ValueError where a model of `vocab` tokens
    cannot read all of its tokens."""
    path = Path(str(config.tokenizer)).expanduser()
    size = load_tokenizer(config, path).vocab
    if size > vocab:
        raise ValueError(
            f"data.tokenizer: {path} has {size} tokens and the model's vocab is {vocab}; "
            f"set vocab to at least {size}"
        )
    return path.read_bytes()


def _fingerprint(config: DataConfig, corpora: list[Corpus], vocab: int, named: bytes | None) -> str:
    limits = [config.max_bytes, config.max_document_bytes, vocab]
    own = [] if named is None else [hashlib.sha256(named).hexdigest(), config.document]
    text = json.dumps([VERSION, limits, [corpus.identity() for corpus in corpora], *own])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _finished(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared corpus whose files are all there, else None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = (folder / "tokenizer.json").is_file() and all(
        part_is_whole(folder / f"source-{i}", part)
        for i, source in enumerate(manifest["sources"])
        for part in source["parts"]
    )
    return manifest if whole else None


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock; what cannot be written is a ValueError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for aside in folder.rglob(f"*{ASIDE}"):
                aside.unlink()
            yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"data.cache: cannot write to {folder} ({reason})") from error


@dataclass(frozen=True)
class _Job:
    """One preparation: its configuration and its folder."""

    config: DataConfig
    vocab: int
    folder: Path
    progress: Progress | None
    # The file of a tokenizer to use as it is.
    named: bytes | None

    def run(self, listed: list[Corpus], fingerprint: str) -> dict[str, Any]:
        """Do what is not done yet, and write the manifest."""
        corpora = [self._local(i, corpus) for i, corpus in enumerate(listed)]
        try:
            splits = [split_of(corpus, self.config) for corpus in corpora]
        except ValueError:
            # Only a hub dataset can fail here: the others were looked through before.
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        tokenizer, sampled = self._tokenizer(corpora, splits)
        dtype = np.dtype(np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32)
        meter = Meter(self.progress, "tokens", sum(f.size for c in corpora for f in c.files))
        work = Work(self.config, self.folder, tokenizer, dtype, meter)
        sources = work.sources(corpora, splits)
        manifest = {
            "version": VERSION,
            "fingerprint": fingerprint,
            "dtype": dtype.name,
            "tokenizer": {"vocab": tokenizer.vocab, "asked": self.vocab, "trained_bytes": sampled},
            "digest": digest_of(tokenizer, sources),
            "sources": sources,
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=True)
        write_aside(self.folder / "manifest.json", text.encode())
        for i in range(len(corpora)):
            shutil.rmtree(self._raw(i), ignore_errors=True)
        return manifest

    def _raw(self, i: int) -> Path:
        return self.folder / f"source-{i}" / "raw"

    def _local(self, i: int, corpus: Corpus) -> Corpus:
        """A hub dataset is streamed into local rows first; other corpora are local already."""
        if not corpus.hub:
            return corpus
        return hub.fetch(corpus, self._raw(i), self.config.max_bytes, self.progress)

    def _tokenizer(self, corpora: list[Corpus], splits: list[Split]) -> tuple[Tokenizer, int]:
        """Train the tokenizer, or load it: one that is named, or what a killed preparation left."""
        path, note = self.folder / "tokenizer.json", self.folder / "tokenizer.sample.json"
        if self.named is not None:
            write_aside(path, self.named)
            return load_tokenizer(self.config, path), 0
        if path.exists() and note.exists():
            return load_tokenizer(self.config, path), int(json.loads(note.read_text()))
        share = SAMPLE_BYTES // len(corpora)
        total = sum(min(share, sum(file.size for file in corpus.files)) for corpus in corpora)
        meter = Meter(self.progress, "tokenizer", total)
        sampled = 0

        def texts() -> Iterator[str]:
            nonlocal sampled
            pairs = zip(corpora, splits, strict=True)
            samples = [sample_of(corpus, split, self.config, share) for corpus, split in pairs]
            for text in itertools.chain.from_iterable(samples):
                size = len(text.encode())
                sampled += size
                meter.add(size)
                yield text

        tokenizer = train_tokenizer(texts(), self.vocab)
        meter.finish()
        write_aside(note, json.dumps(sampled).encode())
        write_aside(path, tokenizer.to_json().encode())
        return tokenizer, sampled
