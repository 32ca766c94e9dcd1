"""What moves between the pool and the tiers below it in the step that is being planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from paged_cache.block_copy import BlockCopy
from paged_cache.host_tier import HostBlock, HostTier
from paged_cache.pool import Key


class Tiers:
    """The tiers below the pool, and the copies that the next plan must make.

    A plan copies to the host first, then to the device. So within a plan a slot may be written and
    then read, never read and then written: a slot that will be read stays pinned until `take`.

        pool block  ---- leaving: {slot: block} ---->  host slot
        pool block  <--- arriving: {block: HostBlock} ---  host slot

    Attributes:
        host_hits: tokens whose content came back from host memory, since start.
    """

    def __init__(self, host: HostTier) -> None:
        self.host = host
        self.host_hits = 0
        self._leaving: dict[int, int] = {}
        self._arriving: dict[int, HostBlock] = {}

    def offer(self, block: int, key: Key) -> None:
        """The pool gives up `key` in `block`: it moves to host memory if there is room."""
        arriving = self._arriving.pop(block, None)
        if arriving is not None:  # it has not even come: host memory still holds it
            self.host.unpin(arriving)
            return
        held = self.host.find(key)
        if held is not None:
            self.host.touch(held)
        else:
            self._store(key, block)

    def _store(self, key: Key, block: int) -> HostBlock | None:
        stored = self.host.store(key)
        if stored is not None:
            self._leaving[stored.slot] = block
        return stored

    def keep(self, blocks: Mapping[Key, int]) -> list[HostBlock] | None:
        """Moves all of `blocks` (content: block of the pool) to host memory to stay there, pinned;
        None, and nothing changed, if too few slots are there."""
        kept = [held for key in blocks if (held := self.host.find(key)) is not None]
        self.pin(kept)
        if len(blocks) - len(kept) > self.host.num_available:
            self.unpin(kept)
            return None
        for key, block in blocks.items():
            if self.host.find(key) is None:
                stored = self._store(key, block)
                assert stored is not None
                self.host.pin(stored)
                kept.append(stored)
        return kept

    def pin(self, blocks: Iterable[HostBlock]) -> None:
        """Adds one pin to each."""
        for block in blocks:
            self.host.pin(block)

    def unpin(self, blocks: Iterable[HostBlock]) -> None:
        """Takes back one pin of each."""
        for block in blocks:
            self.host.unpin(block)

    def bring(self, held: HostBlock, block: int) -> None:
        """The content of `held`, which the caller has pinned, is needed in `block` of the pool.
        The pin is taken back with the plan."""
        self._arriving[block] = held

    def take(self) -> list[BlockCopy]:
        """The copies of the plan, in the order in which they must happen."""
        copies = [BlockCopy(block, slot, "to_host") for slot, block in self._leaving.items()]
        copies += [
            BlockCopy(held.slot, block, "to_device") for block, held in self._arriving.items()
        ]
        self.unpin(self._arriving.values())
        self._leaving, self._arriving = {}, {}
        return copies

    def forget_all(self) -> None:
        """Nothing in memory is found any more: for when the content of blocks is in doubt."""
        self.host.forget_all()
        self._leaving, self._arriving = {}, {}
