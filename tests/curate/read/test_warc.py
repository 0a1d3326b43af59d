"""WARC files, whole, lying and damaged: each record is a document or counted; none is lost."""

import gzip
import io
import json
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.curate.document import Document, Unread
from moebius.curate.read import LIMIT
from moebius.curate.read.response import unchunked
from moebius.curate.read.warc import Warc

from .reading import http, packed, page, read_all, reasons, record, shared

HTML = "Content-Type: text/html"


def read_bytes(
    folder: Path, data: bytes, name: str = "a.warc"
) -> tuple[list[Document], list[Unread]]:
    (folder / name).write_bytes(data)
    return read_all(Warc(path=str(folder / name), name="crawl"))


@pytest.mark.parametrize("gzipped", [True, False])
def test_what_warcio_writes_is_read(tmp_path: Path, gzipped: bool) -> None:
    warcio = pytest.importorskip("warcio", reason="needs the curate extra")
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    assert warcio
    path = tmp_path / ("a.warc.gz" if gzipped else "a.warc")
    with path.open("wb") as stream:
        writer = WARCWriter(stream, gzip=gzipped)
        made = [writer.create_warcinfo_record("a", {"software": "test"})]
        for i in range(5):
            headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], "HTTP/1.1")
            url, body = f"http://a.example/{i}", io.BytesIO(page(f"text {i}"))
            made.append(
                writer.create_warc_record(url, "response", payload=body, http_headers=headers)
            )
            asked = io.BytesIO(b"GET / HTTP/1.1\r\n\r\n")
            made.append(writer.create_warc_record(url, "request", payload=asked))
        made.append(
            writer.create_warc_record(
                "file:///b", "resource", io.BytesIO(page("b")), warc_content_type="text/html"
            )
        )
        for one in made:
            writer.write_record(one)
            one.raw_stream.close()
    documents, unread = read_all(Warc(path=str(path)))
    assert [d.raw for d in documents] == [*(page(f"text {i}") for i in range(5)), page("b")]
    assert [d.url for d in documents][:2] == ["http://a.example/0", "http://a.example/1"]
    assert all(d.text == "" and d.kind == "web" and d.date[:2] == "20" for d in documents)
    assert documents[0].key == f"{path.name}#1"
    assert reasons(unread) == {"warcinfo record": 1, "request record": 5}


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_no_real_page_is_lost_for_its_headers(tmp_path: Path, ending: str) -> None:
    """The pages of a public benchmark, in records that say little, or what is not so."""
    folder = shared("web/article-extraction-benchmark/html")
    pages = [gzip.decompress(path.read_bytes()) for path in sorted(folder.iterdir())]
    lies = [[], [HTML], ["Content-Type: image/png"], ["Content-Type: application/octet-stream"]]
    parts = [
        record(
            http(body, *lies[i % 4]),
            Content_Length=["", "0", "999999999999", str(len(body) // 2), "-7", "many"][i % 6],
        )
        for i, body in enumerate(pages)
    ]
    data = b"".join(packed(part, ending) for part in parts)
    documents, unread = read_bytes(tmp_path, data, f"a.warc{ending}")
    assert [d.raw for d in documents] == [body.rstrip(b"\r\n") for body in pages]
    assert len(documents) == 120 and not unread


OTHERS = {
    "not HTML: image": http(b"\x89PNG\r\n\x1a\n" + bytes(range(256)), HTML),
    "not HTML: PDF": http(b"%PDF-1.4 <html>", HTML),
    "not HTML: archive": http(b"PK\x03\x04" + bytes(99), HTML),
    "not HTML: JSON": http(b'{"a": "<b>"}', "Content-Type: application/json"),
    "not HTML: XML": http(b"<?xml version='1.0'?><rss></rss>", HTML),
    "not HTML: plain text": http(b"User-agent: *\n", "Content-Type: text/plain"),
    "not HTML: binary": http(bytes(range(256)) * 4, HTML),
    "error or redirect page": http(page("gone"), HTML, status="404 Not Found"),
    "empty document": http(b" \r\n", HTML),
    "unsupported content encoding": http(b"abc", HTML, "Content-Encoding: compress"),
    "document above 16 MiB": http(page("a " * LIMIT), HTML),
    "decompresses to more than the limit": http(
        gzip.compress(page("a" * LIMIT)), HTML, "Content-Encoding: gzip"
    ),
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("reason", OTHERS)
def test_what_is_no_page_is_counted(tmp_path: Path, reason: str, ending: str) -> None:
    before, after = record(http(page("a"))), record(http(page("b")))
    data = b"".join(packed(part, ending) for part in (before, record(OTHERS[reason]), after))
    documents, unread = read_bytes(tmp_path, data, f"a.warc{ending}")
    assert [d.raw for d in documents] == [page("a"), page("b")]
    assert [(u.key, u.reason) for u in unread] == [(f"a.warc{ending}#1", reason)]


@pytest.mark.parametrize(
    "type_", ["request", "metadata", "warcinfo", "revisit", "conversion", "continuation"]
)
def test_records_of_other_types_are_counted(tmp_path: Path, type_: str) -> None:
    _, unread = read_bytes(tmp_path, record(page("a"), type_))
    assert reasons(unread) == {f"{type_} record": 1}


@pytest.mark.parametrize("type_", [None, "respons"])
def test_a_record_of_no_known_type_is_told_by_its_bytes(tmp_path: Path, type_: str | None) -> None:
    parts = [record(x, type_) for x in (http(page("a")), page("b"), b"text", b"GET / HTTP/1.1")]
    documents, unread = read_bytes(tmp_path, b"".join(parts))
    assert [d.raw for d in documents] == [page("a"), page("b")]
    assert reasons(unread) == {"record of no known type": 2}


def test_address_and_date(tmp_path: Path) -> None:
    linked = page("a").replace(
        b"<body>", b"<link rel='canonical' href='https://c.example/?a&amp;b'>"
    )
    parts = [
        record(page("a"), "resource", url="<http://b.example/x y>"),
        record(linked, "resource", url="", WARC_Date="yesterday"),
        record(page("c"), "resource", url="http://\x00n\x7f.example/\ud7ff\u00e9"),
    ]
    documents, _ = read_bytes(tmp_path, b"".join(parts))
    assert [(d.url, d.date) for d in documents] == [
        ("http://b.example/x y", "2024-05-06T07:08:09Z"),
        ("https://c.example/?a&b", ""),
        ("http://n.example/\u00e9", "2024-05-06T07:08:09Z"),
    ]


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def chunked(data: bytes, size: int = 7) -> bytes:
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x;a=b\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


BODY = page("a page of text, again and again, again and again")
ENCODED = {
    "gzip": (gzip.compress(BODY), ["Content-Encoding: gzip"]),
    "x-gzip, upper case": (gzip.compress(BODY), ["CONTENT-ENCODING:X-GZIP"]),
    "deflate": (zlib.compress(BODY), ["Content-Encoding: deflate"]),
    "raw deflate": (raw_deflate(BODY), ["Content-Encoding: deflate"]),
    "twice": (gzip.compress(zlib.compress(BODY)), ["Content-Encoding: deflate, gzip"]),
    "zstandard": (None, ["Content-Encoding: zstd"]),
    "gzip undone before": (BODY, ["Content-Encoding: gzip"]),
    "gzip not named": (gzip.compress(BODY), []),
    "chunked": (chunked(BODY), ["Transfer-Encoding: chunked"]),
    "chunked gzip": (
        chunked(gzip.compress(BODY)),
        ["Transfer-Encoding: chunked", "Content-Encoding: gzip"],
    ),
    "transfer gzip": (chunked(gzip.compress(BODY)), ["Transfer-Encoding: gzip, chunked"]),
    "chunks undone before": (BODY, ["Transfer-Encoding: chunked"]),
    "identity": (BODY, ["Content-Encoding: identity"]),
    "lying length": (BODY, ["Content-Length: 3"]),
}


@pytest.mark.parametrize("name", ENCODED)
def test_encodings_are_undone(tmp_path: Path, name: str) -> None:
    body, headers = ENCODED[name]
    body = packed(BODY, ".zst") if body is None else body
    documents, unread = read_bytes(tmp_path, record(http(body, *headers)))
    assert [d.raw for d in documents] == [BODY] and not unread


def test_brotli_is_undone_where_it_is_installed(tmp_path: Path) -> None:
    brotli = pytest.importorskip("brotli", reason="needs the brotli package")
    body = brotli.compress(BODY)
    documents, _ = read_bytes(tmp_path, record(http(body, "Content-Encoding: br")))
    assert [d.raw for d in documents] == [BODY]
    bomb = http(brotli.compress(bytes(8 * LIMIT)), "Content-Encoding: br")
    assert reasons(read_bytes(tmp_path, record(bomb))[1]) == {
        "decompresses to more than the limit": 1
    }


def test_a_page_cut_short_is_kept_as_far_as_it_goes(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(3000).hex()
    body = gzip.compress(page(noise))[:2000]
    documents, _ = read_bytes(tmp_path, record(http(body, "Content-Encoding: gzip")))
    assert page(noise).startswith(documents[0].raw) and len(documents[0].raw) > 1000


@given(st.binary(max_size=300), st.integers(1, 50))
def test_chunks_are_joined(data: bytes, size: int) -> None:
    assert unchunked(chunked(data, size)) == data
    assert unchunked(b"no chunks" + data) == b"no chunks" + data


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 1.0])
def test_a_damaged_member_costs_its_own_record(tmp_path: Path, ending: str, place: float) -> None:
    noise = random.Random(1)
    parts = [packed(record(http(page(noise.randbytes(400).hex()))), ending) for _ in range(5)]
    at = round(place * (len(parts[2]) - 1))
    parts[2] = flipped(parts[2], at)
    documents, unread = read_bytes(tmp_path, b"".join(parts), f"a.warc{ending}")
    # A frame of zstandard written without a checksum may decode to something else unnoticed.
    assert len(documents) + len(unread) == 5 and len(documents) >= 4
    if ending == ".gz":
        assert [(u.key, u.reason) for u in unread] == [("a.warc.gz#2", "damaged record")]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_file_cut_short(tmp_path: Path, ending: str) -> None:
    parts = [packed(record(http(page(f"text {i}" * 99))), ending) for i in range(3)]
    data = b"".join(parts)[: -len(parts[2]) // 2]
    documents, unread = read_bytes(tmp_path, data, f"a.warc{ending}")
    assert [d.raw for d in documents[:2]] == [page(f"text {i}" * 99) for i in range(2)]
    assert len(documents) + len(unread) == 3
    assert reasons(unread) == ({"damaged record": 1} if ending else {})


def test_records_compressed_together_and_across_members(tmp_path: Path) -> None:
    """One member for all, and members cut anywhere, as parallel compressors do."""
    data = b"".join(record(http(page(f"text {i}" * 50))) for i in range(20))
    expected = [page(f"text {i}" * 50) for i in range(20)]
    assert [d.raw for d in read_bytes(tmp_path, gzip.compress(data), "a.warc.gz")[0]] == expected
    blocks = [gzip.compress(data[i : i + 777]) for i in range(0, len(data), 777)]
    documents, unread = read_bytes(tmp_path, b"".join(blocks) + bytes(512), "b.warc.gz")
    assert [d.raw for d in documents] == expected and not unread


def test_bytes_between_records_are_counted(tmp_path: Path) -> None:
    one = record(http(page("a")))
    data = b"junk\n" + one + b"more junk" * 99 + b"\n\n" + one + b"WARC/1.0\r\nContent-Le\n" + one
    documents, unread = read_bytes(tmp_path, data)
    assert [d.raw[:9] for d in documents] == [b"<!DOCTYPE"] * 3
    assert reasons(unread) == {"damaged record": 2}
    assert documents[1].raw.startswith(page("a"))


def test_headers_without_an_end(tmp_path: Path) -> None:
    huge = b"WARC/1.0\r\n" + b"X-A: b\r\n" * 20_000
    documents, unread = read_bytes(tmp_path, huge + b"\n" + record(http(page("a"))))
    assert [d.raw for d in documents] == [page("a")] and reasons(unread) == {"damaged record": 1}


def test_a_page_that_shows_a_warc_is_one_page(tmp_path: Path) -> None:
    """An honest length is believed, whatever stands in the page."""
    shown = page("") + b"<pre>\r\n\r\n" + record(http(page("b")))
    documents, _ = read_bytes(tmp_path, record(http(shown)) + record(http(page("c"))))
    assert [d.raw for d in documents] == [shown, page("c")]


def test_a_dictionary_before_the_frames(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="needs the curate extra")
    noise = random.Random(2)
    words = [noise.randbytes(4).hex() for _ in range(300)]
    parts = [record(http(page(" ".join(noise.choices(words, k=99))))) for _ in range(200)]
    known = zstandard.train_dictionary(4096, parts)
    packer = zstandard.ZstdCompressor(dict_data=known)
    for stored in (known.as_bytes(), zstandard.compress(known.as_bytes())):
        head = b"\x5d\x2a\x4d\x18" + len(stored).to_bytes(4, "little") + stored
        data = head + b"".join(packer.compress(part) for part in parts)
        documents, unread = read_bytes(tmp_path, data, "a.warc.zst")
        assert len(documents) == 200 and not unread
        assert record(http(documents[7].raw)) == parts[7]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_a_file_of_nothing(tmp_path: Path, name: str) -> None:
    _, unread = read_bytes(tmp_path, b"", name)
    assert [(u.key, u.reason) for u in unread] == [(name, "empty document")]


def test_a_bomb_is_left_behind(tmp_path: Path) -> None:
    """A member of 72 MiB of zeros between pages, with the lengths wrong."""
    bomb = record(http(page("a"))) + record(http(bytes(72 << 20)), Content_Length="12")
    data = gzip.compress(bomb, 1) + gzip.compress(record(http(page("b"))))
    documents, unread = read_bytes(tmp_path, data, "a.warc.gz")
    assert [d.raw for d in documents] == [page("a"), page("b")]
    assert reasons(unread) == {"decompresses to more than the limit": 1}


def test_a_file_of_damage_is_given_up(tmp_path: Path) -> None:
    good = gzip.compress(record(http(page("a"))))
    documents, unread = read_bytes(tmp_path, good + b"\x1f\x8b\x08\xff" * 1500 + good, "a.warc.gz")
    assert len(documents) == 1
    assert [u.reason for u in unread] == ["damaged record", "too damaged to read on"]
    assert unread[1].num_bytes > len(good)


def test_one_damage_is_one_count(tmp_path: Path) -> None:
    good = gzip.compress(record(http(page("a"))))
    _, unread = read_bytes(tmp_path, b"\x1f\x8b\x08" + bytes(50), "a.warc.gz")
    assert reasons(unread) == {"damaged record": 1}
    documents, unread = read_bytes(tmp_path, b"\x1f\x8b\x08" + bytes(50) + good, "a.warc.gz")
    assert len(documents) == 1 and reasons(unread) == {"damaged record": 1}
    documents, unread = read_bytes(tmp_path, good + b"junk behind", "a.warc.gz")
    assert len(documents) == 1 and reasons(unread) == {"damaged record": 1}


@pytest.mark.parametrize("unit", [b"WARC/1.0\r\n", b"WARC/1.0\r\nA: b\r\n", record(page("a"))])
def test_many_beginnings_take_time_in_proportion(tmp_path: Path, unit: bytes) -> None:
    """None of them may make the parser look through the rest of the file again."""
    lying = unit.replace(b"Length: 5", b"Length: 1600000")
    documents, unread = read_bytes(tmp_path, lying * 20_000)
    assert len(documents) + len(unread) == 20_000


def test_files_are_sorted_into_tasks(tmp_path: Path) -> None:
    for name in ("b/2.warc.gz", "b/10.WARC", "a.warc.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(packed(record(http(page(name))), name.lower()))
    (tmp_path / "c.arc").write_bytes(b"old")
    reader = Warc(path=str(tmp_path))
    tasks, unread = reader.tasks(1)
    assert [task.files for task in tasks] == [("a.warc.zst",), ("b/10.WARC",), ("b/2.warc.gz",)]
    assert [(u.key, u.reason) for u in unread] == [("c.arc", "unknown kind of file")]
    assert len(reader.tasks(1 << 20)[0]) == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_leaves_each_record_counted(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes changed, removed or put in anywhere: no exception, and what is far from it is read."""
    ending = data.draw(st.sampled_from(["", ".gz", ".zst"]))
    parts = [packed(record(http(page(f"text {i} " * 20))), ending) for i in range(6)]
    at, cut = data.draw(st.integers(0, len(parts[0]))), data.draw(st.integers(0, 80))
    wrong = data.draw(st.binary(max_size=40))
    parts[3] = parts[3][:at] + wrong + parts[3][at + cut :]
    documents, unread = read_bytes(
        tmp_path_factory.mktemp("warc"), b"".join(parts), f"a.warc{ending}"
    )
    assert [d.raw for d in documents[:3]] == [page(f"text {i} " * 20) for i in range(3)]
    assert documents[-1].raw == page("text 5 " * 20)
    assert 5 <= len(documents) + len(unread) <= 8


def test_settings_are_json(tmp_path: Path) -> None:
    from moebius.config import from_json, to_json
    from moebius.curate.read import Reader

    data = json.loads(json.dumps(to_json(Warc(path="a", name="b"))))
    assert from_json(Reader, data) == Warc(path="a", name="b") and data["use"] == "warc"
