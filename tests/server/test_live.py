"""The real client at the edge: the openai SDK over a socket, and clients that hang up."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import defaultdict

import httpx
import msgspec
import openai
import pytest

from scheduler.request import InvalidRequest
from server import edge
from server.app import create_app
from server.keys import KeyRing
from server.template import ChatTemplate
from server.tokenizer import TextModel
from tests.server.fake_engine import FakeEngine
from tests.server.front import CHAT, app_over, live, says, wait_for, within
from tests.server.strict import strict_client
from tests.server.text_models import byte_level_tokenizer, ids_of

HI = [{"role": "user", "content": "hi"}]


def test_sdk() -> None:
    engine = FakeEngine(lambda request, index: ids_of(f"hello 👩‍👩‍👧 {index}"))
    with (
        live(app_over(engine, keys=KeyRing([("sk", "")]))) as url,
        strict_client(url, "sk") as client,
    ):
        assert [model.id for model in client.models.list()] == ["quiet", "quiet-2"]
        chat = client.chat.completions.create(model="quiet", messages=HI, n=2)
        assert [choice.message.content for choice in chat.choices] == [
            "hello 👩‍👩‍👧 0",
            "hello 👩‍👩‍👧 1",
        ]
        assert chat.usage and chat.usage.total_tokens > chat.usage.prompt_tokens
        done = client.completions.create(model="quiet", prompt=["a", "b"], stop="👩", max_tokens=99)
        assert [choice.text for choice in done.choices] == ["hello "] * 2
        assert {choice.finish_reason for choice in done.choices} == {"stop"}
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="other", messages=HI)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="quiet", messages=HI, temperature=3)
        assert (refused.value.param, refused.value.code) == ("temperature", "invalid_value")
        with pytest.raises(openai.AuthenticationError):
            strict_client(url, "other").models.list()


def test_sdk_streams() -> None:
    engine = FakeEngine(lambda request, index: ids_of(f"hello 👩‍👩‍👧 {index}"), step_seconds=0.001)
    with live(app_over(engine)) as url, strict_client(url) as client:
        texts: dict[int, str] = defaultdict(str)
        usage = None
        for chunk in client.chat.completions.create(
            model="quiet", messages=HI, n=2, stream=True, stream_options={"include_usage": True}
        ):
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == {0: "hello 👩‍👩‍👧 0", 1: "hello 👩‍👩‍👧 1"}
        assert usage and usage.completion_tokens == 2 * (len(ids_of("hello 👩‍👩‍👧 0")) + 1)
        parts = client.completions.create(model="quiet", prompt="a", stream=True, max_tokens=99)
        assert "".join(part.choices[0].text for part in parts) == "hello 👩‍👩‍👧 0"


def test_sdk_sees_errors_of_streams() -> None:
    refusal = InvalidRequest("no room", "prompt", "kv_capacity_exceeded")
    with live(app_over(says("hello", refuse=refusal))) as url, strict_client(url) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="quiet", messages=HI, stream=True)
        assert refused.value.code == "kv_capacity_exceeded"
    with live(app_over(says("hello world", fail_after=1))) as url, strict_client(url) as client:
        stream = client.chat.completions.create(model="quiet", messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="a kernel failed"):
            list(stream)


def test_async_sdk() -> None:
    async def ask(url: str) -> list[str | None]:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        async with client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model="quiet", messages=HI) for _ in range(20))
            )
            stream = await client.chat.completions.create(model="quiet", messages=HI, stream=True)
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return [*(answer.choices[0].message.content for answer in answers), "".join(parts)]

    with live(app_over(says("hello world", step_seconds=0.002))) as url:
        assert within(20, ask(url)) == ["hello world"] * 21


def test_clients_that_hang_up_are_aborted() -> None:
    """At any moment, streaming or not, while queued or while answering, one prompt or many."""
    engine = FakeEngine(lambda request, index: [5] * 10_000, step_seconds=0.01, admit_seconds=0.02)
    engine.info = msgspec.structs.replace(engine.info, max_model_len=100_000)
    pick = random.Random(0)

    async def leave(port: int) -> None:
        body = CHAT | {"stream": pick.random() < 0.5, "n": pick.randint(1, 3), "max_tokens": 9_000}
        path = "/v1/chat/completions"
        if pick.random() < 0.3:
            path, body = "/v1/completions", body | {"prompt": ["a"] * pick.randint(1, 4)}
            del body["messages"]
        content = json.dumps(body).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await asyncio.sleep(pick.choice([0.0, 0.01, 0.03, 0.1, 0.3]))
        writer.transport.abort() if pick.random() < 0.5 else writer.close()

    async def crowd(port: int) -> None:
        await asyncio.gather(*(leave(port) for _ in range(32)))

    with live(app_over(engine)) as url:
        within(20, crowd(int(url.rpartition(":")[2])))
        time.sleep(0.1)
        assert len(engine.submitted) > 16
        wait_for(lambda: {request.id for request in engine.submitted} == set(engine.aborted), 5)
        assert not engine.finished
        family = (
            'vllm:request_success_total{engine="0",finished_reason="%s",model_name="quiet"} 0.0'
        )
        metrics = httpx.get(f"{url}/metrics").text
        assert family % "abort" not in metrics
        assert all(family % reason in metrics for reason in ("stop", "length", "error"))


def test_a_finished_answer_aborts_nothing() -> None:
    engine = says("hello world", step_seconds=0.001)
    with live(app_over(engine)) as url, httpx.Client() as client:
        for stream in (True, False):
            client.post(f"{url}/v1/chat/completions", json=CHAT | {"stream": stream})
    assert len(engine.finished) == 2
    assert not engine.aborted


def test_health_answers_while_a_template_does_not_end() -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    text = TextModel(byte_level_tokenizer(), ChatTemplate(source, {}))
    app = create_app(says("x"), text, served_model_names=("quiet",))
    with live(app) as url:
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=30)
            )
        )
        asking.start()
        healthy = 0
        while asking.is_alive() and healthy < 5:
            assert httpx.get(f"{url}/health", timeout=1).status_code == 200
            healthy += 1
        asking.join()
    assert healthy == 5
    assert answers[0].status_code == 400
    assert "longer than" in answers[0].json()["error"]["message"]


def test_cancellation_by_others_is_not_taken_for_a_hang_up() -> None:
    """A server that shuts down cancels the same task; that must go on."""

    async def endless(scope: object, receive: object, send: object) -> None:
        await asyncio.sleep(60)

    async def cancelled() -> None:
        async def never() -> None:
            await asyncio.sleep(60)

        hang_up = edge.HangUp(endless)
        task = asyncio.create_task(hang_up({"type": "http", "method": "POST"}, never, never))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
