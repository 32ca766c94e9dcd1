"""How log lines look, the same in both processes: text for people, JSON lines for machines.

logger.info("said", extra={"fields": {"seconds": 0.1}})      values beside the message
logger.error("broke", extra={"details": "line\nline"})       text of several lines below it
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, Final, Literal

LogFormat = Literal["auto", "text", "json"]

REQUEST_ID: Final = ContextVar("request_id", default="")
"""The HTTP request that the running task works for; every line written meanwhile names it."""

ACCESS: Final = "quire.access"
PROMPTS: Final = "quire.prompts"


def configure(
    level: str, format: LogFormat, *, access: bool = False, prompts: bool = False
) -> None:
    """Sends all logs of this process to stderr.

    Args:
        level: the least important one that is written.
        format: "auto" is text on a terminal, else JSON.
        access: also a line for each HTTP request.
        prompts: also what clients send.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextLine() if is_text(format) else JsonLine())
    handler.addFilter(_name_request)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name, wanted in ((ACCESS, access), (PROMPTS, prompts)):
        logging.getLogger(name).disabled = not wanted


def is_text(format: LogFormat) -> bool:
    """Whether lines are text: see `configure`."""
    return format == "text" or (format == "auto" and sys.stderr.isatty())


def _name_request(record: logging.LogRecord) -> bool:
    record.request_id = REQUEST_ID.get()
    return True


class TextLine(logging.Formatter):
    """12:30:01 INFO quire.server: message key=value [request id]

    What clients send cannot forge a line or colour a terminal: it is escaped.
    """

    def format(self, record: logging.LogRecord) -> str:
        head, below = _parts(self, record)
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        said = "".join([head.pop("message"), *(f" {name}={value}" for name, value in head.items())])
        line = f"{clock} {record.levelname} {record.name}: {_escaped(said)}"
        return "\n".join([line, *map(_escaped, below.splitlines())])


class JsonLine(logging.Formatter):
    """{"time": "2026-01-31T12:30:01.123Z", "level": "info", "logger": ..., "message": ..., ...}"""

    def format(self, record: logging.LogRecord) -> str:
        head, below = _parts(self, record)
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            **head,
        }
        if below:
            line["details"] = below
        return json.dumps(line, default=str)


def _parts(formatter: logging.Formatter, record: logging.LogRecord) -> tuple[dict[str, Any], str]:
    """The message with its fields, and what stands below: details and traceback."""
    head = {"message": record.getMessage(), **getattr(record, "fields", {})}
    if request_id := getattr(record, "request_id", ""):
        head["request_id"] = request_id
    below = [getattr(record, "details", "")]
    if record.exc_info:
        below.append(formatter.formatException(record.exc_info))
    return head, "\n".join(filter(None, below))


def _escaped(text: str) -> str:
    return text if text.isprintable() else "".join(map(_escape, text))


def _escape(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]
