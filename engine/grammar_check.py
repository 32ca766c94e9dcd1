"""Tries grammars out before an engine sees them, in processes that may die of it.

A hostile schema or expression can overflow the compiler's stack, eat memory or take forever. None
of that can be stopped within a process, so each new grammar is compiled once in a process that is
killed after `COMPILE_SECONDS`; the engine only gets what went well there.

    submit -> GrammarChecks.check -> worker: compile, copy, first mask -> engine compiles it again
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import resource
import signal
import threading
from collections import OrderedDict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import msgspec

from engine.protocol import EngineInfo
from scheduler.request import Grammar

COMPILE_SECONDS: Final = 2.0
WORKERS: Final = 2
REMEMBERED: Final = 1024
REMEMBERED_CHARACTERS: Final = 4 << 20

# A worker has less stack than the engine's threads (8 MiB) and little memory to spare, so that
# what fits here fits there.
WORKER_STACK_BYTES: Final = 512 << 10
WORKER_SPARE_BYTES: Final = 1 << 30

TOO_LONG = f"compiling it takes longer than {COMPILE_SECONDS:g} s"
TOO_LARGE = "it is too deep or too large to compile"


class GrammarChecks:
    """A few workers, started when the first grammar comes, and what they found.

    Args:
        info: of the engine that will use the grammars.
    """

    def __init__(self, info: EngineInfo) -> None:
        self._setup = (info.model_path, info.vocab_size, info.eos_token_ids)
        self._free = asyncio.Semaphore(WORKERS)
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._found: OrderedDict[tuple[str, str], asyncio.Task[str | None]] = OrderedDict()
        self._characters = 0
        self._closed = False

    async def problem(self, grammar: Grammar) -> str | None:
        """Why `grammar` cannot be used, or None. Each one is tried once, whoever waits for it."""
        key = (grammar.kind, grammar.text)
        task = self._found.get(key)
        if task is None:
            task = self._found[key] = asyncio.create_task(self._try(grammar))
            self._characters += len(grammar.text)
            self._shrink()
        self._found.move_to_end(key)
        # A caller that goes away does not end what others wait for.
        return await asyncio.shield(task)

    def close(self) -> None:
        """Ends the workers."""
        self._closed = True
        for worker in (*self._idle, *self._busy):
            worker.kill()
        self._idle.clear()

    async def _try(self, grammar: Grammar) -> str | None:
        async with self._free:
            worker = self._idle.pop() if self._idle else _Worker(*self._setup)
            self._busy.add(worker)
            problem = await asyncio.to_thread(worker.ask, grammar)
            self._busy.remove(worker)
            if not self._closed and worker.alive:
                self._idle.append(worker)
            return problem

    def _shrink(self) -> None:
        while len(self._found) > 1 and (
            len(self._found) > REMEMBERED or self._characters > REMEMBERED_CHARACTERS
        ):
            (_, text), _ = self._found.popitem(last=False)
            self._characters -= len(text)


class _Worker:
    """One process that compiles what it is asked about."""

    def __init__(self, folder: str, vocab_size: int, eos_token_ids: list[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=work, args=(theirs, folder, vocab_size, eos_token_ids), daemon=True
        )
        self._process.start()
        theirs.close()
        self._ready = False

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self._process.is_alive()

    def ask(self, grammar: Grammar) -> str | None:
        """What is wrong with `grammar`; None for nothing. Blocks for at most `COMPILE_SECONDS`,
        the first time until the process is up."""
        try:
            if not self._ready:
                self._pipe.recv_bytes()
                self._ready = True
            self._pipe.send_bytes(msgspec.msgpack.encode(grammar))
            if self._pipe.poll(COMPILE_SECONDS):
                return self._pipe.recv_bytes().decode() or None
        except (EOFError, OSError):
            self.kill()
            return TOO_LARGE
        self.kill()
        return TOO_LONG

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.join()


def work(pipe: Connection, folder: str, vocab_size: int, eos_token_ids: list[int]) -> None:
    """Entry point of a worker: answers each grammar with what is wrong with it, "" for nothing,
    until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.stack_size(WORKER_STACK_BYTES)
    thread = threading.Thread(target=_answer_all, args=(pipe, folder, vocab_size, eos_token_ids))
    thread.start()
    thread.join()


def _answer_all(pipe: Connection, folder: str, vocab_size: int, eos_token_ids: list[int]) -> None:
    from engine.grammar import GrammarCompiler, GrammarError

    compiler = GrammarCompiler(Path(folder), vocab_size, eos_token_ids)
    with contextlib.suppress(GrammarError):  # every grammar will be answered with it
        _ = compiler.tokenizer
    limit = _address_space() + WORKER_SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    decode = msgspec.msgpack.Decoder(Grammar).decode
    pipe.send_bytes(b"")
    while True:
        try:
            grammar = decode(pipe.recv_bytes())
        except EOFError:
            return
        problem = ""
        try:
            matcher = compiler.compile(grammar).deep_copy()
            matcher.compute_bitmask()
            if matcher.is_error():
                raise GrammarError(matcher.get_error())
        except GrammarError as error:
            problem = str(error)
        pipe.send_bytes(problem.encode())


def _address_space() -> int:
    """Bytes of address space that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
