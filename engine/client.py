"""How a front door talks to an engine, wherever that engine runs. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

import msgspec

from configs.settings import Settings
from engine.grammar_check import GrammarChecks
from engine.protocol import (
    Abort,
    EngineInfo,
    EngineStats,
    Explain,
    Explained,
    FromEngine,
    Inspect,
    Inspection,
    ListRequests,
    Progress,
    Question,
    ReadTrace,
    Ready,
    Reply,
    RequestList,
    RequestView,
    Shutdown,
    StartFailed,
    StepOutput,
    Submit,
    ToEngine,
    TokenDelta,
    Trace,
    TraceView,
)
from scheduler.request import Grammar, InvalidRequest, Request

Entry = Callable[[Settings, Connection, Connection], None]
"""The entry point of an engine process: settings, inbox, outbox."""

STOP_TIMEOUT = 10.0  # seconds an engine gets to leave by itself before it is killed


class EngineDead(RuntimeError):
    """The engine process or thread is gone; no stream of it will go on."""


class EngineStopped(EngineDead):
    """The engine was closed on purpose."""


class RequestFailed(RuntimeError):
    """The engine ended this one request because of an error of its own, or of a deadline.

    Attributes:
        code: see `Failure`.
    """

    def __init__(self, message: str, code: str = "request_failed") -> None:
        super().__init__(message)
        self.code = code


class EngineStartError(RuntimeError):
    """The engine could not start. `expected` is True where one line tells the operator what to
    change."""

    def __init__(self, message: str, *, expected: bool) -> None:
        super().__init__(message)
        self.message, self.expected = message, expected


class TokenStream(Protocol):
    """The deltas of one request, until each of its n answers has a finish_reason."""

    async def each(self, take: Callable[[TokenDelta], bool]) -> None:
        """Hands every delta to `take` as soon as it is read, on the event loop, without waking a
        task for it. Returns when `take` says that it has enough, or every answer is finished; may
        be called again for the rest.

        Raises:
            RequestFailed: the engine ended the request because of an error of its own.
            EngineDead: the engine is gone.
            Exception: what `take` raised.
        """

    async def aclose(self) -> None:
        """Aborts the request if it is not finished. Use `contextlib.aclosing`."""


class EngineClient(Protocol):
    """Nine verbs: submit, abort, listen, stats, inspect, trace, explain, requests, close."""

    @property
    def info(self) -> EngineInfo:
        """Limits and layout of the running engine."""

    @property
    def alive(self) -> bool:
        """Whether steps can still happen."""

    @property
    def quiet_seconds(self) -> float:
        """How long nothing was heard of an engine that has work; 0 where it has none."""

    async def submit(self, request: Request) -> TokenStream:
        """Hands the request in and returns once it is admitted to the queue.

        Cancelling the call aborts the request.

        Raises:
            InvalidRequest: the engine refuses it (it can never fit the pool, its id is taken).
            EngineDead: the engine is gone.
        """

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or only its answer `index`, within one step; unknown ids are ignored.
        What was ended has the finish_reason `abort`."""

    def listen(self, listener: Callable[[StepOutput], None]) -> None:
        """From now on `listener` hears all that the engine says of its steps, that about answers
        included whose stream was closed."""

    def stats(self) -> EngineStats:
        """The newest snapshot, without a round trip."""

    async def inspect(self, *, verify: bool = False) -> Inspection:
        """A look at the KV cache between two steps, for people who debug.

        Args:
            verify: also check every invariant.

        Raises:
            EngineDead: the engine is gone.
        """

    async def trace(self) -> TraceView:
        """The last steps of the scheduler, for people who debug.

        Raises:
            EngineDead: the engine is gone.
        """

    async def explain(self, request: Request) -> Explained:
        """What the KV cache would find of the request's prompt, and what would become of it now.

        Raises:
            EngineDead: the engine is gone.
        """

    async def requests(self) -> list[RequestView]:
        """The live requests: running ones, then the queue in its order.

        Raises:
            EngineDead: the engine is gone.
        """

    async def close(self) -> None:
        """Stops the engine and waits for it."""


