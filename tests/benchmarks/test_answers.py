"""Every way of servers to write a stream, read as one answer."""

from __future__ import annotations

import json

import pytest

from benchmarks import answers
from benchmarks.sse import BenchError, Client, Reply
from tests.benchmarks.fake_server import OLD, chunked, completion, measured, plain, serving, usage

TEXTS = ["data: %s\n\n", "data:%s\n\n", "data: %s\r\n\r\n", "event: message\nid: 7\ndata: %s\n\n"]


def chunk(**choice: object) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0} | choice]})}\n\n"


def reply(*events: str, apart: float = 1.0) -> Reply:
    """Read one event at a time, `apart` seconds apart; sent at 10, the first came at 11."""
    times = [10 + number * apart for number, _ in enumerate(events, 1)]
    return Reply(10.0, 200, [event.encode() for event in events], times)


@pytest.mark.parametrize("framing", [chunked, measured, lambda e: OLD + "".join(e).encode()])
@pytest.mark.parametrize("form", TEXTS)
@pytest.mark.parametrize("piece", [1, 7, 100_000])
async def test_every_framing_and_form_however_it_is_cut(framing, form, piece) -> None:  # type: ignore[no-untyped-def]
    said = [form % e[6:-2] if e.startswith("data: ") else e for e in completion(5)]
    async with serving(lambda *_: framing(said), piece) as client:
        for _ in range(2):  # over a kept connection or a new one
            answer = answers.read(await client.post("/v1/completions", {}))
            assert (answer.prompt_tokens, answer.completion_tokens, answer.counted) == (3, 5, True)
            assert (answer.text, len(answer.times)) == ("é\n" * 5, 5)
            assert answer.sent < answer.times[0] <= answer.times[-1]
        client.close()


def test_times_are_those_of_events_that_bring_tokens() -> None:
    answer = answers.read(
        reply(
            chunk(delta={"role": "assistant", "content": ""}),
            chunk(delta={"content": "a"}),
            chunk(delta={"content": ""}),  # half a character
            chunk(delta={"reasoning_content": "hm"}),
            chunk(delta={"tool_calls": [{"index": 0}]}),
            chunk(delta={}, finish_reason="length"),
            usage(9),
            "data: [DONE]\n\n",
        )
    )
    assert answer.times == (12, 13, 14, 15)
    assert (answer.ttft, answer.gaps, answer.text) == (2, [1, 1, 1], "a")
    assert answer.tpot == 3 / 8


def test_a_role_beside_text_and_a_last_event_with_text_count() -> None:
    said = [
        chunk(delta={"role": "assistant", "content": "a"}),
        chunk(delta={"role": "assistant", "content": "b"}, finish_reason="length"),
    ]
    answer = answers.read(reply(*said))
    assert (answer.times, answer.text) == ((11, 12), "ab")


def test_an_answer_of_one_token_without_text() -> None:
    answer = answers.read(reply(chunk(text="", finish_reason="length"), usage(1)))
    assert (answer.ttft, answer.tpot, answer.gaps) == (1, 0, [])


def test_without_usage_events_are_counted() -> None:
    answer = answers.read(reply(chunk(text="a"), chunk(text="b")))
    assert (answer.completion_tokens, answer.counted, answer.prompt_tokens) == (2, False, None)


@pytest.mark.parametrize(
    "told",
    [
        [
            chunk(text="a")[:-3] + ',"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\n',
            usage(7),
        ],
        [chunk(text="a"), 'data: {"usage":{"input_tokens":3,"output_tokens":7}}\n\n'],
        [chunk(text="a"), usage(7), 'data: {"choices":[],"usage":null}\n\n'],
        [chunk(text="a")[:-3] + ',"usage":{"prompt_tokens":3,"completion_tokens":7}}'],
    ],
    ids=["in every event", "other names", "null after it", "no blank line at the end"],
)
def test_usage_wherever_it_stands(told: list[str]) -> None:
    answer = answers.read(reply(*told))
    assert (answer.prompt_tokens, answer.completion_tokens) == (3, 7)


def test_events_of_one_read_came_together_and_cut_ones_when_they_were_whole() -> None:
    body = (chunk(text="a") * 2).encode()
    half = Reply(0.0, 200, [body[:20], body[20:]], [1.0, 2.0])
    assert answers.read(half).times == (2.0, 2.0)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([chunk(text="a"), 'data: {"error":{"message":"no"}}\n\n'], "error in the stream.*no"),
        (["data: {oh}\n\n"], "no JSON"),
        (['{"choices":[{"text":"all of it"}]}'], "no streamed answer, but: .*all of it"),
        (["data: [DONE]\n\n"], "no streamed answer"),
    ],
)
def test_what_is_no_answer_is_told(said: list[str], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        answers.read(reply(*said))


@pytest.mark.parametrize(
    "url", ["http://x", "http://x:1/", "http://x/a/v1", "https://u:p@[::1]:9/a/"]
)
def test_urls(url: str) -> None:
    client = Client(url, "key")
    assert client._prefix == ("/a" if "/a" in url else "")
    assert "u:p" not in client._headers and client._headers.endswith("Bearer key")


async def test_an_error_status_is_told_with_its_body() -> None:
    async with serving(lambda *_: plain(404, {"error": "no such"}), 10) as client:
        with pytest.raises(BenchError, match=r"status 404: .*no such"):
            await client.post("/v1/completions", {})


async def test_a_connection_that_ends_in_mid_stream() -> None:
    cut = b"HTTP/1.0 200" + chunked(completion(5))[12:-40]  # the server closes after it
    async with serving(lambda *_: cut) as client:
        with pytest.raises(BenchError, match="closed the connection"):
            await client.post("/v1/completions", {})
