"""Hashed n-grams of a text: what the linear scorer sees.

As in fastText (Joulin et al. 2016), words, pairs of neighbouring words and character n-grams share
a table of `2 ** bits` places, words in its lower half. Hashes are polynomials modulo 2^64 over code
points, computed for all places of a text at once, so a text costs a few dozen array operations.
"""

import functools

import numpy as np
import regex

_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+")
_LETTER = regex.compile(r"[\p{L}\p{M}\p{N}_]+")
# Multipliers are odd, so that no bit of what is multiplied is lost.
BASE = np.uint64(0x9E3779B97F4A7C15)
MIX = np.uint64(0xD6E8FEB86659FD93)
PAIR = np.uint64(0xA24BAED4963EE407)
_HALF = np.uint64(32)


@functools.cache
def _kinds() -> np.ndarray:
    """By code point: 0 divides words, 1 is part of a word, 2 is a word of its own."""
    kinds = np.zeros(0x110000, np.uint8)
    every = "".join(map(chr, range(0x110000)))
    for kind, pattern in ((1, _LETTER), (2, _UNSPACED)):
        for run in pattern.finditer(every):
            kinds[run.start() : run.end()] = kind
    return kinds


def excerpt(text: str, limit: int) -> str:
    """At most `limit` characters of a text: its beginning, middle and end, in equal parts."""
    if len(text) <= limit:
        return text
    part = max(1, limit // 3)
    middle = (len(text) - part) // 2
    return f"{text[:part]}\n{text[middle : middle + part]}\n{text[-part:]}"


def code_points(text: str) -> np.ndarray:
    """The characters of a text as numbers, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def word_hashes(text: str) -> np.ndarray:
    """The hash of each word (lower case) in order, uint64."""
    points = code_points(text.lower())
    kinds = _kinds()[points]
    inside = kinds > 0
    # A word begins after what is no part of one; a character of its own begins and ends one.
    joined = np.zeros(len(points), bool)
    joined[1:] = (kinds[1:] == 1) & (kinds[:-1] == 1)
    starts = np.flatnonzero(inside & ~joined)
    if len(starts) == 0:
        return np.zeros(0, np.uint64)
    places = np.arange(len(points))
    begun = np.cumsum(inside & ~joined) - 1
    place_in_word = (places - starts[begun])[inside]
    terms = (points[inside].astype(np.uint64) + np.uint64(1)) * _power(place_in_word)
    bounds = np.searchsorted(np.flatnonzero(inside), starts)
    return np.add.reduceat(terms, bounds)


def _power(exponents: np.ndarray) -> np.ndarray:
    """BASE to each exponent modulo 2^64."""
    longest = int(exponents.max(initial=0)) + 1
    return np.cumprod(np.concatenate([[np.uint64(1)], np.full(longest, BASE)]))[exponents]


def gram_hashes(points: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    """The hashes of all character n-grams of the given lengths (rising), uint64."""
    wide = points.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(len(wide) + 1, np.uint64)
    found = [np.zeros(0, np.uint64)]
    for length in range(1, max(lengths, default=0) + 1):
        if length > len(wide):
            break
        hashes = hashes[: len(wide) - length + 1] * BASE + wide[length - 1 :]
        if length in lengths:
            # Lengths are kept apart.
            found.append(hashes ^ np.uint64(length))
    return np.concatenate(found)


def places_of(hashes: np.ndarray, bits: int) -> np.ndarray:
    """Hashes spread over `2 ** bits` places."""
    mixed = (hashes ^ (hashes >> _HALF)) * MIX
    return (mixed >> np.uint64(64 - bits)).astype(np.int32)


def features(text: str, bits: int, grams: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The places (int32, rising) and values (float32) of what occurs in a text.

    The value of a count is log(1 + count); words and character n-grams each have length 1.
    """
    words = word_hashes(text)
    pairs = words[:-1] * PAIR + words[1:]
    lower = _counted(places_of(np.concatenate([words, pairs]), bits - 1))
    upper = _counted(places_of(gram_hashes(code_points(text), grams), bits - 1))
    places = np.concatenate([lower[0], upper[0] + np.int32(1 << (bits - 1))])
    return places, np.concatenate([lower[1], upper[1]])


def _counted(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct places, and their log counts scaled to length 1."""
    places = np.sort(places)
    first = np.flatnonzero(np.concatenate([[True], places[1:] != places[:-1]])[: len(places)])
    counts = np.diff(np.append(first, len(places)))
    values = np.log1p(counts.astype(np.float32))
    norm = np.sqrt(np.square(values).sum(dtype=np.float32))
    return places[first], values / norm if len(values) else values
