"""From requests to pieces of text: what every answer is made of, streamed or whole.

    engine  --TokenDelta-->  Answer.push  --Piece-->  Generation.batches  -->  chunks, or one fold

Deltas are turned into pieces as soon as they are read from the engine, so that a stop string ends
the computing even where the client reads slowly. Pieces gather until the reader looks: all those of
one engine step reach it together, and wake one task.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgspec

from engine.client import EngineClient, EngineDead, RequestFailed, TokenStream
from engine.protocol import Receipt, Scores, TokenDelta
from scheduler.request import Request
from server.detokenizer import Detokenizer
from server.errors import ApiError
from server.logprobs import Detail, Trail
from server.metrics import AnswerClock, Metrics
from server.queue_bound import QueueBound
from server.reading import AnswerReader, ToolCall, gather
from server.receipt import AnswerReceipt, RequestReceipt
from server.spans import RequestSpan
from server.stops import StopMatcher
from server.tokenizer import TextModel
from server.tools import CallDelta

IDLE_SECONDS = 15.0


class Piece(msgspec.Struct, frozen=True):
    """More text of one answer, and what was asked for beside it; the last piece of an answer has a
    finish reason."""

    index: int
    text: str
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    detail: Detail | None = None
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become the text of an answer.

    Attributes:
        stops: strings at which the answer ends.
        include_stop: whether the stop string or stop token is part of the text.
        skip_special: leave special tokens out.
        continues: the answer goes on the prompt's text (completions), so a first space counts.
        min_tokens: stop strings count only in the text of later tokens than these.
        logprobs, token_ids: whether pieces tell them.
        reader: makes what tells thoughts and tool calls of an answer from its text.
        keep: special tokens that the reader needs to see.
    """

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    continues: bool = False
    min_tokens: int = 0
    logprobs: bool = False
    token_ids: bool = False
    reader: Callable[[], AnswerReader] | None = None
    keep: tuple[str, ...] = ()


