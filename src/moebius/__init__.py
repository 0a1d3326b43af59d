"""moebius trains small, frontier-quality Mixture-of-Experts language models.

`moebius.load(run)` gives `(model, tokenizer)`; `moebius.fit(run)` trains a recipe. Both are
looked up when first used, so that `import moebius` itself stays cheap.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_LAZY = {"load": "moebius.infer.load", "fit": "moebius.train.fit"}


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moebius' has no attribute {name!r}")