class _Stream:
    """`TokenStream` fed by the client's dispatch, all of it on the event loop's thread."""

    def __init__(self, request: Request, abort: Callable[[str], None]) -> None:
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._id = request.id
        self._unfinished = request.n
        self._ended = False  # nothing more will arrive, or nobody wants it
        self._abort = abort
        self._untaken: deque[TokenDelta] = deque()
        self._failure: Exception | None = None
        self._take: Callable[[TokenDelta], bool] | None = None
        self._enough: asyncio.Future[Exception | None]  # how the newest `each` ends

    def put(self, delta: TokenDelta) -> bool:
        """Takes a delta in; returns whether it was the last one."""
        self._unfinished -= delta.finish_reason is not None
        self._ended = self._unfinished == 0
        self._untaken.append(delta)
        if self._take is not None:
            self._hand_over(self._take)
        return self._ended

    def fail(self, error: Exception) -> None:
        """Nothing more will come: whoever waits gets `error`."""
        self._ended = True
        if not self.admitted.done():
            self.admitted.set_exception(error)
            return
        self._failure = error
        if self._take is not None:
            self._hand_over(self._take)

    async def each(self, take: Callable[[TokenDelta], bool]) -> None:
        self._enough = asyncio.get_running_loop().create_future()
        self._hand_over(take)
        self._take = take
        try:
            error = await self._enough
        finally:
            self._take = None
        if error is not None:
            raise error

    def _hand_over(self, take: Callable[[TokenDelta], bool]) -> None:
        """Gives what is there to `take`, and says whether that was all that is wanted."""
        untaken, enough = self._untaken, self._enough
        try:
            while untaken and not enough.done():
                if take(untaken.popleft()):
                    enough.set_result(None)
        except Exception as error:  # it is this request's alone
            enough.set_result(error)
        if self._ended and not enough.done():
            enough.set_result(self._failure)

    async def aclose(self) -> None:
        if not self._ended:
            self._ended = True
            self._abort(self._id)


class _StreamingClient:
    """What both engines share: many streams over one flow of step outputs."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}
        self._aborted = Abort([], [])
        self._submitted: list[Request] = []
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._stats = EngineStats()
        self._info: EngineInfo | None = None
        self._listener: Callable[[StepOutput], None] = lambda output: None
        self._dead = False
        self._heard = 0.0  # monotonic seconds: the newest message, or the first work after none

    def _send(self, message: ToEngine) -> None:
        raise NotImplementedError

    async def _check(self, grammar: Grammar) -> None:
        """Tries a grammar out before it is sent.

        Raises:
            InvalidRequest: it cannot be used.
        """

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "the engine is not started"
        return self._info

    @property
    def alive(self) -> bool:
        return not self._dead

    def listen(self, listener: Callable[[StepOutput], None]) -> None:
        self._listener = listener

    @property
    def quiet_seconds(self) -> float:
        return time.monotonic() - self._heard if self._has_work else 0.0

    @property
    def _has_work(self) -> bool:
        return bool(self._streams or self._asked)

    def stats(self) -> EngineStats:
        return self._stats

    async def submit(self, request: Request) -> TokenStream:
        if self._dead:
            raise EngineDead("the engine is gone")
        if request.id in self._streams:
            raise InvalidRequest(f"request id {request.id!r} is in use", "id")
        if request.sampling.grammar is not None:
            await self._check(request.sampling.grammar)
        self._note_new_work()
        stream = self._streams[request.id] = _Stream(request, self.abort)
        self._flush_soon()
        self._submitted.append(request)
        try:
            await stream.admitted
        except asyncio.CancelledError:
            await stream.aclose()
            raise
        return stream

    async def inspect(self, *, verify: bool = False) -> Inspection:
        found: Inspection = await self._ask(Inspect(next(self._numbers), verify))
        return found

    async def trace(self) -> TraceView:
        found: Trace = await self._ask(ReadTrace(next(self._numbers)))
        return found.view

    async def explain(self, request: Request) -> Explained:
        found: Explained = await self._ask(Explain(next(self._numbers), request))
        return found

    async def requests(self) -> list[RequestView]:
        found: RequestList = await self._ask(ListRequests(next(self._numbers)))
        return found.requests

    async def _ask(self, question: Question) -> Any:
        """The message that answers `question`."""
        if self._dead:
            raise EngineDead("the engine is gone")
        self._note_new_work()
        answer = self._asked[question.id] = asyncio.get_running_loop().create_future()
        try:
            self._send(question)
            return await answer
        finally:
            del self._asked[question.id]

    def abort(self, request_id: str, index: int | None = None) -> None:
        if request_id not in self._streams or self._dead:
            return
        self._flush_soon()
        if index is None:
            self._aborted.request_ids.append(request_id)
        else:
            self._aborted.answers.append((request_id, index))

    def _note_new_work(self) -> None:
        if not self._has_work:
            self._heard = time.monotonic()

    def _flush_soon(self) -> None:
        """All that this turn of the event loop has to say becomes one message of each kind."""
        aborted = self._aborted.request_ids or self._aborted.answers
        if not self._submitted and not aborted:
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        # Submissions first: an abort may be of a request that was submitted in this very turn.
        if self._submitted:
            self._send(Submit(self._submitted))
        if self._aborted.request_ids or self._aborted.answers:
            self._send(self._aborted)
        self._submitted, self._aborted = [], Abort([], [])

    def _dispatch(self, output: StepOutput | Reply) -> None:
        """Hands one step's output to the streams."""
        self._heard = time.monotonic()
        if isinstance(output, Reply):
            answer = self._asked.get(output.id)
            if answer is not None and not answer.done():
                answer.set_result(output)
            return
        self._stats = output.stats
        self._listener(output)
        for request_id in output.admitted:
            stream = self._streams[request_id]
            if not stream.admitted.done():  # it is done when the caller was cancelled
                stream.admitted.set_result(None)
        for refusal in output.refused:
            error = InvalidRequest(refusal.message, refusal.param, refusal.code)
            self._streams.pop(refusal.request_id).fail(error)
        for delta in output.deltas:
            if self._streams[delta.request_id].put(delta):
                del self._streams[delta.request_id]
        for failure in output.failed:
            if failure.request_id in self._streams:
                self._streams.pop(failure.request_id).fail(
                    RequestFailed(failure.message, failure.code)
                )

    def _die(self, why: EngineDead) -> None:
        """Every stream ends with `why`."""
        self._dead = True
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(why)
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(why)


