"""The command `quire`, as an operator meets it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import __version__
from server.chat_repl import Chat, ChatError, converse, run
from server.cli import main, reachable

ROOT = Path(__file__).parents[2]


class FakeServer(BaseHTTPRequestHandler):
    """Echoes the last message word by word; `break` fails in mid-stream, `refuse` at once."""

    asked: list[dict[str, Any]]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self._plain(200, {})
        else:
            self._plain(200, {"object": "list", "data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        text = body["messages"][-1]["content"]
        if text == "refuse":
            self._plain(400, {"error": {"message": "not that"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b": queued position=1\n\n")
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for word in text.split():
            if word == "break":
                self._event({"error": {"message": "it broke"}})
                break
            self._event({"choices": [{"delta": {"content": word + " "}}]})
        self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _plain(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    handler = type("Handler", (FakeServer,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}", asked
        made.shutdown()


def quire(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(
        command, input=given, capture_output=True, text=True, cwd=ROOT, timeout=60
    )


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUIRE_CONFIG", "QUIRE_PORT", "QUIRE_HOST", "QUIRE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_version_and_help_answer_at_once() -> None:
    assert quire("--version").stdout.strip() == f"quire {__version__}"
    began = time.monotonic()
    shown = quire("--help").stdout
    # 0.25 s alone; the limit allows for other tests on the same cores.
    assert time.monotonic() - began < 2.5
    assert all(command in shown for command in ("serve", "chat", "bench", "health"))


def test_help_tells_every_setting() -> None:
    shown = quire("serve", "--help").stdout
    assert "--block-size" in shown and "128 or" not in shown and "(default 4MiB)" in shown


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["serve", "--block-sze", "8"], "unknown flag --block-sze; the nearest is --block-size"),
        (["serve", "--port=1", "--por=2"], "unknown flag --por; the nearest is --port"),
        (["serve", "a", "b"], "unexpected argument b"),
        (["serve", "--block-size", "20"], "block_size must be one of 8, 16, 32, 64, 128, got 20"),
        (["serve", "--kv-cache-dtype", "fp7"], "'int8' or 'int4', got fp7"),
        (["serve", "--preemption", "swap"], "preemption swap needs host_kv_bytes"),
        (["serve", "a", "--model", "b"], "model must be given once, got a and --model b"),
        (["serve", "--config", "h300"], "config must be a file or one of the presets"),
        (["serve", "--host", "no.such.host.invalid"], "host must be an address of this machine"),
        (["sevre"], "invalid choice: 'sevre'"),
        ([], "arguments are required: COMMAND"),
        (["health", "--url", "nonsense"], "--url must be like http://127.0.0.1:8000"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], no_environment: None
) -> None:
    try:
        code: object = main(arguments)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2
    assert line in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--host-kv-bytes", "100B"],
            "host_kv_bytes must hold at least one KV block of 48 KiB, got 100 B",
        ),
        (
            ["--disk-kv-path", "{file}/kv"],
            "disk_kv_path {file}/kv cannot be used: Not a directory",
        ),
        (
            ["--disk-kv-path", "{folder}/kv", "--disk-kv-bytes", "100B"],
            "disk_kv_bytes must hold at least one KV block of 48 KiB, got 100 B",
        ),
    ],
)
def test_what_only_the_engine_can_know_is_one_line_and_2_as_well(
    flags: list[str], line: str, tmp_path: Path
) -> None:
    places = {"file": tmp_path / "file", "folder": tmp_path}
    places["file"].touch()
    given = [flag.format_map(places) for flag in flags]
    done = quire("serve", "--port", "0", "--log-level", "error", *given)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert line.format_map(places) in done.stderr


def test_a_port_in_use_is_told_before_anything_is_loaded(
    fake: tuple[str, Any], capsys: pytest.CaptureFixture[str], no_environment: None
) -> None:
    port = fake[0].rpartition(":")[2]
    assert main(["serve", "--port", port]) == 2
    assert f"port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err


def test_health(fake: tuple[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--url", fake[0]]) == 0
    assert "200" in capsys.readouterr().out
    assert main(["health", "--url", "http://127.0.0.1:1"]) == 1


def test_health_asks_where_the_settings_point(
    fake: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUIRE_HOST", "0.0.0.0")
    monkeypatch.setenv("QUIRE_PORT", fake[0].rpartition(":")[2])
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert main(["health"]) == 0


def test_chat_over_a_pipe(fake: tuple[str, list[dict[str, Any]]]) -> None:
    url, asked = fake
    said = "hello there\nagain\n/reset\n\nfresh\n/exit\nnever\n"
    done = quire("chat", "--url", url, "--system", "be brief", "--max-tokens", "9", given=said)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n") == ["hello there ", "again ", "fresh ", ""]
    contents = [[message["content"] for message in body["messages"]] for body in asked]
    assert contents == [
        ["be brief", "hello there"],
        ["be brief", "hello there", "hello there ", "again"],
        ["be brief", "fresh"],
    ]
    assert all(body["model"] == "fake" and body["max_completion_tokens"] == 9 for body in asked)


def test_a_failure_ends_a_piped_chat(
    fake: tuple[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("refuse\nhello\n"))
    assert run(fake[0]) == 1
    assert capsys.readouterr().err == "quire: 400: not that\n"
    assert run("http://127.0.0.1:1") == 1
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err
    assert run("nonsense") == 1


def test_what_was_said_stays_and_what_failed_is_taken_back(fake: tuple[str, Any]) -> None:
    with httpx.Client(base_url=fake[0]) as http:
        chat = Chat(http, {"model": "fake"})
        with pytest.raises(ChatError, match="not that"):
            list(chat.say("refuse"))
        assert chat.messages == []
        with pytest.raises(ChatError, match="it broke"):
            list(chat.say("one break two"))
        assert [message["content"] for message in chat.messages] == ["one break two", "one "]
        answer = chat.say("a b c")
        assert next(answer) == "a "
        answer.close()  # type: ignore[attr-defined]
        assert chat.messages[-1] == {"role": "assistant", "content": "a "}
        out = io.StringIO()
        assert converse(chat, io.StringIO("/what\n"), out) == 0
        assert "/reset" in out.getvalue()


@pytest.mark.parametrize(
    ("host", "called"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("10.0.0.1", "10.0.0.1")]
)
def test_reachable(host: str, called: str) -> None:
    assert reachable(host) == called
