"""Baselines against the formula written with dicts, and against the xz tool's own format."""

import lzma
import math
import random
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from typing import final

import numpy as np
import pytest

from moebius.eval import baselines
from moebius.eval.baselines import END, PAD, Ngram, ngram, xz_all, xz_each


def documents(seed: int, num: int, letters: int = 6, longest: int = 40) -> list[bytes]:
    draw = random.Random(seed)
    sizes = [draw.randrange(longest) for _ in range(num)]
    return [bytes(draw.randrange(97, 97 + letters) for _ in range(size)) for size in sizes]


def symbols_of(document: bytes, order: int) -> list[int]:
    return [PAD] * (order - 1) + list(document) + [END]


@final
class Reference:
    """Witten-Bell as its formula reads, a dict a context."""

    def __init__(self, train: list[bytes], order: int) -> None:
        self.successors: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for document in train:
            symbols = symbols_of(document, order)
            for i in range(order - 1, len(symbols)):
                for length in range(order):
                    self.successors[tuple(symbols[i - length : i])][symbols[i]] += 1

    def probability(self, context: tuple[int, ...], symbol: int) -> float:
        lower = self.probability(context[1:], symbol) if context else 1 / 257
        if context not in self.successors:
            return lower
        seen = self.successors[context]
        return (seen[symbol] + len(seen) * lower) / (seen.total() + len(seen))

    def bits_per_byte(self, heldout: list[bytes], order: int) -> float:
        bits = 0.0
        for document in heldout:
            symbols = symbols_of(document, order)
            for i in range(order - 1, len(symbols)):
                bits -= math.log2(self.probability(tuple(symbols[i - order + 1 : i]), symbols[i]))
        return bits / sum(map(len, heldout))


@pytest.mark.parametrize("order", [1, 2, 5, 7])
@pytest.mark.parametrize("seed", range(4))
def test_ngram_equals_the_formula(order: int, seed: int) -> None:
    train = documents(seed, 30)
    heldout = [*documents(seed + 100, 20, letters=9), b"", bytes(range(256))]
    expected = Reference(train, order).bits_per_byte(heldout, order)
    assert ngram(train, heldout, order) == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_batches_do_not_change_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    train, heldout = documents(1, 60), documents(2, 60)
    whole = ngram(train, heldout)
    monkeypatch.setattr(baselines, "BATCH_BYTES", 100)
    assert ngram(train, heldout) == whole


@pytest.mark.parametrize("context", [(PAD, PAD), (PAD, 97), (97, 98), (200, 97), (200, 201)])
def test_probabilities_sum_to_one(context: tuple[int, int]) -> None:
    train = documents(3, 40)
    keys = [context[0] << 18 | context[1] << 9 | symbol for symbol in range(257)]
    p = Ngram.fit(train, 3).probabilities(np.array(keys, np.uint64))
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert p.min() > 0
    reference = Reference(train, 3)
    expected = [reference.probability(context, symbol) for symbol in range(257)]
    np.testing.assert_allclose(p, expected, rtol=1e-12)


def test_contexts_do_not_cross_documents() -> None:
    train, heldout = documents(4, 20), documents(5, 20)
    assert ngram(train[::-1], heldout[::-1]) == pytest.approx(ngram(train, heldout), rel=1e-12)


@pytest.mark.parametrize("order", [0, 8])
def test_an_order_that_does_not_fit_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match="order must be 1 to 7"):
        ngram([b"a"], [b"a"], order)


def test_nothing_to_measure_is_refused() -> None:
    for measure in (xz_each, xz_all):
        with pytest.raises(ValueError, match="no held-out bytes"):
            measure([b""])
    with pytest.raises(ValueError, match="no held-out bytes"):
        ngram([b"abc"], [])
    with pytest.raises(ValueError, match="no training documents"):
        ngram([], [b"abc"])


def test_xz_equals_the_format_of_the_tool() -> None:
    files = documents(6, 5, longest=4000)
    sizes = [len(lzma.compress(file, preset=9 | lzma.PRESET_EXTREME)) for file in files]
    total = sum(map(len, files))
    assert xz_each(files) == 8 * sum(sizes) / total
    together = lzma.compress(b"".join(files), preset=9 | lzma.PRESET_EXTREME)
    assert xz_all(iter(files)) == 8 * len(together) / total


@pytest.mark.skipif(shutil.which("xz") is None, reason="the xz tool is not installed")
def test_xz_equals_the_tool() -> None:
    text = Path(__file__).read_bytes()
    result = subprocess.run(["xz", "-9e", "-T1"], input=text, capture_output=True, check=True)
    assert xz_each([text]) == 8 * len(result.stdout) / len(text)
