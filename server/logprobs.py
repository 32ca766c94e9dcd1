"""Log-probabilities on the wire: which tokens are told of with which text, and in whose words."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from engine.protocol import Scores
from server.tokenizer import TextModel

LEAST = -9999.0  # in place of minus infinity, which JSON does not have; OpenAI's choice


@dataclass(frozen=True, slots=True)
class Told:
    """One token and its log-probability.

    Attributes:
        offset: characters of the text before it.
        logprob, rank: None for the first token of a prompt, which follows nothing.
        top: (id, log-probability) of the likeliest tokens in its place.
    """

    token: int
    offset: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()


def told(token: int, offset: int, scores: Scores, place: int) -> Told:
    """`token`, of which `scores` tell at `place`."""
    top = zip(scores.top_ids[place], scores.top_logprobs[place], strict=True)
    return Told(token, offset, scores.logprobs[place], scores.ranks[place], tuple(top))


@dataclass(frozen=True, slots=True)
class Detail:
    """What a piece of text tells beside the text: log-probabilities, token ids, those of the prompt
    (with its first piece); None where they are not asked for."""

    logprobs: list[Told] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: Sequence[int] | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to tell for now."""
        return not (self.logprobs or self.token_ids)

    def moved(self, start: int) -> Detail:
        """The same in a text that begins `start` characters before."""
        if not start or self.logprobs is None:
            return self
        return replace(
            self, logprobs=[replace(one, offset=start + one.offset) for one in self.logprobs]
        )

    @staticmethod
    def join(parts: Sequence[Detail]) -> Detail | None:
        """The details of an answer's pieces as one, None if there are none."""
        if not parts:
            return None
        logprobs = [part.logprobs for part in parts if part.logprobs is not None]
        token_ids = [part.token_ids for part in parts if part.token_ids is not None]
        return Detail(
            list(chain.from_iterable(logprobs)) if logprobs else None,
            list(chain.from_iterable(token_ids)) if token_ids else None,
            parts[0].prompt_token_ids,
        )

    def ids(self) -> dict[str, Sequence[int]]:
        """The fields of a choice for the ids that were asked for."""
        given = {"token_ids": self.token_ids, "prompt_token_ids": self.prompt_token_ids}
        return {name: ids for name, ids in given.items() if ids is not None}


class Trail:
    """Gathers the details of one answer and gives each out with the text that its token begins.

    A token of which nothing is sent yet (half a character, perhaps the start of a stop string)
    waits, and one whose text falls behind a stop string is never told of. What a stream tells is
    therefore what the whole answer tells.
    """

    def __init__(self, *, logprobs: bool, token_ids: bool) -> None:
        self._waiting: deque[Told] | None = deque() if logprobs else None
        self._ids: list[int] | None = [] if token_ids else None
        self._read = self._sent = 0  # characters

    def counted(self, tokens: Sequence[int]) -> None:
        """`tokens` belong to the answer, shown or not."""
        if self._ids is not None:
            self._ids.extend(tokens)

    def shown(self, token: int, length: int, scores: Scores | None, place: int) -> None:
        """`token` makes `length` more characters whole."""
        if self._waiting is not None and scores is not None:
            self._waiting.append(told(token, self._read, scores, place))
        self._read += length

    def release(self, length: int, *, everything: bool = False) -> Detail:
        """The details that go with the next `length` characters; `everything` at an end at which
        no text was cut off."""
        self._sent += length
        ids, waiting = self._ids, self._waiting
        if ids is not None:
            self._ids = []
        if waiting is None:
            return Detail(None, ids)
        ready = []
        while waiting and (everything or waiting[0].offset < self._sent):
            ready.append(waiting.popleft())
        return Detail(ready, ids)


class Wording:
    """How tokens are named in an answer.

    Args:
        as_ids: `token_id:17` in place of the text (`return_tokens_as_token_ids`).
    """

    def __init__(self, text: TextModel, *, as_ids: bool = False) -> None:
        self._text, self._as_ids = text, as_ids

    def name(self, token: int) -> str:
        """A token as text; the bytes of one that is no whole text stand as `bytes:\\xe2\\x82`."""
        if self._as_ids:
            return f"token_id:{token}"
        raw = self._text.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def chat(self, detail: Detail | None) -> dict[str, Any]:
        """`logprobs` and ids of a chat's choice."""
        if detail is None or detail.logprobs is None:
            return {"logprobs": None, **(detail.ids() if detail else {})}
        content = [
            {
                **self._entry(entry.token, entry.logprob),
                "top_logprobs": [self._entry(token, value) for token, value in entry.top],
            }
            for entry in detail.logprobs
        ]
        return {"logprobs": {"content": content, "refusal": None}, **detail.ids()}

    def completion(self, detail: Detail | None) -> dict[str, Any]:
        """`logprobs` and ids of a completion's choice."""
        if detail is None or detail.logprobs is None:
            return {"logprobs": None, **(detail.ids() if detail else {})}
        entries = detail.logprobs
        logprobs = {
            "tokens": [self.name(entry.token) for entry in entries],
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }
        return {"logprobs": logprobs, **detail.ids()}

    def prompt(self, entries: Sequence[Told]) -> list[dict[str, Any] | None]:
        """`prompt_logprobs` as vLLM has them: by token id, the prompt's own among them."""
        return [self._ranked(entry) for entry in entries]

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = list(self._text.token_bytes(token))
        return {"token": self.name(token), "logprob": _finite(logprob), "bytes": raw}

    def _top(self, entry: Told) -> dict[str, float | None] | None:
        """The likeliest tokens and the chosen one; of two with one name the likelier counts."""
        if entry.logprob is None:
            return None
        found: dict[str, float | None] = {}
        for token, value in (*entry.top, (entry.token, entry.logprob)):
            found.setdefault(self.name(token), _finite(value))
        return found

    def _ranked(self, entry: Told) -> dict[str, Any] | None:
        if entry.logprob is None:
            return None
        ranked = [(entry.token, entry.logprob, entry.rank)]
        ranked += [(token, value, rank) for rank, (token, value) in enumerate(entry.top, 1)]
        return {
            str(token): {
                "logprob": _finite(value),
                "rank": rank,
                "decoded_token": self.name(token),
            }
            for token, value, rank in ranked
        }


def of_prompt(ids: Sequence[int], scores: Scores | None, push: Callable[[int], str]) -> list[Told]:
    """A prompt's tokens.

    Args:
        scores: of all but the first.
        push: of a fresh detokenizer, for the offsets.
    """
    entries = [Told(ids[0], 0)]
    offset = len(push(ids[0]))
    for place, token in enumerate(ids[1:]):
        assert scores is not None
        entries.append(told(token, offset, scores, place))
        offset += len(push(token))
    return entries


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)