class Answer:
    """One choice while it is written: tokens in, pieces out.

    Attributes:
        index: of the choice in the response.
        tokens: tokens so far, those of a stop string and of the end included.
        reasoning_tokens: those of them that were thoughts.
        finish_reason: why it ended, `abort` and `error` included; None until then.
        clock: takes its times.
        engine_receipt: what the engine says of it; None until it says so.
    """

    __slots__ = (
        "_detokenizer",
        "_include_stop",
        "_min_tokens",
        "_reader",
        "_stops",
        "_trail",
        "clock",
        "engine_receipt",
        "finish_reason",
        "index",
        "reasoning_tokens",
        "tokens",
    )

    def __init__(
        self, index: int, options: TextOptions, detokenizer: Detokenizer, clock: AnswerClock
    ) -> None:
        self.index = index
        self.tokens = self.reasoning_tokens = 0
        self._reader = options.reader() if options.reader else None
        self.finish_reason: str | None = None
        self.engine_receipt: Receipt | None = None
        self._detokenizer, self.clock = detokenizer, clock
        self._include_stop = options.include_stop
        self._stops = (
            StopMatcher(options.stops, include=options.include_stop) if options.stops else None
        )
        self._min_tokens = options.min_tokens
        detailed = options.logprobs or options.token_ids
        self._trail = (
            Trail(logprobs=options.logprobs, token_ids=options.token_ids) if detailed else None
        )

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def receipt(self) -> AnswerReceipt:
        """What it took, once it is finished."""
        return AnswerReceipt(self.engine_receipt or Receipt(), self.clock.ttft, self.clock.tpot)

    def push(self, delta: TokenDelta, now: float) -> Piece | None:
        """Takes the tokens of one delta in, at `now` (monotonic seconds). None where they make no
        whole character yet.

        Raises:
            ApiError: the engine aborted the answer.
        """
        if delta.finish_reason == "abort":
            raise ApiError(
                500, "the request was aborted", code="aborted", headers={"x-should-retry": "false"}
            )
        self.clock.tokens(len(delta.tokens), now)
        if self._reader is not None and self._reader.thinking:
            self.reasoning_tokens += len(delta.tokens)
        text = self._read(delta)
        matched = self._stops.matched if self._stops else None
        if matched is not None:
            return self._finish(text, "stop", matched, now)
        if delta.finish_reason is not None:
            text += self._flush()
            matched = self._stops.matched if self._stops else None
            if matched is not None:
                return self._finish(text, "stop", matched, now)
            return self._finish(text, delta.finish_reason, delta.stop_reason, now)
        if not text:
            return None
        detail = self._trail.release(len(text)) if self._trail else None
        return self._tell(Piece(self.index, text, detail=detail))

    def abandon(self, reason: str, now: float) -> None:
        """The answer ends without its last piece: `abort` or `error`."""
        if not self.finished:
            self.finish_reason = reason
            self.clock.finish(reason, now)

    def _read(self, delta: TokenDelta) -> str:
        """The text of the delta's tokens, up to a stop string. The token that ended the answer is
        not shown, unless it is the client's own and asked for."""
        tokens = delta.tokens
        shown = len(tokens)
        if delta.finish_reason == "stop" and not (
            self._include_stop and delta.stop_reason is not None
        ):
            shown -= 1
        if self._stops is None and self._trail is None:
            self.tokens += len(tokens)
            return "".join(map(self._detokenizer.push, tokens[:shown]))
        text = ""
        for place, token in enumerate(tokens[:shown]):
            text += self._read_one(token, delta.scores, place)
            if self._stops is not None and self._stops.matched is not None:
                return text
        self._count(tokens[shown:])
        return text

    def _read_one(self, token: int, scores: Scores | None, place: int) -> str:
        text = self._detokenizer.push(token)
        if self._trail is not None:
            self._trail.shown(token, len(text), scores, place)
        self._count([token])
        if self._stops is None or self.tokens <= self._min_tokens:
            return text
        return self._stops.push(text)

    def _count(self, tokens: Sequence[int]) -> None:
        self.tokens += len(tokens)
        if self._trail is not None:
            self._trail.counted(tokens)

    def _flush(self) -> str:
        rest = self._detokenizer.flush()
        return self._stops.push(rest) + self._stops.flush() if self._stops else rest

    def _finish(self, text: str, reason: str, stop_reason: str | int | None, now: float) -> Piece:
        self.finish_reason = reason
        self.clock.finish(reason, now)
        detail = None
        if self._trail is not None:
            cut = self._stops is not None and self._stops.matched is not None
            detail = self._trail.release(len(text), everything=not cut)
        return self._tell(Piece(self.index, text, reason, stop_reason, detail))

    def _tell(self, piece: Piece) -> Piece:
        """The piece as the reader understands it."""
        if self._reader is None:
            return piece
        reason = piece.finish_reason
        thought, told = self._reader.push(piece.text, last=reason is not None)
        if reason == "stop" and piece.stop_reason is None and self._reader.called:
            reason = "tool_calls"
        return msgspec.structs.replace(
            piece, text=told.content, finish_reason=reason, reasoning=thought, calls=told.calls
        )


@dataclass(slots=True)
class WholeAnswer:
    """The fold of one answer's pieces."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    detail: Detail | None = None
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole HTTP request; `cached_tokens` are those of the prompts that were found in
    the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def fields(self) -> dict[str, object]:
        """As the wire has it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


class _Bell:
    """Wakes one task. An `asyncio.Event` may have many that wait, and costs thrice as much; here it
    is paid for every token."""

    __slots__ = ("_rung", "_waiter")

    def __init__(self) -> None:
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """The next `heard` returns, or the one that waits."""
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def heard(self) -> None:
        if not self._rung:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._rung = False


@dataclass(slots=True)
class _News:
    """What the tasks have for the reader, and the bell that wakes it."""

    bell: _Bell = field(default_factory=_Bell)
    pieces: list[Piece] = field(default_factory=list)
    error: Exception | None = None


