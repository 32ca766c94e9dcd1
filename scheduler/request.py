"""What a client asks for: one frozen value, validated where it is built.

`Request` and `SamplingParams` cross the process boundary, so they are msgspec structs. Every front
door (HTTP, offline,
tests) builds these very types; their `__post_init__` is the one place that checks ranges.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import msgspec

SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1
MAX_PRIORITY = 1000


class InvalidRequest(ValueError):
    """A request that can never be served as it stands.

    Attributes:
        message: what is wrong, naming the field, the limit and the value.
        param: path of the offending field (`temperature`, `messages.0.role`) or None.
        code: the wire contract's error code (`invalid_value`, `context_length_exceeded`, ...).
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


def _require(ok: bool, param: str, limit: str, value: object) -> None:
    if not ok:
        raise InvalidRequest(f"{param} must be {limit}, got {value!r}", param)


@dataclass(frozen=True)
class RequestLimits:
    """How much one request may ask for: answers, stop tokens, biased tokens, and log-probabilities
    in place of each token."""

    n: int = 128
    stop_token_ids: int = 128
    logit_bias: int = 300
    logprobs: int = 20

    def check(self, sampling: SamplingParams, n: int) -> None:
        """Raises `InvalidRequest`."""
        _require(1 <= n <= self.n, "n", f"between 1 and {self.n}", n)
        stops, biases = len(sampling.stop_token_ids), len(sampling.logit_bias)
        limit = self.stop_token_ids
        _require(stops <= limit, "stop_token_ids", f"at most {limit} ids", stops)
        limit = self.logit_bias
        _require(biases <= limit, "logit_bias", f"at most {limit} tokens", biases)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(sampling, name) or 0
            _require(0 <= count <= self.logprobs, name, f"between 0 and {self.logprobs}", count)


