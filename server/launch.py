"""What `quire serve` does: port, engine, app, and a clean end.

The port is taken first: it is the cheapest thing that can fail. It listens only when the engine is
ready, so that a load balancer sees a refused connection and not a silent one until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING, Final, NoReturn, TextIO, TypeVar

from configs.settings import Settings, SettingsError, format_bytes
from engine.client import EngineClient, EngineStartError, connect
from engine.protocol import EngineInfo, Progress
from server import __version__
from server.cli import FAILED, MISUSED, OK, reachable
from server.keys import KeyRing, require_keys

if TYPE_CHECKING:
    from fastapi import FastAPI
    from tqdm import tqdm

GRACE_SECONDS: Final = 20
"""How long running answers may go on after the first signal; a second signal ends them."""

ALIVE_CHECK_SECONDS: Final = 0.5

T = TypeVar("T")
_COUNTED: Final = ("memory", "kernels")  # phases in units of their own; the others are bytes


class Stopped(Exception):
    """A signal came before the server was up."""


def serve(settings: Settings) -> int:
    """Serves until a signal; the exit code.

    Raises:
        SettingsError: the port cannot be taken, or keys are missing or cannot be read.
        EngineStartError: the engine failed in a way nobody expected.
    """
    level = settings.observability.log_level
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s")
    keys = KeyRing.read(settings.http)
    with listening_socket(settings.http.host, settings.http.port) as bound:
        require_keys(bound.getsockname()[0], keys, no_auth=settings.http.no_auth)
        try:
            return asyncio.run(_serve(settings, keys, bound))
        except EngineStartError as error:
            if not error.expected:
                raise
            print(f"quire: {error.message}", file=sys.stderr)
            return MISUSED


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening.

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
    bound = socket.socket(family, kind, number)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise SettingsError(
            f"port {port} of {host} cannot be used ({error.strerror}); choose another with --port"
        ) from None
    return bound


async def _serve(settings: Settings, keys: KeyRing, bound: socket.socket) -> int:
    stop = _signals()
    with ProgressLines(sys.stderr) as lines:
        try:
            # The engine process imports torch meanwhile: on two cores the HTTP stack comes free.
            imported = asyncio.to_thread(importlib.import_module, "server.app")
            client, _ = await _unless(stop, asyncio.gather(connect(settings, lines.show), imported))
        except Stopped:
            return OK
    try:
        await _answer_http(settings, keys, client, bound, stop)
        return OK if client.alive else FAILED
    finally:
        await client.close()


def _signals() -> asyncio.Queue[None]:
    """One item for each SIGINT or SIGTERM."""
    stop: asyncio.Queue[None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.put_nowait, None)
    return stop


async def _unless(stop: asyncio.Queue[None], work: Awaitable[T]) -> T:
    """The result of `work`, or Stopped where a signal comes first; `work` is then cancelled."""
    task, signalled = asyncio.ensure_future(work), asyncio.ensure_future(stop.get())
    await asyncio.wait((task, signalled), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        signalled.cancel()
        return task.result()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    raise Stopped


async def _answer_http(
    settings: Settings,
    keys: KeyRing,
    client: EngineClient,
    bound: socket.socket,
    stop: asyncio.Queue[None],
) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # signals are `stop`'s: uvicorn would raise them again after a clean end

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(banner(settings, keys, client.info, bound.getsockname()), flush=True)

    app = build_app(settings, keys, client)
    server = Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )

    async def watch() -> None:
        await _stopped_or_dead(stop, client)
        server.should_exit = True
        await stop.get()
        server.force_exit = True

    watching = asyncio.create_task(watch())
    try:
        await server.serve(sockets=[bound])
    finally:
        watching.cancel()


async def _stopped_or_dead(stop: asyncio.Queue[None], client: EngineClient) -> None:
    """Returns at the first signal, or when the engine is gone: its streams have then been told,
    and a supervisor starts everything anew."""
    while client.alive:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.get(), ALIVE_CHECK_SECONDS)
            return
    print("quire: the engine is gone; the server ends", file=sys.stderr, flush=True)


def build_app(settings: Settings, keys: KeyRing, client: EngineClient) -> FastAPI:
    """The HTTP application over a running engine.

    Raises:
        EngineStartError: the model has no usable tokenizer.
    """
    from server.app import Limits, TextModel, create_app
    from server.tokenizer import TextModelError

    try:
        text = TextModel.load(client.info.model_path)
    except TextModelError as error:
        raise EngineStartError(str(error), expected=True) from None
    limits = settings.limits
    return create_app(
        client,
        text,
        served_model_names=settings.model.names,
        limits=Limits(limits.max_body_bytes, limits.max_messages, limits.max_prompts),
        keys=keys,
        metrics_without_key=settings.http.metrics_without_key,
    )


def banner(settings: Settings, keys: KeyRing, info: EngineInfo, address: tuple[object, ...]) -> str:
    """A box with what runs and how large it is, and a first request to copy."""
    url = f"http://{reachable(settings.http.host)}:{address[1]}"
    tokens = info.num_blocks * info.block_size
    pool = format_bytes(tokens * info.kv_bytes_per_token)
    rows = {
        "address": url,
        "models": ", ".join(settings.model.names),
        "device": f"{info.device}, {info.dtype}",
        "weights": f"{format_bytes(info.weight_bytes)} ({info.architecture})",
        "KV cache": f"{info.num_blocks:,} blocks x {info.block_size} = {tokens:,} tokens, {pool}",
        "context": f"{info.max_model_len:,} tokens at most",
        "API key": "on" if keys else "off",
    }
    title = f"Quire {__version__}"
    lines = [f"{name:<10}{value}" for name, value in rows.items()]
    width = max(map(len, [title, *lines]))
    return "\n".join(
        [
            f"+- {title} {'-' * (width - len(title) - 1)}+",
            *(f"| {line:<{width}} |" for line in lines),
            f"+{'-' * (width + 2)}+",
            first_request(settings.model.names[0], url, with_key=bool(keys)),
        ]
    )


def first_request(model: str, url: str, *, with_key: bool) -> str:
    """A curl line; a key stays in the variable that holds it."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
    }
    key = ' -H "Authorization: Bearer $QUIRE_API_KEY"' if with_key else ""
    return (
        f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d '{json.dumps(body)}'"
    )


class ProgressLines:
    """Shows how the start goes: a bar for each phase on a terminal, else one line for each."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._phase = ""
        self._began = 0.0
        self._finished = False
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def show(self, message: Progress) -> None:
        """Takes the next message; phases come one after another. A total of 0 is not known yet."""
        if message.phase != self._phase:
            self._close()
            self._phase, self._began, self._finished = message.phase, time.monotonic(), False
            if self._terminal:
                self._open(message)
        if self._bar is not None:
            self._bar.total = message.total or None
            self._bar.set_postfix_str(message.note, refresh=False)
            self._bar.update(message.done - self._bar.n)
        elif 0 < message.total <= message.done and not self._finished:
            self._finished = True
            self._out.write(self._line(message) + "\n")
            self._out.flush()

    def _open(self, message: Progress) -> None:
        from tqdm import tqdm

        in_bytes = message.phase not in _COUNTED
        self._bar = tqdm(
            total=message.total or None,
            desc=message.phase,
            file=self._out,
            unit="B" if in_bytes else "",
            unit_scale=in_bytes,
            unit_divisor=1024,
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, message: Progress) -> str:
        amount = [format_bytes(message.total)] if message.phase not in _COUNTED else []
        told = ", ".join([*amount, *([message.note] if message.note else [])])
        return f"{message.phase}: {told} ({time.monotonic() - self._began:.1f} s)"
