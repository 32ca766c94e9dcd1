"""Constrained answers, through the real loop and the embedded model at a temperature at which it
writes nonsense: whatever it samples must match."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.grammar_masks import forbid
from engine.loop import EngineLoop
from engine.protocol import Submit
from models import embedded
from scheduler.request import Grammar, Request
from tests.engine import drive
from tests.engine.schemas import random_schema

SCHEMAS = int(os.environ.get("TEST_SCHEMAS", "100"))
TOKENIZER = Tokenizer.from_file(str(embedded.path() / "tokenizer.json"))
PROMPT = TOKENIZER.encode("<|begin|><|user|>Write some JSON.<|end|><|assistant|>").ids

Answers = dict[tuple[str, int], tuple[str, str]]


@pytest.fixture(scope="module")
def loop() -> EngineLoop:
    """With so few blocks that a crowd preempts."""
    return drive.engine(embedded.path(), num_gpu_blocks_override=160, max_model_len=1024)


def asked(name: str, kind: Any, source: str, n: int = 1, **sampling: Any) -> Request:
    fields = {"ignore_eos": False, "max_tokens": 500, "temperature": 1.5} | sampling
    request = drive.request(name, PROMPT, grammar=Grammar(kind, source), **fields)
    return Request(id=name, prompt_ids=request.prompt_ids, sampling=request.sampling, n=n)


def answers(loop: EngineLoop, requests: list[Request]) -> Answers:
    """The text and the finish reason of each answer; a refusal is the reason of answer 0."""
    loop.take(Submit(requests))
    tokens: dict[tuple[str, int], list[int]] = {}
    reasons: dict[tuple[str, int], str] = {}
    while loop.has_work:
        loop.step()
        output = loop.collect()
        reasons |= {(refusal.request_id, 0): refusal.message for refusal in output.refused}
        for delta in output.deltas:
            key = (delta.request_id, delta.index)
            tokens.setdefault(key, []).extend(delta.tokens)
            if delta.finish_reason is not None:
                reasons[key] = delta.finish_reason
    loop.scheduler.check()
    assert loop.scheduler.cache.pool.num_used == 0
    return {key: (TOKENIZER.decode(tokens.get(key, [])), why) for key, why in reasons.items()}


def one(loop: EngineLoop, kind: Any, source: str, **sampling: Any) -> tuple[str, str]:
    return answers(loop, [asked("one", kind, source, **sampling)])["one", 0]


def mixed(number: int) -> dict[str, Any]:
    """What else the request number `number` asks for."""
    others: list[dict[str, Any]] = [
        {},
        {"n": 3},
        {"frequency_penalty": 1.0, "presence_penalty": 0.5},
        {"repetition_penalty": 1.3, "top_p": 0.9},
        {"min_tokens": 40, "top_k": 50},
        {"ignore_eos": True, "logit_bias": {7: 5.0, 300: -100.0}},
    ]
    return others[number % len(others)]


def test_whatever_is_sampled_parses_and_validates(loop: EngineLoop) -> None:
    schemas = {f"schema-{i}": random_schema(i) for i in range(SCHEMAS)}
    requests = [
        asked(name, "json_schema", json.dumps(schema), seed=i, **mixed(i))
        for i, (name, schema) in enumerate(schemas.items())
    ]
    preempted = loop.scheduler.num_preemptions
    found = answers(loop, requests)
    assert loop.scheduler.num_preemptions > preempted
    assert len(found) == sum(request.n for request in requests)
    for (name, _), (text, reason) in found.items():
        if reason != "length":
            assert reason == "stop", (schemas[name], reason)
            jsonschema.validate(json.loads(text), schemas[name])
    cut_off = [key for key, (_, reason) in found.items() if reason == "length"]
    assert len(cut_off) <= len(found) // 20


def test_a_crowd_changes_nothing(loop: EngineLoop) -> None:
    """Preempted, its matcher reads the answer so far again."""
    schema = json.dumps(random_schema(12))
    requests = [asked(f"r{i}", "json_schema", schema, seed=i, min_tokens=30) for i in range(40)]
    alone = {key: a for r in requests[-6:] for key, a in answers(loop, [r]).items()}
    preempted = loop.scheduler.num_preemptions
    crowd = answers(loop, requests)
    assert loop.scheduler.num_preemptions > preempted
    assert alone == {key: crowd[key] for key in alone}


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", r"\d{3}-[a-f]{2,4}", r"[0-9]{3}-[a-f]{2,4}"),
        ("regex", r"^(yes|no)$", r"yes|no"),
        ("lark", 'start: "New" | "New York"', r"New( York)?"),
        ("lark", 'start: sum\nsum: /[0-9]{1,3}/ ("+" /[0-9]{1,3}/)~1..3', r"\d+(\+\d+){1,3}"),
        ("json_schema", '{"type": "object"}', r"(?s)\{.*\}"),
    ],
)
def test_each_kind(loop: EngineLoop, kind: str, source: str, pattern: str) -> None:
    found = answers(loop, [asked(f"r{i}", kind, source, seed=i) for i in range(8)])
    ended = [text for text, reason in found.values() if reason == "stop"]
    assert len(ended) >= 6
    assert all(re.fullmatch(pattern, text) for text in ended), ended


def test_the_end_of_a_match_ends_the_answer(loop: EngineLoop) -> None:
    """Neither may an answer go on after it, nor can it be kept from ending there."""
    for more in ({}, {"ignore_eos": True}, {"min_tokens": 50}):
        assert one(loop, "regex", "[ab]{4}x", **more)[1] == "stop"
    assert one(loop, "regex", "[ab]{4}x", max_tokens=2)[1] == "length"


def test_white_space_is_bounded(loop: EngineLoop) -> None:
    """Even for a model that wants to write nothing else."""
    spaces = [i for i in range(2048) if not TOKENIZER.decode([i]).strip() and i > 10]
    bias = dict.fromkeys(spaces[:300], 100.0)
    text, reason = one(
        loop, "json_schema", '{"type":"array","items":{"type":"boolean"},"maxItems":3}',
        logit_bias=bias,
    )  # fmt: skip
    assert reason == "stop"
    json.loads(text)
    assert re.search(r"\s", text)
    assert not re.search(r"\s{18}", text)


def test_others_in_the_batch_are_left_alone(loop: EngineLoop) -> None:
    free = drive.request("free", PROMPT, temperature=1.0, seed=5, max_tokens=30)
    held = [asked(f"r{i}", "regex", "[0-9]{20}", seed=i) for i in range(4)]
    assert (
        answers(loop, [*held[:2], free, *held[2:]])["free", 0] == answers(loop, [free])["free", 0]
    )


@pytest.mark.parametrize(
    ("kind", "source", "why"),
    [
        ("regex", "(a", "unclosed group"),
        ("lark", 'start: "a" nothing', "unknown name"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "nsatisfiable"),
    ],
)
def test_what_cannot_be_held_is_refused(loop: EngineLoop, kind: str, source: str, why: str) -> None:
    _, reason = one(loop, kind, source)
    assert reason.startswith("structured_outputs cannot be used: ")
    assert why in reason


def test_a_grammar_that_explodes_ends_its_request_alone(loop: EngineLoop) -> None:
    """Ambiguous in more ways with each token, until a limit of llguidance's is reached."""
    evil = 'start: e\ne: e e | "a" | "b" | e "c" e'
    neighbour = asked("neighbour", "regex", "[0-9]{300}")
    requests = [asked("evil", "lark", evil, min_tokens=400), neighbour]
    found = answers(loop, requests)
    assert "too many items" in found["evil", 0][1].lower()
    assert re.fullmatch("[0-9]{300}", found["neighbour", 0][0])


@given(data=st.data(), vocab=st.integers(1, 100), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_forbidden_logits_are_minus_infinity(data: st.DataObject, vocab: int, dtype: str) -> None:
    logits = torch.randn(4, vocab).to(getattr(torch, dtype))
    rows = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
    words = data.draw(
        st.lists(
            st.lists(st.integers(-(2**31), 2**31 - 1), min_size=4, max_size=4),
            min_size=len(rows), max_size=len(rows),
        )
    )  # fmt: skip
    bits = torch.tensor(words, dtype=torch.int32)[:, : -(-vocab // 32)]
    before = logits.clone()
    found = forbid(logits, torch.tensor(rows), bits)
    assert torch.equal(logits, before)
    for row in range(4):
        for token in range(vocab):
            held = row in rows
            allowed = not held or words[rows.index(row)][token // 32] >> token % 32 & 1
            want = before[row, token].item() if allowed else -torch.inf
            assert found[row, token].item() == want
