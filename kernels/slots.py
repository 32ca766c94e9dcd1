"""What a step takes from the rows of running sequences, and the tokens it leaves there.

A slot is a row of `tokens` and, in each KV group, a row of `block_tables`. A step computes some
tokens of the sequences in some slots:

    tokens     t0 t1 t2 t3 t4 __        start 2, count 3
                    [t2 t3 t4]          token_ids; their positions are 2, 3, 4
                              at        5: context_len, and where the next token will stand
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class StepShape(NamedTuple):
    """Sizes of a step.

    Attributes:
        seqs: sequences; the first `decodes` of them compute one token each
        tokens: of all sequences
        sampled: sequences whose next token is chosen
        context: tokens of the longest sequence, those of the step included
    """

    seqs: int
    decodes: int
    tokens: int
    sampled: int
    context: int


class StepRows(NamedTuple):
    """A step, gathered.

    Attributes:
        token_ids, positions: int64 [tokens]
        context_lens: int32 [seqs]
        query_start: int32 [seqs - decodes + 1]; row offsets of the sequences behind the decodes,
            relative to row `decodes`
        block_tables: of each group int32 [seqs, at least the blocks of `context`]
        slot_mapping: of each group int32 or int64 [tokens]; block * block_size + offset
        wanted: int64 [sampled]; the row of each sampled sequence's last token
        slots, at: int64 [sampled]; where its next token will stand
        uniforms: float64 [sampled]
    """

    token_ids: Tensor
    positions: Tensor
    context_lens: Tensor
    query_start: Tensor
    block_tables: tuple[Tensor, ...]
    slot_mapping: tuple[Tensor, ...]
    wanted: Tensor
    slots: Tensor
    at: Tensor
    uniforms: Tensor


class SlotRows:
    """The rows of all slots, on any device.

    Args:
        tokens: int32 [slots, max_model_len]
        block_tables: int32 [groups, slots, max_blocks]
    """

    def __init__(self, tokens: Tensor, block_tables: Tensor, block_size: int):
        self._tokens, self._tables, self._block_size = tokens, block_tables, block_size

    def gather(self, plan: array[int], shape: StepShape) -> StepRows:
        """The inputs of a step, valid until the next one is gathered. Waits for nobody.

        Args:
            plan: int64 [3 * seqs + 2 * sampled]; slots, starts and counts of the sequences, which
                of them are sampled, and the bits of those ones' `uniforms`
        """
        seqs, decodes, count, sampled, context = shape
        moved = self._move(torch.frombuffer(plan, dtype=torch.int64))
        slots, starts, counts = moved[: 3 * seqs].view(3, seqs)
        chosen, bits = moved[3 * seqs :].view(2, sampled)
        wanted = slice(None) if sampled == seqs else chosen
        ends = torch.cumsum(counts, 0)  # row after each sequence's last
        if decodes == seqs:
            row_slots, positions = slots, starts
        else:
            row_slots = torch.repeat_interleave(slots, counts, output_size=count)
            # position = row - first row of the sequence + its start
            shift = torch.repeat_interleave(starts - (ends - counts), counts, output_size=count)
            positions = torch.arange(count, device=moved.device) + shift
        size, lens = self._block_size, starts + counts
        places, offsets = positions // size, positions % size
        return StepRows(
            token_ids=self._tokens[row_slots, positions].long(),
            positions=positions,
            context_lens=lens.int(),
            query_start=F.pad(ends[decodes:] - decodes, (1, 0)).int(),
            block_tables=tuple(table[slots, : -(-context // size)] for table in self._tables),
            slot_mapping=tuple(table[row_slots, places] * size + offsets for table in self._tables),
            wanted=(ends - 1)[wanted],
            slots=slots[wanted],
            at=lens[wanted],
            uniforms=bits.view(torch.float64),
        )

    def _move(self, host: Tensor) -> Tensor:
        device = self._tokens.device
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)

    def put(self, slots: Tensor, at: Tensor, values: Tensor) -> None:
        """Sets the token at position `at[i]` of `slots[i]`; int64 [rows] all three."""
        self._tokens[slots, at] = values.int()
