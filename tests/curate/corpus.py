"""A real corpus as a user would bring it: web pages, books in three languages, code, benchmarks.

`moebius curate tests/curate/corpus.py:shared --out DIR` reads what the folder `shared/data` beside
the checkout holds, this machine's Python library, and its documentation where it is installed.
"""

import sysconfig
from pathlib import Path

from moebius.curate.config import Curation
from moebius.curate.mix import Group, Mix, MixStage
from moebius.curate.read import Reader
from moebius.curate.read.pages import Pages
from moebius.curate.read.repository import Repository
from moebius.curate.read.texts import Texts
from moebius.recipes.curation import standard

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
WEB = DATA / "web" / "article-extraction-benchmark"
LISTS = DATA / "lists" / "ldnoobw"
BENCHMARKS = ("gsm8k/test.jsonl", "humaneval", "ifeval", "mmlu/test.jsonl")
# Debian's python3-doc, whichever version.
DOCUMENTATION = sorted(Path("/usr/share/doc").glob("python3*/html/library"))[:1]


def shared() -> Curation:
    """Everything that `shared/data` holds, through the standard steps."""
    sources: list[Reader] = [
        Pages(path=str(WEB / "html"), name="web", urls=str(WEB / "ground-truth.json")),
        *(Texts(path=str(DATA / "text" / code), name=code) for code in ("en", "es", "zh")),
        Repository(path=sysconfig.get_path("stdlib"), name="python"),
        *(Pages(path=str(folder), name="documentation") for folder in DOCUMENTATION),
    ]
    steps = standard(
        dirty={"eng": str(LISTS / "en.txt"), "spa": str(LISTS / "es.txt")},
        benchmarks=tuple(str(DATA / "eval" / name) for name in BENCHMARKS),
    )
    groups = (
        Group("code", kinds=("code",)),
        Group("long", kinds=("prose",), min_bytes=500_000, max_epochs=4.0),
        Group("english", languages=("eng",)),
        Group("other"),
    )
    stages = (
        MixStage(
            "pretrain",
            weights=(("english", 0.4), ("other", 0.2), ("code", 0.2), ("long", 0.2)),
            share_of_tokens=0.7,
        ),
        MixStage(
            "mid-train",
            weights=(("english", 0.2), ("other", 0.1), ("code", 0.7)),
            share_of_tokens=0.3,
        ),
    )
    return Curation(
        name="shared", sources=tuple(sources), steps=steps, mix=Mix(groups=groups, stages=stages)
    )
