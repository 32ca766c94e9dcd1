"""The bench client against a server that says exactly what the test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from benchmarks.serve import Load, Round, main, percentile, run_round, summarize, table
from benchmarks.sse import Answer, BenchError, Client


def chunk(text: str) -> bytes:
    data = text.encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def stream(tokens: int, usage: int | None = None) -> bytes:
    """A whole answer: comment, one event per token, usage, [DONE]."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    events = [": queued position=1\n\n"]
    events += ['data: {"choices":[{"text":"é\\n"}],"usage":null}\n\n'] * tokens
    count = tokens if usage is None else usage
    ending = {"prompt_tokens": 3, "completion_tokens": count}
    events.append(f'data: {{"choices":[],"usage":{json.dumps(ending)}}}\n\n')
    return head + b"".join(map(chunk, [*events, "data: [DONE]\n\n"])) + b"0\r\n\r\n"


@asynccontextmanager
async def serving(answer: Callable[[str, bytes], bytes], piece: int) -> AsyncIterator[Client]:
    """A server that sends `answer(path, body)` in pieces of that many bytes."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                lengths = [line for line in head.split("\r\n") if line.startswith("Content-Length")]
                body = await reader.readexactly(int(lengths[0].split()[1]) if lengths else 0)
                data = answer(head.split()[1], body)
                for start in range(0, len(data), piece):
                    writer.write(data[start : start + piece])
                    await writer.drain()
                    if piece < 100:
                        await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    made = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with made:
        yield Client("127.0.0.1", made.sockets[0].getsockname()[1])


LOAD = Load(model="m", prompt_tokens=3, output_tokens=5, vocab_size=10, requests=2)


def any_random() -> object:
    import random

    return random.Random(0)


@pytest.mark.parametrize("piece", [1, 7, 64, 100_000])
async def test_answers_are_understood_however_they_are_cut(piece: int) -> None:
    asked: list[dict[str, object]] = []

    def answer(path: str, body: bytes) -> bytes:
        assert path == "/v1/completions"
        asked.append(json.loads(body))
        return stream(5)

    async with serving(answer, piece) as client:
        done = await run_round(client, LOAD, clients=3, draw=any_random())  # type: ignore[arg-type]
    assert len(done.answers) == 6
    assert all(one.prompt_tokens == 3 and one.completion_tokens == 5 for one in done.answers)
    assert all(one.sent < one.first <= one.last for one in done.answers)
    assert len({str(body["prompt"]) for body in asked}) == 6
    assert all(len(body["prompt"]) == 3 for body in asked)  # type: ignore[arg-type]
    assert all(body["ignore_eos"] and body["max_tokens"] == 5 for body in asked)


async def test_an_answer_of_another_length_is_refused() -> None:
    async with serving(lambda *_: stream(4), 4096) as client:
        with pytest.raises(BenchError, match="asked for 5 tokens, got 4"):
            await run_round(client, LOAD, 1, any_random())  # type: ignore[arg-type]


async def test_an_error_status_is_told_with_its_body() -> None:
    refusal = b'HTTP/1.1 503 Busy\r\nContent-Length: 13\r\n\r\n{"error":"no"}'[:-1]
    async with serving(lambda *_: refusal, 10) as client:
        with pytest.raises(BenchError, match="status 503"):
            await run_round(client, LOAD, 1, any_random())  # type: ignore[arg-type]


async def test_an_error_in_the_stream_is_told() -> None:
    whole = stream(5).replace(
        b'{"choices":[{"text":"\xc3\xa9\\n"}]', b'{"error":1, "xxxxxxxxxxxx"  ', 1
    )
    async with serving(lambda *_: whole, 4096) as client:
        with pytest.raises(BenchError, match="status 200"):
            await run_round(client, LOAD, 1, any_random())  # type: ignore[arg-type]


async def test_nobody_there() -> None:
    with pytest.raises(BenchError, match="no server at"):
        await Client("127.0.0.1", 1).get("/health")


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3, 1, 2], 0.5, 2), (range(1, 101), 0.99, 99), ([7], 0.99, 7), (range(1, 5), 0.5, 2)],
)
def test_percentile_is_the_nearest_rank(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == expected


def test_the_summary_is_the_median_round() -> None:
    def a_round(seconds: float) -> Round:
        answer = Answer(sent=0, first=0.1, last=0.5, prompt_tokens=3, completion_tokens=5)
        return Round([answer, answer], seconds, cpu_seconds=seconds / 10)

    result = summarize(2, [a_round(1), a_round(2), a_round(4)])
    rates = (result.output_tokens_per_s, result.output_tokens_per_s_min)
    assert (*rates, result.output_tokens_per_s_max) == (5, 2.5, 10)
    assert result.ttft_ms_p50 == pytest.approx(100)
    assert result.tpot_ms_p99 == pytest.approx(100)
    assert result.client_cpu == pytest.approx(0.1)
    assert "| 2 | 5.0 (2.5 to 10.0) |" in table([result])


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "localhost:1"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["--url", "http://x", "--", "--dtype", "float32"])
