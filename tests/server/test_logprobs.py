"""Log-probabilities and token ids in answers. The fake engine makes that of a token minus a tenth
of its id."""

from __future__ import annotations

from typing import Any

import pytest

from server.logprobs import Wording
from server.tokenizer import TextModel
from tests.server.fake_engine import FakeEngine
from tests.server.front import chunks, door, says
from tests.server.text_models import (
    BOS,
    byte_level_tokenizer,
    chat_model,
    ids_of,
    sentencepiece_tokenizer,
)

BOS_ID = byte_level_tokenizer().token_to_id(BOS)
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def joined(events: list[dict[str, Any]], field: str) -> list[Any]:
    """A list of `logprobs` over all chunks."""
    parts = [choice["logprobs"] for event in events for choice in event["choices"]]
    return [one for part in parts if part is not None for one in part[field]]


def test_chat_names_tokens_with_their_bytes() -> None:
    front = door(says("hello 🙃"))
    body = front.chat(logprobs=True, top_logprobs=2).json()
    content = body["choices"][0]["logprobs"]["content"]
    tokens = ids_of("hello 🙃")
    assert [entry["logprob"] for entry in content] == [token / -10 for token in tokens]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "hello 🙃".encode()
    assert content[-1]["token"].startswith("bytes:\\x")
    top = [{"token": "<|start|>", "bytes": list(b"<|start|>"), "logprob": -0.1},
           {"token": BOS, "bytes": list(BOS.encode()), "logprob": -0.2}]  # fmt: skip
    assert all(entry["top_logprobs"] == top for entry in content)
    events = chunks(front.chat(logprobs=True, top_logprobs=2, **USAGE))
    assert joined(events, "content") == content
    plain = front.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in plain)


def test_a_stop_string_cuts_what_is_told() -> None:
    front = door(says("hello world again"))
    shown = front.chat(stop="wor", logprobs=True).json()["choices"][0]
    told = b"".join(bytes(entry["bytes"]) for entry in shown["logprobs"]["content"])
    assert shown["message"]["content"] == "hello "
    assert told.startswith(b"hello ")
    assert len(shown["logprobs"]["content"]) <= len(ids_of("hello ")) + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "told"), [("q", ["z"]), ("q!", ["z", "q", "z"])])
def test_tokens_are_told_of_with_their_text(stop: str, told: list[str], stream: bool) -> None:
    """One behind the end is not; one that only looked like the start of a stop string is."""
    tokens = [*ids_of("z"), *ids_of("q"), *ids_of("z")]
    engine = FakeEngine(lambda request, index: tokens)
    response = door(engine).complete(stop=stop, logprobs=0, stream=stream)
    events = chunks(response) if stream else [response.json()]
    assert joined(events, "tokens") == told


