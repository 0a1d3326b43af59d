"""datatrove's MinHash over documents of a .jsonl file, in a Python of its own: its pins are others.

`python -I datatrove_minhash.py DOCUMENTS FOLDER '{"shingle": 5, "bands": 14, "rows": 8, ...}'`
prints a line of JSON: each document's cluster (-1: none), CPU seconds by stage, the version. One
worker, the stages as its own pipelines run them; nothing here imports moebius.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any


def cluster(documents: Path, folder: Path, options: dict[str, int]) -> dict[str, Any]:
    """Signatures, buckets, clusters, and the filter."""
    from datatrove.data import Document  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.dedup import minhash  # pyright: ignore[reportMissingImports]

    texts = [json.loads(line)["text"] for line in documents.read_text("utf-8").splitlines()]
    given = [Document(text=text, id=str(index)) for index, text in enumerate(texts)]
    config = minhash.MinhashConfig(
        n_grams=options["shingle"],
        num_buckets=options["bands"],
        hashes_per_bucket=options["rows"],
        seed=options["seed"],
    )
    signs, pairs, found = (str(folder / name) for name in ("signs", "pairs", "clusters"))
    signature = minhash.MinhashDedupSignature(signs, config=config)
    buckets = minhash.MinhashDedupBuckets(signs, pairs, config=config)
    clusters = minhash.MinhashDedupCluster(pairs, found, config=config, save_cluster_id=True)
    keep = minhash.MinhashDedupFilter(found, load_cluster_ids=True)
    # What it loads at first use is not timed.
    signature.get_signature(signature.get_shingles(texts[0]))

    seconds: dict[str, float] = {}
    start = time.process_time()
    signature.run(iter(given), 0, 1)
    seconds["signatures"] = time.process_time() - start
    for rank in range(options["bands"]):
        buckets.run(None, rank, options["bands"])
    seconds["buckets"] = time.process_time() - start - seconds["signatures"]
    clusters.run(None, 0, 1)
    kept = {int(document.id) for document in keep.run(iter(given), 0, 1)}
    seconds["all"] = time.process_time() - start
    # The filter notes clusters on all documents, kept or not.
    ids = [int(document.metadata.get("minhash_cluster_id", -1)) for document in given]
    version = importlib.metadata.version("datatrove")
    return {"clusters": ids, "kept": len(kept), "seconds": seconds, "version": version}


if __name__ == "__main__":
    print(json.dumps(cluster(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))))
