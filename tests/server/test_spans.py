"""OpenTelemetry spans of requests, taken by the in-memory exporter."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from configs.settings import SettingsError
from engine.protocol import Receipt
from scheduler.request import InvalidRequest
from server.spans import Spans, connect_spans
from tests.server.fake_engine import FakeEngine
from tests.server.front import CHAT, chunks, door, says

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECOND = 10**9


class Exported:
    """An app whose spans end up here."""

    def __init__(self, engine: FakeEngine) -> None:
        self._exporter = InMemorySpanExporter()
        self.door = door(engine, spans=Spans(self._exporter, batched=False))

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def one(self) -> tuple[ReadableSpan, dict[str, Any]]:
        [span] = self.spans
        return span, dict(span.attributes or {})


def test_a_chat_by_the_conventions() -> None:
    exported = Exported(says("hello there", cached_tokens=2))
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "max_tokens": 50, "n": 2}
    answer = exported.door.chat(**asked, stop=["zzz"]).json()
    span, told = exported.one()
    assert (span.name, span.kind) == ("chat quiet", SpanKind.SERVER)
    assert span.status.status_code is StatusCode.UNSET
    assert span.resource.attributes["service.name"] == "quire"
    usage = answer["usage"]
    assert (
        told.items()
        >= {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "quire",
            "gen_ai.request.model": "quiet",
            "gen_ai.response.model": "quiet",
            "gen_ai.response.id": answer["id"],
            "gen_ai.output.type": "text",
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.top_p": 0.9,
            "gen_ai.request.top_k": 7,
            "gen_ai.request.seed": 3,
            "gen_ai.request.max_tokens": 50,
            "gen_ai.request.choice.count": 2,
            "gen_ai.request.stop_sequences": ("zzz",),
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": usage["completion_tokens"],
            "gen_ai.usage.cache_read.input_tokens": 2,
            "gen_ai.response.finish_reasons": ("stop", "stop"),
        }.items()
    )
    assert 0 < told["gen_ai.response.time_to_first_chunk"] < 60
    assert "hello" not in str(told), "what was said is nobody's business"


def test_what_was_not_asked_for_is_not_told() -> None:
    exported = Exported(says("x"))
    exported.door.complete()
    span, told = exported.one()
    assert span.name == "text_completion quiet"
    assert not [name for name in told if name.startswith("gen_ai.request.") if name[15:] != "model"]


def test_a_stream_ends_its_span() -> None:
    exported = Exported(says("hello"))
    response = exported.door.chat(stream=True)
    chunks(response)
    span, told = exported.one()
    assert told["gen_ai.request.stream"] is True
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert span.end_time is not None
    assert span.start_time is not None
    assert 0 < span.end_time - span.start_time < 60 * SECOND


def test_the_trace_of_the_caller_goes_on() -> None:
    exported = Exported(says("x"))
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1"}
    exported.door.call("POST", "/v1/chat/completions", json=CHAT, headers=headers)
    span, _ = exported.one()
    assert span.parent is not None
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == CALLER
    assert span.context.trace_state.get("vendor") == "1"


def test_a_caller_that_does_not_sample_is_heeded() -> None:
    exported = Exported(says("x"))
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
    exported.door.call("POST", "/v1/chat/completions", json=CHAT, headers=headers)
    assert exported.spans == ()


def test_events_tell_the_queue_the_first_token_and_preemptions() -> None:
    receipt = Receipt(queue=0.5, prefill=0.25, decode=1.0, preemptions=2, preempted_at=[0.6, 0.9])
    exported = Exported(says("x", receipt=receipt))
    exported.door.chat()
    span, told = exported.one()
    events = {event.name: event for event in span.events}
    assert list(events) == ["queued", "scheduled", "first_token", "preempted"]
    times = [event.timestamp for event in span.events if event.name == "preempted"]
    queued = events["queued"].timestamp
    assert [round((time - queued) / SECOND, 2) for time in times] == [0.6, 0.9]
    assert round((events["scheduled"].timestamp - queued) / SECOND, 2) == 0.5
    assert span.start_time is not None
    assert span.start_time <= queued
    assert told["quire.preemptions"] == 2
    assert told["quire.queue_seconds"] == 0.5


@pytest.mark.parametrize(
    ("options", "kind", "reasons"),
    [
        ({"fail_after": 1}, "RequestFailed", ("error",)),
        ({"refuse": InvalidRequest("no room", "prompt")}, "InvalidRequest", ("error",)),
    ],
)
def test_failures_are_errors(options: dict[str, Any], kind: str, reasons: tuple[str]) -> None:
    exported = Exported(says("hello there", **options))
    assert exported.door.chat().status_code >= 400
    span, told = exported.one()
    assert span.status.status_code is StatusCode.ERROR
    assert (told["error.type"], told["gen_ai.response.finish_reasons"]) == (kind, reasons)


def test_without_an_endpoint_nothing_is_imported() -> None:
    code = (
        "import sys, server.app, server.spans\n"
        "assert server.spans.connect_spans(None) is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"pip install 'quire\[otel\]'"):
        connect_spans("http://localhost:4318/v1/traces")