class ProcessEngine(_StreamingClient):
    """An engine in a process of its own, over two anonymous pipes.

        event loop -> queue -> writer thread -> pipe -> engine
        event loop <----------- reader callback <- pipe <- engine

    Writing has a thread of its own because a pipe holds 64 KiB: a long prompt would otherwise
    block every stream until the engine ends its step and reads it.

    Args:
        entry: what runs in the process: the real engine, unless a benchmark wants another.
    """

    def __init__(self, settings: Settings, entry: Entry | None = None) -> None:
        super().__init__()
        # Spawned, not forked: a child must not inherit threads, sockets or CUDA state.
        context = multiprocessing.get_context("spawn")
        inbox, self._to_engine = context.Pipe(duplex=False)
        self._from_engine, outbox = context.Pipe(duplex=False)
        from engine.process import main

        self._process = context.Process(
            target=entry or main, args=(settings, inbox, outbox), name="quire-engine", daemon=True
        )
        self._process.start()
        # The child has its own ends; with ours closed, its death reads as the end of the pipe.
        inbox.close()
        outbox.close()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        self._checks: GrammarChecks | None = None
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(
            target=_write_all, args=(self._outbox, self._to_engine), daemon=True
        )

    async def start(self, on_progress: Callable[[Progress], None]) -> None:
        """Waits until the engine is ready.

        Raises:
            EngineStartError: it could not start.
        """
        try:
            while self._info is None:
                # A thread waits, so that the event loop goes on and this can be cancelled.
                message = self._decode(await asyncio.to_thread(self._from_engine.recv_bytes))
                self._take_start_message(message, on_progress)
        except (EOFError, ConnectionResetError):
            await self.close()
            code = self._process.exitcode
            raise EngineStartError(
                f"the engine process ended while it started (exit code {code})", expected=False
            ) from None
        except BaseException:
            await self.close()
            raise
        self._writer.start()
        asyncio.get_running_loop().add_reader(self._from_engine.fileno(), self._read)

    def _take_start_message(
        self, message: FromEngine, on_progress: Callable[[Progress], None]
    ) -> None:
        if isinstance(message, Progress):
            on_progress(message)
        elif isinstance(message, StartFailed):
            raise EngineStartError(message.message, expected=message.expected)
        elif isinstance(message, Ready):
            self._info = message.info

    def _read(self) -> None:
        try:
            message = self._decode(self._from_engine.recv_bytes())
        except (EOFError, OSError):
            self._stop_reading()
            self._die(EngineDead("the engine is gone"))
            return
        assert isinstance(message, StepOutput | Reply)
        self._dispatch(message)

    def _stop_reading(self) -> None:
        if not self._from_engine.closed:
            asyncio.get_running_loop().remove_reader(self._from_engine.fileno())
            self._from_engine.close()

    def _send(self, message: ToEngine) -> None:
        self._outbox.put(self._encode(message))

    async def _check(self, grammar: Grammar) -> None:
        if self._checks is None:
            self._checks = GrammarChecks(self.info)
        problem = await self._checks.problem(grammar)
        if problem is not None:
            raise grammar.refusal(problem)

    async def close(self) -> None:
        if self._writer.is_alive():
            self._stop_reading()
            self._send(Shutdown())
        self._die(EngineStopped("the engine was closed"))
        self._outbox.put(None)
        if self._checks is not None:
            self._checks.close()
        await asyncio.to_thread(self._join)
        self._stop_reading()

    def kill(self) -> None:
        """Ends the engine's process at once; every stream hears of it."""
        self._process.kill()

    def dump_stacks(self) -> None:
        """Makes the engine's process print where its threads are, if it still can."""
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGUSR1)

    @property
    def exit_code(self) -> int | None:
        """Of the engine's process; negative is a signal, None where it runs."""
        return self._process.exitcode

    def _join(self) -> None:
        if self._info is None:
            self._process.terminate()  # still starting: it does not read its inbox yet
        self._process.join(STOP_TIMEOUT)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        if self._writer.is_alive():
            self._writer.join()
        self._to_engine.close()


