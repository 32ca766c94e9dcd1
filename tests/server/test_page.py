"""The page at /: it brings all that it needs, and may load nothing else."""

from __future__ import annotations

import base64
import hashlib
import re

from server.keys import KeyRing
from server.routes.page import FILE
from tests.server.front import door, says


def test_the_page_needs_no_key_and_may_run_only_itself() -> None:
    response = door(says("x"), keys=KeyRing([("sk", "")])).get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    rules = response.headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in rules
    for tag in ("script", "style"):
        [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in rules


def test_nothing_comes_from_elsewhere_and_nothing_is_inline() -> None:
    """What the policy would forbid: other origins, handlers and styles in attributes."""
    html = FILE.read_text(encoding="utf-8")
    assert not re.search(r"https?://|\bon\w+=|\bstyle=|<script |innerHTML|eval\(", html)
    assert door(says("x")).get("/nothing").status_code == 404
