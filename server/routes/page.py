"""GET /: a small chat page, all in one file."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Final

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

from server.service import Service

FILE: Final = Path(__file__).parents[1] / "web" / "index.html"


def router(service: Service) -> APIRouter:
    """The route; it needs no key, since the page holds nothing and asks for one itself."""
    routes = APIRouter()
    html = FILE.read_text(encoding="utf-8")
    headers = {
        "content-security-policy": policy(html),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(html, headers=headers)

    return routes


def policy(html: str) -> str:
    """A content security policy that lets the page's own script and style run, known by their
    hashes, and talk to this server; nothing else."""
    rules = [
        "default-src 'none'",
        f"script-src {_hashes(html, 'script')}",
        f"style-src {_hashes(html, 'style')}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return "; ".join(rules)


def _hashes(html: str, tag: str) -> str:
    inside = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