def _write_all(outbox: queue.SimpleQueue[bytes | None], pipe: Connection) -> None:
    """Writes every message of `outbox` until a None; what a dead engine cannot take is dropped."""
    with contextlib.suppress(OSError):
        while (data := outbox.get()) is not None:
            pipe.send_bytes(data)


async def connect(settings: Settings, on_progress: Callable[[Progress], None]) -> ProcessEngine:
    """Starts an engine process and waits until it is ready.

    Raises:
        EngineStartError: it could not start.
    """
    engine = ProcessEngine(settings)
    await engine.start(on_progress)
    return engine


def check(settings: Settings) -> EngineInfo:
    """What an engine with these settings would be, from a process of its own, which loads nothing.

    Raises:
        EngineStartError: it could not start.
    """
    from engine import process

    context = multiprocessing.get_context("spawn")
    answers, outbox = context.Pipe(duplex=False)
    checking = context.Process(target=process.check, args=(settings, outbox), daemon=True)
    checking.start()
    outbox.close()
    try:
        answer = msgspec.msgpack.decode(answers.recv_bytes(), type=Ready | StartFailed)
    except EOFError:
        raise EngineStartError("the check failed: see above", expected=False) from None
    finally:
        checking.join()
    if isinstance(answer, StartFailed):
        raise EngineStartError(answer.message, expected=answer.expected)
    return answer.info


class InprocEngine(_StreamingClient):
    """The same loop on a thread of this process, for tests and notebooks.

    Args:
        loop: an `engine.loop.EngineLoop`; given ready-made so that this module needs no torch.
    """

    def __init__(self, loop: Any) -> None:
        super().__init__()
        self._info = loop.info
        self._inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._events = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)
        self._thread.start()

    def _run(self, loop: Any) -> None:
        try:
            loop.run(self, lambda output: self._post(self._dispatch, output))
        finally:
            loop.close()
            self._post(self._die, EngineDead("the engine is gone"))

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens
            self._events.call_soon_threadsafe(callback, *args)

    def drain(self, wait: bool) -> list[ToEngine]:
        """The loop's inbox: see `engine.loop.Inbox`."""
        messages = []
        while wait or not self._inbox.empty():
            message = self._inbox.get()
            if message is None:
                raise EOFError
            messages.append(message)
            wait = False
        return messages

    def _send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    async def close(self) -> None:
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._die(EngineStopped("the engine was closed"))
