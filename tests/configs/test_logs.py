"""Log lines: one line each, whatever a client sends; JSON where nobody watches."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from configs import logs
from configs.logs import ACCESS, PROMPTS, REQUEST_ID


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Gives the logging of the test run back."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    logging.captureWarnings(False)
    for name in (ACCESS, PROMPTS):
        logging.getLogger(name).disabled = False


def written(format: logs.LogFormat, capsys: pytest.CaptureFixture[str], *said: Any) -> str:
    logs.configure("info", format)
    message, *extra = said
    logging.getLogger("quire.test").info(message, extra=dict(*extra))
    return capsys.readouterr().err


def test_a_text_line_cannot_be_forged(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "GET /\n12:00:00 INFO quire.server: all is well\x1b[2J\u202e é"
    line = written("text", capsys, evil, {"fields": {"tenant": "a\rb"}})
    assert line.count("\n") == 1
    assert "GET /\\n12:00:00" in line and "\\x1b[2J\\u202e é tenant=a\\rb" in line


def test_a_json_line_has_fields_request_and_details(capsys: pytest.CaptureFixture[str]) -> None:
    token = REQUEST_ID.set("req-1")
    line = written("json", capsys, "said", {"fields": {"seconds": 0.5}, "details": "a\nb"})
    REQUEST_ID.reset(token)
    told = json.loads(line)
    assert line.count("\n") == 1 and told.pop("time").endswith("Z")
    assert told == {
        "level": "info",
        "logger": "quire.test",
        "message": "said",
        "seconds": 0.5,
        "request_id": "req-1",
        "details": "a\nb",
    }


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_traceback_is_below_or_within(
    format: logs.LogFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", format)
    try:
        raise ValueError("bell \x07")
    except ValueError:
        logging.getLogger("quire.test").exception("broke")
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "\x07" not in shown
    assert (shown.count("\n") == 1) == (format == "json")


def test_auto_is_text_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not logs.is_text("auto")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert logs.is_text("auto") and not logs.is_text("json")


@pytest.mark.parametrize("name", [ACCESS, PROMPTS])
def test_what_clients_do_is_logged_where_asked_for(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger(name)
    for wanted in (True, False):
        logs.configure("info", "text", access=wanted, prompts=wanted)
        assert logger.isEnabledFor(logging.INFO) == wanted
        logger.info("x")
        assert ("x" in capsys.readouterr().err) == wanted
