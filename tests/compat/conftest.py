"""Where the server is; see `tests.compat.serve`."""

from __future__ import annotations

import pytest

from tests.compat.target import Target


@pytest.fixture(scope="session")
def target() -> Target:
    found = Target.from_environment()
    if found is None:
        pytest.skip("needs a server: make compat-test")
    return found