def test_completions_have_lists_and_offsets() -> None:
    body = door(says("hello world")).complete(logprobs=1).json()
    logprobs = body["choices"][0]["logprobs"]
    tokens = ids_of("hello world")
    names = [byte_level_tokenizer().decode([token]) for token in tokens]
    assert logprobs["tokens"] == names
    assert logprobs["token_logprobs"] == [token / -10 for token in tokens]
    assert logprobs["top_logprobs"][0] == {"<|start|>": -0.1, names[0]: tokens[0] / -10}
    assert logprobs["text_offset"] == [len("".join(names[:i])) for i in range(len(names))]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_tells_of_the_prompt(stream: bool) -> None:
    """Also of several prompts in a stream, where each waits for its own."""
    fields = {"prompt": ["hi", "hello"], "n": 2, "echo": True, "logprobs": 0, "max_tokens": 2}
    response = door(says("world")).complete(**fields, stream=stream)
    events = chunks(response) if stream else [response.json()]
    for index in range(4):
        own = [{"choices": [c for c in e["choices"] if c["index"] == index]} for e in events]
        prompt = [BOS_ID, *ids_of(["hi", "hello"][index // 2])]
        answer = ids_of("world")[:2]
        values = [None, *(token / -10 for token in [*prompt[1:], *answer])]
        assert joined(own, "token_logprobs") == values
        assert joined(own, "top_logprobs")[0] is None
        shown = "".join(choice["text"] for event in own for choice in event["choices"])
        names = joined(own, "tokens")
        assert names[0] == BOS
        offsets = joined(own, "text_offset")
        assert offsets[:2] == [0, 0]
        assert shown.startswith("".join(names[1:]))
        assert offsets == sorted(offsets)
        assert shown[offsets[len(prompt)] :] == "".join(names[len(prompt) :])


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_alone_is_scored(stream: bool) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": 0, "stream": stream}
    response = door(says("")).complete(**fields)
    events = chunks(response) if stream else [response.json()]
    assert len(joined(events, "tokens")) == 1 + len(ids_of("hello"))
    last = [choice for event in events for choice in event["choices"]][-1]
    assert last["finish_reason"] == "length"
    if not stream:
        assert last["text"] == "hello"
        assert events[0]["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_as_vllm_has_them() -> None:
    front = door(says("x"))
    body = front.complete(prompt=[5, 6], prompt_logprobs=1).json()
    name = byte_level_tokenizer().decode([6])
    six = {"logprob": -0.6, "rank": 6, "decoded_token": name}
    one = {"logprob": -0.1, "rank": 1, "decoded_token": "<|start|>"}
    assert body["choices"][0]["prompt_logprobs"] == [None, {"6": six, "1": one}]
    assert body["choices"][0]["logprobs"] is None
    found = front.chat(prompt_logprobs=0).json()
    assert len(found["prompt_logprobs"]) == found["usage"]["prompt_tokens"]
    assert [len(entry) for entry in found["prompt_logprobs"][1:]] == [1] * (
        found["usage"]["prompt_tokens"] - 1
    )


def test_token_ids() -> None:
    """With the end token, which is not shown."""
    front = door(says("hello"))
    answer = [*ids_of("hello"), 0]
    choice = front.complete(prompt=[5, 6], return_token_ids=True).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([5, 6], answer)
    body = front.chat(return_token_ids=True).json()
    assert body["choices"][0]["token_ids"] == answer
    for events, prompt in (
        (chunks(front.complete(prompt=[5, 6], return_token_ids=True, stream=True)), [5, 6]),
        (chunks(front.chat(return_token_ids=True, stream=True)), body["prompt_token_ids"]),
    ):
        first, *others = [choice for event in events for choice in event["choices"]]
        assert first["prompt_token_ids"] == prompt
        told = [one for choice in [first, *others] for one in choice.get("token_ids", [])]
        assert told == answer


def test_tokens_named_by_id() -> None:
    body = door(says("hello")).complete(logprobs=1, return_tokens_as_token_ids=True).json()
    names = [f"token_id:{token}" for token in ids_of("hello")]
    assert body["choices"][0]["logprobs"]["tokens"] == names


def test_chat_echo_repeats_the_message_that_goes_on() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The "}]
    fields = {"messages": messages, "continue_final_message": True, "echo": True}
    front = door(says("answer"))
    assert front.chat(**fields).json()["choices"][0]["message"]["content"] == "The answer"
    events = chunks(front.chat(**fields, stream=True))
    text = "".join(c["delta"].get("content", "") for e in events for c in e["choices"])
    assert text == "The answer"
    assert front.chat(echo=True).json()["choices"][0]["message"]["content"] == "answer"


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_bytes_of_sentencepiece_tokens(kind: str) -> None:
    text = TextModel(sentencepiece_tokenizer(kind))
    ids = text.encode(["he é🙃"], add_special_tokens=False)[0]
    assert b"".join(map(text.token_bytes, ids)).decode().strip() == "he é🙃"
    assert Wording(text).name(ids[-1]) == "bytes:\\x83"
    assert Wording(chat_model()).name(0) == "<|end|>"
