"""Fair shares between tenants, by a virtual counter of the tokens that each was served.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): whoever was served
least is next. A tenant that comes back is lifted to the least of those that wait, so that nobody
saves up service by staying away. While two tenants both have requests waiting, what they were
served differs by at most 2 max(INPUT * longest prompt, OUTPUT * tokens that run at once), each
divided by the tenant's weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

INPUT, OUTPUT = 1, 2
"""What a token of a prompt and a token of an answer count for: the second costs a step."""


class FairShares:
    """The counters.

    Args:
        weights: of tenants that get more or less than the others, whose weight is 1.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._counters: dict[str, float] = {}
        self._last = ""  # the tenant whose last request left the queue last

    def counter(self, tenant: str) -> float:
        """What `tenant` was served, by its weight."""
        return self._counters.get(tenant, 0.0)

    def cost(self, tenant: str, tokens: int) -> float:
        """What `tokens`, times `INPUT` or `OUTPUT`, add to the counter of `tenant`."""
        return tokens / self._weights.get(tenant, 1.0)

    def serve(self, tenant: str, tokens: int) -> None:
        """Counts `tokens`, times `INPUT` or `OUTPUT`, as served."""
        self._counters[tenant] = self.counter(tenant) + self.cost(tenant, tokens)

    def come(self, tenant: str, others: Iterable[str]) -> None:
        """`tenant` had nothing waiting and has now; `others` are those that have."""
        least = min(map(self.counter, others), default=self.counter(self._last))
        self._counters[tenant] = max(self.counter(tenant), least)

    def leave(self, tenant: str) -> None:
        """The last waiting request of `tenant` was started, or ended."""
        self._last = tenant
