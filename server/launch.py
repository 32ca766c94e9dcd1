"""What `quire serve` does, from the port to the exit code.

    port ─┬─ health checks answer, everything else is 503 ───────────┐
          └─ engine: download, weights, kernels, memory, warm-up ────┴─ routes ── signal ── drain

The port comes first: it is the cheapest thing that can fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Final, TypeVar

from configs import logs
from configs.settings import Settings, SettingsError
from engine.client import EngineStartError, ProcessEngine, connect
from engine.protocol import STALLED, Progress
from scheduler.request import RequestLimits
from server import progress
from server.banner import box, facts
from server.cli import FAILED, MISUSED, OK
from server.keys import KeyRing, require_keys
from server.lifecycle import Lifecycle
from server.spans import Spans, connect_spans
from server.startup_times import StartupTimes

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

FLUSH_SECONDS: Final = 3
"""How long the last bytes, such as error events, may take to reach their clients."""

CHECK_SECONDS: Final = 0.5
STALLED_CHECKS: Final = 4
"""A stalled engine ends itself and says why; one that cannot is killed so many checks later. Never
at the first check: this process may have been suspended itself, with the engine's news unread."""

T = TypeVar("T")
logger = logging.getLogger("quire.server")


class Stopped(Exception):
    """A signal came first."""


def serve(settings: Settings) -> int:
    """Serves until a signal; the exit code.

    Raises:
        SettingsError: the port cannot be taken, keys are missing or cannot be read, or a package
            that a setting needs is not installed.
    """
    keys = KeyRing.read(settings.http)
    spans = connect_spans(settings.observability.otlp_traces_endpoint)
    with (
        contextlib.closing(spans) if spans else contextlib.nullcontext(),
        listening_socket(settings.http.host, settings.http.port) as listening,
    ):
        require_keys(listening.getsockname()[0], keys, no_auth=settings.http.no_auth)
        wanted = settings.observability
        logs.configure(
            wanted.log_level,
            wanted.log_format,
            access=wanted.access_log,
            prompts=wanted.log_prompts,
        )
        try:
            return asyncio.run(_Server(settings, keys, spans, listening).run())
        except EngineStartError as error:
            if not error.expected:
                logger.critical("the engine did not start", extra={"details": error.message})
                return FAILED
            print(f"quire: {error.message}", file=sys.stderr)
            return MISUSED


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens at the address; who connects waits until somebody answers.

    Raises:
        SettingsError: the address is taken or is not this machine's.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise SettingsError(
            f"host must be an address of this machine, got {host}: {error}"
        ) from None
    listening = socket.socket(family, kind, number)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        raise SettingsError(
            f"port {port} of {host} cannot be used ({error.strerror}); choose another with --port"
        ) from None
    return listening