class Generation:
    """The engine requests of one HTTP request, running together.

    Used as a context: entering submits them, leaving aborts what is not finished.
    """

    def __init__(
        self,
        engine: EngineClient,
        text: TextModel,
        metrics: Metrics,
        requests: Sequence[Request],
        options: TextOptions,
        arrival: float,
        queue: QueueBound,
        span: RequestSpan | None = None,
    ) -> None:
        """Args:
        requests: one per prompt; their answers get the indexes 0..n-1, n..2n-1, ...
        arrival: of the HTTP request, monotonic seconds.
        queue: where they are counted until their first tokens come.
        span: ended with this, where spans are on.
        """
        self._engine, self._metrics, self._requests = engine, metrics, requests
        self._queue, self._span = queue, span
        self._answers = [
            [
                Answer(
                    first + i,
                    options,
                    text.detokenizer(
                        skip_special=options.skip_special,
                        continues=options.continues,
                        keep=options.keep,
                    ),
                    clock,
                )
                for i, clock in enumerate(metrics.answers(request, arrival))
            ]
            for first, request in _first_indexes(requests)
        ]
        self._news = _News()
        self._not_admitted = self._open = len(requests)
        self._cached_tokens = 0
        self._prompt_scores: dict[str, list[Scores]] = {request.id: [] for request in requests}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def count(self) -> int:
        """Answers of all prompts."""
        return sum(map(len, self._answers))

    @property
    def request_ids(self) -> list[str]:
        """The engine's names of the requests."""
        return [request.id for request in self._requests]

    @property
    def complete(self) -> bool:
        """Whether every answer came to an end of its own."""
        cut_off = (None, "abort", "error")
        return all(a.finish_reason not in cut_off for answers in self._answers for a in answers)

    @property
    def error(self) -> Exception | None:
        """Why the answers end early, if they do."""
        return self._news.error

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            sum(len(request.prompt_ids) for request in self._requests),
            sum(answer.tokens for answers in self._answers for answer in answers),
            self._cached_tokens,
            sum(answer.reasoning_tokens for answers in self._answers for answer in answers),
        )

    def prompt_scores(self, index: int) -> Scores:
        """Of the prompt of answer `index`; whole once a piece of that answer has come."""
        request = self._requests[index // self._requests[0].n]
        return Scores.join(self._prompt_scores[request.id])

    @property
    def receipt(self) -> RequestReceipt:
        """What it took, once every answer is finished."""
        return RequestReceipt(
            [answer.receipt for answers in self._answers for answer in answers],
            self._cached_tokens,
        )

    async def __aenter__(self) -> Self:
        try:
            self._queue.enter(self._requests)
        except ApiError as error:
            self._end_span(error)
            raise
        self._tasks = [
            asyncio.create_task(self._run(request, answers))
            for request, answers in zip(self._requests, self._answers, strict=True)
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for request in self._requests:
            self._queue.leave(request)
        self._end_span(self._news.error or error)

    def _end_span(self, error: BaseException | None) -> None:
        if self._span is not None:
            every = [answer for answers in self._answers for answer in answers]
            self._span.end(
                self.usage,
                [answer.receipt for answer in every],
                [answer.finish_reason or "error" for answer in every],
                error,
            )

    async def batches(self) -> AsyncGenerator[list[Piece], None]:
        """Pieces as they come, and an empty list after `IDLE_SECONDS` of nothing.

        Nothing comes before every request is admitted, so that a refusal is the first thing heard.

        Raises:
            InvalidRequest, RequestFailed, EngineDead: as the engine says.
            ApiError: the engine aborted an answer.
        """
        news = self._news
        with _Alarm(news.bell) as alarm:
            while True:
                await news.bell.heard()
                if news.error is not None and self._not_admitted:
                    raise news.error
                if self._not_admitted:
                    continue
                pieces, news.pieces = news.pieces, []
                if pieces or alarm.idle():
                    alarm.reset()
                    yield pieces
                if news.error is not None:
                    raise news.error
                if not self._open and not news.pieces:
                    return

    async def whole(self) -> list[WholeAnswer]:
        """All answers, once they are finished: the fold of the stream."""
        answers = [WholeAnswer() for _ in range(self.count)]
        texts: list[list[str]] = [[] for _ in answers]
        details: list[list[Detail]] = [[] for _ in answers]
        async with contextlib.aclosing(self.batches()) as batches:
            async for pieces in batches:
                for piece in pieces:
                    texts[piece.index].append(piece.text)
                    answers[piece.index].reasoning += piece.reasoning
                    gather(answers[piece.index].calls, piece.calls)
                    if piece.detail is not None:
                        details[piece.index].append(piece.detail)
                    answers[piece.index].finish_reason = piece.finish_reason
                    answers[piece.index].stop_reason = piece.stop_reason
        for answer, parts, told in zip(answers, texts, details, strict=True):
            answer.text, answer.detail = "".join(parts), Detail.join(told)
        return answers

    async def _run(self, request: Request, answers: Sequence[Answer]) -> None:
        """One engine request from submission to its end."""
        try:
            stream = await self._submit(request, answers)
            self._not_admitted -= 1
            await self._follow(request, stream, answers)
        except Exception as error:  # every error of the engine is the reader's
            self._news.error = self._news.error or error
        finally:
            self._open -= 1
            self._news.bell.ring()

    async def _submit(self, request: Request, answers: Sequence[Answer]) -> TokenStream:
        try:
            stream = await self._engine.submit(request)
        except asyncio.CancelledError:
            self._metrics.abandoned(request, [answer.clock for answer in answers])
            raise
        self._metrics.admitted(request)
        return stream

    async def _follow(
        self, request: Request, stream: TokenStream, answers: Sequence[Answer]
    ) -> None:
        """From admission to the end, whatever kind of end it is."""
        reason = "abort"  # of what is not finished where this is cancelled
        try:
            async with contextlib.aclosing(stream):
                await self._take(request, stream, answers)
        except Exception as error:
            reason = "abort" if _aborted(error) else "error"
            raise
        finally:
            now = time.monotonic()
            for answer in answers:
                answer.abandon(reason, now)

    async def _take(self, request: Request, stream: TokenStream, answers: Sequence[Answer]) -> None:
        """Deltas to pieces until every answer is finished."""
        news = self._news
        unfinished = len(answers)
        started = False

        def take(delta: TokenDelta) -> bool:
            nonlocal started, unfinished
            if not started and delta.finish_reason != "abort":
                # The first token is of the answer that read the prompt for all n.
                started = True
                self._cached_tokens += delta.cached_tokens
                self._queue.leave(request)
                self._metrics.read_prompt(request, delta.cached_tokens)
            answer = answers[delta.index]
            answer.engine_receipt = delta.receipt
            if delta.prompt_scores is not None:
                self._prompt_scores[request.id].append(delta.prompt_scores)
            if answer.finished or not (delta.tokens or delta.finish_reason):
                return False
            piece = answer.push(delta, time.monotonic())
            if piece is None:
                return False
            news.pieces.append(piece)
            news.bell.ring()
            if piece.finish_reason is not None:
                unfinished -= 1
                if unfinished and delta.finish_reason is None:
                    self._engine.abort(request.id, delta.index)
            return not unfinished

        await stream.each(take)
        if unfinished:
            raise ApiError(500, "the engine ended the request early", code="request_failed")
        await self._settle(request, stream, answers)

    async def _settle(
        self, request: Request, stream: TokenStream, answers: Sequence[Answer]
    ) -> None:
        """Where a stop string ended the last answer before the engine knew, the engine is told;
        within a step it says what the answer took."""
        if all(answer.engine_receipt is not None for answer in answers):
            return
        self._engine.abort(request.id)

        def take(delta: TokenDelta) -> bool:
            answers[delta.index].engine_receipt = delta.receipt
            return False

        # Whatever happens to the engine now, the answers are complete.
        with contextlib.suppress(EngineDead, RequestFailed):
            await stream.each(take)


class _Alarm:
    """Rings a bell after `IDLE_SECONDS` without a reset. One timer at a time, moved only when it
    goes off: a reset per step costs a clock reading."""

    def __init__(self, bell: _Bell) -> None:
        self._bell = bell
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()

    def __enter__(self) -> Self:
        self._timer = self._loop.call_later(IDLE_SECONDS, self._ring)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def idle(self) -> bool:
        return self._loop.time() >= self._last + IDLE_SECONDS

    def reset(self) -> None:
        self._last = self._loop.time()

    def _ring(self) -> None:
        if self.idle():
            self._bell.ring()
        wait = max(self._last + IDLE_SECONDS - self._loop.time(), IDLE_SECONDS / 10)
        self._timer = self._loop.call_later(wait, self._ring)


def _aborted(error: Exception) -> bool:
    return isinstance(error, ApiError) and error.code == "aborted"


def _first_indexes(requests: Iterable[Request]) -> list[tuple[int, Request]]:
    pairs, first = [], 0
    for request in requests:
        pairs.append((first, request))
        first += request.n
    return pairs
