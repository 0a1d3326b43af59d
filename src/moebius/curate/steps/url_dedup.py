"""URL deduplication over the whole corpus: of the pages of one address the newest is kept.

Llama 3 (section 3.1.1) keeps the most recent version of a page for each URL. Two addresses are one
if they differ in scheme (http, https), `www.`, default port, fragment, tracking parameters, the
order of parameters, or a slash at the end of the path.
"""

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import final
from urllib.parse import SplitResult, urlsplit

import numpy as np
import regex
import xxhash

from moebius.curate.document import Document, Dropped
from moebius.curate.groups import by_place, repeats
from moebius.curate.step import CorpusStep, Decision, Round, Whole, look_up

_RECORD = np.dtype([("hash", "<u8"), ("check", "<u8"), ("age", "<u8"), ("place", "<u8")])
_PORTS = {"http": 80, "https": 443}
# Parameters that say where a visitor came from.
_TRACKING = regex.compile(
    "utm_.*|[dg]clid|twclid|fbclid|msclkid|yclid|[gw]braid|igshid|mc_[ce]id|_g[al]",
    regex.IGNORECASE,
)
_FIRST = datetime(1, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def normalised_url(url: str) -> str:
    """What two addresses of the same page have in common."""
    url = url.strip()
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, scheme = _host(parts), parts.scheme
    except ValueError:
        return url
    query = "&".join(sorted(one for one in parts.query.split("&") if one and not _tracks(one)))
    prefix = "" if scheme in _PORTS else f"{scheme}:"
    return f"{prefix}//{host}{parts.path.rstrip('/')}{'?' if query else ''}{query}"


def _host(parts: SplitResult) -> str:
    host = (parts.hostname or "").rstrip(".").removeprefix("www.")
    usual = parts.port is None or parts.port == _PORTS.get(parts.scheme)
    return host if usual else f"{host}:{parts.port}"


def _tracks(parameter: str) -> bool:
    return _TRACKING.fullmatch(parameter.partition("=")[0]) is not None


def microseconds(date: str) -> int:
    """An ISO 8601 date as microseconds from the year 1 on, plus a day; 0 where it is none.

    A year or month alone is its first day; without a zone it is UTC.
    """
    date = date.strip()
    if regex.fullmatch(r"\d{4}(-\d{2})?", date, regex.ASCII):
        date = f"{date}-01-01"[:10]
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        return 0
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - _FIRST + timedelta(days=1)) // _MICROSECOND


@final
class _Addresses(Round):
    def records(self, document: Document, place: int, known: np.ndarray | None) -> np.ndarray:
        """The address's hash (128 bits), and how far its date is from the end of time."""
        if not document.url:
            return np.zeros(0, _RECORD)
        url = normalised_url(document.url).encode("utf-8", "surrogatepass")
        check, name = divmod(xxhash.xxh3_128_intdigest(url), 1 << 64)
        age = (1 << 64) - 1 - microseconds(document.date)
        return np.array([(name, check, age, place)], _RECORD)

    def settle(self, records: np.ndarray) -> np.ndarray:
        return repeats(records, ("hash", "check"))

    def unite(self, findings: np.ndarray) -> np.ndarray:
        return by_place(findings)


@final
class _NewestOfAddress(Whole):
    def __init__(self) -> None:
        self.rounds = (_Addresses(),)

    def apply(self, document: Document, place: int, verdicts: np.ndarray) -> Decision:
        found = look_up(verdicts, place)
        if found is None:
            return document
        return Dropped("another page of the same URL kept", f"that of place {found['kept']}")


@final
@dataclasses.dataclass(frozen=True)
class UrlDedup(CorpusStep):
    """Keep the newest document of each URL; of equally new ones, or without dates, the first.

    Documents without a URL pass.
    """

    def build(self) -> Whole:
        """The one round and the decision."""
        return _NewestOfAddress()
