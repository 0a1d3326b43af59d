"""A row of a dataset as a document: which fields hold what."""

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass

from moebius.curate.document import Document, Kind, Unread
from moebius.curate.languages import code_of
from moebius.curate.read import LIMIT
from moebius.curate.read.sniff import clean_url
from moebius.curate.read.streams import TOO_LARGE
from moebius.data.readers import TEXT_FIELDS

_DATE = re.compile(r"\d{4}(-\d\d(-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:?\d\d)?)?)?)?")


@dataclass(frozen=True)
class Fields:
    """The names of a row's fields, empty for none; `text` empty means `text`, else `content`."""

    text: str = ""
    html: str = ""
    url: str = "url"
    date: str = "date"
    language: str = "language"
    id: str = ""

    def __post_init__(self) -> None:
        if self.text and self.html:
            raise ValueError("give a field of text or of html, not both")

    @property
    def needed(self) -> tuple[str, ...]:
        """The names of which one must be there."""
        if self.html:
            return (self.html,)
        return (self.text,) if self.text else TEXT_FIELDS

    @property
    def missing(self) -> str:
        """What a row without them is called."""
        return "row without html" if self.html else "row without text"

    @property
    def names(self) -> tuple[str, ...]:
        """All names that are looked at."""
        extra = (self.url, self.date, self.language, self.id)
        return (*self.needed, *(name for name in extra if name))

    def document(
        self, key: str, row: object, size: int, source: str, kind: Kind
    ) -> Document | Unread:
        """The document of a row; `size` is what the row takes, for those that are none."""
        if not isinstance(row, Mapping):
            return Unread(key, self.missing, size)
        value = next((row[name] for name in self.needed if row.get(name) is not None), None)
        if not isinstance(value, str) and not (self.html and isinstance(value, bytes)):
            return Unread(key, self.missing, size)
        text = value if isinstance(value, str) else ""
        data = value if isinstance(value, bytes) else b""
        if text:
            text = valid(text)
            data = text.encode()
        if len(data) > LIMIT:
            return Unread(key, TOO_LARGE, len(data))
        if not data.strip() or (text and not text.strip()):
            return Unread(key, "empty document", len(data))
        identifier = row.get(self.id) if self.id else None
        return Document(
            key,
            "" if self.html else text,
            source=source,
            kind=kind,
            raw=data if self.html else b"",
            url=clean_url(valid(_text(row, self.url))),
            date=_date(row.get(self.date) if self.date else None),
            language=_language(_text(row, self.language)),
            labels={} if identifier is None else {"id": valid(str(identifier)[:256])},
        )


def _text(row: Mapping[str, object], name: str) -> str:
    value = row.get(name) if name else None
    return value if isinstance(value, str) else ""


def valid(text: str) -> str:
    """The text with halves of surrogate pairs joined, or replaced where the other is not there."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _date(value: object) -> str:
    if isinstance(value, datetime.date):
        return value.isoformat()
    text = value.strip() if isinstance(value, str) and len(value) < 64 else ""
    return text.replace(" ", "T") if _DATE.fullmatch(text) else ""


def _language(name: str) -> str:
    try:
        return code_of(name.strip()) if name else ""
    except ValueError:
        return ""
