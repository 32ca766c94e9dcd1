"""How a server is spoken to: which route, ids or text, and which fields it is sent."""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from benchmarks import answers
from benchmarks.sse import BenchError, Client

Api = Literal["completions", "chat"]
PromptKind = Literal["ids", "text"]
Ids = list[int]
PROBE_WORDS: Final = 200


@dataclass(frozen=True)
class Request:
    """`output_tokens` is the length that the answer must have, None where any will do."""

    body: dict[str, Any]
    output_tokens: int | None


@dataclass(frozen=True)
class Words:
    """What words of three random letters cost in tokens: `fixed + each * words` per prompt."""

    fixed: float = 0.0
    each: float = 1.0

    def count(self, tokens: int) -> int:
        return max(1, round((tokens - self.fixed) / self.each))


@dataclass(frozen=True)
class Dialect:
    """What every request to a server has in common.

    Attributes:
        model: as the server calls it.
        prompt_kind: whether prompts are token ids or text; the chat API takes text only.
        vocab_size: ids are drawn below it.
        words: how text is made to measure.
        ignore_eos: ask for answers that go on to their full length, and hold the server to it.
        extra: further fields of every body; None removes a field.
    """

    model: str
    api: Api = "completions"
    prompt_kind: PromptKind = "ids"
    vocab_size: int = 1000
    words: Words = Words()
    ignore_eos: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.api == "chat" else "/v1/completions"

    def ids(self, tokens: int, content: random.Random) -> Ids:
        return content.choices(range(self.vocab_size), k=tokens)

    def text(self, tokens: int, content: random.Random) -> str:
        """Of about that many tokens."""
        return spoken(self.words.count(tokens), content)

    def prompt(self, tokens: int, content: random.Random) -> Ids | str:
        return (self.ids if self.prompt_kind == "ids" else self.text)(tokens, content)

    def asked(self, prompt: Ids | str) -> dict[str, Any]:
        """The fields of a body that say what one prompt says."""
        return {"messages": [user(prompt)]} if self.api == "chat" else {"prompt": prompt}

    def request(self, asked: dict[str, Any], output_tokens: int) -> Request:
        """A streamed, greedy request for the fields of `asked`."""
        body = {"model": self.model} | asked
        body |= {"max_tokens": output_tokens, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        if self.ignore_eos:
            body["ignore_eos"] = True
        body = {name: value for name, value in (body | self.extra).items() if value is not None}
        return Request(body, output_tokens if self.ignore_eos else None)


def spoken(count: int, content: random.Random) -> str:
    """Words of three random letters, a blank before each."""
    return "".join(
        " " + "".join(content.choices(string.ascii_lowercase, k=3)) for _ in range(count)
    )


def user(content: Ids | str) -> dict[str, Any]:
    return {"role": "user", "content": content}


async def first_model(client: Client) -> str:
    """The first that `/v1/models` names.

    Raises:
        BenchError: it names none.
    """
    status, body = await client.get("/v1/models")
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise BenchError(f"/v1/models (status {status}) names no model: give --model") from None


async def measured_words(client: Client, dialect: Dialect) -> Words:
    """What random words cost by the server's own count, from two short requests.

    A server that does not tell is taken to need one token for each.
    """
    content, counts = random.Random(), []
    for count in (PROBE_WORDS, 2 * PROBE_WORDS):
        request = dialect.request(dialect.asked(spoken(count, content)), 1)
        reply = await client.post(dialect.path, request.body)
        counts.append(answers.read(reply).prompt_tokens or 0)
    client.close()
    each = (counts[1] - counts[0]) / PROBE_WORDS
    return Words(counts[0] - each * PROBE_WORDS, each) if each > 0 else Words()
