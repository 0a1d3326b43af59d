"""Keep lines that are sentences, drop pages that have few of them: the rules of C4.

Raffel et al. 2020, section 2.2, in the order of its code: a line with a word of over 1,000
characters goes; citation marks go; a line must end in terminal punctuation and have enough words;
`lorem ipsum` or a curly bracket in such a line drops the page; lines on JavaScript, cookies and
policies go. Marks of other scripts and curly quotes end a line as well; Thai has none, it needs
`endings=()`. A sentence ends at a mark before a space. The first print asked for 5 sentences and
lines of 3 words, as here; its last for 3 and 5.
"""

import dataclasses
import re

from moebius.curate.document import Document, Dropped
from moebius.curate.step import Decide, Decision, Filter, Kind
from moebius.curate.text import words

_STOPS = ".!?\u061f\u06d4\u0964\u1362\u0589\u104b\u17d4"
_WIDE_STOPS = "\u3002\uff01\uff1f\uff0e"
ENDINGS = tuple(_STOPS + _WIDE_STOPS + "\"'\u201d\u2019\u300d\u300f")
POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_CITATION = re.compile(r"\[\d{0,6}\]|\[edit\]|\[citation needed\]")
# Runs are taken whole and entered at their start only, so that no text is read twice.
_SENTENCE_END = re.compile(
    rf"(?<![{_STOPS}])[{_STOPS}]++[\"')\]\u201d\u2019]*+(?!\S)|[{_WIDE_STOPS}]"
)


def num_sentences(line: str) -> int:
    """Sentences in a line with text; what follows the last end is one more."""
    last, ends = 0, 0
    for match in _SENTENCE_END.finditer(line):
        last, ends = match.end(), ends + 1
    return ends + (not ends or any(map(str.isalnum, line[last:])))


@dataclasses.dataclass(frozen=True)
class C4(Filter):
    """`min_sentences=0` keeps short pages; `endings=()` keeps lines that end anyhow."""

    kinds: tuple[Kind, ...] = ("web", "prose")
    min_words_per_line: int = 3
    min_sentences: int = 5
    max_word_length: int = 1000
    endings: tuple[str, ...] = ENDINGS
    drop_citations: bool = True
    drop_lorem_ipsum: bool = True
    drop_curly_bracket: bool = True
    drop_javascript: bool = True
    policies: tuple[str, ...] = POLICIES

    def build(self) -> Decide:
        return self._decide

    def _decide(self, document: Document) -> Decision:
        kept: list[str] = []
        sentences = 0
        for line in document.text.splitlines():
            line = line.strip()
            if not line or self._has_long_word(line):
                continue
            enough = self._has_words(line)
            if self.drop_citations and "[" in line:
                line = _CITATION.sub("", line).rstrip()
            if not enough or not self._is_ended(line):
                continue
            lower = line.lower()
            if self.drop_lorem_ipsum and "lorem ipsum" in lower:
                return Dropped("lorem ipsum")
            if self.drop_javascript and "javascript" in lower:
                continue
            if self.drop_curly_bracket and "{" in line:
                return Dropped("curly bracket")
            if any(phrase in lower for phrase in self.policies):
                continue
            if sentences < self.min_sentences:
                sentences += num_sentences(line)
            kept.append(line)
        if not kept or sentences < self.min_sentences:
            return Dropped("too few sentences", f"{sentences} in {len(kept)} lines")
        return document.with_text("\n".join(kept), "c4")

    def _has_long_word(self, line: str) -> bool:
        if len(line) <= self.max_word_length:
            return False
        return any(
            len(part) > self.max_word_length
            and (part.isascii() or max(map(len, words(part)), default=0) > self.max_word_length)
            for part in line.split()
        )

    def _has_words(self, line: str) -> bool:
        number = len(line.split(None, self.min_words_per_line))
        if number >= self.min_words_per_line:
            return True
        return not line.isascii() and len(words(line)) >= self.min_words_per_line

    def _is_ended(self, line: str) -> bool:
        return not self.endings or (line.endswith(self.endings) and not line.endswith("..."))
