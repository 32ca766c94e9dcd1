"""Calls in what a model writes: the same however it is cut, and as the format says."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.grammar import GrammarCompiler
from models import embedded
from server.reasoning import MARKS, ReasoningReader
from server.tools import (
    FORMATS,
    Function,
    NamedReader,
    ToolReader,
    arguments_grammar,
    calls_grammar,
    format_of,
)

Calls = list[tuple[str, str]]


def read(reader: ToolReader | NamedReader, pieces: list[str]) -> tuple[str, Calls]:
    """Content, and (name, arguments) of each call; checks the shape of the deltas."""
    content, calls, ids = "", [], []
    for told in [*(reader.push(piece) for piece in pieces), reader.finish()]:
        content += told.content
        for delta in told.calls:
            if delta.name is not None:
                assert delta.id
                assert delta.arguments == ""
                assert delta.place == len(calls)
                ids.append(delta.id)
                calls.append((delta.name, ""))
            else:
                name, arguments = calls[delta.place]
                calls[delta.place] = (name, arguments + delta.arguments)
    assert len(set(ids)) == len(calls) == reader.count
    return content, calls


def whole(format: str, text: str) -> tuple[str, Calls]:
    return read(ToolReader(FORMATS[format]), [text])


ONE = '{"name": "f", "arguments": {"a": "}<b\\"", "c": [1, {}]}}'
ARGUMENTS = '{"a": "}<b\\"", "c": [1, {}]}'
LLAMA = ONE.replace("arguments", "parameters")

FRAGMENTS = ["<tool_call>", "</tool_call>", "{", "}", '"name": "f"', '"', ":", ",", "\n", ONE]
FRAGMENTS += [LLAMA, "[TOOL_CALLS]", "[", "]", "text", "<", " ", '"arguments": {}']

CASES = [
    ("hermes", f"<tool_call>\n{ONE}\n</tool_call>", "", [("f", ARGUMENTS)]),
    ("hermes", f"Let me see.\n\n<tool_call>{ONE}</tool_call>\n", "Let me see.", [("f", ARGUMENTS)]),
    (
        "hermes",
        f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{ONE}\n</tool_call>",
        "",
        [("f", ARGUMENTS)] * 2,
    ),
    ("hermes", f"<tool_call>{ONE}{ONE}</tool_call>after", "after", [("f", ARGUMENTS)] * 2),
    ("hermes", '<tool_call>{"arguments": {}, "name": "g"}</tool_call>', "", [("g", "{}")]),
    ("hermes", '<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}', "", [("g", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "g"}</tool_call>', "", [("g", "{}")]),
    ("hermes", f"<tool_call>{ONE[:-9]}", "", [("f", ARGUMENTS[:-8])]),
    ("hermes", "a <tool_call> b", "a <tool_call> b", []),
    ("hermes", "a<tool_call>{1}</tool_call> b", "a<tool_call>{1}</tool_call> b", []),
    ("hermes", "a <tool_cal", "a <tool_cal", []),
    ("hermes", ' {"name": "f"} \n', ' {"name": "f"} \n', []),
    ("hermes", '<tool_call>{"nam', '<tool_call>{"nam', []),
    ("llama3_json", LLAMA, "", [("f", ARGUMENTS)]),
    ("llama3_json", f"<|python_tag|>{LLAMA}; {LLAMA}", "", [("f", ARGUMENTS)] * 2),
    ("llama3_json", f"I say {LLAMA}", f"I say {LLAMA}", []),
    ("llama3_json", '{"age": 5}', '{"age": 5}', []),
    ("mistral", f"[TOOL_CALLS][{ONE}, {ONE}]", "", [("f", ARGUMENTS)] * 2),
    ("mistral", "no [TOOL", "no [TOOL", []),
]


@pytest.mark.parametrize(("format", "text", "content", "calls"), CASES)
def test_formats(format: str, text: str, content: str, calls: Calls) -> None:
    assert whole(format, text) == (content, calls)


@given(data=st.data())
def test_cuts_change_nothing(data: st.DataObject) -> None:
    """Also of what is no call, in every format."""
    text = data.draw(
        st.one_of(
            st.sampled_from([case[1] for case in CASES]),
            st.lists(
                st.sampled_from(FRAGMENTS),
                max_size=12,
            ).map("".join),
        )
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for format in FORMATS:
        expected = whole(format, text)
        assert read(ToolReader(FORMATS[format]), pieces) == expected
        assert read(ToolReader(FORMATS[format]), list(text)) == expected


def test_arguments_are_told_while_they_are_written() -> None:
    reader = ToolReader(FORMATS["hermes"])
    reader.push('<tool_call>\n{"name": "f", "arguments": {"text": "once')
    assert [delta.arguments for delta in reader.push(" upon").calls] == [" upon"]


def test_the_format_is_known_from_the_template() -> None:
    assert format_of("x <tool_call> y") == "hermes"
    assert format_of("[TOOL_CALLS]") == "mistral"
    assert format_of('{"name": function name, "parameters": dictionary}') == "llama3_json"
    assert format_of("{{ messages }}") is None


# ---------------------------------------------------------------------- grammars

FUNCTIONS = [
    Function(
        "weather",
        {
            "type": "object",
            "properties": {"city": {"enum": ["Ulm", "K\u00f6ln"]}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    ),
    Function("now", {"type": "object", "properties": {}, "additionalProperties": False}),
]


def random_answer(grammar: Any, seed: int) -> str:
    """An answer that the grammar allows, token after token."""
    rng = random.Random(seed)
    compiler = GrammarCompiler(embedded.path(), 2048, [2])
    matcher, tokens = compiler.compile(grammar).deep_copy(), []
    while not matcher.is_stopped() and len(tokens) < 400:
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(2048) if mask >> token & 1]
        tokens.append(2 if 2 in allowed else rng.choice(allowed))
        matcher.consume_token(tokens[-1])
    assert not matcher.get_error()
    return compiler.tokenizer.decode_str([token for token in tokens if token != 2])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("parallel", [True, False])
def test_demanded_calls_cannot_fail_to_parse(format: str, parallel: bool) -> None:
    grammar = calls_grammar(FUNCTIONS, FORMATS[format], parallel=parallel, param="tool_choice")
    schemas = {function.name: function.parameters for function in FUNCTIONS}
    counts = set()
    for seed in range(12):
        content, calls = whole(format, random_answer(grammar, seed))
        assert content == ""
        counts.add(len(calls))
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), schemas[name])
    assert min(counts) == 1
    assert parallel or counts == {1}


def test_a_named_call_is_all_of_the_answer() -> None:
    text = random_answer(arguments_grammar(FUNCTIONS[0], "tools"), 3)
    jsonschema.validate(json.loads(text), FUNCTIONS[0].parameters)
    assert read(NamedReader("weather"), list(text)) == ("", [("weather", text)])


# ---------------------------------------------------------------------- reasoning


def split(text: str, pieces: list[str], *, open: bool) -> tuple[str, str]:
    reader = ReasoningReader(MARKS["think"], open=open)
    told = [*(reader.push(piece) for piece in pieces), reader.finish()]
    assert "".join(pieces) == text
    return "".join(thought for thought, _ in told), "".join(answer for _, answer in told)


REASONING = [
    ("<think>\nhm\n</think>\n\nyes", False, ("\nhm\n", "\n\nyes")),
    ("hm</think>yes", True, ("hm", "yes")),
    ("no <think> here", False, ("", "no <think> here")),
    ("<thin", False, ("", "<thin")),
    ("<think>cut </thi", False, ("cut </thi", "")),
    ("", True, ("", "")),
]


@pytest.mark.parametrize(("text", "open", "parts"), REASONING)
def test_reasoning(text: str, open: bool, parts: tuple[str, str]) -> None:
    assert split(text, [text], open=open) == parts
    assert split(text, list(text), open=open) == parts
