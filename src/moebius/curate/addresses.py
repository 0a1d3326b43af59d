"""Web addresses: their parts, and the site a host belongs to.

Nothing here raises: what is no address has an empty host. The site is the registered domain, found
without network and without a list that changes from release to release: the last two labels of the
host; three where the last two are a country's category (co.uk, com.br) or a host of many people's
sites (github.io, blogspot.com).
"""

import re
from typing import NamedTuple

# What is read of an address; servers take no longer ones.
LONGEST = 8192
_PARTS = re.compile(r"(?:([a-z][a-z0-9+.\-]{0,30}):)?//([^/?#]*)([^?#]*)(?:\?([^#]*))?", re.I)
_BARE = re.compile(r"[^/?#:@\s]{1,253}\.[^/?#:@\s]{1,63}(?::\d{1,5})?(?:[/?#]|$)")
_NAME = re.compile(r"[a-z0-9._\-]+")
_IPV4 = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}")

# Second labels under a country's two letters that many registrants share.
_CATEGORIES = """
ac ad adv art asn asso biz blog club co com coop ebiz edu eng firm game gen go gob gouv gov govt
gr gub id idv ind info int judiciary jus kr leg lg ltd me med mil ministry mus museum name ne net
nhs nic nom nt or org parliament plc police presse priv pro sch school tm tv web
"""
_CATEGORY = frozenset(_CATEGORIES.split())
# Countries whose categories are the rule; elsewhere `com.de` and `co.at` are names like any.
_WITH_CATEGORIES = """
ac ae af ag ai al am ao ar at au aw az ba bb bd bh bi bj bm bn bo br bs bt bw by bz ci ck cm cn co
cr cu cv cw cy dm do dz ec ee eg es et fj fm fr gd ge gh gi gl gn gp gr gt gu gy hk hn hr ht hu id
il im in io iq ir je jm jo jp ke kg kh ki km kp kr kw ky kz la lb lc lk lr ls lv ly ma mg mk ml mm
mo ms mt mu mv mw mx my mz na nf ng ni np nr nz om pa pe pf pg ph pk pl pr ps pt py qa re ro rs ru
rw sa sb sc sd sg sh sl sn so ss st sv sy sz th tj tm tn to tr tt tw tz ua ug uk uy uz vc ve vi vn
vu ws ye za zm zw
"""
_COUNTRY = frozenset(_WITH_CATEGORIES.split())
_SHARED_HOSTS = """
000webhostapp.com altervista.org appspot.com azurewebsites.net bitbucket.io blog.com blogspot.com
cloudfront.net deviantart.com fandom.com firebaseapp.com github.io gitlab.io hatenablog.com
herokuapp.com jimdo.com livejournal.com medium.com myshopify.com netlify.app over-blog.com
pages.dev readthedocs.io substack.com tripod.com tumblr.com typepad.com ucoz.ru vercel.app web.app
webnode.com weebly.com wikidot.com wixsite.com wordpress.com workers.dev
"""
_SHARED_HOST = frozenset(_SHARED_HOSTS.split())


class Address(NamedTuple):
    """The parts of a web address, scheme and host in lower case, without user name and fragment."""

    scheme: str
    host: str
    port: str
    path: str
    query: str


def split_address(url: str) -> Address:
    """The parts of an address; `example.org/x` counts as one. Empty host where it is none."""
    url = url[:LONGEST].strip()
    match = _PARTS.match(url)
    if match is None and _BARE.match(url):
        match = _PARTS.match("//" + url)
    if match is None:
        return Address("", "", "", "", "")
    scheme, place, path, query = (part or "" for part in match.groups())
    place = place.rpartition("@")[2]
    host, colon, port = place, "", ""
    if not place.endswith("]"):
        host, colon, port = place.rpartition(":")
        if not colon:
            host, port = place, ""
    return Address(scheme.lower(), _host(host), port, path, query)


def site_of(url: str) -> str:
    """The registered domain of an address, `news.example.co.uk` -> example.co.uk; may be empty."""
    return registered_domain(split_address(url).host)


def registered_domain(host: str) -> str:
    """The registered domain of a host; an IP address or a single label is its own."""
    if _IPV4.fullmatch(host) or host.startswith("["):
        return host
    labels = [label for label in host.split(".") if label]
    if len(labels) <= 2:
        return ".".join(labels)
    count = 3 if labels[-1] in _COUNTRY and labels[-2] in _CATEGORY else 2
    shared = ".".join(labels[-2:]) in _SHARED_HOST
    if shared or (len(labels) > count and labels[-count] == "blogspot"):
        count += 1
    return ".".join(labels[-count:])


def without_www(host: str) -> str:
    """`www.example.org` -> example.org."""
    return host[4:] if host.startswith("www.") and host.count(".") > 1 else host


def _host(host: str) -> str:
    host = host.lower().strip(".")
    if host.isascii():
        return host
    try:
        name = host.encode("idna").decode("ascii")
    except UnicodeError:
        return host
    # Some letters stand for a space, a slash or a colon, which would make another address of it.
    return name if _NAME.fullmatch(name) else host
