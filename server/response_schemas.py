"""The body of the Responses API, and the chat that it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from server.errors import invalid
from server.fields import UNSUPPORTED_IN_RESPONSES, check_extra
from server.schemas import (
    Body,
    CalledFunction,
    ChatBody,
    Exact,
    FailFast,
    FunctionName,
    JsonSchema,
    Message,
    MessageToolCall,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    Stop,
    Tool,
    ToolChoice,
    ToolFunction,
    choice_kind,
    content_kind,
)


class Part(Body):
    """Text of a message; other kinds of parts are refused by their type."""

    type: Literal["input_text", "output_text"]
    text: str


Text = Annotated[
    Annotated[str, Tag("<str>")] | Annotated[list[Part], FailFast, Tag("<parts>")],
    Discriminator(content_kind),
]


def _joined(text: str | list[Part]) -> str:
    return text if isinstance(text, str) else "".join(part.text for part in text)


class Item(Body):
    """What all items may have; an item of an earlier output comes back with both."""

    id: str | None = None
    status: str | None = None


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["developer", "system", "user", "assistant"]
    content: Text


class CallItem(Item):
    """A call that the model made before; `arguments` is JSON text."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutputItem(Item):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Text


class Thought(Body):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Item):
    """Thoughts of an earlier answer."""

    type: Literal["reasoning"]
    summary: list[dict[str, Any]] | None = None
    content: list[Thought] | None = None
    encrypted_content: str | None = None


_ITEMS = ("function_call", "function_call_output", "reasoning")


def _item_kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in _ITEMS else "<message>"


AnyItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[CallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(_item_kind),
]
Input = Annotated[
    Annotated[str, Tag("<str>")] | Annotated[list[AnyItem], FailFast, Tag("<parts>")],
    Discriminator(content_kind),
]


class TextFormat(Exact):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    def for_chat(self) -> ResponseFormat:
        """Raises:
        ApiError: 400 for a schema that is not there.
        """
        if self.type != "json_schema":
            return ResponseFormat(type=self.type)
        for name, value in (("name", self.name), ("schema", self.schema_)):
            if value is None:
                param = f"text.format.{name}"
                raise invalid(param, f"{param} is required with the type 'json_schema'")
        schema = JsonSchema(name=self.name or "", schema=self.schema_ or {})
        return ResponseFormat(type=self.type, json_schema=schema)


class TextConfig(Body):
    format: TextFormat | None = None


class FunctionTool(Body):
    """A function, in one object; tools that the platform runs itself are refused by their type."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedToolChoice(Body):
    type: Literal["function"]
    name: str


ResponsesToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedToolChoice, Tag("<named>")],
    Discriminator(choice_kind),
]

_OF_CHAT = (
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "parallel_tool_calls",
    "chat_template_kwargs", "stream", "cache_salt", "priority", "user",
)  # fmt: skip


class ResponsesBody(Body):
    """`null` means the default everywhere."""

    model: str | None = None
    input: Input
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Stop | None = None
    text: TextConfig | None = None
    tools: Annotated[list[FunctionTool], FailFast] | None = None
    tool_choice: ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: int | None = None
    user: str | None = None

    def ignored(self) -> list[str]:
        """Paths of fields that have no effect.

        Raises:
            ApiError: 400 for a field that is not served.
        """
        ignored = check_extra(self.model_extra, UNSUPPORTED_IN_RESPONSES)
        if self.text is not None:
            ignored += check_extra(self.text.model_extra, prefix="text.")
        if not isinstance(self.input, str):
            for place, item in enumerate(self.input):
                ignored += check_extra(item.model_extra, prefix=f"input.{place}.")
        return ignored

    def chat(self) -> ChatBody:
        """The same as a chat.

        Raises:
            ApiError: 400 for an empty input, or a format without a schema.
        """
        format = self.text.format if self.text else None
        return ChatBody(
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            response_format=format.for_chat() if format else None,
            tools=[_chat_tool(tool) for tool in self.tools] if self.tools else None,
            tool_choice=self._chat_tool_choice(),
            **{name: getattr(self, name) for name in _OF_CHAT},
        )

    def _chat_tool_choice(self) -> ToolChoice | None:
        """`auto` is the default, and therefore allowed without tools."""
        choice = self.tool_choice
        if isinstance(choice, NamedToolChoice):
            return NamedTool(type="function", function=NamedFunction(name=choice.name))
        return None if choice == "auto" else choice

    def _messages(self) -> list[Message]:
        messages = []
        if self.instructions is not None:
            messages.append(Message(role="system", content=self.instructions))
        if isinstance(self.input, str):
            return [*messages, Message(role="user", content=self.input)]
        if not self.input:
            raise invalid("input", "input must have at least 1 item, got 0")
        return messages + _chat_messages(self.input)


def _chat_tool(tool: FunctionTool) -> Tool:
    function = tool.model_dump(exclude_none=True, exclude={"type"})
    return Tool(type="function", function=ToolFunction(**function))


def _chat_messages(items: list[AnyItem]) -> list[Message]:
    """What an assistant thought, said and called in a row is one message of a chat."""
    messages: list[Message] = []
    thoughts: str | None = None
    for item in items:
        match item:
            case ReasoningItem():
                thoughts = "".join(thought.text for thought in item.content or ()) or None
                continue
            case CallItem():
                if thoughts is not None or not messages or messages[-1].role != "assistant":
                    messages.append(Message(role="assistant", reasoning_content=thoughts))
                last = messages[-1]
                function = CalledFunction(name=item.name, arguments=item.arguments)
                call = MessageToolCall(id=item.call_id, type="function", function=function)
                last.tool_calls = [*(last.tool_calls or ()), call]
            case CallOutputItem():
                output = _joined(item.output)
                messages.append(Message(role="tool", tool_call_id=item.call_id, content=output))
            case MessageItem():
                thought = thoughts if item.role == "assistant" else None
                text = _joined(item.content)
                messages.append(Message(role=item.role, content=text, reasoning_content=thought))
        thoughts = None
    return messages
