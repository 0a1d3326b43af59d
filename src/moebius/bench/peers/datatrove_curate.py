"""datatrove's curation of web pages, in a Python of its own: it has pins of old.

`python -I datatrove_curate.py WARCS OUT '{"workers": 1, ...}'` leaves what it keeps under OUT/kept,
what a filter drops under OUT/dropped/BLOCK, its own times in OUT/logs, and prints its version. The
blocks and their order are those of its FineWeb example; nothing here imports moebius.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any


def filters(warcs: Path, out: Path, timeout: float) -> list[Any]:
    """Pages to texts, and the filters of one document; what they drop is written as ours is."""
    from datatrove.pipeline import filters as filter_  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.extractors import Trafilatura  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.readers import WarcReader  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.writers import JsonlWriter  # pyright: ignore[reportMissingImports]

    blocks = {
        "gopher_repetition": filter_.GopherRepetitionFilter,
        "gopher_quality": filter_.GopherQualityFilter,
        "c4": filter_.C4QualityFilter,
        "fineweb": filter_.FineWebQualityFilter,
    }
    return [
        WarcReader(str(warcs)),
        Trafilatura(favour_precision=True, timeout=timeout),
        *(
            block(exclusion_writer=JsonlWriter(str(out / "dropped" / name)))
            for name, block in blocks.items()
        ),
        JsonlWriter(str(out / "filtered")),
    ]


def curate(warcs: Path, out: Path, options: dict[str, Any]) -> None:
    """All stages, one after the other, as many tasks and workers as there are files."""
    from datatrove.executor import LocalPipelineExecutor  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.dedup import minhash  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.formatters import PIIFormatter  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.readers import JsonlReader  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.writers import JsonlWriter  # pyright: ignore[reportMissingImports]

    config = minhash.MinhashConfig(
        n_grams=options["shingle"],
        num_buckets=options["bands"],
        hashes_per_bucket=options["rows"],
        seed=options["seed"],
    )
    signs, pairs, found = (str(out / name) for name in ("signs", "pairs", "clusters"))
    texts, workers = str(out / "filtered"), options["workers"]
    stages = {
        "filters": (filters(warcs, out, options["timeout"]), workers),
        "signatures": (
            [JsonlReader(texts), minhash.MinhashDedupSignature(signs, config=config)],
            workers,
        ),
        "buckets": ([minhash.MinhashDedupBuckets(signs, pairs, config=config)], options["bands"]),
        "clusters": ([minhash.MinhashDedupCluster(pairs, found, config=config)], 1),
        "output": (
            [
                JsonlReader(texts),
                minhash.MinhashDedupFilter(
                    found, exclusion_writer=JsonlWriter(str(out / "dropped" / "minhash"))
                ),
                PIIFormatter(),
                JsonlWriter(str(out / "kept")),
            ],
            workers,
        ),
    }
    for name, (pipeline, tasks) in stages.items():
        logs = str(out / "logs" / name)
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=logs).run()


if __name__ == "__main__":
    curate(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    print(importlib.metadata.version("datatrove"))
