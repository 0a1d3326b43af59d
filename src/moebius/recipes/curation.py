"""Curations: the standard list of steps, and recipes that read what a machine has.

The order is Llama 3's (2407.21783, 3.1.1): lists of sites, extraction, deduplication by URL,
document and line, heuristics, private data, decontamination. A user's own recipe is a function in
any file that returns a `Curation`: `moebius curate my_corpus.py:books --out DIR`.
"""

import sysconfig
from collections.abc import Mapping
from pathlib import Path

from moebius.curate.benchmarks import Benchmark
from moebius.curate.config import Curation
from moebius.curate.mix import Group, Mix
from moebius.curate.read.pages import Pages
from moebius.curate.read.repository import Repository
from moebius.curate.read.row import Fields
from moebius.curate.read.rows import Rows
from moebius.curate.read.warc import Warc
from moebius.curate.step import Step
from moebius.curate.steps.c4 import C4
from moebius.curate.steps.decontaminate import Decontaminate
from moebius.curate.steps.detect import Detect
from moebius.curate.steps.dirty_words import DirtyWords
from moebius.curate.steps.exact_dedup import ExactDedup
from moebius.curate.steps.extract import Extract
from moebius.curate.steps.fineweb import FineWeb
from moebius.curate.steps.gopher_quality import GopherQuality
from moebius.curate.steps.gopher_repetition import GopherRepetition
from moebius.curate.steps.language import Language
from moebius.curate.steps.line_dedup import LineDedup
from moebius.curate.steps.line_repetition import LineRepetition
from moebius.curate.steps.mask import Mask
from moebius.curate.steps.minhash import MinHash
from moebius.curate.steps.repair import Repair
from moebius.curate.steps.template import Template
from moebius.curate.steps.unusual_tokens import UnusualTokens
from moebius.curate.steps.url_dedup import UrlDedup
from moebius.curate.steps.url_list import UrlList


def standard(
    *,
    languages: tuple[str, ...] = (),
    blocked: tuple[str, ...] = (),
    dirty: Mapping[str, str] | None = None,
    benchmarks: tuple[str, ...] = (),
) -> tuple[Step, ...]:
    """The standard steps. Languages are ISO 639-3 (none keeps all); the rest names files.

    `blocked` are lists of domains, `dirty` maps languages to lists of words, `benchmarks` are files
    or folders to decontaminate against. Rules for prose pass over code; rules that expect sentences
    (C4, FineWeb) are for web pages alone, or poems and dialogues would fall.
    """
    steps: list[Step] = [UrlList(domains=blocked)] if blocked else []
    steps += [Extract(), Repair(kinds=("web", "prose")), Language(keep=languages)]
    steps += [UrlDedup(), ExactDedup(), MinHash(), LineDedup(kinds=("web",))]
    steps += [Template(kinds=("web",)), LineRepetition(), GopherRepetition(kinds=("web",))]
    steps += [GopherQuality(kinds=("web",)), C4(kinds=("web",)), FineWeb(kinds=("web",))]
    steps += [DirtyWords(lists=dirty)] if dirty else []
    steps += [UnusualTokens(), Mask(), Detect()]
    if benchmarks:
        steps.append(Decontaminate(benchmarks=tuple(Benchmark(path) for path in benchmarks)))
    return tuple(steps)


def web() -> Curation:
    """A folder of HTML pages: sources.0.path=DIR, and steps.N... for everything else."""
    return Curation(name="web", sources=(Pages(path="pages", name="pages"),), steps=standard())


def crawl() -> Curation:
    """A folder of WARC files: sources.0.path=DIR."""
    return Curation(name="crawl", sources=(Warc(path="warc", name="warc"),), steps=standard())


def library() -> Curation:
    """The sources of this machine's Python library, and its documentation where it is installed."""
    folder = sysconfig.get_path("stdlib")
    sources = [Repository(path=folder, name="library")]
    version = sysconfig.get_python_version()
    documentation = Path(f"/usr/share/doc/python{version}/html")
    pages = [Pages(path=str(documentation), name="documentation")] if documentation.is_dir() else []
    groups = (Group("code", kinds=("code",), weight=0.7), Group("text", weight=0.3))
    return Curation(
        name="library",
        sources=(*sources, *pages),
        steps=standard(),
        mix=Mix(groups=groups if pages else groups[:1]),
    )


def dirtied() -> Curation:
    """What `moebius lab dirt` made, for `moebius lab curation`: sources.0.path=FILE."""
    steps = (
        Language(keep=("eng",)),
        ExactDedup(),
        MinHash(),
        LineDedup(),
        GopherRepetition(),
        GopherQuality(),
        UnusualTokens(),
    )
    source = Rows(path="dirty.jsonl", name="dirty", fields=Fields(id="id"))
    return Curation(name="dirtied", sources=(source,), steps=steps)
