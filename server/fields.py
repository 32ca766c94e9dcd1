"""Fields that are not part of a schema: refused by name, or named as ignored; never silent.

A field that gets built moves from `UNSUPPORTED` into `schemas.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from server.errors import invalid, unsupported

# Field -> the values that ask for nothing and are therefore accepted.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": (None,),
    "audio": (None,),
    "bad_words": (None, []),
    "chat_template": (None,),
    "documents": (None, []),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_decoding_backend": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_whitespace_pattern": (None,),
    "length_penalty": (None, 1, 1.0),
    "logits_processors": (None, []),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "use_beam_search": (None, False),
}

UNSUPPORTED_IN_MESSAGE: dict[str, tuple[object, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None,),
}

UNSUPPORTED_IN_RESPONSES: dict[str, tuple[object, ...]] = {
    "background": (None, False),
    "conversation": (None,),
    "previous_response_id": (None,),
    "prompt": (None,),
    "top_logprobs": (None, 0),
    "truncation": (None, "disabled"),
}

HINTS = {
    "background": "nothing is stored, so an answer cannot be fetched later",
    "chat_template": "a template never comes from a request",
    "conversation": "nothing is stored; send all earlier items in input",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "guided_choice": "use structured_outputs.choice",
    "guided_decoding_backend": "there is one backend; use structured_outputs",
    "guided_grammar": "use structured_outputs.grammar",
    "guided_json": "use structured_outputs.json or response_format",
    "guided_regex": "use structured_outputs.regex",
    "guided_whitespace_pattern": "white space is bounded already; use structured_outputs",
    "previous_response_id": "nothing is stored; send all earlier items in input",
    "prompt": "nothing is stored; use instructions and input",
    "suffix": "send a prompt that holds the model's own fill-in-the-middle tokens",
    "use_beam_search": "use n",
}

MAX_NAMED = 32
_PRINTABLE = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


def _same(value: object, neutral: object) -> bool:
    """Equality that tells False from 0 and True from 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def check_extra(
    extra: Mapping[str, object] | None,
    neutral: Mapping[str, tuple[object, ...]] = UNSUPPORTED,
    prefix: str = "",
) -> list[str]:
    """Judges the fields of an object that its schema does not know.

    Args:
        extra: those fields.
        neutral: which of them are known but not served, and the values that ask for nothing.
        prefix: path of the object, such as `messages.0.`.

    Returns:
        Paths of the fields that have no effect here.

    Raises:
        ApiError: 400 `unsupported_parameter`.
    """
    ignored = []
    for name, value in (extra or {}).items():
        path = prefix + name
        if name not in neutral:
            ignored.append(path)
        elif not any(_same(value, one) for one in neutral[name]):
            hint = f"; {HINTS[name]}" if name in HINTS else ""
            raise unsupported(path, f"{path} is not supported by this server{hint}")
    return ignored


def printable(names: list[str]) -> str:
    """Names as one header value. They are a client's: what is not a plain name is left out."""
    plain = [name for name in names if _PRINTABLE.fullmatch(name)][:MAX_NAMED]
    more = len(names) - len(plain)
    return ", ".join([*plain, f"(and {more} more)"] if more else plain)


def one_max_tokens(
    max_tokens: int | None, max_completion_tokens: int | None, *, least: int
) -> int | None:
    """The one value of the two names, at least `least`; some benchmark clients send both.

    Raises:
        ApiError: 400 where they differ, or one is no count.
    """
    given = {"max_tokens": max_tokens, "max_completion_tokens": max_completion_tokens}
    for name, value in given.items():
        if value is not None and value < least:
            raise invalid(name, f"{name} must be at least {least}, got {value}")
    if max_tokens is None or max_completion_tokens is None:
        return max_completion_tokens if max_tokens is None else max_tokens
    if max_tokens != max_completion_tokens:
        raise invalid(
            "max_tokens",
            f"max_tokens ({max_tokens}) and max_completion_tokens ({max_completion_tokens}) "
            "differ: send one of them",
        )
    return max_tokens
