"""The receipt that comes with every final answer."""

from __future__ import annotations

from typing import Any

import pytest

from engine.protocol import Receipt
from server.receipt import AnswerReceipt, RequestReceipt
from tests.server.fake_engine import FakeEngine
from tests.server.front import chunks, door, says
from tests.server.text_models import ids_of

USAGE = {"stream": True, "stream_options": {"include_usage": True}}
ENGINE = {
    "queue_ms": 250.0,
    "prefill_ms": 500.0,
    "decode_ms": 2000.0,
    "recomputed_tokens": 7,
    "preemptions": 1,
    "blocks_peak": 3,
    "block_seconds": 4.5,
}
FIELDS = {*ENGINE, "ttft_ms", "tpot_ms", "cached_tokens"}


def receipts(engine: FakeEngine, **fields: Any) -> list[dict[str, Any]]:
    """Of the four ways to be answered."""
    front = door(engine)
    return [
        front.chat(**fields).json()["quire"],
        front.complete(**fields).json()["quire"],
        chunks(front.chat(**fields, **USAGE))[-1]["quire"],
        chunks(front.complete(**fields, **USAGE))[-1]["quire"],
    ]


def test_whole_answers_and_usage_chunks_carry_it() -> None:
    for receipt in receipts(says("hello world", cached_tokens=2)):
        assert receipt.keys() == FIELDS
        assert ENGINE.items() <= receipt.items()
        assert receipt["cached_tokens"] == 2
        assert receipt["ttft_ms"] > 0
        assert receipt["tpot_ms"] > 0


def test_no_other_chunk_carries_it() -> None:
    events = chunks(door(says("hello")).chat(**USAGE))
    assert all("quire" not in event for event in events[:-1])
    assert all("quire" not in event for event in chunks(door(says("hello")).chat(stream=True)))


def test_one_token_has_no_time_per_token() -> None:
    for receipt in receipts(says("hello world"), max_tokens=1):
        assert receipt["tpot_ms"] is None
        assert receipt["ttft_ms"] > 0


def test_after_a_stop_string_the_engine_is_asked() -> None:
    """The engine would go on for long; it is told to end, and its receipt comes with that."""
    tokens = ids_of("hello world") + [5] * 100
    for n in (1, 3):
        engine = FakeEngine(lambda request, index: tokens)
        for receipt in receipts(engine, stop="hello", max_tokens=90, n=n):
            assert receipt["decode_ms"] == 2000.0
            assert receipt["blocks_peak"] == 3 * n
        assert len(engine.aborted) == 4
        assert not engine.finished


def test_several_answers_take_the_longest_time_and_the_sum_of_the_rest() -> None:
    answers = [
        AnswerReceipt(Receipt(0.1, 0.5, 2.0, 7, 1, 3, 4.5), 0.7, 0.02),
        AnswerReceipt(Receipt(0.3, 0.4, 0.0, 0, 0, 2, 1.5), 0.8, None),
    ]
    receipt = RequestReceipt(answers, 16)
    assert receipt.fields() == {
        "queue_ms": 300.0,
        "prefill_ms": 500.0,
        "decode_ms": 2000.0,
        "ttft_ms": 800.0,
        "tpot_ms": 20.0,
        "cached_tokens": 16,
        "recomputed_tokens": 7,
        "preemptions": 1,
        "blocks_peak": 5,
        "block_seconds": 6.0,
    }
    timing = "queue;dur=300.0, prefill;dur=500.0, decode;dur=2000.0, ttft;dur=800.0, tpot;dur=20.0"
    assert receipt.server_timing() == timing


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_server_timing_and_the_request_id_are_headers(path: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "a"}
    headers = {"x-request-id": "mine-1"}
    answer = door(says("hello")).call("POST", path, json=body, headers=headers)
    assert answer.headers["x-request-id"] == "mine-1"
    assert "queue;dur=250.0" in answer.headers["server-timing"]