class Grammar(msgspec.Struct, frozen=True):
    """The only form that an answer may take.

    Attributes:
        kind: what `text` is: a JSON schema, a regular expression (Rust's syntax, for the whole
            answer), or a grammar in llguidance's dialect of Lark.
        param: the client's name of the field it came in, for errors.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    param: str = "structured_outputs"

    def refusal(self, why: str) -> InvalidRequest:
        """What a client is told about a grammar that is none."""
        return InvalidRequest(f"{self.param} cannot be used: {why}", self.param)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen and when to stop. Defaults are OpenAI's, not the checkpoint's.

    Attributes:
        temperature: 0 is greedy; up to 2.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities add up to top_p, in
            (0, 1].
        min_p: drop tokens less likely than min_p times the likeliest, in [0, 1].
        presence_penalty, frequency_penalty: taken off the logits of tokens of the answer, once or
            once per occurrence, in [-2, 2].
        repetition_penalty: divides the positive logits of tokens of prompt and answer, multiplies
            the negative ones; in (0, 2], 1 is off.
        logit_bias: token id -> what is added to its logit, in [-100, 100].
        seed: fixes the random numbers of the request; None draws a seed when the request is built.
        max_tokens: most tokens to generate; None means up to the end of the context; 0 computes
            the prompt alone.
        min_tokens: before so many tokens none is chosen that would end the answer.
        stop_token_ids: token ids that end the answer, beside the model's own end-of-sequence ids.
        ignore_eos: do not stop at the model's end-of-sequence ids.
        logprobs: tell the log-probability of each token, and of so many of the likeliest; None
            tells nothing. They are those of the model: before temperature and everything above.
        prompt_logprobs: the same for the prompt's tokens but the first.
        grammar: what the answer must match; the end of a match ends the answer.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        # `not (a <= x <= b)` also refuses NaN.
        _require(0 <= self.temperature <= 2, "temperature", "between 0 and 2", self.temperature)
        _require(-1 <= self.top_k < 2**31, "top_k", "-1 or 0 (off) or positive", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "between 0 and 1", self.min_p)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2 <= value <= 2, name, "between -2 and 2", value)
        penalty = self.repetition_penalty
        _require(0 < penalty <= 2, "repetition_penalty", "above 0 and at most 2", penalty)
        for token, bias in self.logit_bias.items():
            _require(-100 <= bias <= 100, f"logit_bias.{token}", "between -100 and 100", bias)
        if self.seed is not None:
            _require(SEED_MIN <= self.seed <= SEED_MAX, "seed", "a 64-bit integer", self.seed)
        if self.max_tokens is not None:
            _require(self.max_tokens >= 0, "max_tokens", "0 or more", self.max_tokens)
        _require(self.min_tokens >= 0, "min_tokens", "0 or more", self.min_tokens)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken without drawing a random number."""
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        """Whether tokens that occurred before count less, or more."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt to continue, `n` times.

    Attributes:
        id: unique among live requests; chosen by the front door.
        prompt_ids: the prompt's token ids, at least one.
        sampling: how to continue it. Its seed is never None here (see `build`).
        n: how many answers, each its own sequence with index 0..n-1.
        tenant: whose request it is: a name of the API key, never the key; "" without keys.
        priority: lower ones are started first, and give way last.
        cache_salt: requests with different salts never share cached blocks.
        deadline: `time.monotonic()` by which it must be answered, or is ended; None for no such
            time.
        ttft_deadline: the same for its first token.
        arrival: `time.monotonic()` when the front door took the request.
        x_request_id: what the client knows it by, for the engine's log; several may share one, and
            "" is none.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    tenant: str = ""
    priority: int = 0
    cache_salt: str = ""
    deadline: float | None = None
    ttft_deadline: float | None = None
    arrival: float = 0.0
    x_request_id: str = ""

    def __post_init__(self) -> None:
        _require(len(self.prompt_ids) >= 1, "prompt", "at least one token", "none")
        _require(self.n >= 1, "n", "at least 1", self.n)
        _require(
            -MAX_PRIORITY <= self.priority <= MAX_PRIORITY,
            "priority",
            f"between {-MAX_PRIORITY} and {MAX_PRIORITY}",
            self.priority,
        )


def build(
    request_id: str,
    prompt_ids: tuple[int, ...],
    sampling: SamplingParams,
    *,
    vocab_size: int,
    max_model_len: int,
    seed: int,
    n: int = 1,
    tenant: str = "",
    priority: int = 0,
    cache_salt: str = "",
    deadline: float | None = None,
    ttft_deadline: float | None = None,
    x_request_id: str = "",
    param: str = "prompt",
    limits: RequestLimits | None = None,
) -> Request:
    """The one door: a validated `Request` or an `InvalidRequest`.

    Args:
        vocab_size: ids must lie in 0..vocab_size-1.
        max_model_len: prompt + max_tokens may not pass it; without max_tokens one token must still
            fit.
        seed: used when the client gave none (drawn by the caller, so that this stays a pure
            function).
        param: the client's name of the prompt field (`prompt` or `messages`), for the error.
        limits: the operator's; None for the defaults.
    """
    (limits or RequestLimits()).check(sampling, n)
    if prompt_ids and not (min(prompt_ids) >= 0 and max(prompt_ids) < vocab_size):
        bad = next(i for i in prompt_ids if not 0 <= i < vocab_size)
        raise InvalidRequest(
            f"{param} has token id {bad}, but the vocabulary ends at {vocab_size - 1}", param
        )
    _check_ids(sampling, vocab_size)
    wanted = sampling.max_tokens
    if len(prompt_ids) + (wanted or 1) > max_model_len:
        asked = f"{wanted} in max_tokens" if wanted else "at least 1 to generate"
        raise InvalidRequest(
            f"the context is {max_model_len} tokens, but the request needs "
            f"{len(prompt_ids) + (wanted or 1)} ({len(prompt_ids)} in {param}, {asked})",
            param,
            "context_length_exceeded",
        )
    changes: dict[str, object] = {}
    most = max_model_len - len(prompt_ids) if wanted is None else wanted
    if wanted is None:
        changes["max_tokens"] = most
    limit = f"at most the {most} of max_tokens"
    _require(sampling.min_tokens <= most, "min_tokens", limit, sampling.min_tokens)
    if sampling.seed is None:
        changes["seed"] = seed
    if changes:
        sampling = msgspec.structs.replace(sampling, **changes)
    return Request(
        id=request_id,
        prompt_ids=prompt_ids,
        sampling=sampling,
        n=n,
        tenant=tenant,
        priority=priority,
        cache_salt=cache_salt,
        deadline=deadline,
        ttft_deadline=ttft_deadline,
        arrival=time.monotonic(),
        x_request_id=x_request_id,
    )


def _check_ids(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises `InvalidRequest` for a token id of a sampling field that the model does not have."""
    limit = f"between 0 and {vocab_size - 1}"
    for place, token in enumerate(sampling.stop_token_ids):
        _require(0 <= token < vocab_size, f"stop_token_ids.{place}", limit, token)
    for token in sampling.logit_bias:
        _require(0 <= token < vocab_size, f"logit_bias.{token}", f"for an id {limit}", token)
