"""What would become of a request if it came now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Outlook:
    """Attributes:
    verdict: `admit`: the next step would start it; `queue`: there is no room yet; `refuse`: there
        never will be.
    blocks: KV blocks that one of its answers holds at the most.
    ahead: sequences that would be started before it. With shares between tenants that is a guess.
    wait: seconds in the queue, from how fast it went on of late; None where too little is known.
    """

    verdict: Literal["admit", "queue", "refuse"]
    blocks: int
    ahead: int = 0
    wait: float | None = 0.0
