"""The tier in host memory: which content lies in which slot."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from paged_cache.pool import Key


@dataclass(slots=True, eq=False)
class HostBlock:
    """Content that lies in host memory.

    Attributes:
        pins: who needs it to stay there.
        from_disk: it was read from the disk and not used yet.
    """

    key: Key
    slot: int
    pins: int = 0
    from_disk: bool = False


class HostTier:
    """Content of KV blocks in slots 0..num_slots-1 of host memory, least recently used first out.

    Invariants: a slot is free or holds one key, a key lies in one slot; a block is idle, and may
    be given up for another, exactly when nobody pins it.

                  store                  pin
        free  ------------>  idle  <--------------->  pinned
          ^                   | unpin                   |
          +-------------------+ given up (least recently used), or forgotten

    Args:
        num_slots: 0 is a tier that never holds anything.
        keep: whether what nobody pins stays to be found; without it such a slot is free at once.

    Attributes:
        on_evict: told of a block before its slot is given to another.
    """

    def __init__(self, num_slots: int, *, keep: bool = True) -> None:
        self.num_slots = num_slots
        self.on_evict: Callable[[HostBlock], None] = _ignore
        self._keep = keep
        self._blocks: dict[Key, HostBlock] = {}
        self._idle: OrderedDict[Key, HostBlock] = OrderedDict()  # least recently used first
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_used(self) -> int:
        return len(self._blocks)

    @property
    def num_available(self) -> int:
        """Slots that could take new content now."""
        return len(self._free) + len(self._idle)

    def find(self, key: Key) -> HostBlock | None:
        """Where this content lies, if it does."""
        return self._blocks.get(key)

    def touch(self, block: HostBlock) -> None:
        """Counts as a use of an idle block."""
        if not block.pins:
            self._idle.move_to_end(block.key)

    def store(self, key: Key) -> HostBlock | None:
        """A slot for content that the tier does not hold yet, idle; None where all are pinned.

        The caller sees to it that the content gets there.
        """
        if not self._free:
            if not self._idle:
                return None
            oldest = next(iter(self._idle.values()))
            self.on_evict(oldest)
            self._remove(oldest)
        block = HostBlock(key, self._free.pop())
        self._blocks[key] = self._idle[key] = block
        return block

    def pin(self, block: HostBlock) -> None:
        """Holds `block` in place until as many `unpin`."""
        block.pins += 1
        self._idle.pop(block.key, None)

    def unpin(self, block: HostBlock) -> None:
        """Takes one `pin` back. Does nothing for a block that was forgotten meanwhile."""
        if self._blocks.get(block.key) is not block:
            return
        block.pins -= 1
        if not block.pins:
            self._idle[block.key] = block
            if not self._keep:
                self._remove(block)

    def blocks(self) -> list[HostBlock]:
        """All that it holds: pinned blocks, then idle ones, the last used first."""
        pinned = [block for block in self._blocks.values() if block.pins]
        return pinned + list(reversed(self._idle.values()))

    def forget_all(self) -> None:
        """Every slot is free: for when the content is in doubt."""
        self._blocks.clear()
        self._idle.clear()
        self._free = list(range(self.num_slots - 1, -1, -1))

    def _remove(self, block: HostBlock) -> None:
        del self._blocks[block.key], self._idle[block.key]
        self._free.append(block.slot)

    def check(self, pinned: Iterable[HostBlock]) -> None:
        """Raises AssertionError where an invariant does not hold.

        Args:
            pinned: every block once per pin; forgotten ones do not count.
        """
        slots = [*self._free, *(block.slot for block in self._blocks.values())]
        assert sorted(slots) == list(range(self.num_slots)), "a host slot is lost or held twice"
        idle = {key for key, block in self._blocks.items() if not block.pins}
        assert idle == self._idle.keys(), "host blocks and their pins disagree"
        pins = Counter(block for block in pinned if self.find(block.key) is block)
        counted = {block: block.pins for block in self._blocks.values() if block.pins}
        assert counted == pins, "host blocks are pinned by nobody, or not by those who need them"


def _ignore(_: HostBlock) -> None:
    """Nothing lies below."""
