"""Chat templates: the checkpoint's jinja2, in a sandbox that ends.

A template comes with a checkpoint, so it is code by strangers. jinja2's sandbox keeps it away from
Python's internals; what is added here bounds its time and memory, in the thread that renders it
(which could not be killed): every step of a loop and every call looks at the clock, and the
operations that can multiply the size of a value are measured first.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError as JinjaError
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

RENDER_SECONDS = 2.0
MAX_SIZE = 16 * 2**20  # characters of a text, items of a list, digits of a number
MAX_WIDTH = 1000  # of padding and indentation


class TemplateError(ValueError):
    """The template cannot be used, or refuses these messages; the text says why."""


class _TooMuch(JinjaError):
    """The template passed one of the bounds."""


_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))


def _tick() -> None:
    if time.monotonic() > _deadline.get():
        raise _TooMuch(f"it takes longer than {RENDER_SECONDS:g} s")


def _bounded(size: int, limit: int = MAX_SIZE) -> None:
    if size > limit:
        raise _TooMuch(f"it makes a value of size {size}, and the limit is {limit}")


def _ticking(items: Iterable[Any]) -> Iterator[Any]:
    """Every `for` runs over this."""
    for item in items:
        _tick()
        yield item


def _concatenated(values: Sequence[Any]) -> str:
    """The `~` operator."""
    texts = [str(value) for value in values]
    _bounded(sum(map(len, texts)))
    return "".join(texts)


def _size(value: object) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, Sequence) else 0


def _check_replace(text: Any, old: Any, new: Any, *_: Any) -> None:
    count = len(text) + 1 if old == "" else str(text).count(str(old))
    _bounded(len(text) + count * len(str(new)))


def _check_join(separator: Any, items: Any, *_: Any) -> Any:
    items = items if isinstance(items, Sequence) else list(items)
    _bounded(sum(len(str(item)) for item in items) + len(items) * len(str(separator)))
    return items


def _check_format(text: Any) -> None:
    for width in re.findall(r"\d{4,}|\*", str(text)):
        raise _TooMuch(f"it formats with the width {width}, and the limit is {MAX_WIDTH}")


def _check_method(method: Any, args: Sequence[Any]) -> Sequence[Any]:
    """Bounds the string methods whose result may be far longer than the string."""
    method = getattr(method, "__wrapped__", method)  # jinja2 wraps str.format
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(owner, str):
        return args
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        for width in args:
            _bounded(width if isinstance(width, int) else 0, MAX_WIDTH)
    elif name == "replace" and len(args) >= 2:
        _check_replace(owner, *args)
    elif name == "join" and args:
        return [_check_join(owner, args[0]), *args[1:]]
    elif name in ("format", "format_map"):
        _check_format(owner)
    return args


class _Bound(NodeTransformer):
    """Puts `_ticking` around what loops run over, and `_concatenated` in place of `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(
            node.iter,
            "ticking",
            [],
            [],
            None,
            None,
            lineno=node.lineno,
            environment=node.environment,
        )
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        values = nodes.List(node.nodes, lineno=node.lineno, environment=node.environment)
        return nodes.Filter(
            values, "concatenated", [], [], None, None, lineno=node.lineno,
            environment=node.environment,
        )  # fmt: skip


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here its
    body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012, jinja2's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Bound().visit(super()._parse(source, name, filename))
        return tree

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _tick()
        return super().call(context, obj, *_check_method(obj, args), **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        match operator:
            case "*" if isinstance(left, int) and isinstance(right, int):
                _bounded(_size(left) + _size(right), MAX_WIDTH)
            case "*":
                text, count = (right, left) if isinstance(left, int) else (left, right)
                _bounded(_size(text) * max(count if isinstance(count, int) else 0, 0))
            case "**":
                _bounded(_size(left) * int(abs(right)), MAX_WIDTH)
            case "+":
                _bounded(_size(left) + _size(right))
            case "%" if isinstance(left, str):
                _check_format(left)
        return super().call_binop(context, operator, left, right)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, not jinja2's filter of this name, which escapes for HTML."""
    _bounded(indent or 0, MAX_WIDTH)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    _check_replace(str(text), old, new)
    return str(text).replace(str(old), str(new), -1 if count is None else count)


def _join(items: Any, separator: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        items = [item.get(attribute, "") for item in items]
    return str(separator).join(map(str, _check_join(separator, items)))


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _bounded(_size(width) if isinstance(width, str) else width, MAX_WIDTH)
    pad = width if isinstance(width, str) else " " * width
    lines = str(text).split("\n")
    padded = [
        pad + line if (i or first) and (line or blank) else line for i, line in enumerate(lines)
    ]
    return "\n".join(padded)


def _format(text: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(text)
    return str(text) % (kwargs or args)


def _raise_exception(message: str) -> NoReturn:
    raise JinjaError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


_UNBOUNDED_FILTERS = ("batch", "center", "slice", "urlize", "wordwrap", "xmlattr")


def _sandbox() -> _Sandbox:
    env = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # folding constants would run filters while compiling
        extensions=[loopcontrols, _Generation],
    )
    env.filters = {name: f for name, f in FILTERS.items() if name not in _UNBOUNDED_FILTERS}
    ours: dict[str, Callable[..., Any]] = {
        "concatenated": _concatenated,
        "format": _format,
        "indent": _indent,
        "join": _join,
        "replace": _replace,
        "ticking": _ticking,
        "tojson": _tojson,
    }
    env.filters.update(ours)
    del env.globals["lipsum"]
    env.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return env


# What a request sets in fields of their own, or not at all.
GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatTemplate:
    """A compiled chat template.

    Attributes:
        source: as it was given.
        has_developer: whether the template knows the role `developer`.
        variables: names that it reads beside the ones it is always given; a request may set them
            (`chat_template_kwargs`).
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Args:
            source: jinja2, as in `tokenizer_config.json`.
            special_tokens: `bos_token` and the like, variables of the template.

        Raises:
            TemplateError: the source does not compile.
        """
        self.source = source
        self.has_developer = "developer" in source
        self._special_tokens = dict(special_tokens)
        env = _sandbox()
        try:
            self._template = env.from_string(source)
            read = meta.find_undeclared_variables(env.parse(source))
        except (JinjaError, RecursionError) as error:
            raise TemplateError(f"the chat template does not compile: {error}") from None
        self.variables = frozenset(read) - GIVEN - set(special_tokens) - set(env.globals)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text that the model continues. Takes at most about `RENDER_SECONDS`.

        Args:
            variables: values of some of `self.variables`; other names are left out.
            tools: as the client describes them.

        Raises:
            TemplateError: the template refuses the messages, fails, or does not end.
        """
        known = {n: value for n, value in (variables or {}).items() if n in self.variables}
        token = _deadline.set(time.monotonic() + RENDER_SECONDS)
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                **known,
                **self._special_tokens,
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
            ):
                parts.append(part)
                size += len(part)
                _bounded(size)
        except _TooMuch as error:
            raise TemplateError(f"the chat template was stopped: {error}") from None
        except JinjaError as error:
            raise TemplateError(f"the chat template refused the messages: {error}") from None
        except Exception as error:  # whatever the template's own expressions raise
            why = str(error) or type(error).__name__
            raise TemplateError(f"the chat template failed: {why}") from None
        finally:
            _deadline.reset(token)
        return "".join(parts)

    def render_open(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text up to the end of the last message's content, which the model then goes on with
        (`continue_final_message`).

        Raises:
            TemplateError: as in `render`, or the template does not show the last message as it is.
        """
        *before, last = messages
        mark = "\ue000end of the last message\ue000"
        marked = [*before, {**last, "content": f"{last['content']}{mark}"}]
        whole = self.render(marked, add_generation_prompt=False, variables=variables, tools=tools)
        text, found, _ = whole.rpartition(mark)
        if not found:
            raise TemplateError("the chat template does not show the last message's content")
        return text
