"""Drop documents that do not look like prose: the quality rules of Gopher.

Rae et al. 2021, appendix A1.1. Words are those of `curate.text`; the rule on letters is about what
stands between spaces. datatrove divides marks from words there and counts them, which drops one in
ten pages of English novels: 84% of its verdicts are ours, 96% with `marks_are_words` (on articles,
novels and spoilt texts). Lines are those with text. Where each character is a word, none has a
length to judge; a language without stop words in `STOP_WORDS` is not asked for any.
"""

import dataclasses
import re
from collections.abc import Sequence

from moebius.curate.document import Document, Dropped
from moebius.curate.languages import macro_of
from moebius.curate.step import Decide, Decision, Filter, Kind
from moebius.curate.text import words

# English as in the paper; for others the most frequent words that few languages share.
STOP_WORDS = {
    "eng": "the be to of and that have with",
    "ces": "a v na se je že z do",
    "dan": "og i at det er en til af",
    "deu": "der die und das den von zu mit",
    "fin": "ja on ei että se tai kun oli",
    "fra": "de la le et les des est que",
    "hun": "a az és hogy nem is egy volt",
    "ind": "yang dan di dengan untuk dari ini itu",
    "ita": "di il la che e per un non",
    "nld": "de het van een en dat niet is",
    "nor": "og i det er på en til som",
    "pol": "i w na z nie się że do",
    "por": "de que o a do da em não",
    "ron": "și de la în cu nu că o",
    "rus": "и в не на что с по как",  # noqa: RUF001
    "spa": "de la que el en y los se",
    "swe": "och i att det är en som på",
    "tur": "ve bir bu da de için ile çok",
    "ukr": "і в не на що з до та",  # noqa: RUF001
    "vie": "và của là có không được các những",
}
# Both read a text once: what they repeat is never given back.
_LETTERLESS = re.compile(r"(?<!\S)(?:(?![^\W\d_])\S)++(?!\S)")
_WORD_OR_MARKS = re.compile(r"['\u2019]?[^\W_]++(?:[.,/:@_][^\W_]++)*+|([^\w\s])\1*+|_++")
_LETTER = re.compile(r"[^\W\d_]")
_ELLIPSES = ("...", "\u2026")
# Thai is the first script that writes without spaces; from here on they are Han and kana.
_UNSPACED, _HAN = "\u0e00", "\u2e80"


def characters_per_word(words: Sequence[str]) -> int:
    """1 in scripts with spaces; where each character is a word, about how many make a real one.

    2 in Chinese and Japanese, 4 in Thai, Lao, Khmer and Burmese.
    """
    if list(map(len, words)).count(1) * 2 <= len(words):
        return 1
    single = [word for word in words if len(word) == 1 and word >= _UNSPACED]
    if len(single) * 2 <= len(words):
        return 1
    return 2 if sum(word >= _HAN for word in single) * 2 > len(single) else 4


@dataclasses.dataclass(frozen=True)
class GopherQuality(Filter):
    """Thresholds of the paper. `language` is assumed of documents that do not say theirs."""

    kinds: tuple[Kind, ...] = ("web", "prose")
    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_symbols_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_lettered: float = 0.8
    marks_are_words: bool = False
    min_stop_words: int = 2
    bullets: tuple[str, ...] = ("\u2022", "-")
    language: str = "eng"

    def build(self) -> Decide:
        stop_words = {language: frozenset(text.split()) for language, text in STOP_WORDS.items()}

        def decide(document: Document) -> Decision:
            text = document.text
            found = words(text)
            stop = stop_words.get(macro_of(document.language or self.language), frozenset())
            return (
                self._of_words(found)
                or self._of_symbols(text, len(found))
                or self._of_lines(text)
                or self._of_letters(text)
                or self._of_stop_words(found, stop, bool(document.language))
                or document
            )

        return decide

    def _of_words(self, found: list[str]) -> Dropped | None:
        if len(found) < max(self.min_words, 1):
            return Dropped("too few words", f"{len(found)} words")
        if len(found) > self.max_words:
            return Dropped("too many words", f"{len(found)} words")
        mean = sum(map(len, found)) / len(found)
        if mean < self.min_word_length and characters_per_word(found) == 1:
            return Dropped("words too short", f"{mean:.1f} characters on average")
        if mean > self.max_word_length:
            return Dropped("words too long", f"{mean:.1f} characters on average")
        return None

    def _of_symbols(self, text: str, num_words: int) -> Dropped | None:
        hashes = text.count("#")
        ellipses = sum(map(text.count, _ELLIPSES))
        if max(hashes, ellipses) > self.max_symbols_per_word * num_words:
            return Dropped("too many symbols", f"{hashes} hashes, {ellipses} ellipses")
        return None

    def _of_lines(self, text: str) -> Dropped | None:
        lines = [line for line in map(str.strip, text.splitlines()) if line]
        bulleted = sum(line.startswith(self.bullets) for line in lines) / len(lines)
        if bulleted > self.max_bullet_lines:
            return Dropped("mostly bullet points", f"{bulleted:.0%} of lines")
        cut_off = sum(line.endswith(_ELLIPSES) for line in lines) / len(lines)
        if cut_off > self.max_ellipsis_lines:
            return Dropped("lines cut off", f"{cut_off:.0%} of lines")
        return None

    def _of_letters(self, text: str) -> Dropped | None:
        if self.marks_are_words:
            tokens = [match.group() for match in _WORD_OR_MARKS.finditer(text)]
            number, lettered = len(tokens), sum(1 for token in tokens if _LETTER.search(token))
        else:
            number = len(text.split())
            lettered = number - len(_LETTERLESS.findall(text))
        if lettered < self.min_lettered * number:
            return Dropped("too few words with letters", f"{lettered} of {number}")
        return None

    def _of_stop_words(self, found: list[str], stop: frozenset[str], known: bool) -> Dropped | None:
        if not stop or len(stop.intersection(found)) >= self.min_stop_words:
            return None
        held = len(stop.intersection(map(str.casefold, found)))
        if held >= self.min_stop_words or (not known and characters_per_word(found) > 1):
            return None
        return Dropped("too few stop words", f"{held} of {len(stop)}")
