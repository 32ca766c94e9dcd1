"""The engine's side of the process boundary."""

from __future__ import annotations

import faulthandler
import gc
import logging
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import msgspec

from configs import logs
from configs.settings import Settings
from engine.protocol import FromEngine, Progress, Ready, StartFailed, ToEngine

if TYPE_CHECKING:  # the parent imports this module, and must not load torch
    from models import loader


logger = logging.getLogger("quire.engine")


class PipeInbox:
    """Reads messages from an anonymous pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode

    def drain(self, wait: bool) -> list[ToEngine]:
        """All messages in the pipe; with `wait`, at least one. EOFError when the writer is gone."""
        messages = []
        while wait or self._pipe.poll():
            messages.append(self._decode(self._pipe.recv_bytes()))
            wait = False
        return messages


def main(settings: Settings, inbox: Connection, outbox: Connection) -> None:
    """Entry point of the engine process: builds the engine, then serves until the pipe closes."""
    # Ctrl-C reaches the whole process group; the front door decides when the engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure(settings.observability.log_level, settings.observability.log_format)
    faulthandler.register(signal.SIGUSR1)  # all stacks, even where Python itself stands still
    encode = msgspec.msgpack.Encoder().encode

    def send(message: FromEngine) -> None:
        outbox.send_bytes(encode(message))

    def progress(phase: str, done: float, total: float, note: str) -> None:
        send(Progress(phase, done, total, note))

    try:
        _serve(settings, PipeInbox(inbox), send, progress)
    except BrokenPipeError:
        pass  # the front door is gone: nobody is left to tell
    except Exception:
        logger.critical("the engine ends", exc_info=True)
        sys.exit(1)


def check(settings: Settings, outbox: Connection) -> None:
    """Entry point of a process that only tells what the engine would be."""
    logs.configure(settings.observability.log_level, settings.observability.log_format)
    from engine.build import StartError
    from engine.build import check as checked

    answer: FromEngine
    try:
        answer = Ready(checked(settings))
    except StartError as error:
        answer = StartFailed(str(error), expected=True)
    outbox.send_bytes(msgspec.msgpack.encode(answer))


def _serve(
    settings: Settings,
    inbox: PipeInbox,
    send: Callable[[FromEngine], None],
    progress: loader.Progress,
) -> None:
    progress("engine", 0, 1, "starting its process")
    from engine.build import StartError, build
    from engine.stall_watch import StallWatch

    progress("engine", 1, 1, "its process runs")
    try:
        loop = build(settings, progress)
    except StartError as error:
        send(StartFailed(str(error), expected=True))
        return
    except Exception:
        send(StartFailed(traceback.format_exc(), expected=False))
        return
    gc.collect()
    gc.freeze()  # what a start leaves lives as long as the process: no collection looks at it again
    StallWatch(loop, settings.lifetime.stall_timeout).start()
    send(Ready(loop.info))
    try:
        loop.run(inbox, send)
    finally:
        loop.close()
