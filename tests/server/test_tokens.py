"""/tokenize and /detokenize, and variables of the chat template."""

from __future__ import annotations

from typing import Any

import pytest

from server.template import ChatTemplate
from server.tokenizer import TextModel
from tests.server.front import CHAT, Door, door, says
from tests.server.test_errors import check
from tests.server.text_models import BOS, CHATML, byte_level_tokenizer, ids_of

BOS_ID = byte_level_tokenizer().token_to_id(BOS)


@pytest.fixture(scope="module")
def front() -> Door:
    return door(says("hello"))


def test_a_text(front: Door) -> None:
    ids = [BOS_ID, *ids_of("hello 🙃")]
    answer = front.call("POST", "/tokenize", json={"prompt": "hello 🙃", "model": "quiet"}).json()
    assert answer == {"tokens": ids, "count": len(ids), "max_model_len": 256}
    plain = {"prompt": "hello", "add_special_tokens": False}
    assert front.call("POST", "/tokenize", json=plain).json()["tokens"] == ids_of("hello")
    back = front.call("POST", "/detokenize", json={"tokens": ids}).json()
    assert back == {"prompt": f"{BOS}hello 🙃"}


def test_messages_are_rendered_as_chat_does() -> None:
    engine = says("x")
    front = door(engine)
    for more in ({}, {"add_generation_prompt": False}):
        found = front.call("POST", "/tokenize", json=CHAT | more).json()
        front.chat(**more)
        assert tuple(found["tokens"]) == engine.submitted[-1].prompt_ids
        assert found["count"] == len(found["tokens"])


CASES: list[tuple[str, dict[str, Any], str, tuple[str, ...]]] = [
    ("/tokenize", {}, "prompt", ("required",)),
    ("/tokenize", {"prompt": ["a"]}, "prompt", ("string",)),
    ("/tokenize", {"prompt": "a", **CHAT}, "prompt", ("messages",)),
    ("/tokenize", {"messages": []}, "messages", ("at least 1",)),
    ("/detokenize", {}, "tokens", ("required",)),
    ("/detokenize", {"tokens": [5, 1000]}, "tokens.1", ("between 0 and 999", "1000")),
    ("/detokenize", {"tokens": [-1]}, "tokens.0", ("-1",)),
    ("/detokenize", {"tokens": ["a"]}, "tokens.0", ("integer",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[:2])[:40])
def test_errors(front: Door, case: tuple[str, dict[str, Any], str, tuple[str, ...]]) -> None:
    path, body, param, words = case
    check(front.call("POST", path, json=body), 400, "invalid_value", param, *words)


def test_unknown_models(front: Door) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        answer = front.call("POST", path, json={**body, "model": "gpt"})
        check(answer, 404, "model_not_found", "model", "gpt")


def test_embeddings_are_no_route(front: Door) -> None:
    answer = front.call("POST", "/v1/embeddings", json={"input": "a"})
    check(answer, 404, "not_found", None, "POST /v1/embeddings")


def test_stats(front: Door) -> None:
    answer = front.get("/debug/stats").json()
    assert answer["engine"]["vocab_size"] == 1000
    assert answer["stats"]["running"] == 0


class TestTemplateVariables:
    """`chat_template_kwargs`: what the template reads, and nothing else."""

    SOURCE = CHATML + "{% if enable_thinking %}<think>{% endif %}"

    @pytest.fixture
    def front(self, monkeypatch: pytest.MonkeyPatch) -> Door:
        model = TextModel(byte_level_tokenizer(), ChatTemplate(self.SOURCE, {"bos_token": BOS}))
        monkeypatch.setattr("tests.server.front.chat_model", lambda: model)
        return door(says("x"))

    def text(self, front: Door, variables: dict[str, Any]) -> str:
        body = CHAT | {"chat_template_kwargs": variables}
        tokens = front.call("POST", "/tokenize", json=body).json()["tokens"]
        return str(front.call("POST", "/detokenize", json={"tokens": tokens}).json()["prompt"])

    def test_a_known_one_reaches_the_template(self, front: Door) -> None:
        assert self.text(front, {"enable_thinking": True}).endswith("<think>")
        assert not self.text(front, {"enable_thinking": False}).endswith("<think>")
        answer = front.chat(chat_template_kwargs={"enable_thinking": True})
        assert "x-ignored-params" not in answer.headers

    def test_an_unknown_one_is_named(self, front: Door) -> None:
        given = {"thinking": True, "raise_exception": 1}
        answer = front.chat(chat_template_kwargs=given)
        named = "chat_template_kwargs.thinking, chat_template_kwargs.raise_exception"
        assert answer.headers["x-ignored-params"] == named
        assert self.text(front, given) == self.text(front, {})

    @pytest.mark.parametrize("name", ["messages", "bos_token", "chat_template", "tools"])
    def test_what_is_given_cannot_be_set(self, front: Door, name: str) -> None:
        path = f"chat_template_kwargs.{name}"
        answer = front.chat(chat_template_kwargs={name: []})
        check(answer, 400, "invalid_value", path, path)
