"""A byte-level BPE tokenizer (Sennrich et al. 2016, over bytes as in GPT-2), trained on the corpus.

Text is first cut by one pattern: words with the space or sign before them, numbers two digits at a
time, punctuation, and line ends together with the indentation that follows, which is what makes
code short. Every byte has a token, so any text comes back exactly. Token 0, `<|document|>`, opens
each document and is never produced from text. A published model's byte-level tokenizer serves as
well, with a token of its own in that place; its normaliser may change a text.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

DOCUMENT = "<|document|>"
MIN_VOCAB = 257
TRAINING_PIECE = 64 << 10
# The indentation after a line end leaves its last space to the word that follows it.
INDENT = r"[\r\n]+[ \t]*(?!\S)"
PATTERN = "|".join(
    [
        r"'(?i:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,2}",
        rf" ?[^\s\p{{L}}\p{{N}}]+(?:{INDENT})?",
        rf"\s*{INDENT}",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# A line end after a letter or a digit opens a new match, and no look-ahead reaches across it.
SAFE_CUT = re.compile(r"(?<=[A-Za-z0-9])\n")
SEGMENT = 64 << 10


@functools.cache
def _byte_of() -> dict[str, int]:
    """The printable letter that stands for each byte in a byte-level vocabulary, inverted."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """Text <-> token ids; one trained here loses nothing. Final.

    `document` is the special token that opens a document. Held instead of a tokenizer, a
    ValueError is raised by whatever needs one: an imported model may come without.
    """

    def __init__(self, inner: tokenizers.Tokenizer | ValueError, document: str = DOCUMENT) -> None:
        self._held, self._name = inner, document
        if isinstance(inner, ValueError):
            return
        # Not kept in the file: `<|document|>` inside a text is text, not the special token.
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        if inner.token_to_id(document) is None:
            whose = "is not one of moebius" if document == DOCUMENT else "cannot open documents"
            raise ValueError(f"this tokenizer has no {document} token; it {whose}")
        if document != DOCUMENT:
            _check_byte_level(inner)

    @property
    def _inner(self) -> tokenizers.Tokenizer:
        if isinstance(self._held, ValueError):
            raise ValueError(str(self._held))
        return self._held

    @functools.cached_property
    def document(self) -> int:
        """The id of the token that opens a document."""
        found = self._inner.token_to_id(self._name)
        assert found is not None
        return found

    @functools.cached_property
    def vocab(self) -> int:
        """One more than the largest id; ids below that no token has stand for nothing."""
        return max(self._inner.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode on all cores, long texts in segments; the GIL is free meanwhile."""
        # Where a published tokenizer's pattern surely cuts is not known.
        own = self._name == DOCUMENT
        segments = [_segments(text) if own else [text] for text in texts]
        flat = list(itertools.chain.from_iterable(segments))
        done = iter(self._inner.encode_batch_fast(flat, add_special_tokens=False))
        return [
            list(itertools.chain.from_iterable(next(done).ids for _ in of_text))
            for of_text in segments
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens; `<|document|>` shows by its name, broken UTF-8 as U+FFFD."""
        shown = {self.document: self._name.encode()}
        return b"".join(shown.get(i) or self.token_bytes(i) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; none for `<|document|>`, nor where no token has the id."""
        return self._bytes[token] if token < len(self._bytes) else b""

    def token_text(self, token: int) -> str:
        """A token in printable form, for tables and plots: quotes left off, escapes kept."""
        if token == self.document:
            return self._name
        data = self.token_bytes(token)
        try:
            return repr(data.decode())[1:-1]
        except UnicodeDecodeError:
            return repr(data)[2:-1]

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        byte_of = _byte_of()
        names = [self._inner.id_to_token(i) or "" for i in range(self.vocab)]
        table = [bytes(byte_of[letter] for letter in name if letter in byte_of) for name in names]
        # Added tokens are named as they are, not in the letters of bytes.
        for i, token in self._inner.get_added_tokens_decoder().items():
            table[i] = token.content.encode()
        table[self.document] = b""
        return table

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return self._inner.to_str(pretty=True)

    def save(self, path: Path | str) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str, document: str | None = None) -> "Tokenizer":
        """Read a `tokenizer.json`; `document` names its special token, if not `<|document|>`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot read the tokenizer {path} ({error.strerror})") from error
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is damaged ({error}); restore it from a copy") from error
        try:
            return cls(inner, document or DOCUMENT)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _check_byte_level(inner: tokenizers.Tokenizer) -> None:
    """ValueError where tokens are not byte-level BPE: their bytes are not known to us then."""
    decoder = json.loads(inner.decoder.__getstate__()) if inner.decoder is not None else {}
    steps = [decoder, *decoder.get("decoders", ())]
    kind = type(inner.model).__name__
    if kind != "BPE" or not any(step.get("type") == "ByteLevel" for step in steps):
        raise ValueError(
            f"this tokenizer ({kind}, decoded by {decoder.get('type')}) is not byte-level BPE; the "
            "model takes token ids, but text cannot be read or written with it"
        )


def _segments(text: str, length: int = SEGMENT) -> list[str]:
    """Cut a long text where PATTERN always does, so that the tokens are those of the whole."""
    starts = [0]
    while (cut := SAFE_CUT.search(text, starts[-1] + length)) is not None:
        starts.append(cut.start())
    return [text[i:j] for i, j in itertools.pairwise([*starts, len(text)])]


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Train on texts. A small corpus may give fewer tokens than `vocab`, which counts token 0."""
    if vocab < MIN_VOCAB:
        raise ValueError(f"vocab must be at least {MIN_VOCAB} (256 bytes, {DOCUMENT}), not {vocab}")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_short(texts), trainer)
    return Tokenizer(inner)


def _short(texts: Iterable[str]) -> Iterator[str]:
    """The texts, long ones in pieces that end with a line: training holds 256 at a time."""
    for text in texts:
        start = 0
        while len(text) - start > TRAINING_PIECE:
            end = text.rfind("\n", start, start + TRAINING_PIECE) + 1 or start + TRAINING_PIECE
            yield text[start:end]
            start = end
        yield text[start:]
