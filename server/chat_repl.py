"""`quire chat`: a conversation in the terminal, over the same HTTP that every client uses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final, TextIO

import httpx

_HELP: Final = "/reset forgets the conversation, /exit leaves; Ctrl-C stops an answer"


class ChatError(RuntimeError):
    """The server refused or went away; one line."""


class Chat:
    """One conversation: the messages so far, and how to ask for the next.

    Args:
        http: a client whose base URL is the server's.
        options: request fields sent every time, `model` among them.
    """

    def __init__(
        self, http: httpx.Client, options: dict[str, Any], system: str | None = None
    ) -> None:
        self._http = http
        self._options = options
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._start)

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = list(self._start)

    def say(self, text: str) -> Iterator[str]:
        """Sends one message and yields the answer piece by piece.

        Whatever was said of the answer stays in the conversation, also when the caller stops
        early; a message that failed without any answer is taken back.
        """
        self.messages.append({"role": "user", "content": text})
        answer: list[str] = []
        try:
            for piece in self._stream():
                answer.append(piece)
                yield piece
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
            else:
                self.messages.pop()

    def _stream(self) -> Iterator[str]:
        body = {**self._options, "messages": self.messages, "stream": True}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise ChatError(_error_of(response))
                yield from _pieces(response.iter_lines())
        except httpx.HTTPError as error:
            raise ChatError(f"the connection failed: {error}") from error


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """The content of every event; comments and other fields of the event stream are skipped."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ChatError(event["error"]["message"])
        for choice in event.get("choices", ()):
            if content := choice["delta"].get("content"):
                yield content


def _error_of(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    return f"{response.status_code}: {message}"


def first_model(http: httpx.Client) -> str:
    """The id of the first model that the server names."""
    try:
        response = http.get("/v1/models")
        if response.is_error:
            raise ChatError(_error_of(response))
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPError as error:
        raise ChatError(f"no server answers at {http.base_url}: {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ChatError(f"{http.base_url} is no OpenAI-style server") from error


def run(
    url: str,
    *,
    model: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    api_key: str | None = None,
) -> int:
    """Reads messages from standard input until it ends; 0, or 1 where something failed."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(None, connect=5.0)  # a queued answer may take its time
    wanted = {"max_completion_tokens": max_tokens, "temperature": temperature}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=timeout) as http:
            options: dict[str, Any] = {"model": model or first_model(http)}
            options |= {name: value for name, value in wanted.items() if value is not None}
            return converse(Chat(http, options, system), sys.stdin, sys.stdout)
    except (ChatError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        print(f"quire: {error}", file=sys.stderr)
        return 1


def converse(chat: Chat, lines: TextIO, out: TextIO) -> int:
    """The loop: one line in, one answer out. Without a terminal, the first failure ends it."""
    terminal = lines.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # line editing and history for input()
        print(_HELP, file=out)
    while (line := _next_line(lines, terminal)) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            chat.reset()
        elif line.startswith("/"):
            print(_HELP, file=out)
        elif line:
            try:
                _answer(chat, line, out)
            except ChatError as error:
                print(f"quire: {error}", file=sys.stderr)
                if not terminal:
                    return 1
    return 0


def _next_line(lines: TextIO, terminal: bool) -> str | None:
    if not terminal:
        line = lines.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _answer(chat: Chat, line: str, out: TextIO) -> None:
    answer = chat.say(line)
    try:
        for piece in answer:
            out.write(piece)
            out.flush()
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]  # a generator: keeps what was said
    finally:
        print(file=out)
