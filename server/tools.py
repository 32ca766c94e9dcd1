"""Tool calls: read from what a model writes, piece by piece, and grammars that demand them.

    hermes       <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>      Hermes, Qwen
    llama3_json  {"name": ..., "parameters": {...}}, at the beginning, ; between    Llama 3
    mistral      [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]               Mistral

Text and calls come out as soon as they are certain, whatever the pieces are: a whole answer is the
fold of a streamed one.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from scheduler.request import Grammar
from server.stops import held_back

MAX_PARALLEL: Final = 16  # calls that a grammar lets an answer have

# A call whose name comes first can be told before it is complete.
_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes calls.

    Attributes:
        opener: what a call begins with; "" where an answer of calls begins with `{` itself.
        closer: what ends it.
        between: characters around the objects that mean nothing.
    """

    opener: str
    closer: str = ""
    between: str = " \t\r\n"


FORMATS: Final = {
    "hermes": ToolFormat("<tool_call>", "</tool_call>"),
    "llama3_json": ToolFormat("", between=" \t\r\n;"),
    "mistral": ToolFormat("[TOOL_CALLS]", between=" \t\r\n[,]"),
}


def format_of(template: str) -> str | None:
    """The name of the format that a chat template shows to the model, or None."""
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or '"parameters": ' in template:
        return "llama3_json"
    return None


@dataclass(frozen=True, slots=True)
class CallDelta:
    """More of call number `place` of an answer; the first of a call has its name and id."""

    place: int
    arguments: str = ""
    name: str | None = None
    id: str | None = None


