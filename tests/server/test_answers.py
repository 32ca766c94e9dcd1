"""Answers, streamed and whole: their shape, their text, what they count."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.request import InvalidRequest, Request
from server import generate
from server.keys import KeyRing
from tests.server.fake_engine import FakeEngine
from tests.server.front import CHAT, COMPLETION, chunks, door, says
from tests.server.text_models import BOS, byte_level_tokenizer, ids_of

USAGE = {"stream": True, "stream_options": {"include_usage": True}}
BOS_ID = byte_level_tokenizer().token_to_id(BOS)


def fold(events: list[dict[str, Any]]) -> dict[int, tuple[str, Any, Any]]:
    """What a client makes of a stream: text, finish_reason and stop_reason of each index."""
    texts: dict[int, str] = defaultdict(str)
    ends: dict[int, tuple[Any, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            index = choice["index"]
            assert index not in ends, "a chunk after the last one"
            texts[index] += choice["delta"].get("content", "") if "delta" in choice else (
                choice["text"]
            )  # fmt: skip
            if choice["finish_reason"] is not None:
                ends[index] = choice["finish_reason"], choice["stop_reason"]
    return {index: (texts[index], *end) for index, end in ends.items()}


def whole(body: dict[str, Any]) -> dict[int, tuple[str, Any, Any]]:
    return {
        choice["index"]: (
            choice["message"]["content"] if "message" in choice else choice["text"],
            choice["finish_reason"],
            choice["stop_reason"],
        )
        for choice in body["choices"]
    }


def details(bodies: list[dict[str, Any]]) -> dict[int, dict[str, list[Any]]]:
    """What is told beside the text, by index: every list of `logprobs` and `token_ids`, joined over
    the chunks."""
    found: dict[int, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for body in bodies:
        for choice in body["choices"]:
            lists = {**(choice["logprobs"] or {}), "token_ids": choice.get("token_ids")}
            for name, values in lists.items():
                found[choice["index"]][name] += values or []
    return {index: {k: v for k, v in lists.items() if v} for index, lists in found.items()}


answers = st.lists(st.text("ab🙂é \n", max_size=20), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(
    texts=answers,
    n=st.integers(1, 3),
    per_step=st.integers(1, 4),
    options=st.fixed_dictionaries(
        {},
        optional={
            "stop": st.lists(st.text("ab🙂 ", min_size=1, max_size=3), min_size=1, max_size=3),
            "include_stop_str_in_output": st.booleans(),
            "max_tokens": st.integers(1, 12),
            "stop_token_ids": st.just(ids_of("a")),
            "min_tokens": st.integers(0, 1),
            "return_token_ids": st.booleans(),
        },
    ),
    logprobs=st.sampled_from([None, 0, 2]),
    echo=st.booleans(),
)
def test_stream_equals_whole(
    texts: list[str],
    n: int,
    per_step: int,
    options: dict[str, Any],
    logprobs: int | None,
    echo: bool,
) -> None:
    def say(request: Request, index: int) -> list[int]:
        return ids_of(texts[(len(request.prompt_ids) + index) % len(texts)])

    front = door(FakeEngine(say, per_step=per_step))
    prompts = {"prompt": ["x", "y 🙂", "z z z"], "logprobs": logprobs, "echo": echo}
    check_stream(front.complete, {"n": n, **options, **prompts}, 3 * n)
    told = {} if logprobs is None else {"logprobs": True, "top_logprobs": logprobs}
    check_stream(front.chat, {"n": n, **options, **told}, n)


def check_stream(ask: Callable[..., httpx.Response], fields: dict[str, Any], choices: int) -> None:
    """One request, whole and streamed: text, ends, usage, log-probabilities and ids are the same,
    and the tokens told of a chat spell its text."""
    answer, events = ask(**fields).json(), chunks(ask(**fields, **USAGE))
    assert fold(events) == whole(answer)
    assert len(whole(answer)) == choices
    assert events[-1]["usage"] == answer["usage"]
    assert details(events) == details([answer])
    for index, (text, *_) in whole(answer).items():
        if fields.get("logprobs") is True:
            told = details([answer])[index].get("content", [])
            raw = b"".join(bytes(entry["bytes"]) for entry in told)
            assert raw.decode(errors="replace").startswith(text)


def test_usage_tells_what_was_found_cached() -> None:
    front = door(says("hello", cached_tokens=16))
    details = {"cached_tokens": 16}
    assert front.chat(n=3).json()["usage"]["prompt_tokens_details"] == details
    assert chunks(front.chat(n=3, **USAGE))[-1]["usage"]["prompt_tokens_details"] == details


def test_tenants_reach_the_engine() -> None:
    engine = says("hello")
    front = door(engine, keys=KeyRing([("k1", "ann"), ("k2", "bob")]))
    front.call("POST", "/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer k1"})
    front.call("POST", "/v1/completions", json=COMPLETION, headers={"authorization": "Bearer k2"})
    door(engine).chat()
    assert [request.tenant for request in engine.submitted] == ["ann", "bob", ""]


def test_priorities_reach_the_engine() -> None:
    engine = says("hello")
    front = door(engine)
    front.chat(priority=-3)
    front.complete()
    assert [request.priority for request in engine.submitted] == [-3, 0]
    assert front.chat(priority=1001).status_code == 400


def test_salts_reach_the_engine() -> None:
    engine = says("hello")
    front = door(engine)
    front.chat(cache_salt="a")
    front.chat()
    assert [request.cache_salt for request in engine.submitted] == ["a", ""]
    assert front.chat(cache_salt="").status_code == 400


def test_chat_stream_shape() -> None:
    events = chunks(door(says("hello world")).chat(n=2, **USAGE))
    for field in ("id", "object", "created", "model", "system_fingerprint"):
        assert len({event[field] for event in events}) == 1
    assert events[0]["id"].startswith("chatcmpl-")
    assert events[0]["object"] == "chat.completion.chunk"
    assert events[0]["model"] == "quiet"
    *others, last = events
    assert all(event["usage"] is None for event in others)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    for index in range(2):
        own = [event["choices"][0] for event in others if event["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [set(choice["delta"]) for choice in own[1:-1]] == [{"content"}] * len(own[1:-1])
        assert all(choice["delta"]["content"] for choice in own[1:-1])
        assert own[-1]["delta"] == {}
        assert [choice["finish_reason"] for choice in own] == [None] * len(own[:-1]) + ["stop"]


def test_stream_without_usage() -> None:
    events = chunks(door(says("hello")).chat(stream=True))
    assert all("usage" not in event and event["choices"] for event in events)


def test_usage_in_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = chunks(door(says("hello world")).chat(stream=True, stream_options=options))
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == len(ids_of("hello world")) + 1
    assert all(event["usage"]["prompt_tokens"] for event in events)


def test_stream_headers() -> None:
    response = door(says("hello")).chat(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"]
    assert "content-length" not in response.headers


def test_whole_chat() -> None:
    body = door(says("hello world")).chat(model="quiet-2").json()
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "hello world", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert (body["object"], body["model"]) == ("chat.completion", "quiet-2")
    assert body["choices"] == [choice]
    tokens = len(ids_of("hello world")) + 1  # the end token counts and is not shown
    assert body["usage"]["completion_tokens"] == tokens
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + tokens


def test_choices_of_several_prompts() -> None:
    def say(request: Request, index: int) -> list[int]:
        return ids_of(f"{byte_level_tokenizer().decode(list(request.prompt_ids))}{index}")

    body = door(FakeEngine(say)).complete(prompt=["a", "b"], n=2, echo=True).json()
    assert [choice["text"] for choice in body["choices"]] == ["aa0", "aa1", "bb0", "bb1"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    prompts = sum(len(ids) for ids in ([BOS_ID, 0], [BOS_ID, 0]))
    assert body["usage"]["prompt_tokens"] == prompts  # once per prompt, not per answer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hi there", ["hi there"], ids_of("hi there")])
def test_echo(prompt: Any, stream: bool) -> None:
    response = door(says("hello")).complete(prompt=prompt, echo=True, stream=stream)
    texts = fold(chunks(response)) if stream else whole(response.json())
    assert texts == {0: ("hi therehello", "stop", None)}


def test_prompt_kinds_reach_the_engine() -> None:
    engine = says("x")
    front = door(engine)
    hi = tuple(ids_of("hi"))
    for prompt, expected in [
        ("hi", [(BOS_ID, *hi)]),
        (["hi", "hi"], [(BOS_ID, *hi)] * 2),
        ([5, 6], [(5, 6)]),
        ([[5], [6, 7]], [(5,), (6, 7)]),
    ]:
        engine.submitted.clear()
        assert front.complete(prompt=prompt).status_code == 200
        assert [request.prompt_ids for request in engine.submitted] == expected
    front.complete(prompt="hi", add_special_tokens=False)
    assert engine.submitted[-1].prompt_ids == hi


def test_chat_has_one_bos() -> None:
    engine = says("x")
    door(engine).chat()
    assert engine.submitted[0].prompt_ids.count(BOS_ID) == 1


def test_content_parts_and_continued_message() -> None:
    engine = says("x")
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    messages = [
        {"role": "developer", "content": parts},
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "The answer is"},
    ]
    door(engine).chat(messages=messages, continue_final_message=True)
    tokenizer = byte_level_tokenizer()
    text = tokenizer.decode(list(engine.submitted[0].prompt_ids), skip_special_tokens=False)
    assert text == (
        f"{BOS}<|start|>system\nhello<|end|><|start|>user\na<|end|>"
        "<|start|>assistant\nThe answer is"
    )
    door(engine).chat(add_generation_prompt=False)
    text = tokenizer.decode(list(engine.submitted[1].prompt_ids), skip_special_tokens=False)
    assert text.endswith("<|start|>user\nhi<|end|>")


def test_sampling_fields_reach_the_engine() -> None:
    engine = says("x")
    sent = {"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "seed": -5, "max_tokens": 9}
    door(engine).chat(**sent, n=3, stop_token_ids=[4, 5], ignore_eos=True)
    request = engine.submitted[0]
    assert request.n == 3
    assert {name: getattr(request.sampling, name) for name in sent} == sent
    assert request.sampling.stop_token_ids == (4, 5)
    assert request.sampling.ignore_eos


def test_sampling_rules_reach_the_engine() -> None:
    engine = says("x")
    sent = {
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        "min_tokens": 3,
    }
    door(engine).complete(**sent, logit_bias={"5": 1, "0007": -100})
    request = engine.submitted[0]
    assert {name: getattr(request.sampling, name) for name in sent} == sent
    assert request.sampling.logit_bias == {5: 1, 7: -100}
    assert request.sampling.logprobs is request.sampling.prompt_logprobs is None


@pytest.mark.parametrize(("keep", "kept"), [(None, 40), (99, 40), (3, 3), (-1, 40)])
def test_truncated_prompts(keep: int | None, kept: int) -> None:
    engine = says("x")
    ids = list(range(1, 41))
    body = door(engine).complete(prompt=ids, truncate_prompt_tokens=keep).json()
    assert engine.submitted[0].prompt_ids == tuple(ids[-kept:])
    assert body["usage"]["prompt_tokens"] == kept


def test_what_the_context_leaves_of_a_prompt() -> None:
    engine = says("x")
    front = door(engine)
    assert front.complete(prompt=[5] * 300, truncate_prompt_tokens=-1, max_tokens=6).is_success
    assert len(engine.submitted[0].prompt_ids) == 250


def test_min_tokens_keep_stop_strings_out() -> None:
    tokens = len(ids_of("hello "))
    for least, text in ((0, "hello "), (tokens + len(ids_of("world ")), "hello world again ")):
        answer = door(says("hello world again world")).chat(stop="world", min_tokens=least)
        assert whole(answer.json()) == {0: (text, "stop", "world")}


def test_defaults() -> None:
    """What guidellm sends, nulls included, means the defaults; seeds are drawn per request."""
    engine = says("x")
    front = door(engine)
    nulls = dict.fromkeys(["temperature", "top_p", "top_k", "n", "seed", "stop", "user", "echo"])
    front.chat(**nulls)
    front.chat()
    front.complete()
    front.complete(max_tokens=5, max_completion_tokens=5, stop=None, ignore_eos=True)
    chat, other_chat, completion, guidellm = engine.submitted
    assert chat.sampling.temperature == chat.sampling.top_p == 1
    assert chat.sampling.max_tokens == 256 - len(chat.prompt_ids)
    assert chat.sampling.seed != other_chat.sampling.seed
    assert completion.sampling.max_tokens == 16
    assert guidellm.sampling.max_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_computing(stream: bool) -> None:
    engine = says("hello world " * 15, step_seconds=0.001)
    response = door(engine).chat(stop="world", stream=stream)
    texts = fold(chunks(response)) if stream else whole(response.json())
    assert texts == {0: ("hello ", "stop", "world")}
    assert engine.aborted == [engine.submitted[0].id]


def test_one_stopped_answer_does_not_stop_the_others() -> None:
    """The engine stops computing that one at once."""

    def say(request: Request, index: int) -> list[int]:
        return ids_of(["hello STOP not", "z" * 20][index])

    engine = FakeEngine(say)
    body = door(engine).chat(stop=["STOP"], n=2).json()
    assert whole(body) == {0: ("hello ", "stop", "STOP"), 1: ("z" * 20, "stop", None)}
    assert engine.aborted_answers == [(engine.submitted[0].id, 0)]
    assert not engine.aborted
    counted = len(ids_of("hello STOP")) + len(ids_of("z" * 20)) + 1
    assert body["usage"]["completion_tokens"] == counted


def test_stop_token_of_the_client() -> None:
    engine = says("hello world")
    token = ids_of("hello world")[-1]
    body = door(engine).chat(stop_token_ids=[token]).json()
    shown = byte_level_tokenizer().decode(ids_of("hello world")[:-1])
    assert whole(body) == {0: (shown, "stop", token)}
    body = door(engine).chat(stop_token_ids=[token], include_stop_str_in_output=True).json()
    assert whole(body) == {0: ("hello world", "stop", token)}


def test_held_back_text_comes_when_the_answer_ends() -> None:
    response = door(says("hello world")).chat(stop="world!", stream=True)
    assert fold(chunks(response)) == {0: ("hello world", "stop", None)}
    response = door(says("hello world")).chat(
        stop="world!", stream=True, max_tokens=len(ids_of("hello world"))
    )
    assert fold(chunks(response)) == {0: ("hello world", "length", None)}


def test_unfinished_character_is_flushed_at_the_end() -> None:
    tokens = ids_of("🙃")
    assert len(tokens) > 1
    response = door(says("🙃")).chat(max_tokens=len(tokens) - 1, stream=True)
    assert fold(chunks(response)) == {0: ("\ufffd", "length", None)}


def test_steps_become_one_write_each() -> None:
    """All answers of a request that one step gives go out together."""
    engine = says("hello world", step_seconds=0.005)
    app = door(engine).app
    writes: list[bytes] = []
    send_body = b'{"messages": [{"role": "user", "content": "hi"}], "n": 4, "stream": true}'

    async def receive() -> dict[str, Any]:
        if writes or sent:
            await asyncio.sleep(60)
        sent.append(True)
        return {"type": "http.request", "body": send_body}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            writes.append(message["body"])

    sent: list[bool] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [],
        "query_string": b"",
    }
    asyncio.run(app(scope, receive, send))
    steps = len(ids_of("hello world")) + 1
    assert len(writes) <= steps + 1  # and the end of the stream
    assert writes[1].count(b"data: ") == 4


def test_comments_while_nothing_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "IDLE_SECONDS", 0.03)
    response = door(says("hi", step_seconds=0.2)).chat(stream=True)
    first, *_ = response.text.split("\n\n")
    assert first == ": waiting"
    assert fold(chunks(response)) == {0: ("hi", "stop", None)}
    # Not before the engine has taken the request: that could still be refused.
    refusal = InvalidRequest("no", "prompt", "kv_capacity_exceeded")
    response = door(says("hi", admit_seconds=0.2, refuse=refusal)).chat(stream=True)
    assert response.status_code == 400
    # An answer in one piece does not care.
    assert door(says("hi", step_seconds=0.1)).chat().status_code == 200
    # Once the headers are out, an error is an event.
    response = door(says("hi", step_seconds=0.1, fail_after=0)).chat(stream=True)
    assert chunks(response)[0]["error"]["code"] == "request_failed"


def test_models_and_version() -> None:
    front = door(says("x"))
    listed = front.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["quiet", "quiet-2"]
    assert front.get("/v1/models/quiet-2").json() == listed["data"][1]
    assert listed["data"][0]["max_model_len"] == 256
    assert front.get("/version").json()["version"]
