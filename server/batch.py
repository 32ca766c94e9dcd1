"""Batches of requests in OpenAI's file format: one request per line in, one answer per line out.

    in    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    out   {"id": "..", "custom_id": "a", "response": {"status_code": 200, ...}, "error": null}

Answers are written as they come, whatever the order of the requests. What failed stands in a file
of its own, in the same format. A batch that was stopped goes on where it was: answers that are
there are not asked for again, failures are.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

import httpx
import msgspec

URLS: Final = ("/v1/chat/completions", "/v1/completions")
ATTEMPTS: Final = 8  # at a request that the server, or the way to it, has no room for
LONGEST_WAIT: Final = 60.0  # seconds between two of them
TRY_AGAIN: Final = (429, 503)


class BatchError(ValueError):
    """A file cannot be used; one line."""


class InvalidLine(ValueError):
    """A line of the input is no request.

    Attributes:
        code: OpenAI's name of what is wrong.
        custom_id: of the line, where it has one.
    """

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.custom_id = code, message, custom_id


@dataclass(frozen=True, slots=True)
class Item:
    """One request of a batch."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_item(line: bytes) -> Item:
    """A line of the input.

    Raises:
        InvalidLine: it is none.
    """
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InvalidLine("invalid_json_line", f"the line is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidLine("invalid_json_line", "the line must be a JSON object")
    name, method = fields.get("custom_id"), fields.get("method")
    url, body = fields.get("url"), fields.get("body")
    if not isinstance(name, str) or not name:
        raise InvalidLine("missing_required_parameter", "custom_id must be a string, not empty")
    if method != "POST":
        raise InvalidLine("invalid_method", f"method must be 'POST', got {method!r}", name)
    if url not in URLS:
        raise InvalidLine("invalid_url", f"url must be one of {', '.join(URLS)}, got {url!r}", name)
    if not isinstance(body, dict):
        raise InvalidLine("missing_required_parameter", "body must be a JSON object", name)
    if body.get("stream"):
        raise InvalidLine("invalid_request", "body.stream must be false in a batch", name)
    return Item(name, url, body)


class Answers:
    """The two files of a batch's answers, as a context.

    Args:
        out: answers; what it holds already is kept.
        errors: failures of this run; no such file is left where there are none.

    Attributes:
        done: the custom ids that are answered.
        failed: how many lines failed in this run.

    Raises:
        BatchError: a file cannot be written, or `out` holds something else.
    """

    def __init__(self, out: Path, errors: Path) -> None:
        self.failed = 0
        try:
            self.done = _answered(out)
            self._out: IO[bytes] = out.open("ab")
            self._errors: IO[bytes] = errors.open("wb")
        except OSError as error:
            raise BatchError(f"{error.filename} cannot be used: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        self._errors.close()
        if not self.failed:
            Path(self._errors.name).unlink(missing_ok=True)

    def answer(self, custom_id: str, response: httpx.Response) -> None:
        """Writes what the server said."""
        told = {
            "status_code": response.status_code,
            "request_id": response.headers.get("x-request-id"),
            "body": _json_of(response),
        }
        self._write(custom_id, response.is_success, told, None)

    def failure(self, custom_id: str | None, code: str, message: str) -> None:
        """Writes why there is no answer at all."""
        self._write(custom_id, False, None, {"code": code, "message": message})

    def _write(self, custom_id: str | None, good: bool, response: Any, error: Any) -> None:
        line = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
        file = self._out if good else self._errors
        file.write(msgspec.json.encode(line) + b"\n")
        file.flush()
        self.failed += not good


def _answered(path: Path) -> set[str]:
    """The custom ids of an output file. A last line that was cut off while written is removed."""
    if not path.exists():
        return set()
    done, end = set(), 0
    with path.open("r+b") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.truncate(end)
                break
            end += len(line)
            try:
                done.add(str(json.loads(line)["custom_id"]))
            except (ValueError, KeyError, TypeError):
                raise BatchError(f"{path} is no output of a batch: see line {number}") from None
    return done


def _json_of(response: httpx.Response) -> Any:
    """The body, also of a proxy that answers something else."""
    try:
        return response.json()
    except ValueError:
        return {"error": {"message": response.text[:1000]}}


async def run(
    http: httpx.AsyncClient,
    lines: Iterable[bytes],
    answers: Answers,
    *,
    concurrency: int,
    progress: Callable[[], object],
) -> None:
    """Asks for every line that is not answered yet.

    Args:
        http: a client whose base URL is the server's.
        concurrency: most requests at a time.
        progress: called for each line that needs no more work.
    """
    items = _new_items(lines, answers, progress)

    async def work() -> None:
        for item in items:
            try:
                answers.answer(item.custom_id, await _ask(http, item))
            except httpx.TransportError as error:
                what = str(error) or type(error).__name__
                answers.failure(item.custom_id, "connection_error", what)
            progress()

    async with asyncio.TaskGroup() as workers:
        for _ in range(concurrency):
            workers.create_task(work())


def _new_items(
    lines: Iterable[bytes], answers: Answers, progress: Callable[[], object]
) -> Iterator[Item]:
    """The requests that are to be asked; lines that are none become failures."""
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = read_item(line)
            if item.custom_id in seen:
                raise InvalidLine(
                    "duplicate_custom_id", "custom_id is that of a line before", item.custom_id
                )
        except InvalidLine as error:
            answers.failure(error.custom_id, error.code, f"line {number}: {error.message}")
            progress()
            continue
        seen.add(item.custom_id)
        if item.custom_id not in answers.done:
            yield item
        else:
            progress()


async def _ask(http: httpx.AsyncClient, item: Item) -> httpx.Response:
    """The server's last word on a request.

    Raises:
        httpx.TransportError: it cannot be reached, for good.
    """
    for attempt in range(1, ATTEMPTS + 1):
        last, wait = attempt == ATTEMPTS, min(2.0**attempt / 4, LONGEST_WAIT)
        try:
            response = await http.post(item.url, json=item.body)
        except httpx.TransportError:
            if last:
                raise
        else:
            if last or response.status_code not in TRY_AGAIN:
                return response
            given = response.headers.get("retry-after", "")
            wait = min(float(given), LONGEST_WAIT) if given.isdecimal() else wait
        await asyncio.sleep(wait)
    raise AssertionError("the last attempt returns or raises")
