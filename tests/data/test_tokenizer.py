"""The tokenizer is lossless, never makes its special token from text, and is the same every
time.
"""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from moebius.data.tokenizer import Tokenizer, _segments, train_tokenizer

from .conftest import text_of

TOKENIZER = train_tokenizer((text_of(i) for i in range(50)), 300)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
CODE = st.text("ab_ \t\r\n(){}:.,'\"019", max_size=200)


@settings(deadline=None)
@given(st.one_of(TEXTS, CODE))
def test_any_text_comes_back_exactly(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == text.encode()
    assert TOKENIZER.document not in ids
    assert TOKENIZER.encode_batch([text, "x"])[0] == ids


@settings(deadline=None)
@given(st.text("ab_ \t\r\n()é:.'19", max_size=300), st.integers(1, 20))
def test_segments_have_the_tokens_of_the_whole(text: str, length: int) -> None:
    segments = _segments(text, length)
    assert "".join(segments) == text
    assert [i for segment in segments for i in TOKENIZER.encode(segment)] == TOKENIZER.encode(text)


def test_a_long_text_is_encoded_as_one() -> None:
    text = "\n".join(text_of(i, 40) for i in range(200))
    assert len(_segments(text)) > 1
    assert TOKENIZER.encode_batch(["a", text, ""]) == [
        TOKENIZER.encode("a"),
        TOKENIZER.encode(text),
        [],
    ]


def test_the_name_of_the_special_token_is_text(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for tokenizer in (TOKENIZER, Tokenizer.load(tmp_path / "tokenizer.json")):
        ids = tokenizer.encode("a<|document|>b")
        assert tokenizer.document == 0 and 0 not in ids
        assert tokenizer.decode(ids) == "a<|document|>b"
        assert tokenizer.decode([0, *tokenizer.encode("b")]) == "<|document|>b"
        assert tokenizer.token_bytes(0) == b"" and tokenizer.token_text(0) == "<|document|>"


def test_every_byte_has_a_token_and_texts_are_printable() -> None:
    single = {TOKENIZER.token_bytes(i) for i in range(TOKENIZER.vocab)}
    assert {bytes([byte]) for byte in range(256)} <= single
    texts = [TOKENIZER.token_text(i) for i in range(TOKENIZER.vocab)]
    assert all(text.isprintable() and text for text in texts)
    newline = next(i for i in range(TOKENIZER.vocab) if TOKENIZER.token_bytes(i) == b"\n")
    assert TOKENIZER.token_text(newline) == "\\n"


def test_training_is_repeatable_and_gives_at_most_what_was_asked() -> None:
    again = train_tokenizer((text_of(i) for i in range(50)), 300)
    assert again.to_json() == TOKENIZER.to_json() and again.vocab == 300
    assert 257 <= train_tokenizer(["ab ab"], 400).vocab < 300


def test_line_end_and_indentation_are_one_token() -> None:
    tokenizer = train_tokenizer(["if x:\n        return y\n" * 50], 300)
    tokens = [tokenizer.token_bytes(i) for i in tokenizer.encode("if x:\n        return y\n")]
    assert b":\n       " in tokens and b" return" in tokens


def published(*, letters: bool = True) -> tokenizers.Tokenizer:
    """A tokenizer as published models have them: specials of its own names, a hole in the ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if letters else ["a"]
    inner = tokenizers.Tokenizer(models.BPE({x: i for i, x in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    inner.decoder = decoders.Sequence([decoders.ByteLevel()])  # type: ignore[assignment]
    inner.add_special_tokens(["<|end of text|>", "<|ü|>"])
    return inner


@settings(deadline=None)
@given(st.one_of(TEXTS, CODE))
def test_a_published_tokenizer_serves(text: str) -> None:
    tokenizer = Tokenizer(published(), "<|end of text|>")
    assert tokenizer.document == 256 and tokenizer.vocab == 258
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and max(ids, default=0) < 256
    assert tokenizer.encode_batch([text, text])[1] == ids
    assert tokenizer.decode([256, 257, 999]) == "<|end of text|><|ü|>"
    assert tokenizer.token_bytes(257) == "<|ü|>".encode() and tokenizer.token_bytes(256) == b""


def test_a_published_tokenizer_encodes_long_texts_whole(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    published().save(str(path))
    tokenizer = Tokenizer.load(path, "<|ü|>")
    text = "\n".join(text_of(i, 40) for i in range(200))
    assert len(_segments(text)) > 1
    assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]


def test_published_tokenizers_that_do_not_serve(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    published().save(str(path))
    with pytest.raises(ValueError, match=r"tokenizer.json: .*has no <.document.> token; it is not"):
        Tokenizer.load(path)
    with pytest.raises(ValueError, match="no <end> token; it cannot open documents"):
        Tokenizer.load(path, "<end>")
    pieces = published(letters=False)
    pieces.decoder = decoders.Metaspace()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"\(BPE, decoded by Metaspace\) is not byte-level BPE"):
        Tokenizer(pieces, "<|ü|>")
    pieces.decoder = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="decoded by None"):
        Tokenizer(pieces, "<|ü|>")


def test_a_tokenizer_that_is_not_there_says_so_when_used() -> None:
    tokenizer = Tokenizer(ValueError("there is none"))
    uses = [
        lambda: tokenizer.encode("a"),
        lambda: tokenizer.encode_batch(["a"]),
        lambda: tokenizer.decode([1]),
        lambda: tokenizer.token_text(1),
        lambda: tokenizer.document,
        lambda: tokenizer.vocab,
        lambda: tokenizer.to_json(),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="there is none"):
            use()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="257"):
        train_tokenizer(["text"], 256)
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "nowhere.json")
