"""Drop pages whose lines are no sentences, are short, or come twice: the rules of FineWeb.

Penedo et al. 2024, section 3.6: the share of lines that end in punctuation, of characters in
duplicated lines, of short lines; and new lines per word, which stands in its code alone. The paper
gives 0.1 for characters in duplicated lines, its code 0.01: the paper's is the default here. The
marks are those of Unicode's Sentence_Terminal and the full-width stop.
"""

import dataclasses

import regex

from moebius.curate.document import Document, Dropped
from moebius.curate.step import Decide, Decision, Filter, Kind
from moebius.curate.steps.gopher_repetition import duplicates
from moebius.curate.text import words

_ENDED = regex.compile(r"[\p{Sentence_Terminal}\uff0e\uff61]")


@dataclasses.dataclass(frozen=True)
class FineWeb(Filter):
    """Thresholds of the paper; a line is short up to `short_line` characters."""

    kinds: tuple[Kind, ...] = ("web", "prose")
    min_ended_lines: float = 0.12
    max_short_lines: float = 0.67
    short_line: int = 30
    max_duplicate_line_characters: float = 0.1
    max_new_lines_per_word: float = 0.3

    def build(self) -> Decide:
        return self._decide

    def _decide(self, document: Document) -> Decision:
        text = document.text
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        if not lines:
            return Dropped("empty text")
        return self._of_lines(text, lines) or self._of_words(text) or document

    def _of_lines(self, text: str, lines: list[str]) -> Dropped | None:
        last = {line[-1] for line in lines}
        marks = {mark for mark in last if _ENDED.match(mark)}
        ended = sum(line[-1] in marks for line in lines) / len(lines)
        if ended <= self.min_ended_lines:
            return Dropped("too few lines end in punctuation", f"{ended:.0%} of lines")
        short = sum(len(line) <= self.short_line for line in lines) / len(lines)
        if short >= self.max_short_lines:
            return Dropped("too many short lines", f"{short:.0%} of lines")
        share = duplicates(lines)[1] / (len(text) - text.count("\n"))
        if share >= self.max_duplicate_line_characters:
            return Dropped("duplicate lines", f"{share:.0%} of characters")
        return None

    def _of_words(self, text: str) -> Dropped | None:
        new_lines = text.count("\n")
        # Most texts show in their beginning that they have words enough; a cut word is not counted.
        for part in (text[: 24 * new_lines], text):
            number = len(words(part))
            if new_lines <= self.max_new_lines_per_word * (number - (len(part) < len(text))):
                return None
        return Dropped("too many new lines", f"{new_lines} for {number} words")
