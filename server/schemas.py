"""The bodies of the OpenAI API as far as this server serves them. Types only: ranges are checked
where `scheduler.request` builds the request, fields left out of here in `fields`."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from scheduler.request import RequestLimits
from server.errors import ApiError, invalid

_TOKEN_ID = re.compile(r"-?\d{1,18}")


@dataclass(frozen=True)
class Limits:
    """How much one HTTP request may hold.

    Attributes:
        max_answers: over all prompts; 1,000 prompts of 128 answers would hold up every stream.
        request: what is left to `scheduler.request` to check.
    """

    max_body_bytes: int = 4 * 2**20
    max_messages: int = 1000
    max_prompts: int = 1000
    max_answers: int = 10_000
    max_stops: int = 16
    request: RequestLimits = field(default_factory=RequestLimits)


def _by_type(value: object) -> str:
    """Which branch of `Prompt`, `Stop` or `Content` a value belongs to; one branch is then tried,
    so that a long list of ids is not validated as a list of strings first."""
    if isinstance(value, str):
        return "<str>"
    first = value[0] if isinstance(value, Sequence) and value else ""
    if isinstance(first, str):
        return "<strings>"
    return "<lists>" if isinstance(first, list | tuple) else "<ids>"


FailFast = Field(fail_fast=True)

Strings = Annotated[list[str], FailFast]
Ids = Annotated[list[int], FailFast]
Prompt = Annotated[
    Annotated[str, Tag("<str>")]
    | Annotated[Strings, Tag("<strings>")]
    | Annotated[Ids, Tag("<ids>")]
    | Annotated[list[Ids], FailFast, Tag("<lists>")],
    Discriminator(_by_type),
]
Stop = Annotated[
    Annotated[str, Tag("<str>")]
    | Annotated[Strings, Tag("<strings>")]
    | Annotated[Strings, Tag("<ids>")]
    | Annotated[Strings, Tag("<lists>")],
    Discriminator(_by_type),
]


class Body(BaseModel):
    """Base of all bodies: JSON types are not converted, unknown fields are kept for `fields`."""

    model_config = ConfigDict(strict=True, extra="allow")


class TextPart(Body):
    """A part of a message's content; other kinds of parts are refused by their type."""

    type: Literal["text"]
    text: str


def content_kind(value: object) -> str:
    """Which branch of a union of a text and parts a value belongs to."""
    return "<str>" if isinstance(value, str) else "<parts>"


Content = Annotated[
    Annotated[str, Tag("<str>")] | Annotated[list[TextPart], FailFast, Tag("<parts>")],
    Discriminator(content_kind),
]


class CalledFunction(Body):
    name: str
    arguments: str


class MessageToolCall(Body):
    """A call that the model made before; `arguments` is JSON text."""

    id: str
    type: Literal["function"]
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """Templates write the arguments as JSON themselves."""
        try:
            arguments = msgspec.json.decode(self.function.arguments)
        except msgspec.DecodeError:
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class ToolFunction(Body):
    """`strict` changes nothing: demanded calls are always held to their schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: ToolFunction


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


def choice_kind(value: object) -> str:
    """Which branch of a union of words and a named tool a value belongs to."""
    return "<word>" if isinstance(value, str) else "<named>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedTool, Tag("<named>")],
    Discriminator(choice_kind),
]


class Message(Body):
    """One message of a chat. Only calls of tools may stand in place of the content."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[MessageToolCall], FailFast] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as a chat template sees it: the content as one string, no nulls."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        more: dict[str, Any] = {
            "name": self.name,
            "reasoning_content": self.reasoning_content,
            "tool_call_id": self.tool_call_id,
        }
        if self.tool_calls:
            more["tool_calls"] = [call.for_template() for call in self.tool_calls]
        given = {name: value for name, value in more.items() if value is not None}
        return {"role": self.role, "content": content, **given}


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Exact(Body):
    """An object in which an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")


class JsonSchema(Exact):
    """`strict` changes nothing: a schema is always held to."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


def _schema_kind(value: object) -> str:
    return "<str>" if isinstance(value, str) else "<schema>"


Schema = Annotated[
    Annotated[str, Tag("<str>")] | Annotated[dict[str, Any], Tag("<schema>")],
    Discriminator(_schema_kind),
]


class ResponseFormat(Exact):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Exact):
    """vLLM's name for what the answers must match; a schema may come as text."""

    json_: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Strings | None = None
    grammar: str | None = None


class GenerationBody(Body):
    """What chat and completions share. `null` means the default everywhere."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: Stop | None = None
    min_tokens: int | None = None
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    echo: bool | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: int | None = None
    user: str | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as one tuple, as it came."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def stops(self, most: int) -> tuple[str, ...]:
        """The stop strings, checked.

        Raises:
            ApiError: 400 for too many of them or an empty one.
        """
        stops = self.stop_strings
        if len(stops) > most:
            raise invalid("stop", f"stop may have at most {most} strings, got {len(stops)}")
        if "" in stops:
            param = "stop" if isinstance(self.stop, str) else f"stop.{stops.index('')}"
            raise invalid(param, f"{param} must not be an empty string, got ''")
        return stops

    def biases(self) -> dict[int, float]:
        """`logit_bias` by token id.

        Raises:
            ApiError: 400 for a key that is no id.
        """
        biases = {}
        for key, bias in (self.logit_bias or {}).items():
            if not _TOKEN_ID.fullmatch(key):
                raise invalid("logit_bias", f"logit_bias must have token ids as keys, got {key!r}")
            biases[int(key)] = bias
        return biases

    @property
    def answer_logprobs(self) -> int | None:
        """How many log-probabilities are told in place of each token; None tells nothing."""
        raise NotImplementedError


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], FailFast]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], FailFast] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def answer_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def named_tool(self) -> str | None:
        """The one function that must be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None


class CompletionBody(GenerationBody):
    prompt: Prompt
    logprobs: int | None = None

    @property
    def answer_logprobs(self) -> int | None:
        return self.logprobs


class TokenizeBody(Body):
    """A text to tokenize; with `messages` in it, the body is that of a chat."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Ids


B = TypeVar("B", bound=Body)


def parse(kind: type[B], raw: bytes, limits: Limits) -> B:
    """The body as `kind`.

    Lists are counted before they are validated: a million empty prompts would hold up every stream.

    Raises:
        ApiError: 400 for malformed JSON, wrong types and too many messages or prompts, with the
            path of the first of them.
    """
    try:
        fields = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(None, f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise invalid(None, "the body must be a JSON object")
    for name in ("messages", "input"):
        _count(fields, name, limits.max_messages)
    if (prompts := fields.get("prompt")) and isinstance(prompts, list):
        _count(fields, "prompt", limits.max_prompts if not isinstance(prompts[0], int) else None)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _first_error(error) from None


def _count(fields: dict[str, Any], name: str, limit: int | None) -> None:
    value = fields.get(name)
    if limit is not None and isinstance(value, list) and len(value) > limit:
        raise invalid(name, f"{name} may have at most {limit} items, got {len(value)}")


def _first_error(error: ValidationError) -> ApiError:
    detail: Any = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(str(step) for step in detail["loc"] if not str(step).startswith("<")) or None
    if path is None:
        return invalid(None, "the body must be a JSON object")
    if detail["type"] == "missing":
        return invalid(path, f"{path} is required")
    message = detail["msg"].replace("Input should be", "must be")
    return invalid(path, f"{path} {message}, got {reprlib.repr(detail['input'])}")
