"""Hostile grammars kill the process that tries them out, and nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import msgspec
import pytest

from engine import grammar_check
from engine.grammar_check import TOO_LARGE, TOO_LONG, GrammarChecks
from models import embedded
from scheduler.request import Grammar
from tests.server.fake_engine import INFO


@pytest.fixture
async def checks() -> AsyncIterator[GrammarChecks]:
    info = msgspec.structs.replace(
        INFO, model_path=str(embedded.path()), vocab_size=2048, eos_token_ids=[2]
    )
    found = GrammarChecks(info)
    yield found
    found.close()


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def nested_references(depth: int) -> Grammar:
    """Overflows the compiler's stack, which ends a process."""
    definitions = {
        f"d{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}}
        for i in range(depth)
    }
    return schema({"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{depth}": {}}})


def slow(number: int) -> Grammar:
    """Takes minutes."""
    return Grammar("regex", "(ab|c)*d?" * (30_000 + number))


async def test_tells_what_is_wrong(checks: GrammarChecks) -> None:
    assert await checks.problem(Grammar("regex", "[0-9]+")) is None
    assert await checks.problem(schema({"type": "object"})) is None
    assert await checks.problem(nested_references(20)) is None
    assert "unclosed" in (await checks.problem(Grammar("regex", "(a")) or "")
    # Compiles, but nothing ends it: found with the first mask.
    loop = schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})
    assert await checks.problem(loop) is not None


async def test_survives_what_kills_a_process(checks: GrammarChecks) -> None:
    assert await checks.problem(nested_references(20_000)) == TOO_LARGE
    assert await checks.problem(Grammar("regex", "a")) is None


async def test_time_is_limited(checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "COMPILE_SECONDS", 0.1)
    assert await checks.problem(slow(0)) == TOO_LONG


async def test_a_slow_one_holds_up_nobody(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_check, "COMPILE_SECONDS", 100)
    slow_one = asyncio.create_task(checks.problem(slow(1)))
    await asyncio.sleep(0)
    assert await checks.problem(Grammar("regex", "c")) is None
    assert not slow_one.done()
    checks.close()
    assert await slow_one is not None


async def test_each_grammar_is_tried_once(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(grammar_check._Worker, "ask", lambda _, grammar: tried.append(grammar))
    same = [Grammar("regex", "[a-z]", param) for param in ("one", "two")]
    await asyncio.gather(*(checks.problem(grammar) for grammar in same))
    await checks.problem(same[0])
    await checks.problem(Grammar("lark", "[a-z]"))
    assert len(tried) == 2


async def test_going_away_does_not_end_what_others_wait_for(checks: GrammarChecks) -> None:
    waiting = [asyncio.create_task(checks.problem(Grammar("regex", "[x-z]"))) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    assert await waiting[1] is None


async def test_remembers_a_bounded_amount(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_check._Worker, "ask", lambda *_: None)
    monkeypatch.setattr(grammar_check, "REMEMBERED_CHARACTERS", 100)
    for length in range(1, 60):
        await checks.problem(Grammar("regex", "a" * length))
    assert sum(len(text) for _, text in checks._found) <= 100
    assert checks._characters == sum(len(text) for _, text in checks._found)
