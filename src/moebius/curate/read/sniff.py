"""What bytes are, told from themselves: HTML or not, text or binary, and a page's own address.

A server's word on the type is believed only where the bytes leave it open; the marks are those of
the WHATWG's MIME sniffing standard, looked for further into the page than it does.
"""

import html
import re

HEAD = 64 << 10
_IMAGE = (b"\x89PNG", b"GIF8", b"\xff\xd8\xff", b"\x00\x00\x01\x00", b"II*\x00", b"MM\x00*")
_ARCHIVE = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")
_CONTROL = bytes([*range(9), *range(14, 32), 127])
_STRONG = re.compile(rb"<!doctype\s+html|<html[\s>]", re.I)
_XML_PAGE = re.compile(rb"<html[\s>]|<[a-z]{1,9}:html[\s>]", re.I)
_TAG = re.compile(
    rb"<(?:a|abbr|article|b|base|blockquote|body|br|center|code|div|dl|em|font|footer|form|frameset"
    rb"|h[1-6]|head|header|hr|i|iframe|img|li|link|main|meta|nav|noscript|ol|p|pre|script|section"
    rb"|span|strong|style|table|tbody|td|title|tr|tt|ul)[\s>/]|<!--",
    re.I,
)
_HTML_TYPES = ("text/html", "application/xhtml", "application/vnd.wap.xhtml")


def control_share(data: bytes) -> float:
    """The share of control bytes that no text uses."""
    return (len(data) - len(data.translate(None, _CONTROL))) / len(data) if data else 0.0


def not_html(page: bytes, declared: str = "") -> str:
    """Why bytes are no HTML page; empty where they are one. `declared` is the type claimed."""
    head = page[:HEAD]
    if head.startswith(_IMAGE) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return "not HTML: image"
    if head[:1024].lstrip().startswith(b"%PDF-"):
        return "not HTML: PDF"
    if head.startswith(_ARCHIVE):
        return "not HTML: archive"
    # UTF-16 has a NUL beside each character of a tag.
    bare = head.removeprefix(b"\xef\xbb\xbf")
    bare = bare.removeprefix(b"\xff\xfe").removeprefix(b"\xfe\xff").replace(b"\0", b"").lstrip()
    says_html = not declared or declared.strip().lower().startswith(_HTML_TYPES)
    if bare[:5].lower() == b"<?xml" and not _XML_PAGE.search(bare):
        return "not HTML: XML"
    if bare.startswith(b"<") and (_STRONG.search(bare) or _TAG.match(bare)):
        return ""
    if control_share(head) > 0.01 and not _STRONG.search(bare):
        return "not HTML: binary"
    if says_html and (_STRONG.search(bare) or (bare[:1] not in b"{[" and _TAG.search(bare))):
        return ""
    if bare.startswith((b"{", b"[")):
        return "not HTML: JSON"
    return "not HTML: XML" if bare.startswith(b"<") else "not HTML: plain text"


_LINK = re.compile(rb"<(link|meta)\b([^<>]*)>", re.I)
_CANONICAL = re.compile(rb"\brel\s*=\s*[\"']?canonical\b", re.I)
_OPEN_GRAPH = re.compile(rb"\b(?:property|name)\s*=\s*[\"']?og:url\b", re.I)
_VALUE = rb"\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s\"'>]+))"
_HREF = re.compile(rb"\bhref" + _VALUE, re.I)
_CONTENT = re.compile(rb"\bcontent" + _VALUE, re.I)


def page_url(page: bytes) -> str:
    """The address a page gives itself: its canonical link, else its og:url, else nothing."""
    head = page[:HEAD]
    second = ""
    if b"canonical" not in head and b"og:url" not in head:
        return ""
    for match in _LINK.finditer(head):
        inside = match[2]
        if match[1].lower() == b"link" and _CANONICAL.search(inside):
            if url := _address(_HREF.search(inside)):
                return url
        elif not second and _OPEN_GRAPH.search(inside):
            second = _address(_CONTENT.search(inside))
    return second


def _address(match: re.Match[bytes] | None) -> str:
    if match is None:
        return ""
    value = next(group for group in match.groups() if group is not None)
    url = clean_url(html.unescape(value.decode("utf-8", "replace")))
    return url if url.lower().startswith(("http://", "https://")) else ""


def clean_url(url: str) -> str:
    """An address without the brackets, blanks and control characters that do not belong to it."""
    url = "".join(char for char in url[:8192] if char.isprintable()).strip()
    return url[1:-1].strip() if url.startswith("<") and url.endswith(">") else url
