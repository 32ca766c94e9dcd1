"""Where the peers of a comparison live: one environment each, beside what is made for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]


def home() -> Path:
    """`.peers/` of the checkout, or the folder that the variable BENCH_PEERS names."""
    return Path(os.environ.get("BENCH_PEERS", ROOT / ".peers")).resolve()
