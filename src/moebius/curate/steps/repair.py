"""Repair of a text's characters: mojibake undone (ftfy, Speer 2019), NFC, no control characters.

What an author wrote stays: curly quotes, full-width letters, HTML entities in code. Line ends
become `\\n`, blanks at the ends of lines go, soft hyphens and invisible marks go.
"""

import dataclasses
import unicodedata

import regex

from moebius.curate.document import Document
from moebius.curate.step import Decide, Decision, Filter

# C0 and C1 controls but tab and newline, soft hyphen, byte order mark, interlinear annotations
_UNWANTED = regex.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\xad\ufeff\ufff9-\ufffb]")
_TERMINAL = regex.compile(r"\x1b\[[0-9;]*+[A-Za-z]")
_LINE_ENDS = regex.compile(r"\r\n|[\r\x85\u2028\u2029\x0c]")
_TRAILING = regex.compile(r"[^\S\n]+$", regex.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Repair(Filter):
    """Mends the text of every document; drops none."""

    def build(self) -> Decide:
        """The decision. Raises ValueError without ftfy."""
        try:
            import ftfy
        except ImportError:
            raise ValueError(
                "repair needs the curate extra: pip install 'moebius[curate]'"
            ) from None
        config = ftfy.TextFixerConfig(
            unescape_html=False,
            uncurl_quotes=False,
            fix_character_width=False,
            remove_control_chars=False,
            fix_line_breaks=False,
            explain=False,
        )

        def decide(document: Document) -> Decision:
            text = document.text
            if not text.isascii():
                text = ftfy.fix_text(text, config)
            return document.with_text(cleaned(text), "repair")

        return decide


def cleaned(text: str) -> str:
    """NFC, lines ended by newlines alone, no control characters, no trailing blanks."""
    text = _LINE_ENDS.sub("\n", _TERMINAL.sub("", text))
    text = _UNWANTED.sub("", text)
    if not text.isascii():
        # a lone surrogate cannot be written as UTF-8
        text = text.encode("utf-8", "replace").decode()
        text = unicodedata.normalize("NFC", text)
    return _TRAILING.sub("", text).strip("\n")
