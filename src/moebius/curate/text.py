"""Words, lines and hashes of a text, the same for every step of curation.

A word is a run of letters, digits and inner apostrophes in scripts that put spaces between words;
each character is one in those that do not (Han, kana, Thai, Lao, Khmer, Burmese).
"""

import re
import unicodedata

import numpy as np
import regex
import xxhash

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(
    rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}_])+"
    rf"(?:['\u2019](?:(?![{_UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}_])+)*"
)
# Latin, Greek and Cyrillic letters, punctuation and signs: there `re` finds the same words, faster.
_OTHER = re.compile(
    "[^\x00-\u02ff\u0370-\u0482\u048a-\u052f\u1e00-\u208e\u20a0-\u20cf"
    "\u2100-\u214f\u2190-\u23ff\u2500-\u27bf]"
)
_SPACED_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
_ASCII_WORD = re.compile(r"[A-Za-z0-9_]+(?:'[A-Za-z0-9_]+)*")


def words(text: str) -> list[str]:
    """The words of a text in order, punctuation left out."""
    if text.isascii():
        return _ASCII_WORD.findall(text)
    return (_WORD if _OTHER.search(text) else _SPACED_WORD).findall(text)


def normalised(text: str) -> str:
    """Lower case without accents, digits as 0, each run of anything else as one space."""
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text)
        text = "".join(c for c in decomposed if not unicodedata.combining(c))
    return regex.sub(r"\d", "0", " ".join(words(text.casefold())))


def hash_of(text: str, seed: int = 0) -> int:
    """A 64-bit hash of a text, equal on every machine."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed)


def hashes_of(texts: list[str], seed: int = 0) -> np.ndarray:
    """The 64-bit hashes of several texts, uint64."""
    return np.fromiter((hash_of(text, seed) for text in texts), np.uint64, len(texts))
