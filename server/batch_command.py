"""`quire run-batch`: a file of requests, against a running server or a model of its own."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from tqdm import tqdm

from configs import logs
from configs.settings import Settings, SettingsError
from engine.client import EngineStartError, connect
from server import batch, progress
from server.cli import FAILED, MISUSED, OK
from server.keys import KeyRing
from server.launch import build_app
from server.lifecycle import Lifecycle

STOPPED = 130  # as a shell has it of Ctrl-C


@dataclass(frozen=True)
class Options:
    """Attributes:
    errors: where failures go; None is beside `out`.
    concurrency: most requests at a time.
    """

    input: Path
    out: Path
    errors: Path | None
    concurrency: int


def run_against(options: Options, url: str, api_key: str | None) -> int:
    """The batch against a server; the exit code.

    Raises:
        SettingsError: the URL or a file cannot be used.
    """
    if not url.startswith(("http://", "https://")):
        raise SettingsError(f"--url must be like http://127.0.0.1:8000, got {url}")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=options.concurrency)
    return _run(
        options, httpx.AsyncClient(base_url=url, headers=headers, timeout=None, limits=limits)
    )


def run_here(options: Options, settings: Settings) -> int:
    """The batch with a model that is started for it; the exit code.

    Raises:
        SettingsError: a file cannot be used.
        EngineStartError: the engine failed in a way nobody expected.
    """
    wanted = settings.observability
    logs.configure(wanted.log_level, wanted.log_format)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    try:
        return _run(options, _started(settings))
    except EngineStartError as error:
        if not error.expected:
            raise
        print(f"quire: {error.message}", file=sys.stderr)
        return MISUSED


@asynccontextmanager
async def _started(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application itself, without a port, over an engine of its own."""
    with progress.display(text=logs.is_text(settings.observability.log_format)) as lines:
        engine = await connect(settings, lines.show)
    try:
        lifecycle = Lifecycle(math.inf, engine)
        app = build_app(settings, KeyRing(), None, lifecycle, engine, {})
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            yield client
    finally:
        await engine.close()


def _run(options: Options, client: AbstractAsyncContextManager[httpx.AsyncClient]) -> int:
    errors = options.errors or options.out.with_suffix(f".errors{options.out.suffix}")
    if len({path.resolve() for path in (options.input, options.out, errors)}) < 3:
        raise SettingsError("input, output and errors must be three files")
    try:
        with options.input.open("rb") as lines:
            total = sum(1 for line in lines if line.strip())
    except OSError as error:
        raise SettingsError(f"{options.input} cannot be read: {error.strerror}") from None
    try:
        with batch.Answers(options.out, errors) as answers:
            asyncio.run(_work(options, client, answers, total))
    except batch.BatchError as error:
        raise SettingsError(str(error)) from None
    except KeyboardInterrupt:
        print("quire: stopped; the same command goes on from here", file=sys.stderr)
        return STOPPED
    if answers.failed:
        print(f"quire: {answers.failed} of {total} failed: see {errors}", file=sys.stderr)
        return FAILED
    return OK


async def _work(
    options: Options,
    client: AbstractAsyncContextManager[httpx.AsyncClient],
    answers: batch.Answers,
    total: int,
) -> None:
    async with client as http:
        with options.input.open("rb") as lines, tqdm(total=total, unit="request") as bar:
            await batch.run(
                http, lines, answers, concurrency=options.concurrency, progress=bar.update
            )
