"""What is sent: bodies, text made to measure, and chats that go on with the server's answers."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from benchmarks.dialect import Dialect, Words, first_model, measured_words
from benchmarks.load import ClosedLoop, run_round
from benchmarks.sse import BenchError
from benchmarks.workload import Chats, Independent, Lengths, Workload
from tests.benchmarks.fake_server import chunked, plain, serving, usage

Body = dict[str, Any]


@pytest.mark.parametrize("text", ["64", "1:9"])
def test_lengths(text: str) -> None:
    lengths = Lengths.parse(text)
    assert str(lengths) == text
    drawn = {lengths.draw(shape) for shape in [random.Random(0)] for _ in range(200)}
    assert drawn == set(range(lengths.low, lengths.high + 1))


@pytest.mark.parametrize("text", ["0", "9:1", "x", "1:2:3", "-1", ""])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(ValueError):
        Lengths.parse(text)


def test_bodies_say_what_is_asked_and_more_where_told() -> None:
    plainly = Dialect("m").request({"prompt": [1]}, 5)
    assert plainly.output_tokens == 5
    assert plainly.body == {
        "model": "m",
        "prompt": [1],
        "max_tokens": 5,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    extra = {"stream_options": None, "seed": 1, "temperature": 1}
    other = Dialect("m", ignore_eos=False, extra=extra).request({"prompt": "a"}, 5)
    assert other.output_tokens is None
    assert other.body == {
        "model": "m",
        "prompt": "a",
        "max_tokens": 5,
        "temperature": 1,
        "stream": True,
        "seed": 1,
    }


async def asked_of(work: Workload, loop: ClosedLoop, *said: str) -> list[Body]:
    """The bodies of one round; the server answers every request with these choices."""
    bodies: list[Body] = []

    def answer(path: str, body: bytes) -> bytes:
        assert path == work.dialect.path
        bodies.append(json.loads(body))
        return chunked([*(f'data: {{"choices":[{one}]}}\n\n' for one in said), usage(2)])

    async with serving(answer) as client:
        done = await run_round(client, work, loop, seed=0)
    assert sorted(answer.turn for answer in done.answers) == sorted(
        list(range(work.turns)) * loop.scripts
    )
    return bodies


async def test_chats_send_the_whole_history_and_share_their_system_prompt() -> None:
    dialect = Dialect("m", api="chat", prompt_kind="text")
    work = Chats(dialect, Lengths(3, 3), Lengths(2, 2), turns=3, system_tokens=20)
    said = ['{"delta":{"content":"wo"}}', '{"delta":{"content":"rd"}}']
    bodies = await asked_of(work, ClosedLoop(2, 1), *said)
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    longest = [body["messages"] for body in bodies if len(body["messages"]) == 6]
    assert len(longest) == 2
    for messages in longest:
        assert [message["role"] for message in messages] == roles
        assert [m["content"] for m in messages if m["role"] == "assistant"] == ["word"] * 2
        assert sum(body["messages"] == messages[:4] for body in bodies) == 1
        assert [len(m["content"].split()) for m in messages[:2]] == [20, 3]
    assert longest[0][0] == longest[1][0] and longest[0][1] != longest[1][1]


async def test_chats_in_text_are_one_prompt_that_grows() -> None:
    work = Chats(Dialect("m", prompt_kind="text"), Lengths(3, 3), Lengths(2, 2), turns=2)
    first, second = await asked_of(work, ClosedLoop(1, 1), '{"text":" wo"}', '{"text":"rd"}')
    assert len(first["prompt"].split()) == 603
    assert second["prompt"].startswith(first["prompt"] + " word ")
    assert len(second["prompt"].split()) == 607


async def test_chats_in_ids_go_on_with_the_ids_that_came() -> None:
    work = Chats(Dialect("m"), Lengths(3, 3), Lengths(2, 2), turns=2, system_tokens=5)
    said = ['{"text":"a","token_ids":[7]}', '{"text":"","token_ids":[2000]}']
    first, second = await asked_of(work, ClosedLoop(1, 1), *said)
    assert first["return_token_ids"] and len(first["prompt"]) == 8
    assert second["prompt"][:10] == [*first["prompt"], 7, 2000]
    assert len(second["prompt"]) == 13


async def test_chats_in_ids_need_the_server_s_ids() -> None:
    work = Chats(Dialect("m"), Lengths(3, 3), Lengths(2, 2))
    with pytest.raises(BenchError, match="return_token_ids"):
        await asked_of(work, ClosedLoop(1, 1), '{"text":"a"}')


async def test_random_prompts_over_the_chat_route() -> None:
    dialect = Dialect("m", api="chat", prompt_kind="text")
    work = Independent(dialect, Lengths(4, 4), Lengths(2, 2))
    (body,) = await asked_of(work, ClosedLoop(1, 1), '{"delta":{"content":"a"}}')
    (message,) = body["messages"]
    assert message["role"] == "user" and len(message["content"].split()) == 4


async def test_words_are_measured_by_the_server_s_own_count() -> None:
    def answer(path: str, body: bytes) -> bytes:
        words = len(json.loads(body)["messages"][0]["content"].split())
        return chunked(
            ['data: {"choices":[{"delta":{"content":"a"}}]}\n\n', usage(1, 2 * words + 9)]
        )

    dialect = Dialect("m", api="chat", prompt_kind="text")
    async with serving(answer) as client:
        words = await measured_words(client, dialect)
    assert words == Words(fixed=9, each=2)
    assert words.count(109) == 50 and words.count(5) == 1


async def test_a_server_that_does_not_count_takes_one_token_per_word() -> None:
    async with serving(lambda *_: chunked(['data: {"choices":[{"text":"a"}]}\n\n'])) as client:
        assert await measured_words(client, Dialect("m", prompt_kind="text")) == Words()


async def test_the_first_model_or_a_hint() -> None:
    async with serving(lambda *_: plain(200, {"data": [{"id": "a"}, {"id": "b"}]})) as client:
        assert await first_model(client) == "a"
    for answer in (plain(404, {}), plain(200, {"data": []}), plain(200, [])):
        async with serving(lambda *_, said=answer: said) as client:
            with pytest.raises(BenchError, match="give --model"):
                await first_model(client)
