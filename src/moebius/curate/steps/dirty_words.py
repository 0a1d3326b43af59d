"""Drop documents with too many words of lists that the user names, as adult sites have.

Llama 3 (2024), section 3.1.1, counts the words of C4's list ("dirty word counting") to catch what
domain lists miss; C4 itself drops at the first (`max_count=0, max_share=0`). A list has one word or
phrase a line; it matches whole words in any case, and characters where words have no spaces.
Entries with marks in them (`s&m`, an emoji) match as they are written.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from moebius.curate.document import Document, Dropped
from moebius.curate.languages import code_of, macro_of
from moebius.curate.step import Decide, Decision, Filter, Kind
from moebius.curate.text import words

# Marks that only join or divide words; an entry with others is looked for as it is written.
_JOINING = re.compile(r"[\s\w'\u2019-]*")
# Entries that are parts of common words where words have no spaces; mC4 leaves them out as well.
IGNORED = ("\u6027", "\u30b0\u30ed", "\u5973\u306e\u5b50")
# The number of matches in a casefolded text and its words.
Count = Callable[[str, list[str]], int]


@dataclasses.dataclass(frozen=True)
class DirtyWords(Filter):
    """`lists` maps a language (`eng` or `en`) to its file; documents of other languages pass.

    A document of unknown language is held against each list. It is dropped where it has both more
    than `max_count` matches and more than `max_share` of them per word: neither a long book nor a
    news report of a crime falls for a few.
    """

    kinds: tuple[Kind, ...] = ("web", "prose")
    lists: Mapping[str, str] = dataclasses.field(default_factory=dict)
    max_count: int = 4
    max_share: float = 0.015
    ignored: tuple[str, ...] = IGNORED

    def build(self) -> Decide:
        if not self.lists:
            raise ValueError("dirty_words needs lists, a file of words for each language")
        counts = {
            macro_of(code_of(language)): load_list(path, self.ignored)
            for language, path in self.lists.items()
        }

        def decide(document: Document) -> Decision:
            language = macro_of(document.language)
            chosen = [counts[language]] if language in counts else []
            if not language:
                chosen = list(counts.values())
            if not chosen:
                return document
            text = document.text.casefold()
            found = words(text)
            number = max(count(text, found) for count in chosen)
            if number > self.max_count and number > self.max_share * len(found):
                return Dropped("dirty words", f"{number} among {len(found)} words")
            return document

        return decide


def load_list(path: str, ignored: tuple[str, ...]) -> Count:
    """What counts the matches of a list; ValueError where its file cannot be read or is empty."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"dirty_words cannot read its list {path}: {error}") from error
    left_out = {"", *map(str.casefold, ignored)}
    entries = sorted({line.strip().casefold() for line in lines} - left_out)
    if not entries:
        raise ValueError(f"the list {path} of dirty_words is empty; write a word on each line")
    return _counter(entries)


def _counter(entries: list[str]) -> Count:
    """A count that takes of overlapping entries the longest, as a reader would."""
    phrases: dict[str, list[tuple[str, ...]]] = {}
    marked: list[str] = []
    for entry in entries:
        of_entry = tuple(words(entry))
        if of_entry and _JOINING.fullmatch(entry):
            phrases.setdefault(of_entry[0], []).append(of_entry)
        else:
            marked.append(entry)
    for same in phrases.values():
        same.sort(key=len, reverse=True)
    as_written = re.compile("|".join(map(_bounded, sorted(marked, key=len, reverse=True))))

    def count(text: str, found: list[str]) -> int:
        number = len(as_written.findall(text)) if marked else 0
        after = 0
        for index in [i for i, word in enumerate(found) if word in phrases]:
            if index < after:
                continue
            for phrase in phrases[found[index]]:
                if tuple(found[index : index + len(phrase)]) == phrase:
                    number, after = number + 1, index + len(phrase)
                    break
        return number

    return count


def _bounded(entry: str) -> str:
    """A pattern of an entry that does not start or end within a word."""
    before = r"(?<!\w)" if re.match(r"\w", entry[0]) else ""
    behind = r"(?!\w)" if re.match(r"\w", entry[-1]) else ""
    return f"{before}{re.escape(entry)}{behind}"
