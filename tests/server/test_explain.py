"""/v1/explain: what would become of a request, without computing anything."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from paged_cache.explain import Explanation, Missing
from scheduler.outlook import Outlook
from tests.server.front import CHAT, Door, door, says
from tests.server.test_errors import check
from tests.server.text_models import BOS


def explain(front: Door, body: Any, **options: Any) -> httpx.Response:
    return front.call("POST", "/v1/explain", json=body, **options)


def test_a_chat() -> None:
    engine = says(
        "x",
        explanation=Explanation(16, [1], [Missing(16, 5, "last_block")]),
        outlook=Outlook("queue", 16, 2, 1.5),
    )
    front = door(engine)
    told = explain(front, CHAT | {"store": True, "n": 2, "messages.0": 1}).json()
    assert told["ignored_params"] == ["store", "messages.0"]
    [prompt] = told["prompts"]
    front.chat()
    asked = engine.submitted[0]
    assert len(engine.submitted) == 1, "it was submitted"
    assert prompt.pop("tokens") == list(asked.prompt_ids)
    assert prompt == {
        "prompt": f"{BOS}<|start|>user\nhi<|end|><|start|>assistant\n",
        "prompt_tokens": len(asked.prompt_ids),
        "answers": 2,
        "max_tokens": 256 - len(asked.prompt_ids),
        "verdict": "queue",
        "blocks_needed": 16,
        "blocks_total": 64,
        "cached_tokens": 16,
        "missing": [{"start": 16, "count": 5, "reason": "last_block", "diverges_at": None}],
        "ahead": 2,
        "estimated_wait_seconds": 1.5,
    }


def test_completions_one_by_one() -> None:
    """What can never be served is explained too."""
    engine = says("x", explanation=Explanation(16, [1], []))
    body = {"prompt": [[5], [5] * 300], "echo": True, "logprobs": 1}
    good, bad = explain(door(engine), body).json()["prompts"]
    assert (good["verdict"], good["max_tokens"], good["cached_tokens"]) == ("admit", 16, 0)
    assert (bad["verdict"], bad["prompt_tokens"]) == ("refuse", 300)
    assert bad["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "prompt"), ({"messages": []}, "messages"), (CHAT | {"temperature": 9}, "temperature")],
)
def test_wrong_fields_are_errors(body: dict[str, Any], param: str) -> None:
    check(explain(door(says("x")), body), 400, "invalid_value", param)


def test_strict() -> None:
    response = explain(door(says("x")), CHAT | {"store": True}, headers={"x-strict": "1"})
    check(response, 400, "unsupported_parameter", "store")


def test_ids_that_no_vocabulary_has_are_refused_and_no_error_of_the_server() -> None:
    front = door(says("hello"))
    for token in (-5, 10**6, -(2**70)):
        [told] = explain(front, {"prompt": [1, token]}).json()["prompts"]
        assert told["verdict"] == "refuse" and str(token) in told["error"]["message"]
