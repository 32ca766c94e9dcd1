"""Token ids to text, one token at a time: O(1) per token, never half a character.

Two kinds of vocabularies are known by their decoder and turned into bytes token by token:

    byte-level BPE   every token is bytes (GPT-2's printable alphabet stands for them)
    SentencePiece    tokens are text with U+2581 for a space, and `<0xE2>` for single bytes

Any other decoder goes through the library's own incremental decoding.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"
METASPACE = "\u2581"


class Detokenizer(Protocol):
    """The text of one growing answer."""

    def push(self, token: int) -> str:
        """The characters that `token` completes; "" while one is unfinished."""

    def flush(self) -> str:
        """What is left once the answer has ended: U+FFFD for bytes that never became text."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's map from a printable character to the byte that it stands for: bytes that Latin-1
    prints stand for themselves, the others for U+0100 onwards."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in shown}
    hidden = (byte for byte in range(256) if byte not in set(shown))
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


class Vocabulary:
    """What each token id stands for, worked out when it is first seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        decoder: Any = tokenizer.decoder
        self._spec = json.loads(decoder.__getstate__()) if decoder is not None else {}
        kind = self._spec.get("type")
        self._byte_fallback = kind == "Sequence"
        self._is_sentencepiece = kind == "Metaspace" or (
            kind == "Sequence" and _is_sentencepiece(self._spec["decoders"])
        )
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[int, str | int] = {}

    def detokenizer(
        self, *, skip_special: bool = True, continues: bool = False, keep: Sequence[str] = ()
    ) -> Detokenizer:
        """A detokenizer of one answer.

        Args:
            skip_special: leave the special tokens out of the text.
            continues: the answer goes on a text before it, so that a first space belongs to it.
            keep: special tokens that stay in the text all the same.
        """
        hidden = self.special_ids if skip_special else frozenset()
        if keep:
            hidden -= {self.tokenizer.token_to_id(text) for text in keep}
        kind = self._spec.get("type")
        if kind == "ByteLevel":
            return _ByteLevel(self, hidden)
        if kind == "Metaspace":
            strips = self._spec.get("prepend_scheme") != "never"
            return _SentencePiece(self, hidden, strip_piece=strips and not continues)
        if kind == "Sequence" and self._is_sentencepiece:
            strips = any(step["type"] == "Strip" for step in self._spec["decoders"])
            return _SentencePiece(self, hidden, strip_space=strips and not continues)
        return _Library(self.tokenizer, skip_special=skip_special)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token of a byte-level vocabulary; b"" for an unknown id."""
        found = self._bytes.get(token)
        if found is None:
            text = self.tokenizer.id_to_token(token) or ""
            try:
                found = bytes([_BYTE_OF[char] for char in text])
            except KeyError:  # an added token with characters outside of the alphabet
                found = text.encode()
            self._bytes[token] = found
        return found

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token of any vocabulary stands for, by itself; b"" for an unknown id."""
        if self._spec.get("type") == "ByteLevel":
            return self.bytes_of(token)
        if self._is_sentencepiece:
            piece = self.piece_of(token)
            if isinstance(piece, int):
                return bytes([piece])
            return piece.replace(METASPACE, " ").encode()
        return self.tokenizer.decode([token], skip_special_tokens=False).encode()

    def piece_of(self, token: int) -> str | int:
        """The text of a token of a SentencePiece vocabulary, still with U+2581, or the one byte
        (0..255) that it stands for."""
        found = self._pieces.get(token)
        if found is None:
            found = self.tokenizer.id_to_token(token) or ""
            if (
                self._byte_fallback
                and len(found) == 6
                and found.startswith("<0x")
                and found.endswith(">")
            ):
                with suppress(ValueError):
                    found = int(found[3:5], 16)
            self._pieces[token] = found
        return found


def _is_sentencepiece(steps: list[dict[str, Any]]) -> bool:
    kinds = [step["type"] for step in steps]
    if kinds not in (
        ["Replace", "ByteFallback", "Fuse"],
        ["Replace", "ByteFallback", "Fuse", "Strip"],
    ):
        return False
    strip = steps[3] if len(steps) == 4 else {"content": " ", "start": 1, "stop": 0}
    return (
        steps[0]["pattern"] == {"String": METASPACE}
        and steps[0]["content"] == " "
        and (strip["content"], strip["start"], strip["stop"]) == (" ", 1, 0)
    )


class _ByteLevel:
    def __init__(self, vocabulary: Vocabulary, hidden: frozenset[int]) -> None:
        self._vocabulary, self._hidden = vocabulary, hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if token in self._hidden:
            return ""
        return self._decoder.decode(self._vocabulary.bytes_of(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _SentencePiece:
    """Byte tokens gather until they are characters. Where a run of them is no UTF-8, each byte not
    yet sent becomes one U+FFFD, as the library's ByteFallback does it."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        hidden: frozenset[int],
        *,
        strip_piece: bool = False,
        strip_space: bool = False,
    ) -> None:
        """`strip_piece`: the first piece loses its U+2581 (Metaspace); `strip_space`: the text
        loses one leading space (Strip)."""
        self._vocabulary, self._hidden = vocabulary, hidden
        self._strip_piece, self._strip_space = strip_piece, strip_space
        self._run = bytearray()  # bytes of an unfinished character
        self._broken = False  # the current run of byte tokens holds a byte that fits nowhere

    def push(self, token: int) -> str:
        if token in self._hidden:
            return ""
        piece = self._vocabulary.piece_of(token)
        if isinstance(piece, int):
            text = self._byte(piece)
        elif not piece:
            return ""
        else:
            if self._strip_piece:
                piece = piece.replace(METASPACE, "")
            text = self.flush() + piece.replace(METASPACE, " ")
        self._strip_piece = False
        if text and self._strip_space:
            self._strip_space = False
            text = text.removeprefix(" ")
        return text

    def _byte(self, byte: int) -> str:
        self._run.append(byte)
        if not self._broken:
            try:
                text = self._run.decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    return ""
                self._broken = True
            else:
                self._run.clear()
                return text
        text = REPLACEMENT * len(self._run)
        self._run.clear()
        return text

    def flush(self) -> str:
        text = REPLACEMENT * len(self._run)
        self._run.clear()
        self._broken = False
        return text


class _Library:
    """Holds text back while it ends in U+FFFD, which may be a character that is not finished."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._stream = DecodeStream(skip_special_tokens=skip_special)
        self._tokens: list[int] = []
        self._sent = 0

    def push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._stream.step(self._tokenizer, token) or ""
        self._sent += len(text)
        return text

    def flush(self) -> str:
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=self._skip)
        return whole[self._sent :]


def decode(detokenizer: Detokenizer, tokens: Iterable[int]) -> str:
    """The whole text: a fold of the increments."""
    return "".join([*map(detokenizer.push, tokens), detokenizer.flush()])
