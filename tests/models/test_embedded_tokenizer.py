"""The tokenizer and the chat template of the embedded model."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from models.embedded import path
from models.embedded.corpus import conversation
from models.embedded.tokenizer import ROLES, SPECIAL, render

TOKENIZER = Tokenizer.from_file(str(path() / "tokenizer.json"))
CHAT = AutoTokenizer.from_pretrained(path())


def template(messages: list[dict], **options) -> str:
    return CHAT.apply_chat_template(messages, tokenize=False, **options)


@given(st.text())
def test_any_text_survives_a_round_trip(text: str):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    if not any(mark in text for mark in SPECIAL):
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n", "naïve café", "日本語 テキスト", "🙂🙃", "a\tb\r\n", "1,234.5", "'s 's"],
)
def test_odd_texts_survive_a_round_trip(text: str):
    assert CHAT.decode(CHAT.encode(text)) == text


def test_every_digit_is_a_token_of_its_own():
    assert TOKENIZER.encode("12+345").tokens == ["1", "2", "+", "3", "4", "5"]


def test_both_loaders_give_the_same_ids():
    for text in ("What is 3 + 4?", "Hello there, Quire!", "it's naïve: 12, 13"):
        assert CHAT.encode(text) == TOKENIZER.encode(text).ids


def test_the_special_tokens_are_known():
    config = json.loads((path() / "config.json").read_text())
    assert CHAT.eos_token == "<|end|>" and CHAT.eos_token_id == config["eos_token_id"]
    assert CHAT.bos_token_id == config["bos_token_id"]
    assert CHAT.pad_token_id == config["pad_token_id"]
    for mark in SPECIAL:
        assert len(TOKENIZER.encode(mark, add_special_tokens=False).ids) == 1
    assert len(TOKENIZER.get_vocab()) == config["vocab_size"]


def test_the_template_renders_each_role():
    messages = [{"role": role, "content": f"I am {role}."} for role in ROLES]
    expected = "".join(f"<|{role}|>I am {role}.<|end|>" for role in ROLES)
    assert template(messages) == "<|begin|>" + expected
    assert template(messages, add_generation_prompt=True).endswith("<|end|><|assistant|>")


def test_developer_is_rendered_as_system():
    assert template([{"role": "developer", "content": "x"}]) == "<|begin|><|system|>x<|end|>"


def test_parts_and_missing_content_are_accepted():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template([{"role": "user", "content": parts}]) == "<|begin|><|user|>ab<|end|>"
    assert template([{"role": "assistant", "content": None}]) == "<|begin|><|assistant|><|end|>"


def test_the_template_is_what_the_model_was_trained_on():
    rng = random.Random(11)
    for _ in range(100):
        chat = conversation(rng, 3)
        assert template(chat) == "".join(text for text, _ in render(chat))


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def test_tools_are_listed_in_the_system_turn():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    listed = "Tools:\nget_weather(city): Weather in a city<|end|>"
    assert template(chat, tools=[WEATHER]).startswith(
        "<|begin|><|system|>Be brief.\n\n" + listed + "<|user|>Hi"
    )
    assert template(chat[1:], tools=[WEATHER]).startswith("<|begin|><|system|>" + listed)


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_tool_calls_of_earlier_turns_are_written_as_the_model_writes_them(arguments):
    call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    text = template([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert text == (
        "<|begin|><|assistant|><tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|end|>'
    )