@dataclass(slots=True)
class Reading:
    """What a piece of an answer turned out to be."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class ToolReader:
    """Tells the calls of one answer from its text.

    State: `_pending` is text that is not told yet. Outside of calls it is white space, which is
    left out next to a call, or the possible start of an opener; within one it is what came since
    the object began.
    """

    def __init__(self, format: ToolFormat) -> None:
        self._format = format
        self._pending = ""
        self._region = False  # between an opener and what ends the calls
        self._raw = ""  # of the region since its last call: text after all where there is none
        self._found = False  # whether the region holds a call
        self._call: _Object | None = None
        self._count = 0
        self._began = False  # whether text was told

    @property
    def count(self) -> int:
        """Calls so far, the one that is being written included."""
        return self._count + (self._call is not None and self._call.named)

    def push(self, text: str) -> Reading:
        """Takes more of the answer in."""
        told = Reading()
        self._pending += text
        while self._step(told):
            pass
        return told

    def finish(self) -> Reading:
        """What is left once the answer has ended."""
        told = Reading()
        if self._call is not None and not self._call.named:
            self._tell(told, self._raw + self._call.text)
        elif self._region and self._call is None and not self._found:
            self._tell(told, self._raw + self._pending)
        elif not self._region and (not self._count or self._pending.strip()):
            self._tell(told, self._pending)
        return told

    def _step(self, told: Reading) -> bool:
        """One move; whether there may be another."""
        if self._call is not None:
            return self._in_call(told, self._call)
        return self._between_calls(told) if self._region else self._in_text(told)

    def _in_text(self, told: Reading) -> bool:
        opener, pending = self._format.opener, self._pending
        if not opener:
            body = pending.lstrip().removeprefix("<|python_tag|>").lstrip()
            if not self._began and (not body or "<|python_tag|>".startswith(body)):
                return False
            if not self._began and body.startswith("{"):
                self._enter(pending[: len(pending) - len(body)], body)
                return True
            self._tell(told, pending)
            self._pending = ""
            return False
        at = pending.find(opener)
        if at >= 0:
            self._tell(told, pending[:at].rstrip())
            self._enter(
                pending[len(pending[:at].rstrip()) : at] + opener, pending[at + len(opener) :]
            )
            return True
        keep = held_back(pending, opener)
        certain = pending[: len(pending) - keep].rstrip()
        self._tell(told, certain)
        self._pending = pending[len(certain) :]
        return False

    def _enter(self, raw: str, rest: str) -> None:
        self._region, self._found, self._raw, self._pending = True, False, raw, rest

    def _tell(self, told: Reading, text: str) -> None:
        if text:
            self._began = True
            told.content += text

    def _between_calls(self, told: Reading) -> bool:
        """Before, between and after the objects of a region."""
        format = self._format
        rest = self._pending.lstrip(format.between)
        self._raw += self._pending[: len(self._pending) - len(rest)]
        self._pending = rest
        if not rest:
            return False
        if rest[0] == "{":
            self._call = _Object(self._count)
            return True
        closer = format.closer
        if closer and len(rest) < len(closer) and closer.startswith(rest):
            return False
        if closer and rest.startswith(closer):
            self._raw, rest = self._raw + closer, rest[len(closer) :]
        if not self._found:
            self._tell(told, self._raw)
        self._region, self._began, self._pending = False, True, rest
        return True

    def _in_call(self, told: Reading, call: _Object) -> bool:
        text, self._pending = self._pending, ""
        rest = call.push(text, told.calls)
        if rest is None:
            return False
        if call.named or call.read_whole(told.calls):
            self._count += 1
            self._found, self._raw = True, ""
        else:
            self._raw += call.text
        self._call, self._pending = None, rest
        return True


class _Object:
    """One JSON object that should be a call."""

    def __init__(self, place: int) -> None:
        self._place = place
        self._depth = 0
        self._in_string = self._escaped = False
        self._arguments = False  # whether the next characters are of the arguments
        self._seen = 0  # characters of `text` that were scanned
        self.text = ""
        self.named = False

    def push(self, text: str, calls: list[CallDelta]) -> str | None:
        """Takes more in; what follows the object, or None while it is not complete."""
        self.text += text
        if not self.named and (head := _HEAD.match(self.text)):
            name = _decoded(head[1])
            if isinstance(name, str):
                self.named = True
                calls.append(CallDelta(self._place, name=name, id=new_id()))
                self._seen, self._depth = head.end(), 1
                self._in_string = self._escaped = False
                self._arguments = True
        start = self._seen
        for at in range(start, len(self.text)):
            if self._scan(self.text[at]):
                if self._arguments and self._depth == 1:
                    calls.append(CallDelta(self._place, self.text[start : at + 1]))
                    self._arguments = False
                if self._depth == 0:
                    rest, self.text = self.text[at + 1 :], self.text[: at + 1]
                    return rest
        self._seen = len(self.text)
        if self._arguments and self._seen > start:
            calls.append(CallDelta(self._place, self.text[start:]))
        return None

    def _scan(self, char: str) -> bool:
        """Whether `char` closes an object or a list."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return True
        return False

    def read_whole(self, calls: list[CallDelta]) -> bool:
        """Reads a complete object whose name does not come first; whether it is a call."""
        found = _decoded(self.text)
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return False
        arguments = found.get("arguments", found.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(CallDelta(self._place, name=found["name"], id=new_id()))
        calls.append(CallDelta(self._place, arguments))
        return True


class NamedReader:
    """The whole answer is the arguments of one function, as a grammar demands it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.count = 0

    def push(self, text: str) -> Reading:
        """Takes more of the answer in."""
        calls = []
        if text and not self.count:
            self.count = 1
            calls.append(CallDelta(0, name=self._name, id=new_id()))
        if text:
            calls.append(CallDelta(0, text))
        return Reading(calls=calls)

    def finish(self) -> Reading:
        """Nothing is held back."""
        return Reading()


def new_id() -> str:
    """Of a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# ---------------------------------------------------------------------- grammars


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a model may call; `parameters` is a JSON schema."""

    name: str
    parameters: dict[str, Any]


def arguments_grammar(function: Function, param: str) -> Grammar:
    """Nothing but the arguments of `function`."""
    return Grammar("json_schema", msgspec.json.encode(function.parameters).decode(), param)


def calls_grammar(
    functions: Sequence[Function], format: ToolFormat, *, parallel: bool, param: str
) -> Grammar:
    """One call or more of any of the functions, in the format that `ToolReader` reads."""
    before, after, between = ("", "", "\n")
    if format.closer:
        before, after = f"{format.opener}\n", f"\n{format.closer}"
    elif format.opener:
        before, after, between = "[", "]", ", "
    more = f"({_text(between)} call){{0,{MAX_PARALLEL - 1}}}" if parallel else ""
    rules = [" | ".join(f"f{place}" for place in range(len(functions)))]
    lines = [f"call: {_text(before)} one {_text(after)}" if format.closer else "call: one"]
    if format.closer or not format.opener:
        lines.append(f"start: call {more}")
    else:
        lines.append(f"start: {_text(format.opener + before)} call {more} {_text(after)}")
    lines.append(f"one: {rules[0]}")
    for place, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function.name)}, "arguments": '
        schema = msgspec.json.encode(function.parameters | _JSON_OPTIONS).decode()
        lines.append(f"f{place}: {_text(head)} %json {schema} {_text('}')}")
    return Grammar("lark", "\n".join(lines), param)


# White space as the engine bounds it in other JSON.
_JSON_OPTIONS: Final = {"x-guidance": {"whitespace_pattern": r" |\n {0,16}"}}


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
