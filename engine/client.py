"""How a front door talks to an engine, wherever that engine runs. Imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from engine.protocol import EngineInfo, EngineStats, TokenDelta
from scheduler.request import Request


class EngineDead(RuntimeError):
    """The engine process or thread is gone; no stream of it will go on."""


class RequestFailed(RuntimeError):
    """The engine ended this one request because of an error of its own."""


class EngineStartError(RuntimeError):
    """The engine could not start. `expected` is True where one line tells the operator what to
    change."""

    def __init__(self, message: str, *, expected: bool) -> None:
        super().__init__(message)
        self.message, self.expected = message, expected


class EngineClient(Protocol):
    """Four verbs: submit, abort, stats, close."""

    @property
    def info(self) -> EngineInfo:
        """Limits and layout of the running engine."""

    @property
    def alive(self) -> bool:
        """Whether steps can still happen."""

    async def submit(self, request: Request) -> AsyncIterator[TokenDelta]:
        """Hands the request in and returns once it is admitted to the queue.

        The iterator yields deltas of all n answers until each has a finish_reason. Closing it
        earlier (`aclose`, or
        leaving the consuming task) aborts the request.

        Raises:
            InvalidRequest: the engine refuses it (it can never fit the pool, its id is taken).
            RequestFailed: (while iterating) the request hit an error of the engine.
            EngineDead: the engine is gone.
        """

    def abort(self, request_id: str) -> None:
        """Ends a request within one step; unknown ids are ignored. Its iterator ends with
        finish_reason `abort`."""

    def stats(self) -> EngineStats:
        """The newest snapshot, without a round trip."""

    async def close(self) -> None:
        """Stops the engine and waits for it."""
