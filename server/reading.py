"""What a chat's answer consists of, told apart while it is written: thoughts, text, calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from scheduler.request import Grammar
from server.errors import invalid
from server.reasoning import MARKS, ReasoningReader, marks_of
from server.schemas import ChatBody
from server.structured import closed, grammar_of
from server.tools import (
    FORMATS,
    CallDelta,
    Function,
    NamedReader,
    Reading,
    ToolFormat,
    ToolReader,
    arguments_grammar,
    calls_grammar,
    format_of,
)

ANY_ARGUMENTS: Final[dict[str, Any]] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class ParserNames:
    """As an operator sets them; `auto` asks the chat template."""

    tools: Literal["auto", "none", "hermes", "llama3_json", "mistral"] = "auto"
    reasoning: Literal["auto", "none", "think", "mistral"] = "auto"


class AnswerReader:
    """One answer's text in, its parts out."""

    def __init__(
        self, reasoning: ReasoningReader | None, tools: ToolReader | NamedReader | None
    ) -> None:
        self._reasoning, self._tools = reasoning, tools

    @property
    def thinking(self) -> bool:
        """Whether what comes next is a thought."""
        return self._reasoning is not None and self._reasoning.thinking

    @property
    def called(self) -> bool:
        """Whether there is a tool call."""
        return self._tools is not None and self._tools.count > 0

    def push(self, text: str, *, last: bool) -> tuple[str, Reading]:
        """Takes more of the answer in: thoughts, and what else it says. `last`: it has ended."""
        thought = ""
        if self._reasoning is not None:
            thought, text = self._reasoning.push(text)
            if last:
                more, rest = self._reasoning.finish()
                thought, text = thought + more, text + rest
        if self._tools is None:
            return thought, Reading(text)
        told = self._tools.push(text)
        if last:
            rest_told = self._tools.finish()
            told = Reading(told.content + rest_told.content, told.calls + rest_told.calls)
        return thought, told


@dataclass(slots=True)
class ToolCall:
    """One whole call."""

    id: str
    name: str
    arguments: str = ""

    def fields(self) -> dict[str, Any]:
        """As the wire has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def gather(calls: list[ToolCall], deltas: Iterable[CallDelta]) -> None:
    """Folds what came into whole calls."""
    for delta in deltas:
        if delta.name is not None:
            calls.append(ToolCall(delta.id or "", delta.name))
        calls[delta.place].arguments += delta.arguments


class ChatParsers:
    """How answers of this model are read.

    Args:
        template: source of the chat template, "" without one.
    """

    def __init__(self, names: ParserNames, template: str) -> None:
        tools = format_of(template) if names.tools == "auto" else names.tools
        marks = marks_of(template) if names.reasoning == "auto" else names.reasoning
        self._format: ToolFormat | None = FORMATS.get(tools or "")
        self._marks = MARKS.get(marks or "")

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens that are needed to read an answer."""
        found = [self._format.opener, "<|python_tag|>"] if self._format else []
        return (*found, *((self._marks.start, self._marks.end) if self._marks else ()))

    def grammar(self, body: ChatBody) -> Grammar | None:
        """What the answer must match: calls where they are demanded.

        Raises:
            ApiError: 400 for a choice that there is not, or two demands at once.
        """
        asked = grammar_of(body)
        functions = functions_of(body)
        named = body.named_tool
        if body.tool_choice in (None, "none", "auto"):
            if body.tool_choice == "auto" and not functions:
                raise invalid("tool_choice", "tool_choice needs tools")
            return asked
        if not functions:
            raise invalid("tool_choice", "tool_choice needs tools")
        if asked is not None:
            raise invalid("tool_choice", "tool_choice demands calls, and response_format or "
                          "structured_outputs something else")  # fmt: skip
        if named is None:
            parallel = body.parallel_tool_calls is not False
            format = self._format or FORMATS["hermes"]
            return calls_grammar(functions, format, parallel=parallel, param="tools")
        for place, function in enumerate(functions):
            if function.name == named:
                return arguments_grammar(function, f"tools.{place}.function.parameters")
        raise invalid("tool_choice", f"tool_choice names the function {named!r}, which tools lacks")

    def readers(self, body: ChatBody, prompt: str) -> Callable[[], AnswerReader] | None:
        """Makes the reader of each answer to `prompt`; None where all of it is text."""
        demanded = body.tool_choice not in (None, "none", "auto")
        format = self._format or (FORMATS["hermes"] if demanded else None)
        tools = body.tools and body.tool_choice != "none" and format
        # A grammar holds from the first token on, so there is nothing before what it demands.
        thinks = self._marks is not None and not demanded and grammar_of(body) is None
        if not tools and not thinks:
            return None
        opened = self._marks is not None and prompt.rstrip().endswith(self._marks.start)

        def make() -> AnswerReader:
            reasoning = None
            if thinks and self._marks is not None:
                reasoning = ReasoningReader(self._marks, open=opened)
            return AnswerReader(reasoning, _tool_reader(body.named_tool, tools or None))

        return make


def _tool_reader(named: str | None, format: ToolFormat | None) -> ToolReader | NamedReader | None:
    if named is not None:
        return NamedReader(named)
    return ToolReader(format) if format is not None else None


def functions_of(body: ChatBody) -> list[Function]:
    """The functions that the model may call."""
    return [
        Function(tool.function.name, closed(tool.function.parameters or ANY_ARGUMENTS))
        for tool in body.tools or ()
    ]
