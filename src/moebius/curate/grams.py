"""Hashes of words and of n-grams of words, all of a text at once, in numpy.

A character becomes a 64-bit number by a table (lower case, no accents, no compatibility forms; what
is neither letter nor digit separates words), a word the polynomial of its characters, an n-gram the
polynomial of its words: what reads the same hashes the same wherever it stands. `text.words` is the
rule this follows, but that `_` separates and invisible characters (soft hyphens, zero-width spaces,
marks of direction) are not there.
"""

import functools
import unicodedata
from collections.abc import Iterator

import numpy as np
import regex

# Code points above are read as separators: private use, tags.
_LIMIT = 0x33480
_HAN_FROM = 0x20000
_BLOCK = 1 << 16
_BASE = np.uint64(0x9E3779B97F4A7C15 | 5)
_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")
# The classes of characters, in the three low bits of their numbers.
_SEPARATOR, _NOTHING, _LETTER, _UNSPACED_LETTER, _SEVERAL = range(5)
_CLASS = np.uint64(7)


def mix(hashes: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that makes every bit depend on every other (MurmurHash3's)."""
    hashes = hashes ^ (hashes >> np.uint64(33))
    hashes *= np.uint64(0xFF51AFD7ED558CCD)
    hashes ^= hashes >> np.uint64(33)
    hashes *= np.uint64(0xC4CEB9FE1A85EC53)
    return hashes ^ (hashes >> np.uint64(33))


def word_hashes(text: str, *, digits_alike: bool, split_apostrophes: bool) -> np.ndarray:
    """The hashes of a text's words in order, uint64.

    Apostrophes separate words (`don't` is `don t`) or are not there (`don't` is `dont`). A word
    longer than 65,536 characters may be several.
    """
    table = _table(digits_alike, split_apostrophes)
    return np.concatenate([_word_hashes(*part) for part in _parts(text, table)])


def num_letters(text: str, *, split_apostrophes: bool) -> np.ndarray:
    """How many letters each word of a text has; digits are none."""
    table = _table(True, split_apostrophes)
    digit = table[ord("0")]
    return np.concatenate(
        [
            np.add.reduceat((v & _CLASS >= _LETTER) & (v != digit), starts, dtype=np.int64)
            if len(starts)
            else np.zeros(0, np.int64)
            for v, starts in _parts(text, table)
        ]
    )


def line_hashes(
    text: str, *, digits_alike: bool, split_apostrophes: bool
) -> tuple[np.ndarray, np.ndarray]:
    """For each line of a text its hash, uint64, and its length in words joined by spaces.

    Lines end at `\\n` alone; those of the same words hash the same, those without have length 0.
    """
    table = _table(digits_alike, split_apostrophes)
    num_lines = text.count("\n") + 1
    lines, words, letters, line = [], [], [], 0
    for values, starts in _parts(text, table):
        ends = np.flatnonzero(values == table[ord("\n")])
        lines.append(np.searchsorted(ends, starts) + line)
        line += len(ends)
        words.append(_word_hashes(values, starts))
        if len(starts):
            letters.append(np.add.reduceat(values & _CLASS >= _LETTER, starts, dtype=np.int64))
    line_of = np.concatenate(lines)
    found, first, counts = np.unique(line_of, return_index=True, return_counts=True)
    hashes, lengths = np.zeros(num_lines, np.uint64), np.zeros(num_lines, np.int64)
    if len(found):
        place = (np.arange(len(line_of)) - np.repeat(first, counts)).astype(np.uint64)
        hashes[found] = mix(np.add.reduceat(mix(np.concatenate(words) + place * _BASE), first))
        lengths[found] = np.add.reduceat(np.concatenate(letters), first) + counts - 1
    return hashes, lengths


def excerpt(
    text: str, start: int, stop: int, *, digits_alike: bool, split_apostrophes: bool
) -> str:
    """The text from the word `start` to before the word `stop`, numbered as hashes are."""
    table = _table(digits_alike, split_apostrophes)
    if (_characters(text, table) & _CLASS == _SEVERAL).any():
        text = text.translate(_folds()[2])
    offset, offsets = 0, [np.zeros(0, np.int64)]
    for block in _blocks(text):
        values, kept = _present(_characters(block, table))
        starts = _starts(values)
        offsets.append(offset + (starts if kept is None else kept[starts]))
        offset += len(block)
    begins = np.append(np.concatenate(offsets), len(text))
    return text[begins[min(start, len(begins) - 1)] : begins[min(stop, len(begins) - 1)]].strip()


def gram_hashes(words: np.ndarray, length: int) -> np.ndarray:
    """The hashes of all runs of `length` words, uint64, in order; none if there are fewer words.

    Long runs are put together from those of half their length.
    """
    if len(words) < length:
        return np.zeros(0, np.uint64)
    runs, size = words, 1
    grams, done = words[:0], 0
    for bit in range(length.bit_length()):
        if bit:
            runs, size = _joined(runs, size, runs, size), 2 * size
        if length >> bit & 1:
            grams, done = (_joined(grams, done, runs, size) if done else runs), done + size
    return mix(grams)


def _joined(runs: np.ndarray, size: int, more: np.ndarray, more_size: int) -> np.ndarray:
    """The polynomials of runs, each with the run of `more` that follows it."""
    joined = runs[: len(more) - size] * np.uint64(pow(int(_BASE), more_size, 1 << 64))
    joined += more[size:]
    return joined


def _blocks(text: str) -> list[str]:
    """The text in pieces that numpy holds in cache, cut at white space where there is any."""
    blocks: list[str] = []
    start = 0
    while len(text) - start > _BLOCK:
        cut = max(text.rfind(space, start, start + _BLOCK) for space in " \n")
        cut = cut + 1 if cut >= 0 else start + _BLOCK
        blocks.append(text[start:cut])
        start = cut
    return [*blocks, text[start:] if start else text]


def _parts(text: str, table: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Block by block the characters that are something, and where words begin among them."""
    for block in _blocks(text):
        values = _characters(block, table)
        if (values & _CLASS == _SEVERAL).any():
            yield from _parts(block.translate(_folds()[2]), table)
        else:
            values, _ = _present(values)
            yield values, _starts(values)


def _word_hashes(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    if not len(starts):
        return np.zeros(0, np.uint64)
    up, down = _powers()
    letters = values * (values & _CLASS >= _LETTER)
    return mix(np.add.reduceat(letters * up[: len(values)], starts) * down[starts])


def _characters(text: str, table: np.ndarray) -> np.ndarray:
    """The numbers of the characters of a text."""
    if text.isascii():
        codes = np.frombuffer(text.encode("ascii"), np.uint8)
    else:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return table.take(codes, mode="clip")


def _present(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Characters without those that are as nothing, and where they stood if there were such."""
    there = values & _CLASS != _NOTHING
    if there.all():
        return values, None
    kept = np.flatnonzero(there)
    return values[kept], kept


def _starts(values: np.ndarray) -> np.ndarray:
    """Where words begin."""
    classes = (values & _CLASS).astype(np.uint8)
    begins = classes >= _LETTER
    goes_on = classes == _LETTER
    begins[1:] &= ~(goes_on[1:] & goes_on[:-1])
    return np.flatnonzero(begins)


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """The powers of the base and their inverses, for the characters of a block."""
    inverse = np.uint64(pow(int(_BASE), -1, 1 << 64))
    up, down = np.full(_BLOCK, _BASE), np.full(_BLOCK, inverse)
    up[0] = down[0] = 1
    return np.cumprod(up), np.cumprod(down)


@functools.cache
def _folds() -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """For every code point its class and the one it folds to; and what those of several are."""
    folded = np.arange(_LIMIT, dtype=np.uint32)
    classes = np.zeros(_LIMIT, np.uint8)
    classes[_HAN_FROM:] = _UNSPACED_LETTER
    several: dict[int, str] = {}
    for code in range(_HAN_FROM):
        char = chr(code)
        category = unicodedata.category(char)
        if category in ("Cn", "Cs", "Co", "Cc"):
            continue
        if unicodedata.combining(char) or category == "Cf":
            classes[code] = _NOTHING
            continue
        plain = _plain(char)
        if len(plain) == 1:
            folded[code], classes[code] = ord(plain), _class_of(plain)
        elif 0xAC00 <= code < 0xD7A4:
            classes[code] = _LETTER
        elif any(_class_of(one) for one in plain):
            several[code], classes[code] = plain, _SEVERAL
    return classes, folded, several


def _plain(char: str) -> str:
    """Lower case, compatibility forms undone, accents gone."""
    number = unicodedata.decimal(char, None)
    if number is not None:
        return str(number)
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", char).casefold())
    return "".join(one for one in parts if not unicodedata.combining(one))


def _class_of(char: str) -> int:
    if _UNSPACED.match(char):
        return _UNSPACED_LETTER
    return _LETTER if unicodedata.category(char)[0] in "LMN" else _SEPARATOR


@functools.cache
def _table(digits_alike: bool, split_apostrophes: bool) -> np.ndarray:
    classes, folded, _ = _folds()
    classes = classes.copy()
    if digits_alike:
        folded = np.where((folded >= ord("0")) & (folded <= ord("9")), np.uint32(ord("0")), folded)
    if not split_apostrophes:
        classes[[ord("'"), 0x2018, 0x2019, 0x02BC, 0xFF07]] = _NOTHING
    # The last code point answers for all above the table: a separator.
    classes[-1] = _SEPARATOR
    return (mix(folded.astype(np.uint64) + np.uint64(1)) & ~_CLASS) | classes
