"""What is asked: prompts that share nothing, or chats that share a system prompt.

A workload writes scripts. A script is a generator: it yields a request, is sent the reply, and
yields the next request, until there is nothing more to ask about.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from benchmarks import answers
from benchmarks.dialect import Dialect, Request, user
from benchmarks.sse import BenchError, Reply

Script = Generator[Request, Reply, None]


@dataclass(frozen=True)
class Lengths:
    """A number of tokens, drawn uniformly from low to high, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """`64`, or `32:256` for anything from 32 to 256.

        Raises:
            ValueError: not of that form, below 1, or the wrong way round.
        """
        low, _, high = text.partition(":")
        lengths = cls(int(low), int(high or low))
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(text)
        return lengths

    def draw(self, shape: random.Random) -> int:
        return shape.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


WARM_UP: Final = Lengths(8, 8)


@dataclass(frozen=True)
class Independent:
    """Prompts that share nothing, one per script."""

    dialect: Dialect
    input: Lengths
    output: Lengths
    turns: int = 1

    def brief(self) -> Independent:
        """The same with short answers, to warm a server up."""
        return replace(self, output=WARM_UP)

    def scripts(self, count: int, shape: random.Random, content: random.Random) -> list[Script]:
        """`shape` draws the lengths, `content` what the prompts say."""
        return [self._script(shape, content) for _ in range(count)]

    def _script(self, shape: random.Random, content: random.Random) -> Script:
        prompt = self.dialect.prompt(self.input.draw(shape), content)
        return _only(self.dialect.request(self.dialect.asked(prompt), self.output.draw(shape)))


def _only(request: Request) -> Script:
    yield request


@dataclass(frozen=True)
class Chats:
    """Chats of several turns, one per script; those made together share their system prompt.

    Every turn sends all that was said before, the server's own answers included, and a question of
    `input` tokens. Over the completions route a chat is one prompt that grows, without roles.
    """

    dialect: Dialect
    input: Lengths
    output: Lengths
    turns: int = 4
    system_tokens: int = 600

    def brief(self) -> Chats:
        """The same with one turn and short answers, to warm a server up."""
        return replace(self, output=WARM_UP, turns=1)

    def scripts(self, count: int, shape: random.Random, content: random.Random) -> list[Script]:
        """`shape` draws the lengths, `content` what the prompts say."""
        system = self.dialect.prompt(self.system_tokens, content)
        return [self._script(system, shape, content) for _ in range(count)]

    def _script(self, system: Any, shape: random.Random, content: random.Random) -> Script:
        lengths = [(self.input.draw(shape), self.output.draw(shape)) for _ in range(self.turns)]
        turns = [(self.dialect.prompt(asked, content), answered) for asked, answered in lengths]
        if self.dialect.api == "chat":
            return self._messages(system, turns)
        return (self._ids if self.dialect.prompt_kind == "ids" else self._text)(system, turns)

    def _messages(self, system: str, turns: Sequence[tuple[Any, int]]) -> Script:
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
        for question, output_tokens in turns:
            messages.append(user(question))
            reply = yield self.dialect.request({"messages": list(messages)}, output_tokens)
            messages.append({"role": "assistant", "content": answers.read(reply).text})

    def _text(self, prompt: str, turns: Sequence[tuple[Any, int]]) -> Script:
        for question, output_tokens in turns:
            prompt += question
            reply = yield self.dialect.request({"prompt": prompt}, output_tokens)
            prompt += answers.read(reply).text

    def _ids(self, prompt: list[int], turns: Sequence[tuple[Any, int]]) -> Script:
        for question, output_tokens in turns:
            prompt = prompt + question
            asked = {"prompt": prompt, "return_token_ids": True}
            answer = answers.read((yield self.dialect.request(asked, output_tokens)))
            if not answer.token_ids:
                raise BenchError(
                    "chats in token ids need a server that takes return_token_ids; "
                    "--prompt-kind text or --api chat do without"
                )
            prompt = prompt + list(answer.token_ids)


Workload = Independent | Chats
