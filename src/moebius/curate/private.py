"""Private data in a text: where e-mail addresses, phone, card and account numbers and the like are.

Each kind is found by a pattern and then checked (checksums of cards and accounts, public ranges of
IP addresses, lengths), so that version numbers, dates and prices stay. Searches are linear on any
text: a pattern starts at one kind of character and is bounded from there.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

PrivateKind = Literal["email", "iban", "card", "ssn", "ip", "phone"]
# Where two kinds meet in one place the earlier of these is meant.
PRIVATE_KINDS: tuple[PrivateKind, ...] = get_args(PrivateKind)


class Found(NamedTuple):
    """One piece of private data: its place in the text and its kind."""

    start: int
    end: int
    kind: PrivateKind


def find(text: str, kinds: tuple[PrivateKind, ...] = PRIVATE_KINDS) -> list[Found]:
    """All private data of the kinds, in order, without overlaps."""
    digits = _HAS_NUMBER.search(text) is not None
    everything = [
        (start, rank, Found(start, end, kind))
        for rank, kind in enumerate(PRIVATE_KINDS)
        if kind in kinds and (digits or kind == "email")
        for start, end in _FINDERS[kind](text)
    ]
    kept: list[tuple[int, Found]] = []
    for _, rank, found in sorted(everything):
        if not kept or found.start >= kept[-1][1].end:
            kept.append((rank, found))
        elif rank < kept[-1][0]:
            kept[-1] = (rank, found)
    return [found for _, found in kept]


def mask(text: str, kinds: tuple[PrivateKind, ...] = PRIVATE_KINDS) -> tuple[str, list[Found]]:
    """The text with each piece replaced by its kind, as `<EMAIL>`, and what was replaced."""
    found = find(text, kinds)
    parts: list[str] = []
    end = 0
    for piece in found:
        parts += [text[end : piece.start], f"<{piece.kind.upper()}>"]
        end = piece.end
    return "".join([*parts, text[end:]]) if found else text, found


Spans = Iterator[tuple[int, int]]
_HAS_NUMBER = re.compile(r"\d[\d .:()/\-A-Fa-f]{5}|\d::", re.ASCII)

# --- e-mail ---------------------------------------------------------------------------------------

_DOMAIN = re.compile(r"@([A-Za-z0-9\-]{1,63}(?:\.[A-Za-z0-9\-]{1,63}){1,8}+)")
_LONGEST_LOCAL = 64
_MARKS = frozenset("._%+-'!#$&*=?^`{|}~")
# Names of files, not of domains: logo@2x.png.
_NOT_TOP = {"png", "jpg", "jpeg", "gif", "webp", "svg", "css", "js", "html", "php", "py"}


def _emails(text: str) -> Spans:
    for match in _DOMAIN.finditer(text):
        labels = match[1].rstrip("-").split(".")
        top = labels[-1].lower()
        named = (top.isalpha() and len(top) > 1) or top.startswith("xn--")
        if not named or top in _NOT_TOP or any(label[:1] in ("", "-") for label in labels):
            continue
        at = start = match.start()
        while start > 0 and at - start <= _LONGEST_LOCAL and _in_local(text[start - 1]):
            start -= 1
        while start < at and not text[start].isalnum():
            start += 1
        if 0 < at - start <= _LONGEST_LOCAL and text[at - 1] != ".":
            yield start, match.start(1) + len(match[1].rstrip("-"))


def _in_local(character: str) -> bool:
    """Letters and digits of Latin script, and some marks."""
    return character in _MARKS or (character < "\u0250" and character.isalnum())


# --- numbers of accounts --------------------------------------------------------------------------

_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9][A-Z])[A-Z]\d\d(?=((?: ?[A-Z0-9]){11,30}+))", re.ASCII)
_IBAN_LENGTHS = """
AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29
ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20
LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25
QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20
"""
_LENGTHS = {item[:2]: int(item[2:]) for item in _IBAN_LENGTHS.split()}


def _ibans(text: str) -> Spans:
    for match in _IBAN.finditer(text):
        length = _LENGTHS.get(match[0][:2], 99)
        written = match[0] + match[1]
        places = [place for place, c in enumerate(written) if c != " "][:length]
        end = match.start() + places[-1] + 1
        if len(places) < length or text[end : end + 1].isalnum():
            continue
        account = "".join(written[place] for place in places)
        if int("".join(str(int(c, 36)) for c in account[4:] + account[:4])) % 97 == 1:
            yield match.start(), end


_CARD = re.compile(
    r"""\d (?<! [\w.+\-] \d ) \d{3}           # not inside a word or a longer number
        (?: ([ \-]?) \d{4} \1 \d{4} \1 \d{4} (?: \1 \d{1,3} )?
          | ([ \-]?) \d{6} \2 \d{4,5} )
        (?! [\w\-] | [.,]\d )""",
    re.ASCII | re.VERBOSE,
)
_ISSUER = re.compile(
    r"4|5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)|3[4-9]|30[0-5]|6(?:011|4[4-9]|5|2)"
)


def _cards(text: str) -> Spans:
    for match in _CARD.finditer(text):
        digits = [int(c) for c in match[0] if c.isdigit()]
        doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
        if (sum(doubled) + sum(digits[-1::-2])) % 10 == 0 and _ISSUER.match(match[0]):
            yield match.span()


_SSN = re.compile(
    r"[0-8] (?<! [\w.\-] [0-8] ) \d\d - (?!00) \d\d - (?!0000) \d{4} (?! [\w\-] | \.\d )",
    re.ASCII | re.VERBOSE,
)


def _ssns(text: str) -> Spans:
    return (m.span() for m in _SSN.finditer(text) if m[0][:3] not in ("000", "666"))


# --- internet addresses ---------------------------------------------------------------------------

_IPV4 = re.compile(r"\d(?<![\w.\-]\d)\d{0,2}(?:\.\d{1,3}){3}(?![\w\-]|\.\d)", re.ASCII)
# Addresses in use on the internet are 2000::/3, so that the first group is whole.
_IPV6 = re.compile(r"[23](?<![\w:.][23])[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,35}+(?![\w:])")
# Four numbers all below this are a version or a section.
_VERSION_BELOW = 20


def _ips(text: str) -> Spans:
    for match in _IPV4.finditer(text):
        before = text[max(0, match.start() - 2) : match.start()]
        in_path = before.endswith("/") and before != "//"
        small = all(int(part) < _VERSION_BELOW for part in match[0].split("."))
        if not in_path and not small and _is_public(match[0]):
            yield match.span()
    for match in _IPV6.finditer(text):
        end = match.end() - (match[0].endswith(":") and not match[0].endswith("::"))
        if _is_public(text[match.start() : end]):
            yield match.start(), end


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


# --- phone ----------------------------------------------------------------------------------------

_DIGITS = re.compile(r"\d(?<![\w.,]\d)(?:[ .\-/()]{0,2}\d){6,40}+", re.ASCII)
_AMERICAN = re.compile(
    r"""(?<! [\d.\-/] ) (?: 1 [ .\-] )?
        (?: \( [2-9]\d\d \) [ ]? [2-9]\d\d [.\-] | [2-9]\d\d ([.\-]) [2-9]\d\d \1 )
        \d{4} (?! [.\-/]? \d | \w )""",
    re.ASCII | re.VERBOSE,
)
_DATE = re.compile(
    r"(?:1[89]|20)\d\d([./\-])\d\d?\1\d\d?(?!\d)|\d\d?([./\-])\d\d?\2(?:1[89]|20)\d\d"
)
# A phone number does not end in a group of one digit.
_DECIMAL = re.compile(r"[ .\-/()]\d$")
# How far before a number the word for phone may stand.
_REACH = 24
_LABEL = re.compile(
    r"""\b (?: tel | tele?phones? | telefon[oe]? | teléfono | tél(?:éphone)? | telefoon | phones?
             | fax | mobile | mobil | móvil | cell | handy | call(?:\ us|\ me)? | whatsapp | celular
             | тел | телефон )
        (?: \ (?: numbers? | no | nr | us | me | at | on | is ) ){0,2} [\ .:=()+\-]{0,4} $
      | (?: 电话 | 電話 | 手机 | 手機 | ☎ | 📞 ) [\ .:\uff1a=()+\-]{0,4} $""",
    re.IGNORECASE | re.VERBOSE,
)


def _phones(text: str) -> Spans:
    for match in _DIGITS.finditer(text):
        start, end = match.span()
        before = text[max(0, start - _REACH) : start]
        opened = len(before) - len(before.rstrip("("))
        digits = sum(c.isdigit() for c in match[0])
        stem = before.rstrip("(")
        if text[end : end + 1].isalnum() or _DECIMAL.search(match[0]):
            continue
        if stem.endswith("+") and 8 <= digits <= 15 and match[0][0] != "0":
            if not stem[:-1][-1:].isalnum():
                yield start - opened - 1, end
        elif digits <= 15 and _LABEL.search(before) and not _DATE.match(match[0]):
            yield start - opened, end
        else:
            yield from (m.span() for m in _AMERICAN.finditer(text, start - opened, end))


_FINDERS: dict[PrivateKind, Callable[[str], Spans]] = {
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "ssn": _ssns,
    "ip": _ips,
    "phone": _phones,
}
