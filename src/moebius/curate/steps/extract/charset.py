"""The characters of a page: byte order mark, UTF-8, what it declares, at last a guess.

Bytes of valid UTF-8 with characters beyond ASCII are UTF-8 whatever the page says: texts in other
charsets are hardly ever valid in it, and pages that lie about it are common. Declared names mean
what browsers take them for (WHATWG Encoding: "latin-1" is windows-1252).
"""

import codecs

import regex

_MARKS = [
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
]
_DECLARED = regex.compile(
    rb"<(?:meta|\?xml)\b[^>]{0,500}?(?:charset|encoding)\s*=\s*[\"']?([\w.:-]+)", regex.I
)
_SUPERSETS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
    # a page whose declaration could be read is not in them
    "utf-16": "utf-8",
    "utf-16-le": "utf-8",
    "utf-16-be": "utf-8",
    "utf-32": "utf-8",
}
_NAMES = {"x-sjis": "cp932", "windows-31j": "cp932", "ks_c_5601-1987": "cp949", "x-gbk": "gb18030"}
_SEVEN_BITS = {"iso2022_jp", "hz"}
_SAMPLE = 1 << 16


def decode(raw: bytes, declared: str = "") -> str:
    """The text of a page's bytes; `declared` is the charset that the server named, if any."""
    for mark, name in _MARKS:
        if raw.startswith(mark):
            return raw[len(mark) :].decode(name, "replace")
    named = _known(declared)
    if declared.lower().startswith("utf-16") and b"\0" in raw[:200]:
        return raw.decode("utf-16-be" if raw[:1] == b"\0" else "utf-16-le", "replace")
    if not named:
        found = _DECLARED.search(raw[:4096])
        named = _known(found[1].decode("ascii", "replace")) if found else ""
    for name in (named if named in _SEVEN_BITS else "", "utf-8", named):
        text = _decoded(raw, name) if name else None
        if text is not None:
            return text
    return raw.decode(_guessed(raw, named), "replace")


def _known(name: str) -> str:
    """The codec that browsers use for a declared name, "" if there is none."""
    try:
        codec = codecs.lookup(_NAMES.get(name.lower(), name)).name
    except (LookupError, ValueError):
        return ""
    codec = _SUPERSETS.get(codec, codec)
    try:
        b"".decode(codec)
    except LookupError:
        return ""
    return codec


def _decoded(raw: bytes, name: str) -> str | None:
    try:
        return raw.decode(name)
    except (UnicodeDecodeError, ValueError):
        return None


def _guessed(raw: bytes, named: str) -> str:
    """The likeliest charset of bytes that are valid neither in UTF-8 nor in the declared one."""
    import charset_normalizer

    other = sum(byte > 127 for byte in raw[:_SAMPLE])
    # few faults: a page that was cut, or pasted together
    for name in (named, "utf-8"):
        if name and raw[:_SAMPLE].decode(name, "replace").count("\ufffd") * 10 < other:
            return name
    start = next((i for i, byte in enumerate(raw) if byte > 127), 0)
    best = charset_normalizer.from_bytes(raw[max(0, start - 100) : start + _SAMPLE // 4]).best()
    return best.encoding if best else "cp1252"
