"""What inspect says is what was prepared."""

import io
import json

from rich.console import Console

from moebius.data.inspect import inspect, render
from moebius.data.loader import Loader
from moebius.data.prepared import Prepared


def test_inspect_and_render(prepared: Prepared) -> None:
    for loader in (None, Loader(prepared, 32, 4, seed=0)):
        facts = inspect(prepared, loader)
        assert json.loads(json.dumps(facts)) == facts
        train = facts["sources"][0]["train"]
        assert train["documents"] == prepared.train[0].shards.num_documents
        assert train["bytes"] == sum(len(text) for _, text in prepared.train_documents())
        assert facts["sources"][0]["share"] == 1.0
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(render(facts))
        page = console.export_text()
        assert f"{train['tokens']:,}" in page and facts["samples"][0]["key"] in page
