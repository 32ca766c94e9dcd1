"""What moves between the pool and the tiers below it in the step that is being planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from paged_cache.block_copy import BlockCopy, DiskCopy
from paged_cache.host_tier import HostBlock, HostTier
from paged_cache.pool import Key
from paged_cache.table import SequenceBlocks


class Disk(Protocol):
    """What `Tiers` needs of `DiskTier`; tests put a fake here."""

    @property
    def num_blocks(self) -> int:
        """Blocks that it holds."""

    num_bytes: int
    num_errors: int

    def holds(self, key: Key) -> bool:
        """Whether this content can be asked for."""

    def load(self, key: Key) -> None:
        """Begins to read it."""

    def poll(self) -> list[tuple[Key, bool]]:
        """What has been read since the last call, and whether it is good."""

    def discard(self, key: Key) -> None:
        """Nobody wants what was read."""

    def wait(self, seconds: float) -> None:
        """Waits until something has been read, if something is being read."""


class Tiers:
    """The tiers below the pool, and the copies that the next plan must make.

        pool block  ---- leaving {slot: block} ------->  host slot  -- saved {slot: key} -->  disk
        pool block  <--- arriving {block: HostBlock} --  host slot  <- filled {slot: key} --  disk

    A plan copies from the host to the disk first, then from the disk, to the host, to the device.
    So within a plan a slot may be written and then read, never read and then written: a slot that
    will be read stays pinned until `take`.

    Attributes:
        host_hits, disk_hits: tokens whose content came back, since start, by where it lay.
    """

    def __init__(self, host: HostTier, disk: Disk | None = None) -> None:
        self.host = host
        self.disk = disk
        self.host_hits = self.disk_hits = 0
        host.on_evict = self._spill
        self._leaving: dict[int, int] = {}
        self._arriving: dict[int, HostBlock] = {}
        self._saved: dict[int, Key] = {}
        self._filled: dict[int, Key] = {}
        self._loading: dict[Key, list[SequenceBlocks]] = {}  # who waits for what

    # ------------------------------------------------------------------ down

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

    def _spill(self, held: HostBlock) -> None:
        """Host memory gives `held` up: it goes to the disk, unless it has not even come."""
        if self._leaving.pop(held.slot, None) is not None or self.disk is None:
            return
        if self._filled.pop(held.slot, None) is not None:
            self.disk.discard(held.key)
        elif not self.disk.holds(held.key):
            self._saved[held.slot] = held.key

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

    # ------------------------------------------------------------------ up

    def bring(self, held: HostBlock, block: int) -> None:
        """The content of `held`, which the caller has pinned, is needed in `block` of the pool.
        The pin is taken back with the plan."""
        self._arriving[block] = held

    def fetch(self, seq: SequenceBlocks, keys: Iterable[Key]) -> None:
        """Begins to read what the disk holds for `seq`, as far as host memory has room for it. What
        arrives stays there for `seq`."""
        assert self.disk is not None
        room = self.host.num_available - len(self._loading)
        for key in keys:
            if key not in self._loading:
                if room <= 0:
                    return
                room -= 1
                self._loading[key] = []
                self.disk.load(key)
            self._loading[key].append(seq)
            seq.awaited += 1

    @property
    def num_reading(self) -> int:
        """Sequences for which the disk is being read."""
        return len({seq for waiting in self._loading.values() for seq in waiting})

    def poll(self) -> None:
        """Takes in what the disk has read since the last call."""
        if self.disk is None:
            return
        for key, good in self.disk.poll():
            held = self._fill(key) if good else None
            for seq in self._loading.pop(key):
                seq.awaited -= 1
                if held is not None:
                    self.host.pin(held)
                    seq.kept.append(held)

    def _fill(self, key: Key) -> HostBlock | None:
        """A slot for what was just read."""
        assert self.disk is not None
        held = self.host.find(key)
        if held is None:
            held = self.host.store(key)
            if held is not None:
                held.from_disk = True
                self._filled[held.slot] = key
                return held
        self.disk.discard(key)
        return held

    def let_go(self, seq: SequenceBlocks) -> None:
        """Nothing needs to be kept, or read, for `seq` any more."""
        self.unpin(seq.kept)
        seq.kept = []
        if seq.awaited:
            for waiting in self._loading.values():
                if seq in waiting:
                    waiting.remove(seq)
            seq.awaited = 0

    def wait_for_disk(self, seconds: float) -> None:
        """Waits until something has been read, if something is being read."""
        if self._loading and self.disk is not None:
            self.disk.wait(seconds)

    def count_hits(self, places: Iterable[list[HostBlock]], tokens: int) -> None:
        """Counts content that comes back.

        Args:
            places: what comes back of each place of a sequence, in all groups.
            tokens: of each place.
        """
        for blocks in places:
            if any(held.from_disk for held in blocks):
                self.disk_hits += tokens
            else:
                self.host_hits += tokens
            for held in blocks:
                held.from_disk = False

    # ------------------------------------------------------------------ a plan's end

    def take(self) -> tuple[list[BlockCopy], list[DiskCopy]]:
        """The copies of the plan, in the order in which they must happen, those with the disk
        before the others."""
        with_disk = [DiskCopy(slot, key, "to_disk") for slot, key in self._saved.items()]
        with_disk += [DiskCopy(slot, key, "from_disk") for slot, key in self._filled.items()]
        copies = [BlockCopy(block, slot, "to_host") for slot, block in self._leaving.items()]
        copies += [
            BlockCopy(held.slot, block, "to_device") for block, held in self._arriving.items()
        ]
        self.unpin(self._arriving.values())
        self._drop_plan()
        return copies, with_disk

    def forget_all(self) -> None:
        """Nothing in memory is found any more: for when the content of blocks is in doubt. What is
        being read from the disk was checked and is not in doubt."""
        self.host.forget_all()
        if self.disk is not None:
            for key in self._filled.values():
                self.disk.discard(key)
        self._drop_plan()

    def _drop_plan(self) -> None:
        self._leaving, self._arriving, self._saved, self._filled = {}, {}, {}, {}