class _Server:
    """One run of a server."""

    def __init__(
        self, settings: Settings, keys: KeyRing, spans: Spans | None, listening: socket.socket
    ) -> None:
        self._settings, self._keys, self._listening = settings, keys, listening
        self._text = logs.is_text(settings.observability.log_format)
        self._spans = spans
        self._lifecycle = Lifecycle(settings.lifetime.stall_timeout)
        self._startup = StartupTimes()
        self._signals: asyncio.Queue[None] = asyncio.Queue()  # an item for each

    async def run(self) -> int:
        """Until the end; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signals.put_nowait, None)
        with progress.display(text=self._text) as lines:
            # The engine's process has the longest way to go: it sets out before anything else.
            connecting = asyncio.create_task(self._connect(lines))
            await asyncio.sleep(0)
            from server.starting import starting_app

            front = _Front(starting_app(self._lifecycle, self._keys))
            async with _http(front, self._listening) as http:
                try:
                    engine = await self._unless_signalled(connecting)
                except Stopped:
                    return OK
                try:
                    await self._open(front, engine)
                    return await self._serve(engine, http)
                finally:
                    await engine.close()

    async def _connect(self, lines: progress.ProgressDisplay) -> ProcessEngine:
        """The engine, started."""

        def show(message: Progress) -> None:
            self._lifecycle.progress = message
            self._startup.take(message)
            lines.show(message)

        # The HTTP stack is imported while the engine's process imports torch.
        imported = asyncio.to_thread(importlib.import_module, "server.app")
        engine, _ = await asyncio.gather(connect(self._settings, show), imported)
        return engine

    async def _open(self, front: _Front, engine: ProcessEngine) -> None:
        """Puts the routes over `engine` in front."""
        front.app = await asyncio.to_thread(
            build_app,
            self._settings,
            self._keys,
            self._spans,
            self._lifecycle,
            engine,
            self._startup.ready(),
        )
        gc.collect()
        gc.freeze()  # as in the engine's process
        self._lifecycle.engine = engine
        address = self._listening.getsockname()
        told = facts(self._settings, self._keys, engine.info, address)
        if self._text:
            print(box(told), flush=True)
        else:
            logger.info("ready", extra={"fields": told})

    async def _unless_signalled(self, task: asyncio.Task[T]) -> T:
        """The result of `task`, or Stopped where a signal comes first; it is then cancelled."""
        signalled = asyncio.ensure_future(self._signals.get())
        await asyncio.wait((task, signalled), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            signalled.cancel()
            return task.result()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        raise Stopped

    async def _serve(self, engine: ProcessEngine, http: uvicorn.Server) -> int:
        """Until a signal and the end of what is running then, or until the engine is gone."""
        try:
            return await self._unless_signalled(asyncio.create_task(self._watch(engine)))
        except Stopped:
            await self._drain(engine, http)
            return OK

    async def _watch(self, engine: ProcessEngine) -> int:
        """Returns an exit code when the engine is gone; one that stands still is killed. Its
        streams have then been told, and a supervisor starts everything anew."""
        stalled = 0
        while engine.alive and stalled < STALLED_CHECKS:
            await asyncio.sleep(CHECK_SECONDS)
            stalled = stalled + 1 if self._lifecycle.state == "stalled" else 0
        if engine.alive:
            logger.critical("no step for %.0f s: the engine is killed", engine.quiet_seconds)
            engine.dump_stacks()
            await asyncio.sleep(CHECK_SECONDS)
            engine.kill()
            while engine.alive:  # its streams are told that it died, not that the server closed it
                await asyncio.sleep(CHECK_SECONDS / 10)
        await engine.close()
        logger.critical("the engine is gone (exit code %s); the server ends", engine.exit_code)
        return STALLED if stalled or engine.exit_code == STALLED else FAILED

    async def _drain(self, engine: ProcessEngine, http: uvicorn.Server) -> None:
        """Lets what is running end, for a while; the rest ends with an error."""

        async def hurry() -> None:
            await self._signals.get()
            http.force_exit = True
            engine.kill()

        self._lifecycle.draining = True
        seconds = self._settings.lifetime.shutdown_timeout
        if self._lifecycle.running:
            logger.info(
                "stopping: waiting up to %g s for %d running requests (another signal ends them)",
                seconds,
                self._lifecycle.running,
            )
        hurrying = asyncio.create_task(hurry())
        idle = asyncio.create_task(self._lifecycle.idle())
        await asyncio.wait((hurrying, idle), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if self._lifecycle.running:
            logger.warning("ending %d requests before they are done", self._lifecycle.running)
        await engine.close()


class _Front:
    """The application as the HTTP server sees it: first one that starts, then the real one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


@contextlib.asynccontextmanager
async def _http(app: ASGIApp, listening: socket.socket) -> AsyncIterator[uvicorn.Server]:
    """Answers HTTP within the context; on the way out, the last bytes get a little time."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # signals are `_Server`'s: uvicorn would raise them again after a clean end

    server = Server(
        uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # `create_app` reads them, behind the way of scrapes
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
    )
    answering = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield server
    finally:
        server.should_exit = True
        await answering


def build_app(
    settings: Settings,
    keys: KeyRing,
    spans: Spans | None,
    lifecycle: Lifecycle,
    engine: ProcessEngine,
    startup: Mapping[str, float],
) -> FastAPI:
    """The HTTP application over a running engine. `startup`: seconds that each phase took.

    Raises:
        EngineStartError: the model has no usable tokenizer.
    """
    from server.app import Limits, ParserNames, TextModel, create_app
    from server.metrics import Slo
    from server.queue_bound import QueueLimits
    from server.tokenizer import TextModelError

    try:
        text = TextModel.load(engine.info.model_path)
    except TextModelError as error:
        raise EngineStartError(str(error), expected=True) from None
    limits = settings.limits
    return create_app(
        engine,
        text,
        served_model_names=settings.model.names,
        lifecycle=lifecycle,
        limits=Limits(
            limits.max_body_bytes,
            limits.max_messages,
            limits.max_prompts,
            limits.max_answers,
            limits.max_stop_strings,
            RequestLimits(
                limits.max_n,
                limits.max_stop_token_ids,
                limits.max_logit_bias,
                limits.max_logprobs,
            ),
        ),
        queue=QueueLimits(
            limits.max_queued_requests,
            limits.max_queued_tokens,
            limits.max_queued_requests_per_key,
        ),
        keys=keys,
        metrics_without_key=settings.http.metrics_without_key,
        spans=spans,
        slo=Slo(settings.observability.slo_ttft, settings.observability.slo_tpot),
        startup=startup,
        parsers=ParserNames(settings.model.tool_call_parser, settings.model.reasoning_parser),
    )
