"""Increments against the library's decoding of the whole."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from server.detokenizer import REPLACEMENT, Vocabulary, decode
from tests.server.text_models import END, byte_level_tokenizer, sentencepiece_tokenizer

BYTE_LEVEL = Vocabulary(byte_level_tokenizer())
LLAMA = Vocabulary(sentencepiece_tokenizer("llama"))
GEMMA = Vocabulary(sentencepiece_tokenizer("gemma"))
FAMILY = "👩‍👩‍👧‍👦 à é ñ 漢字 नमस्ते \u2028 \x00"

vocabularies = pytest.mark.parametrize(
    "vocabulary", [BYTE_LEVEL, LLAMA, GEMMA], ids=["byte-level", "llama", "gemma"]
)


def encode(vocabulary: Vocabulary, text: str) -> list[int]:
    return vocabulary.tokenizer.encode(text, add_special_tokens=False).ids


@vocabularies
@given(text=st.text())
@example(text=FAMILY)
@example(text=REPLACEMENT)
@example(text="   leading")
def test_increments_are_the_whole(vocabulary: Vocabulary, text: str) -> None:
    ids = encode(vocabulary, text)
    assert decode(vocabulary.detokenizer(), ids) == vocabulary.tokenizer.decode(ids)


@vocabularies
@given(text=st.text(), cut=st.integers(0, 200))
@example(text=FAMILY, cut=3)
def test_no_half_character_at_any_cut(vocabulary: Vocabulary, text: str, cut: int) -> None:
    text = text.replace(REPLACEMENT, "")
    detokenizer = vocabulary.detokenizer()
    ids = encode(vocabulary, text)
    sent = "".join(map(detokenizer.push, ids[:cut]))
    assert REPLACEMENT not in sent
    assert vocabulary.tokenizer.decode(ids).startswith(sent)


@given(ids=st.lists(st.integers(0, 410)))
def test_invalid_bytes_of_a_byte_level_vocabulary(ids: list[int]) -> None:
    detokenizer = BYTE_LEVEL.detokenizer()
    assert decode(detokenizer, ids) == BYTE_LEVEL.tokenizer.decode(ids)


@pytest.mark.parametrize("vocabulary", [LLAMA, GEMMA], ids=["llama", "gemma"])
@given(ids=st.lists(st.integers(0, 295)))
def test_invalid_bytes_of_a_sentencepiece_vocabulary(
    vocabulary: Vocabulary, ids: list[int]
) -> None:
    """The library replaces every byte of a run of byte tokens that is not UTF-8, the characters
    that it begins with included. Those are sent by then: only what follows them is replaced."""
    known = [token for token in ids if vocabulary.tokenizer.id_to_token(token)]
    pieces = [vocabulary.piece_of(token) for token in known if token not in vocabulary.special_ids]
    found = decode(vocabulary.detokenizer(), ids)
    text, mixed = "", False
    for is_byte, group in groupby(pieces, lambda piece: isinstance(piece, int)):
        if not is_byte:
            text += "".join(map(str, group)).replace("▁", " ")
            continue
        run = bytes(map(int, group))
        good = characters(run)
        bad = len(run) - len(good.encode())
        text += good + REPLACEMENT * bad
        mixed |= bool(good and bad)
    assert found == (text.removeprefix(" ") if vocabulary is LLAMA else text)
    assert mixed or found == vocabulary.tokenizer.decode(ids)


def characters(run: bytes) -> str:
    """The whole characters that a run begins with."""
    for end in range(len(run), 0, -1):
        try:
            return run[:end].decode()
        except UnicodeDecodeError:
            continue
    return ""


def test_a_broken_run_after_a_character() -> None:
    ids = [LLAMA.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in (0x41, 0xFF, 0xE2, 0x42)]
    detokenizer = LLAMA.detokenizer()
    assert [*map(detokenizer.push, ids)] == ["A", *REPLACEMENT * 3]
    assert detokenizer.push(LLAMA.tokenizer.token_to_id("b")) == "b"


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    end = BYTE_LEVEL.tokenizer.token_to_id(END)
    ids = [end, *encode(BYTE_LEVEL, "hi"), end]
    assert decode(BYTE_LEVEL.detokenizer(), ids) == "hi"
    assert decode(BYTE_LEVEL.detokenizer(skip_special=False), ids) == f"{END}hi{END}"


def test_a_continuation_keeps_its_first_space() -> None:
    ids = encode(LLAMA, "hello")  # U+2581 h e ...
    assert decode(LLAMA.detokenizer(), ids) == "hello"
    assert decode(LLAMA.detokenizer(continues=True), ids) == " hello"


def test_metaspace_decoder() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"▁a": 0, "b▁": 1, "<0x41>": 2, "é": 3}, merges=[]))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    for ids in ([0, 1, 0], [2, 0], [1, 1, 3], []):
        assert decode(Vocabulary(tokenizer).detokenizer(), ids) == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 4)))
def test_other_decoders_go_through_the_library(ids: list[int]) -> None:
    tokenizer = Tokenizer(
        models.WordPiece(vocab={"[UNK]": 0, "a": 1, "##b": 2, "c": 3}, unk_token="[UNK]")
    )
    tokenizer.decoder = decoders.WordPiece()
    assert decode(Vocabulary(tokenizer).detokenizer(), ids) == tokenizer.decode(ids)


def test_cost_does_not_grow_with_the_answer() -> None:
    """Counted, not timed: every token is looked up once in the tokenizer, then never again."""
    calls = []

    class Counting:
        decoder = byte_level_tokenizer().decoder
        get_added_tokens_decoder = byte_level_tokenizer().get_added_tokens_decoder

        def id_to_token(self, token: int) -> str | None:
            calls.append(token)
            return byte_level_tokenizer().id_to_token(token)

    detokenizer = Vocabulary(Counting()).detokenizer()
    ids = encode(BYTE_LEVEL, FAMILY)
    for token in ids * 50:
        detokenizer.push(token)
    assert sorted(calls) == sorted(set(ids))
