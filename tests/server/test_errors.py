"""Every row of the contract's error table has the one shape and says what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.client import RequestFailed
from scheduler.request import InvalidRequest
from server import service
from server.fields import UNSUPPORTED
from server.schemas import Limits
from tests.server.front import CHAT, COMPLETION, Door, chunks, door, says

CHAT_PATH, COMPLETION_PATH = "/v1/chat/completions", "/v1/completions"
TYPES = {401: "authentication_error", 500: "server_error", 503: "server_error"}


@pytest.fixture(scope="module")
def front() -> Door:
    return door(says("hello"))


def check(response: Any, status: int, code: str, param: str | None, *words: str) -> None:
    """The one shape, and that the message holds `words`."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == TYPES.get(status, "invalid_request_error")
    for word in words:
        assert word in error["message"]
    assert "Traceback" not in response.text
    assert 'File "' not in response.text


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"} | fields]}


CHAT_CASES = [
    ({"temperature": 2.5}, "temperature", "between 0 and 2", "2.5"),
    ({"temperature": "1"}, "temperature", "number", "'1'"),
    ({"top_p": 0}, "top_p", "above 0 and at most 1", "0"),
    ({"top_p": 1.1}, "top_p", "at most 1", "1.1"),
    ({"top_k": -2}, "top_k", "-1 or 0", "-2"),
    ({"top_k": 2**31}, "top_k", "2147483648"),
    ({"min_p": -0.1}, "min_p", "between 0 and 1", "-0.1"),
    ({"seed": 2**63}, "seed", "64-bit", str(2**63)),
    ({"seed": 1.5}, "seed", "integer", "1.5"),
    ({"n": 0}, "n", "between 1 and 128", "0"),
    ({"n": 129}, "n", "between 1 and 128", "129"),
    ({"n": True}, "n", "integer", "True"),
    ({"max_tokens": 0}, "max_tokens", "at least 1", "0"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "at least 1", "-1"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "5", "6", "differ"),
    ({"stop": ""}, "stop", "empty"),
    ({"stop": ["a", ""]}, "stop.1", "empty"),
    ({"stop": ["a"] * 17}, "stop", "at most 16", "17"),
    ({"stop": [1]}, "stop.0", "string", "1"),
    ({"stop_token_ids": [1000]}, "stop_token_ids.0", "between 0 and 999", "1000"),
    ({"stop_token_ids": [10**30]}, "stop_token_ids.0"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids", "at most 128", "129"),
    ({"presence_penalty": 2.1}, "presence_penalty", "between -2 and 2", "2.1"),
    ({"frequency_penalty": -3}, "frequency_penalty", "between -2 and 2", "-3"),
    ({"repetition_penalty": 0}, "repetition_penalty", "above 0 and at most 2", "0"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "token ids", "'a'"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "between -100 and 100", "101"),
    ({"logit_bias": {"1000": 1}}, "logit_bias.1000", "between 0 and 999", "1000"),
    ({"logit_bias": dict.fromkeys(map(str, range(301)), 1)}, "logit_bias", "at most 300", "301"),
    ({"logit_bias": {"5": "x"}}, "logit_bias.5", "number", "'x'"),
    ({"logit_bias": [5]}, "logit_bias", "dict"),
    ({"min_tokens": -1}, "min_tokens", "0 or more", "-1"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "at most the 8 of max_tokens", "9"),
    ({"logprobs": 1}, "logprobs", "boolean", "1"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20", "21"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "between 0 and 20", "21"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
    ({"stream": "yes"}, "stream", "boolean", "'yes'"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"messages": []}, "messages", "at least 1", "0"),
    ({"messages": None}, "messages", "None"),
    ({"messages": "hi"}, "messages", "'hi'"),
    (message(role="robot"), "messages.0.role", "'assistant'", "'robot'"),
    (message(content=None), "messages.0.content", "None"),
    (message(content=[{"type": "text", "text": 1}]), "messages.0.content.0.text", "1"),
    (message(content=[{"type": "image_url"}]), "messages.0.content.0.type", "'image_url'"),
    (message(content=["hi"]), "messages.0.content.0"),
    ({"continue_final_message": True}, "messages.0.role", "'assistant'", "'user'"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
]


@pytest.mark.parametrize("case", CHAT_CASES, ids=lambda case: str(case[0])[:40])
def test_chat_values(front: Door, case: tuple[Any, ...]) -> None:
    fields, param, *words = case
    check(front.chat(**fields), 400, "invalid_value", param, *words)


COMPLETION_CASES = [
    ({"prompt": None}, "prompt", "None"),
    ({"prompt": 5}, "prompt", "5"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": [[1], []]}, "prompt.1", "at least one token"),
    ({"prompt": [1, "a"]}, "prompt.1", "integer", "'a'"),
    ({"prompt": ["a", 1]}, "prompt.1", "string", "1"),
    ({"prompt": [[1], [2.5]]}, "prompt.1.0", "integer", "2.5"),
    ({"prompt": [1000]}, "prompt", "1000", "999"),
    ({"prompt": [-1]}, "prompt", "-1"),
    ({"prompt": [[1], [10**30]]}, "prompt.1", str(10**30), "999"),
    ({"echo": 1}, "echo", "boolean"),
    ({"max_tokens": -1, "echo": True}, "max_tokens", "at least 0", "-1"),
    ({"logprobs": 21}, "logprobs", "between 0 and 20", "21"),
    ({"logprobs": True}, "logprobs", "integer", "True"),
    ({"logprobs": -1, "echo": True}, "logprobs", "between 0 and 20", "-1"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 or at least 1", "0"),
]


@pytest.mark.parametrize("case", COMPLETION_CASES, ids=lambda case: str(case[0])[:40])
def test_completion_values(front: Door, case: tuple[Any, ...]) -> None:
    fields, param, *words = case
    check(front.complete(**fields), 400, "invalid_value", param, *words)


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'"x"', b"null", b'{"a": NaN}', b'{"a": "\xff"}', b'{"a":' * 9999]
)
def test_malformed_bodies(front: Door, path: str, raw: bytes) -> None:
    check(front.call("POST", path, content=raw), 400, "invalid_value", None, "JSON")


def test_missing_fields(front: Door) -> None:
    for path, param in ((CHAT_PATH, "messages"), (COMPLETION_PATH, "prompt")):
        check(front.call("POST", path, json={}), 400, "invalid_value", param, "required")


NOT_SERVED: dict[str, Any] = {
    "audio": {"voice": "x"},
    "best_of": 3,
    "chat_template": "{{ 1 }}",
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "guided_json": {},
    "guided_regex": "a*",
    "suffix": "end",
}


@pytest.mark.parametrize("field", NOT_SERVED)
def test_what_is_not_served_is_refused_by_name(front: Door, field: str) -> None:
    value = {field: NOT_SERVED[field]}
    for response in (front.chat(**value), front.complete(**value)):
        check(response, 400, "unsupported_parameter", field, field)


def test_values_that_ask_for_nothing_are_accepted(front: Door) -> None:
    for place in range(max(map(len, UNSUPPORTED.values()))):
        fields = {name: values[min(place, len(values) - 1)] for name, values in UNSUPPORTED.items()}
        response = front.chat(**fields, best_of=1, user="me", stop=[], stream_options=None)
        assert response.status_code == 200, response.text
        assert "x-ignored-params" not in response.headers


def test_ignored_fields_are_named(front: Door) -> None:
    fields = {"store": True, "metadata": {"a": "b"}, "my field\r\n": 1, "verbosity": "low"}
    response = front.chat(**fields, **message(colour="red", refusal=None))
    assert response.status_code == 200
    named = response.headers["x-ignored-params"]
    assert named == "store, metadata, verbosity, messages.0.colour, (and 1 more)"


def test_strict_refuses_what_would_be_ignored(front: Door) -> None:
    strict = {"x-strict": "1"}
    response = front.call("POST", CHAT_PATH, json=CHAT | {"store": True}, headers=strict)
    check(response, 400, "unsupported_parameter", "store", "x-strict")
    assert front.call("POST", CHAT_PATH, json=CHAT, headers=strict).status_code == 200


def test_unknown_model_and_route_and_method(front: Door) -> None:
    for response in (front.chat(model="gpt"), front.complete(model="gpt")):
        check(response, 404, "model_not_found", "model", "'gpt'", "quiet, quiet-2")
    check(front.get("/v1/models/gpt"), 404, "model_not_found", "model", "'gpt'")
    check(front.get("/v1/nothing"), 404, "not_found", None, "GET /v1/nothing")
    check(front.get(CHAT_PATH), 405, "method_not_allowed", None, "GET")
    assert front.get(CHAT_PATH).headers["allow"] == "POST"


def test_context_length(front: Door) -> None:
    check(
        front.complete(prompt=[5] * 200, max_tokens=100),
        400, "context_length_exceeded", "prompt", "256", "300", "200", "100",
    )  # fmt: skip
    check(front.complete(prompt=[5] * 256), 400, "context_length_exceeded", "prompt", "256")
    check(front.complete(prompt=[[5], [5] * 300]), 400, "context_length_exceeded", "prompt.1")
    long = message(content="x" * 300)
    check(front.chat(**long), 400, "context_length_exceeded", "messages", "256")
    # What the client did not ask for is cut to what fits.
    response = front.complete(prompt=[5] * 250)
    assert response.json()["usage"]["completion_tokens"] <= 6


def test_too_many(front: Door) -> None:
    small = door(says("hello"), limits=Limits(max_messages=2, max_prompts=2))
    chat = [{"role": "user", "content": "hi"}] * 3
    check(small.chat(messages=chat), 400, "invalid_value", "messages", "2", "3")
    check(small.complete(prompt=["a"] * 3), 400, "invalid_value", "prompt", "2", "3")
    check(front.complete(prompt=["a"] * 100, n=128), 400, "invalid_value", "n", "10000", "12800")
    assert small.complete(prompt=[5, 6, 7]).status_code == 200
    assert small.complete(prompt=["a"] * 2).status_code == 200


def test_template_errors(front: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.template import ChatTemplate
    from server.tokenizer import TextModel
    from tests.server.text_models import byte_level_tokenizer

    source = "{{ raise_exception('Conversation roles must alternate') }}"
    models = (TextModel(byte_level_tokenizer(), ChatTemplate(source, {})), TextModel(
        byte_level_tokenizer()
    ))  # fmt: skip
    for model, words in zip(models, ("roles must alternate", "no chat template"), strict=True):
        monkeypatch.setattr("tests.server.front.chat_model", lambda model=model: model)
        check(door(says("x")).chat(), 400, "invalid_value", "messages", words)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
class TestEngineErrors:
    """Before the first token they are a real status, streamed or not."""

    def post(self, engine: Any, path: str, stream: bool) -> Any:
        fields = (CHAT if path == CHAT_PATH else COMPLETION) | {"stream": stream}
        return door(engine).call("POST", path, json=fields)

    def test_refusal(self, path: str, stream: bool) -> None:
        refusal = InvalidRequest("needs 9 blocks, there are 4", "prompt", "kv_capacity_exceeded")
        response = self.post(says("x", refuse=refusal), path, stream)
        check(response, 400, "kv_capacity_exceeded", "prompt", "9 blocks")

    def test_failure(self, path: str, stream: bool) -> None:
        response = self.post(says("x", fail_after=0), path, stream)
        check(response, 500, "request_failed", None, "a kernel failed")

    def test_dead_engine(self, path: str, stream: bool) -> None:
        response = self.post(says("x", alive=False), path, stream)
        check(response, 503, "engine_dead", None, "engine")
        assert int(response.headers["retry-after"]) <= 60
        assert response.headers["x-should-retry"] == "true"

    def test_bug(self, path: str, stream: bool) -> None:
        def bug(request: object, index: int) -> list[int]:
            raise KeyError("secret")

        engine = says("x")
        engine.say = bug
        response = self.post(engine, path, stream)
        check(response, 500, "internal_error", None)
        assert "secret" not in response.text


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
def test_failure_in_mid_stream(path: str) -> None:
    front = door(says("hello world", fail_after=2))
    fields = (CHAT if path == CHAT_PATH else COMPLETION) | {"stream": True}
    *before, last = chunks(front.call("POST", path, json=fields))
    assert before
    assert last["error"] == {
        "message": "a kernel failed",
        "type": "server_error",
        "param": None,
        "code": "request_failed",
    }


def test_one_refused_prompt_refuses_the_list() -> None:
    """The other prompts are aborted, and the status is real although they had answers."""
    engine = says("hello world how are you", step_seconds=0.001)
    submit = engine.submit

    async def second_is_refused(request: Any) -> Any:
        if len(engine.submitted) == 1:
            engine.admit_seconds = 0.05
            engine.refuse = InvalidRequest("no", "prompt", "kv_capacity_exceeded")
        return await submit(request)

    engine.submit = second_is_refused
    response = door(engine).complete(prompt=["a", "b"], stream=True, max_tokens=200)
    check(response, 400, "kv_capacity_exceeded", "prompt")


def test_aborted_by_the_operator() -> None:
    engine = says("hello world how are you", step_seconds=0.001)
    engine.say = lambda request, index: engine.abort(request.id) or [5]
    response = door(engine).chat()
    check(response, 500, "aborted", None)
    assert response.headers["x-should-retry"] == "false"


def test_error_while_building(front: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(service, "build", bug)
    response = front.chat()
    check(response, 500, "internal_error", None)
    assert "secret" not in json.dumps(response.json())


def test_dead_engine_is_not_healthy(front: Door) -> None:
    assert front.get("/health").json() == {"status": "ready"}
    dead = door(says("x", alive=False)).get("/health")
    assert (dead.status_code, dead.json()["status"]) == (503, "dead")
    assert dead.json()["error"]["code"] == "engine_dead"


def test_a_deadline_that_cannot_be_met() -> None:
    late = RequestFailed("too late", "deadline_exceeded")
    for stream in (False, True):
        response = door(says("hello", refuse=late)).chat(stream=stream)
        assert response.status_code == 504
        assert response.headers["x-should-retry"] == "false"
        assert response.json()["error"]["code"] == "deadline_exceeded"


def test_deadlines_count_from_the_arrival() -> None:
    engine = says("hello")
    headers = {"x-deadline-ms": "60000", "x-ttft-deadline-ms": "1"}
    path = "/v1/chat/completions"
    assert door(engine).call("POST", path, json=CHAT, headers=headers).status_code == 200
    [request] = engine.submitted
    assert request.deadline is not None
    assert request.ttft_deadline is not None
    assert request.deadline - request.ttft_deadline == pytest.approx(59.999)
    assert request.ttft_deadline <= request.arrival + 0.001


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "x", "", "999999999999", "86400001"])
def test_what_is_no_deadline(value: str) -> None:
    headers = {"x-deadline-ms": value}
    response = door(says("x")).call("POST", "/v1/completions", json=COMPLETION, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-deadline-ms"
