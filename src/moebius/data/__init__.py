"""Documents -> tokens -> packed, mixed, resumable batches."""

from moebius.data.config import DataConfig, Source
from moebius.data.inspect import inspect, render
from moebius.data.loader import Batch, Loader, heldout_batches
from moebius.data.prepare import prepare
from moebius.data.prepared import Prepared
from moebius.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "DataConfig",
    "Loader",
    "Prepared",
    "Source",
    "Tokenizer",
    "heldout_batches",
    "inspect",
    "prepare",
    "render",
    "train_tokenizer",
]
