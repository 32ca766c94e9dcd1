"""A device without tensors: runs plans on plain Python lists, through the blocks.

Its "keys and values" are the tokens themselves, and the token it samples is a hash of every token
that it reads back through the block table. A wrong block, a lost write or a stale table therefore
changes the answer, which `expected` predicts from the prompt alone.
"""

import hashlib
import struct

from scheduler.plan import StepPlan, StepResult
from scheduler.request import Request, SamplingParams

VOCAB = 97


def next_token(tokens: list[int], uniform: float) -> int:
    data = struct.pack(f"<{len(tokens)}qd", *tokens, uniform)
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little") % VOCAB


def expected(request: Request, index: int, eos: frozenset[int]) -> list[int]:
    """The answer of one sequence, computed alone and without a scheduler."""
    from scheduler.random_numbers import uniform

    tokens, sampling = list(request.prompt_ids), request.sampling
    for t in range(sampling.max_tokens or 0):
        number = 0.0 if sampling.greedy else uniform(sampling.seed or 0, index, t)
        tokens.append(next_token(tokens, number))
        if tokens[-1] in eos and not sampling.ignore_eos:
            break
        if tokens[-1] in sampling.stop_token_ids:
            break
    return tokens[len(request.prompt_ids) :]


class FakeDevice:
    def __init__(self, num_slots: int, block_size: int) -> None:
        self.block_size = block_size
        self.tokens: list[list[int]] = [[] for _ in range(num_slots)]
        self.tables: list[list[int]] = [[] for _ in range(num_slots)]
        self.kv: dict[tuple[int, int], int] = {}
        self.steps = 0

    def run(self, plan: StepPlan) -> StepResult:
        self.steps += 1
        for new in plan.admitted:
            self.tokens[new.slot] = new.tokens[:]
            self.tables[new.slot] = []
        for blocks in plan.new_blocks:
            table = self.tables[blocks.slot]
            assert len(table) == blocks.first, "blocks must be appended where the table ends"
            table.extend(blocks.blocks)
        counts = [item.count for item in plan.scheduled]
        assert counts == sorted(counts, key=lambda count: count > 1), "single tokens come first"
        assert len({item.slot for item in plan.scheduled}) == len(plan.scheduled)
        # All writes of a step happen before its reads, as in one batched forward pass.
        for item in plan.scheduled:
            for position in range(item.start, item.start + item.count):
                self.kv[self._place(item.slot, position)] = self.tokens[item.slot][position]
        sampled = []
        for item in plan.scheduled:
            if item.wants_token:
                end = item.start + item.count
                seen = [self.kv[self._place(item.slot, p)] for p in range(end)]
                sampled.append(next_token(seen, item.uniform))
                assert len(self.tokens[item.slot]) == end, "sampled before the last token"
                self.tokens[item.slot].append(sampled[-1])
        return StepResult(plan.id, sampled)

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        block, row = divmod(position, self.block_size)
        return self.tables[slot][block], row


def make_request(
    name: str, prompt: list[int], max_tokens: int = 8, n: int = 1, **sampling: object
) -> Request:
    params = {"temperature": 0.0, "seed": 1, **sampling}
    return Request(
        id=name,
        prompt_ids=tuple(prompt),
        n=n,
        sampling=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
    )
