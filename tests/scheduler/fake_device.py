"""A device without tensors: runs plans on plain Python lists, through the blocks.

The "keys and values" of a position are a hash of all tokens up to it, as real ones depend on the
whole prefix, and reading a position back asserts that hash. A wrong block, a lost write, a stale
table, a block given away too early or copied too late is therefore found where it is read, in
every KV group and within its window. The sampled token is a hash of the sequence, so answers can
be predicted from the prompt alone (`expected`).
"""

import hashlib
import struct
from collections import Counter
from typing import Any

from paged_cache.block_copy import BlockCopy, CopyKind
from paged_cache.pool import Key
from scheduler.plan import ScheduledSeq, Scores, StepPlan, StepResult
from scheduler.random_numbers import uniform
from scheduler.request import Request, SamplingParams

VOCAB = 97
COPIES: tuple[tuple[CopyKind, str, str], ...] = (  # in the order of a plan: kind, from, to
    ("to_host", "kv", "host"),
    ("to_device", "host", "kv"),
    ("cow", "kv", "kv"),
)


def digest(tokens: list[int]) -> int:
    """What a device stores for the last of `tokens`."""
    data = struct.pack(f"<{len(tokens)}q", *tokens)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def next_token(tokens: list[int], number: float) -> int:
    return (digest(tokens) + int(number * 1e9)) % VOCAB


def expected(request: Request, index: int, eos: frozenset[int]) -> list[int]:
    """The answer of one sequence, computed alone and without a scheduler."""
    tokens, sampling = list(request.prompt_ids), request.sampling
    for t in range(sampling.max_tokens or 0):
        number = 0.0 if sampling.greedy else uniform(sampling.seed or 0, index, t)
        tokens.append(next_token(tokens, number))
        if tokens[-1] in eos and not sampling.ignore_eos:
            break
        if tokens[-1] in sampling.stop_token_ids:
            break
    return tokens[len(request.prompt_ids) :]


Rows = list[int | None]


class FakeDisk:
    """A disk without files: `paged_cache.tiers.Disk`, and the side that the device sees.

    Args:
        max_blocks: the oldest is dropped for another, even while it is being read.
        delay: polls from a `load` to its end.
        broken: every so many reads one fails; 0 is never.
    """

    def __init__(self, max_blocks: int, delay: int = 0, broken: int = 0) -> None:
        self.max_blocks, self.delay, self.broken = max_blocks, delay, broken
        self.files: dict[Key, Rows] = {}
        self.loaded: dict[Key, Rows] = {}
        self.reading: list[list[Any]] = []  # [polls left, key]
        self.num_bytes = self.num_errors = self.reads = 0

    @property
    def num_blocks(self) -> int:
        return len(self.files)

    def holds(self, key: Key) -> bool:
        return key in self.files

    def save(self, key: Key, rows: Rows) -> None:
        self.files[key] = rows
        if len(self.files) > self.max_blocks:
            del self.files[next(iter(self.files))]

    def load(self, key: Key) -> None:
        assert all(key != reading for _, reading in self.reading), "read twice at once"
        self.reading.append([self.delay, key])

    def poll(self) -> list[tuple[Key, bool]]:
        ended: list[tuple[Key, bool]] = []
        for item in self.reading:
            item[0] -= 1
        for _, key in [item for item in self.reading if item[0] < 0]:
            self.reads += 1
            good = key in self.files and not (self.broken and self.reads % self.broken == 0)
            if good:
                self.loaded[key] = self.files[key]
            else:
                self.files.pop(key, None)
            ended.append((key, good))
        self.reading = [item for item in self.reading if item[0] >= 0]
        return ended

    def take(self, key: Key) -> Rows:
        return self.loaded.pop(key)

    def discard(self, key: Key) -> None:
        del self.loaded[key]

    def wait(self, seconds: float) -> None:
        pass


