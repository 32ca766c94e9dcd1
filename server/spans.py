"""One OpenTelemetry span per generation request, by the GenAI semantic conventions.

The packages are an extra, `quire[otel]`, and imported only where an endpoint is set. Prompts and
answers are never part of a span.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from configs.settings import SettingsError
from scheduler.request import Request
from server import __version__
from server.receipt import AnswerReceipt

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

    from server.generate import Usage
    from server.schemas import GenerationBody

EXPORT_SECONDS: Final = 5.0
"""How long one attempt to hand spans over may take, at the end of the server too."""


class Spans:
    """Where spans begin. Those of a trace that a caller began (`traceparent`) join it."""

    def __init__(self, exporter: SpanExporter, *, batched: bool = True) -> None:
        """Args:
        batched: hand spans over in the background; False does it as each one ends.
        """
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say comes before these.
        resource = Resource({"service.name": "quire", "service.version": __version__})
        self._provider = TracerProvider(resource=resource.merge(_told_by_environment()))
        processor = BatchSpanProcessor(exporter) if batched else SimpleSpanProcessor(exporter)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("quire", __version__)

    def start(
        self,
        body: GenerationBody,
        requests: Sequence[Request],
        *,
        operation: str,
        model: str,
        headers: Mapping[str, str],
        arrival: float,
    ) -> RequestSpan:
        """The span of an HTTP request, begun at its `arrival` (monotonic seconds).

        Args:
            requests: the engine's, one per prompt.
            operation: `chat` or `text_completion`.
        """
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        span = self._tracer.start_span(
            f"{operation} {model}",
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "quire",
                "gen_ai.request.model": model,
                "gen_ai.response.model": model,
                "gen_ai.response.id": requests[0].id.removesuffix("-0"),
                "gen_ai.output.type": "text",
                **_asked(body),
            },
            start_time=_unix_ns(arrival),
        )
        return RequestSpan(span, arrival, min(request.arrival for request in requests))

    def close(self) -> None:
        """Hands over what is left. Takes its time: to be run on a thread."""
        self._provider.shutdown()


class RequestSpan:
    """A span under way.

    Args:
        arrival, queued: of the HTTP request, and when it was handed to the engine; monotonic
            seconds.
    """

    def __init__(self, span: Span, arrival: float, queued: float) -> None:
        self._span, self._arrival, self._queued = span, arrival, queued

    def end(
        self,
        usage: Usage,
        answers: Sequence[AnswerReceipt],
        reasons: Sequence[str],
        error: BaseException | None,
    ) -> None:
        """Writes down what became of the request.

        Args:
            answers, reasons: what each answer took, and why it ended.
            error: why the request as a whole did; None where all is well.
        """
        from opentelemetry.trace import StatusCode

        self._add_events(answers)
        engine = [answer.engine for answer in answers]
        first = [answer.ttft for answer in answers if answer.ttft is not None]
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
                "gen_ai.response.finish_reasons": list(reasons),
                "quire.queue_seconds": max(receipt.queue for receipt in engine),
                "quire.prefill_seconds": max(receipt.prefill for receipt in engine),
                "quire.decode_seconds": max(receipt.decode for receipt in engine),
                "quire.preemptions": sum(receipt.preemptions for receipt in engine),
                "quire.kv_block_seconds": sum(receipt.block_seconds for receipt in engine),
            }
        )
        if first:
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", min(first))
        if error is not None:
            self._span.set_attribute("error.type", type(error).__name__)
            self._span.set_status(StatusCode.ERROR, str(error))
        self._span.end()

    def _add_events(self, answers: Sequence[AnswerReceipt]) -> None:
        """In the order of time, as far as it is known: an answer that a client left unfinished has
        no receipt."""
        known = [answer.engine for answer in answers if answer.engine.prefill]
        first = [answer.ttft for answer in answers if answer.ttft is not None]
        self._span.add_event("queued", timestamp=_unix_ns(self._queued))
        if known:
            started = self._queued + min(receipt.queue for receipt in known)
            self._span.add_event("scheduled", timestamp=_unix_ns(started))
        if first:
            self._span.add_event("first_token", timestamp=_unix_ns(self._arrival + min(first)))
        for index, answer in enumerate(answers):
            for after in answer.engine.preempted_at:
                at = _unix_ns(self._queued + after)
                self._span.add_event("preempted", {"quire.answer_index": index}, at)


def connect_spans(endpoint: str | None) -> Spans | None:
    """Spans that go to an OTLP collector over HTTP; None without an endpoint.

    Args:
        endpoint: such as `http://localhost:4318/v1/traces`.

    Raises:
        SettingsError: the packages are not installed.
    """
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise SettingsError(
            "otlp_traces_endpoint needs the OpenTelemetry packages: pip install 'quire[otel]'"
        ) from None
    return Spans(OTLPSpanExporter(endpoint, timeout=EXPORT_SECONDS))


def _asked(body: GenerationBody) -> dict[str, AttributeValue]:
    """What the client asked for, as far as it said."""
    asked: dict[str, AttributeValue | None] = {
        "gen_ai.request.max_tokens": body.max_completion_tokens or body.max_tokens,
        "gen_ai.request.temperature": body.temperature,
        "gen_ai.request.top_p": body.top_p,
        "gen_ai.request.top_k": body.top_k,
        "gen_ai.request.seed": body.seed,
        "gen_ai.request.choice.count": body.n,
        "gen_ai.request.stop_sequences": body.stop_strings or None,
        "gen_ai.request.stream": body.stream,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _told_by_environment() -> Resource:
    from opentelemetry.sdk.resources import OTELResourceDetector

    return OTELResourceDetector().detect()


def _unix_ns(moment: float) -> int:
    """Monotonic seconds as nanoseconds since 1970."""
    return time.time_ns() - int((time.monotonic() - moment) * 1e9)
