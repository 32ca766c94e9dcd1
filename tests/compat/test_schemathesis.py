"""schemathesis against our own OpenAPI document: no case may be answered by a 5xx but a deliberate
503, by a shape that the document does not tell, or by a traceback."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis")
if "QUIRE_URL" not in os.environ:
    pytest.skip("needs a server: make compat-test", allow_module_level=True)

from hypothesis import HealthCheck, Phase, settings  # noqa: E402

URL, KEY = os.environ["QUIRE_URL"], os.environ["QUIRE_KEY"]
CASES = int(os.environ.get("TEST_CASES", "5000"))
HEADERS = {"authorization": f"Bearer {KEY}"}

schema = schemathesis.openapi.from_url(f"{URL}/openapi.json", headers=HEADERS)
posts = schema.include(method="POST")
others = schema.exclude(method="POST")
CHECKS = [
    schemathesis.checks.CHECKS.get_one(name)
    for name in (
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    )
]


def cases(operations: Any, share: float) -> settings:
    """Settings that spend a share of all cases on `operations`, evenly."""
    count = len(list(operations.get_all_operations()))
    return settings(
        max_examples=math.ceil(CASES * share / count),
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def check(case: Any) -> None:
    """Sends one case and holds the answer against the document."""
    response = case.call(headers=HEADERS, timeout=60)
    assert response.status_code < 500 or response.status_code == 503, response.text
    assert "Traceback" not in response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    case.validate_response(response, checks=CHECKS)


@posts.parametrize()
@cases(posts, 0.8)
def test_posts(case: Any) -> None:
    if isinstance(case.body, dict):  # answers of two tokens are as good a test as long ones
        case.body.setdefault("max_tokens", 2)
    check(case)


@others.parametrize()
@cases(others, 0.2)
def test_others(case: Any) -> None:
    check(case)