class FakeDevice:
    """Attributes:
    computed: tokens computed so far, over all sequences and steps.
    copied: blocks copied so far, by kind.
    """

    def __init__(
        self,
        num_slots: int,
        block_size: int,
        windows: tuple[int, ...] = (0,),
        disk: FakeDisk | None = None,
    ) -> None:
        self.disk = disk
        self.block_size = block_size
        self.windows = windows
        self.tokens: list[list[int]] = [[] for _ in range(num_slots)]
        self.known: list[list[int]] = [[] for _ in range(num_slots)]
        self.tables: list[list[dict[int, int]]] = [[] for _ in range(num_slots)]
        self.kv: dict[tuple[int, int], int] = {}  # (block, row) -> digest
        self.host: dict[tuple[int, int], int] = {}  # (slot, row) -> digest
        self.copied: Counter[CopyKind] = Counter()
        self.steps = self.computed = 0

    def launch(self, plan: StepPlan) -> StepResult:
        return self.run(plan)

    def run(self, plan: StepPlan) -> StepResult:
        self.steps += 1
        self._apply(plan)
        counts = [item.count for item in plan.scheduled]
        assert counts == sorted(counts, key=lambda count: count > 1), "single tokens come first"
        assert len({item.slot for item in plan.scheduled}) == len(plan.scheduled)
        # A step stores everything before it reads anything, as each layer of a model does.
        for item in plan.scheduled:
            self._store(item)
        for item in plan.scheduled:
            self._attend(item)
        scores = [self._score(item) for item in plan.scheduled if item.num_scored]
        tokens = [self._sample(item) for item in plan.scheduled if item.wants_token]
        return StepResult(plan.id, tokens, prompt_scores=scores)

    def _apply(self, plan: StepPlan) -> None:
        for new in plan.admitted:
            self.tokens[new.slot] = new.tokens[:]
            self.known[new.slot] = []
            self.tables[new.slot] = [{} for _ in self.windows]
        for entries in plan.new_blocks:
            assert min(entries.blocks) >= 0
            table = self.tables[entries.slot][entries.group]
            table.update(enumerate(entries.blocks, entries.first))
        self._copy_with_disk(plan)
        for kind, source, target in COPIES:
            copies = [copy for copy in plan.copies if copy.kind == kind]
            self._copy(copies, getattr(self, source), getattr(self, target))
            self.copied[kind] += len(copies)

    def _copy_with_disk(self, plan: StepPlan) -> None:
        written = [copy.slot for copy in plan.disk_copies if copy.kind == "from_disk"]
        written += [copy.dst for copy in plan.copies if copy.kind == "to_host"]
        assert len(set(written)) == len(written), "a slot is written twice"
        kinds = [copy.kind for copy in plan.disk_copies]
        assert kinds == sorted(kinds, reverse=True), "what leaves a slot comes first"
        for copy in plan.disk_copies:
            assert self.disk is not None
            places = [(copy.slot, row) for row in range(self.block_size)]
            if copy.kind == "to_disk":
                self.disk.save(copy.key, [self.host.get(place) for place in places])
                continue
            for place, value in zip(places, self.disk.take(copy.key), strict=True):
                self.host.pop(place, None)
                if value is not None:
                    self.host[place] = value

    def _copy(
        self,
        copies: list[BlockCopy],
        source: dict[tuple[int, int], int],
        target: dict[tuple[int, int], int],
    ) -> None:
        """All at once, as one launch does it in any order."""
        sources, targets = {c.src for c in copies}, {c.dst for c in copies}
        assert source is not target or not sources & targets, "copied from and to in one launch"
        assert len(targets) == len(copies), "two copies have one target"
        for copy in copies:
            for row in range(self.block_size):
                target.pop((copy.dst, row), None)
                if (copy.src, row) in source:
                    target[copy.dst, row] = source[copy.src, row]

    def _store(self, item: ScheduledSeq) -> None:
        digests = self._digests(item.slot)
        for position in range(item.start, item.start + item.count):
            self.computed += 1
            for group in range(len(self.windows)):
                self.kv[self._place(item.slot, group, position)] = digests[position]

    def _attend(self, item: ScheduledSeq) -> None:
        digests = self._digests(item.slot)
        for group, window in enumerate(self.windows):
            first = max(item.start - window + 1, 0) if window else 0
            for position in range(first, item.start + item.count):
                found = self.kv.get(self._place(item.slot, group, position))
                assert found == digests[position], (
                    f"slot {item.slot}, group {group}, position {position}: not its own KV"
                )

    def _digests(self, slot: int) -> list[int]:
        """What each position of the sequence in `slot` stores."""
        known, tokens = self.known[slot], self.tokens[slot]
        known.extend(digest(tokens[:end]) for end in range(len(known) + 1, len(tokens) + 1))
        return known

    def _score(self, item: ScheduledSeq) -> Scores:
        """In place of log-probabilities the positions themselves, which must be computed."""
        positions = range(item.score_from, item.score_from + item.num_scored)
        assert item.start <= positions[0] <= positions[-1] < item.start + item.count
        return Scores([float(p) for p in positions], [], [], [])

    def _sample(self, item: ScheduledSeq) -> int:
        tokens = self.tokens[item.slot]
        assert len(tokens) == item.start + item.count, "sampled before the last token"
        tokens.append(next_token(tokens, item.uniform))
        return tokens[-1]

    def _place(self, slot: int, group: int, position: int) -> tuple[int, int]:
        block, row = divmod(position, self.block_size)
        return self.tables[slot][group][block], row


def make_request(
    name: str,
    prompt: list[int],
    max_tokens: int = 8,
    n: int = 1,
    cache_salt: str = "",
    tenant: str = "",
    priority: int = 0,
    **sampling: object,
) -> Request:
    params = {"temperature": 0.0, "seed": 1, **sampling}
    return Request(
        id=name,
        prompt_ids=tuple(prompt),
        n=n,
        cache_salt=cache_salt,
        tenant=tenant,
        priority=priority,
        sampling=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
    )
