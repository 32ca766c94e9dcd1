"""The server that the tests here talk to."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A running server: base URL without /v1, API key, a served model."""

    url: str
    key: str
    model: str

    @staticmethod
    def from_environment() -> Target | None:
        """What `tests.compat.serve` started, if it did."""
        if "QUIRE_URL" not in os.environ:
            return None
        return Target(os.environ["QUIRE_URL"], os.environ["QUIRE_KEY"], os.environ["QUIRE_MODEL"])
