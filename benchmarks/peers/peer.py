"""What can be compared: how a peer is started, and how it is asked."""

from __future__ import annotations

import asyncio
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from benchmarks.dialect import Dialect, PromptKind, measured_words
from benchmarks.load import Round, run_round
from benchmarks.local_server import free_port
from benchmarks.peers.checkpoint import Checkpoint
from benchmarks.peers.process import ProcessGroup
from benchmarks.peers.task import Task
from benchmarks.sse import BenchError, Client

START_SECONDS: Final = 600.0


class Running(Protocol):
    """A peer that has answered its first token."""

    process: ProcessGroup

    def measure(self, task: Task, limit_s: float) -> Round:
        """One round.

        Raises:
            TimeoutError: not done within `limit_s` seconds; it may still be at work.
            BenchError: it refused, or an answer has another length than asked for.
        """


class Peer(Protocol):
    """A program that serves models.

    Attributes:
        name: for the command line and the table.
        about: what it is and how it is driven, in one line.
    """

    name: str
    about: str

    def absent(self) -> str | None:
        """Why it cannot be measured here; None if it can."""

    def version(self) -> str: ...

    def prepare(self, checkpoint: Checkpoint) -> None:
        """Makes the files that it reads, where they are not there yet."""

    def start(self, checkpoint: Checkpoint, log: Path) -> Running:
        """Starts it, and waits until it has answered a first token.

        Raises:
            BenchError: it ended, or did not answer in time.
        """

    def settings(self, checkpoint: Checkpoint) -> str:
        """How it is started, as one would type it."""


class ServerPeer(ABC):
    """A peer that speaks OpenAI's API over HTTP."""

    name: str
    about: str
    prompt_kind: PromptKind = "ids"

    @property
    def environment(self) -> dict[str, str]:
        return {}

    @property
    def extra_body(self) -> dict[str, Any]:
        """Fields of every request beside the client's own; None takes one away."""
        return {}

    @abstractmethod
    def absent(self) -> str | None: ...

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def command(self, checkpoint: Checkpoint, port: int) -> Sequence[str | Path]: ...

    def prepare(self, checkpoint: Checkpoint) -> None:
        self.command(checkpoint, 0)

    def settings(self, checkpoint: Checkpoint) -> str:
        given = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*given, *map(_short, self.command(checkpoint, 0))])

    def model(self, checkpoint: Checkpoint) -> str:
        """The name that requests give."""
        return checkpoint.shape

    def start(self, checkpoint: Checkpoint, log: Path) -> RunningServer:
        port = free_port()
        command = [str(piece) for piece in self.command(checkpoint, port)]
        process = ProcessGroup(command, log, environment=self.environment)
        dialect = Dialect(
            self.model(checkpoint), prompt_kind=self.prompt_kind, extra=self.extra_body
        )
        running = RunningServer(process, Client(f"http://127.0.0.1:{port}"), dialect)
        try:
            asyncio.run(running.until_it_answers())
        except BaseException:
            process.end()
            raise
        return running


class RunningServer:
    """Single requests go to /v1/completions, chats as text to /v1/chat/completions."""

    def __init__(self, process: ProcessGroup, client: Client, dialect: Dialect) -> None:
        self.process = process
        self._client = client
        self._dialects = {False: dialect}  # by whether they are for chats

    async def until_it_answers(self) -> None:
        """Raises BenchError: the process ended, or START_SECONDS have passed."""
        dialect = self._dialects[False]
        prompt = "a b c d" if dialect.prompt_kind == "text" else [1, 2, 3, 4]
        request = dialect.request(dialect.asked(prompt), 1)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.ended:
                raise BenchError(f"it ended: {self.process.last_words()}")
            try:
                await self._client.post(dialect.path, request.body)
                return self._client.close()
            except BenchError as error:
                refused = error
                await asyncio.sleep(0.1)
        raise BenchError(f"no answer in {START_SECONDS:.0f} s, at last: {refused}")

    def measure(self, task: Task, limit_s: float) -> Round:
        return asyncio.run(asyncio.wait_for(self._measure(task), limit_s))

    async def _measure(self, task: Task) -> Round:
        if task.chats not in self._dialects:
            self._dialects[task.chats] = await self._chat_dialect()
        workload = task.workload(self._dialects[task.chats])
        return await run_round(self._client, workload, task.loop, seed=0)

    async def _chat_dialect(self) -> Dialect:
        asked = self._dialects[False]
        chat = Dialect(asked.model, api="chat", prompt_kind="text", extra=asked.extra)
        words = await measured_words(self._client, chat)
        self._client.close()  # some servers close idle connections at a moment of their own
        return Dialect(chat.model, api="chat", prompt_kind="text", extra=chat.extra, words=words)


def version_of(python: Path, package: str) -> str:
    """The version of a package in the environment of that interpreter."""
    script = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _short(piece: str | Path) -> str:
    """A path by its last name."""
    return piece.name if isinstance(piece, Path) else piece
