"""All that the scheduler may ask of the KV cache."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from paged_cache.block_copy import BlockCopy, DiskCopy
from paged_cache.explain import Explanation, Missing, PrefixMemory, missing, reach
from paged_cache.host_tier import HostBlock, HostTier
from paged_cache.layout import most_blocks
from paged_cache.pool import BlockPool, Key
from paged_cache.prefix import KEY_BYTES, PrefixHasher
from paged_cache.table import SequenceBlocks
from paged_cache.tiers import Disk, Tiers


@dataclass(frozen=True, slots=True)
class NewBlocks:
    """Entries of one group's table from index `first` on, as the device must know them."""

    group: int
    first: int
    blocks: list[int]


class Grown(msgspec.Struct, frozen=True):
    """What the device must be told after a table grew."""

    new: list[NewBlocks]
    copies: list[BlockCopy]


class KVCacheManager:
    """Gives sequences the blocks that their next tokens need, finds blocks that are there already,
    and takes blocks back.

    Every KV group of a sequence has a table of its own over the one pool. `start`, `fork` and
    `grow` are all or nothing: they succeed fully or leave tables and pool as they were (but for
    blocks behind a window, which nobody needs again).

    Args:
        windows: per KV group, how many positions its layers see; 0 is all.
        prefix_cache: whether blocks are published and found again.
        isolate_tenants: whether one tenant's blocks are hidden from the others.
        host: the tier for blocks that the pool gives up; none unless given.
        disk: the tier below that one, which needs a host tier to pass through.
        hash_key: what content is hashed with; drawn at random unless given.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        windows: tuple[int, ...] = (0,),
        *,
        prefix_cache: bool = True,
        isolate_tenants: bool = False,
        host: HostTier | None = None,
        disk: Disk | None = None,
        hash_key: bytes | None = None,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.pool = pool
        self.block_size = block_size
        self.windows = windows
        self._hasher = PrefixHasher(hash_key or secrets.token_bytes(KEY_BYTES), block_size)
        self._prefix_cache = prefix_cache
        self._isolate_tenants = isolate_tenants
        self.memory = PrefixMemory()
        self.tiers = Tiers(host or HostTier(0), disk)
        pool.on_evict = self.tiers.offer
        self._opened = itertools.count()
        self._full = [g for g, window in enumerate(windows) if not window]
        self._sliding = [g for g, window in enumerate(windows) if window]

    # ------------------------------------------------------------------ sizes

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks of one group that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def most_blocks(self, num_tokens: int, chunk: int) -> int:
        """The most blocks that a sequence of `num_tokens` tokens ever holds, when steps compute at
        most `chunk` of them."""
        return most_blocks(self.windows, self.block_size, num_tokens, chunk)

    def _first_seen(self, group: int, position: int) -> int:
        """Table index of the first block that `position` sees."""
        window = self.windows[group]
        return max(position - window + 1, 0) // self.block_size if window else 0

    # ------------------------------------------------------------------ a sequence's life

    def open(self, salt: str = "", tenant: str = "") -> SequenceBlocks:
        """Empty tables. Sequences with different salts never share blocks by content, nor do those
        of different tenants where these are isolated; without a prefix cache no two of them do."""
        owner = self._owner(tenant)
        own = () if self._prefix_cache else (str(next(self._opened)),)
        root = self._hasher.root(salt, owner, *own)
        self.memory.opened(root, owner)
        return SequenceBlocks(len(self.windows), root)

    def _owner(self, tenant: str) -> str:
        return tenant if self._isolate_tenants else ""

    def start(
        self,
        seq: SequenceBlocks,
        tokens: Sequence[int],
        chunk: int,
        spare: int = 0,
        reusable: int | None = None,
    ) -> tuple[int, list[NewBlocks]] | None:
        """Fills the empty tables of a sequence that begins (or begins again).

        Blocks that hold a prefix of `tokens` already are shared, and content in host memory comes
        back into blocks of the pool; the last token is always left to be computed, since its logits
        are needed, and so is everything from position `reusable` on. Beyond them there will be room
        for all of `tokens` in full groups and for the first `chunk` tokens to compute in sliding
        ones, and `spare` blocks are left free.

        Returns:
            (tokens found, entries of all tables), or None if too few blocks are free.
        """
        found = self._find(seq, tokens, self._most_found(tokens, reusable), self._holds)
        position = found * self.block_size
        firsts = [self._first_seen(group, position) for group in range(len(self.windows))]
        hits = [
            [self._held((group, digest)) for digest in seq.chain[first:found]]
            for group, first in enumerate(firsts)
        ]
        here = [block for row in hits for block in row if isinstance(block, int)]
        below = [block for row in hits for block in row if isinstance(block, HostBlock)]
        ends = [
            len(tokens) if not window else min(position + chunk, len(tokens))
            for window in self.windows
        ]
        missing = sum(self.blocks_for(end) - found for end in ends) + len(below)
        revived = sum(not self.pool.refs(block) for block in here)
        if missing + revived + spare > self.pool.num_free:
            return None
        # Taking a block may evict another, and storing that one may push content out of host
        # memory: what was found is made safe first.
        self.pool.share(here)
        self.tiers.pin(below)
        self.tiers.let_go(seq)
        for table, first, row in zip(seq.tables, firsts, hits, strict=True):
            table.fill(first, [self._bring(b) if isinstance(b, HostBlock) else b for b in row])
        self._append(seq, ends)
        seq.published = found
        self.memory.started(seq.root, tokens)
        self._count_hits(firsts, hits)
        return position, self.entries(seq)

    def fetch(
        self, seq: SequenceBlocks, tokens: Sequence[int], reusable: int | None = None
    ) -> bool:
        """Asks the disk, once, for what it alone holds of what `start` could find.

        Returns:
            whether something of it is still being read: `start` would compute it in vain.
        """
        disk = self.tiers.disk
        if disk is not None and self._prefix_cache and not seq.asked:
            seq.asked = True

            def holds(key: Key) -> bool:
                return self._holds(key) or disk.holds(key)

            found = self._find(seq, tokens, self._most_found(tokens, reusable), holds)
            first = [self._first_seen(g, found * self.block_size) for g in range(len(self.windows))]
            keys = [
                (group, seq.chain[place])
                for place in range(found)
                for group in range(len(self.windows))
                if place >= first[group]
            ]
            self.tiers.fetch(seq, [key for key in keys if not self._holds(key)])
        return seq.awaited > 0

    def fork(self, parent: SequenceBlocks, child: SequenceBlocks, position: int) -> bool:
        """Lets the empty `child` share the blocks in which `parent` has the positions before
        `position`, the one that the child computes next.

        Returns:
            whether the parent still holds all that the child will see.
        """
        needed = self.blocks_for(position)
        firsts = [self._first_seen(group, position) for group in range(len(self.windows))]
        for table, first in zip(parent.tables, firsts, strict=True):
            if table.start > first or len(table) < needed:
                return False
        for mine, theirs, first in zip(child.tables, parent.tables, firsts, strict=True):
            shared = theirs.blocks[first:needed]
            self.pool.share(shared)
            mine.fill(first, shared)
        self.tiers.let_go(child)
        child.chain = parent.chain[: position // self.block_size]
        child.published = min(parent.published, position // self.block_size)
        return True

    def grow(self, seq: SequenceBlocks, start: int, end: int) -> Grown | None:
        """Makes room to compute positions start..end-1.

        Blocks behind the window of `start` go back to the pool. A block that will be written but
        is shared is exchanged for a copy (copy on write). Then what is missing is appended.

        Returns:
            what changed, or None if too few blocks are free.
        """
        for group in self._sliding:
            self.pool.drop(seq.tables[group].trim(self._first_seen(group, start))[::-1])
        place, inside = divmod(start, self.block_size)
        needed, missing, shared = self.blocks_for(end), 0, []
        for group, table in enumerate(seq.tables):
            held = len(table.blocks)
            missing += max(needed - held, 0)
            if inside and place < held and self.pool.refs(table.blocks[place]) > 1:
                shared.append(group)
        if missing + len(shared) > self.pool.num_free:
            return None
        if not missing and not shared:  # nearly every decode
            return Grown([], [])
        new, copies = [], []
        for group in shared:
            blocks = self.pool.take(1)
            assert blocks is not None
            old = seq.tables[group].blocks[place]
            seq.tables[group].blocks[place] = blocks[0]
            self.pool.drop([old])
            copies.append(BlockCopy(old, blocks[0]))
            new.append(NewBlocks(group, place, blocks))
        return Grown(new + self._append(seq, [end] * len(seq.tables)), copies)

    def publish(self, seq: SequenceBlocks, tokens: Sequence[int], num_computed: int) -> None:
        """Lets others find the blocks that `num_computed` tokens fill. A planned step counts as
        computed: whoever finds a block reads it in that step at the earliest, and a step stores
        the keys and values of a layer before that layer attends."""
        if not self._prefix_cache:
            return
        full = min(num_computed, len(tokens)) // self.block_size
        if full <= seq.published:
            return
        self._hasher.extend(seq.root, seq.chain, tokens, full)
        for group, table in enumerate(seq.tables):
            for place in range(max(seq.published, table.start), full):
                block = table.blocks[place]
                if self.pool.key(block) is None:
                    self.pool.publish(block, (group, seq.chain[place]))
        seq.published = full

    def entries(self, seq: SequenceBlocks) -> list[NewBlocks]:
        """The entries of every table that hold a block."""
        return [
            NewBlocks(group, table.start, table.held)
            for group, table in enumerate(seq.tables)
            if len(table) > table.start
        ]

    def release(self, seq: SequenceBlocks) -> None:
        """Takes every block of a sequence back, tail first. Its hashes stay known."""
        for table in seq.tables:
            self.pool.drop(table.clear())
        seq.published = 0
        seq.asked = False
        self.tiers.let_go(seq)

    def swap_out(self, seq: SequenceBlocks, tokens: Sequence[int], num_computed: int) -> bool:
        """Takes the blocks of a running sequence back and moves the full ones to host memory, where
        they stay until `start` finds them or `release` gives them up.

        Returns:
            whether it did; else nothing changed: no block is full, host memory has too little
            room, or a window has passed by what continuing after the last full block would see.
        """
        full = min(num_computed, len(tokens)) // self.block_size
        firsts = [self._first_seen(g, full * self.block_size) for g in range(len(self.windows))]
        if not full or any(t.start > f for t, f in zip(seq.tables, firsts, strict=True)):
            return False
        self._hasher.extend(seq.root, seq.chain, tokens, full)
        kept = self.tiers.keep(
            {
                (group, seq.chain[place]): table.blocks[place]
                for group, (table, first) in enumerate(zip(seq.tables, firsts, strict=True))
                for place in range(first, full)
            }
        )
        if kept is None:
            return False
        self.release(seq)
        seq.kept = kept
        return True

    # ------------------------------------------------------------------ a plan's end

    def take_copies(self) -> tuple[list[BlockCopy], list[DiskCopy]]:
        """The copies between the tiers that the plan made since the last call needs, in the order
        in which they must happen, before its own; those with the disk come first."""
        return self.tiers.take()

    def cached(self) -> list[tuple[Key, int | HostBlock]]:
        """All content in memory that can be found, and where, between two plans: the pool's first,
        each newest first."""
        below = [(held.key, held) for held in self.tiers.host.blocks()]
        return [*self.pool.published(), *below]

    def forget_all(self) -> None:
        """Nothing in memory is found any more: for when the content of blocks is in doubt."""
        self.pool.forget_all()
        self.tiers.forget_all()

    # ------------------------------------------------------------------ for people who debug

    def explain(self, tokens: Sequence[int], salt: str = "", tenant: str = "") -> Explanation:
        """What `start` would find of `tokens` now, all of them reusable, and why not more. Changes
        nothing."""
        owner, groups = self._owner(tenant), range(len(self.windows))
        if not self._prefix_cache:
            return Explanation(0, [0 for _ in groups], [Missing(0, len(tokens), "off")])
        seq = SequenceBlocks(len(self.windows), self._hasher.root(salt, owner))
        found = self._find(seq, tokens, self._most_found(tokens), self._holds)
        holds, evicted = self._holds, set(self.pool.evicted)

        def known(digest: bytes) -> bool:
            return any(holds((group, digest)) or (group, digest) in evicted for group in groups)

        others = self.memory.others(seq.root, owner)
        chains = (self._hasher.chain(root, tokens, len(seq.chain)) for root in others)
        return Explanation(
            found * self.block_size,
            [sum(holds((group, digest)) for digest in seq.chain) for group in groups],
            missing(
                len(tokens),
                self.block_size,
                found,
                seq.chain,
                known,
                reach(chains, known),
                self.memory.divergence(seq.root, tokens),
            ),
        )

    # ------------------------------------------------------------------ inside

    def _most_found(self, tokens: Sequence[int], reusable: int | None = None) -> int:
        """Blocks at the start of `tokens` that need not be computed if they are found."""
        most = len(tokens) - 1
        return (most if reusable is None else min(most, reusable)) // self.block_size

    def _find(
        self,
        seq: SequenceBlocks,
        tokens: Sequence[int],
        found: int,
        holds: Callable[[Key], bool],
    ) -> int:
        """Most blocks from the start of `tokens`, up to `found`, whose content some tier `holds`,
        in every group as far as the next position sees them."""
        if not self._prefix_cache and not seq.kept:
            return 0
        self._hasher.extend(seq.root, seq.chain, tokens, found)
        chain = seq.chain
        for group in self._full:
            cached = 0
            while cached < found and holds((group, chain[cached])):
                cached += 1
            found = cached
        # A sliding group needs only what the next position sees; where a block of that is missing,
        # the prefix can end at it at the latest. Repeat until all groups agree.
        agreed = False
        while not agreed:
            agreed = True
            for group in self._sliding:
                first = self._first_seen(group, found * self.block_size)
                for place in range(found - 1, first - 1, -1):
                    if not holds((group, chain[place])):
                        found, agreed = place, False
                        break
        return found

    def _holds(self, key: Key) -> bool:
        return self.pool.holds(key) or self.tiers.host.find(key) is not None

    def _held(self, key: Key) -> int | HostBlock:
        """Where content that is held lies: in a block of the pool rather than below."""
        if self.pool.holds(key):
            return self.pool.block_of(key)
        held = self.tiers.host.find(key)
        assert held is not None
        return held

    def _bring(self, held: HostBlock) -> int:
        """A new block of the pool for content of host memory, which is pinned."""
        blocks = self.pool.take(1)
        assert blocks is not None
        self.tiers.bring(held, blocks[0])
        if self._prefix_cache:
            self.pool.publish(blocks[0], held.key)
        return blocks[0]

    def _count_hits(self, firsts: list[int], hits: list[list[int | HostBlock]]) -> None:
        places: dict[int, list[HostBlock]] = {}
        for first, row in zip(firsts, hits, strict=True):
            for place, block in enumerate(row, first):
                if isinstance(block, HostBlock):
                    places.setdefault(place, []).append(block)
        self.tiers.count_hits(places.values(), self.block_size)

    def _append(self, seq: SequenceBlocks, ends: list[int]) -> list[NewBlocks]:
        """Lengthens each group's table to hold ends[group] tokens; the caller knows that there are
        enough free blocks."""
        new = []
        for group, (table, end) in enumerate(zip(seq.tables, ends, strict=True)):
            missing = self.blocks_for(end) - len(table)
            if missing > 0:
                blocks = self.pool.take(missing)
                assert blocks is not None
                new.append(NewBlocks(group, len(table), blocks))
                table.append(blocks)
        return new
