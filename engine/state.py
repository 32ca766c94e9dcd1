"""What the device remembers of every running sequence, one row per slot."""

from __future__ import annotations

from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scheduler.plan import StepPlan
from scheduler.request import SamplingParams

_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
# A forbidden token has this added, not minus infinity: where a grammar leaves nothing else, it is
# still drawn.
FORBIDDEN = -1e9
ALWAYS = 2**31

Kind = Literal["greedy", "drawn", "filtered"]
KINDS: tuple[Kind, ...] = ("greedy", "drawn", "filtered")
"""How the rows of a step are sampled, from the cheapest to the dearest: whoever shares a step with
somebody who asks for more is sampled the dearer way too, with the same result."""
_WAYS = (*KINDS, None)

Traits = npt.NDArray[np.void]
"""What the host must know of slots or rows to choose the cheapest path: fields of `TRAITS`."""

TRAITS = np.dtype(
    [
        ("greedy", np.bool_),
        ("filtered", np.bool_),
        ("top_k", np.int64),
        ("penalized", np.bool_),
        ("num_edits", np.int64),
        ("logprobs", np.int64),  # -1 where none are asked for
        ("prompt_logprobs", np.int64),  # the same
        ("length", np.int64),  # tokens before the one to choose; of rows, not of slots
    ]
)


class SlotState:
    """Rows of device tensors that steps gather from, so that no step moves a sequence's data.

    A preempted sequence simply loses its row: coming back means filling one again.

    Attributes:
        nobody: a slot more, which no sequence ever has.
        tokens: int32 [slots, max_model_len]; ids so far. The sampler writes the newest one here,
            where the next step finds it without a round trip to the host.
        block_tables: int32 [groups, slots, max_blocks]
        temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty:
            float32 [slots]
        top_k: int64 [slots], 0 where off; num_prompt, num_edits: int64 [slots]
        edit_ids, edit_until: int64 [slots, most edits so far]; edit_values: float32, the same. The
            first num_edits of a row count: `value` is added to the logit of token `id` while fewer
            than `until` tokens are generated.
    """

    def __init__(
        self,
        num_slots: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        num_groups: int = 1,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.device = device
        self.nobody = num_slots
        num_slots += 1
        self.max_blocks = -(-max_model_len // block_size)
        self.tokens = torch.zeros(num_slots, max_model_len, dtype=torch.int32, device=device)
        shape = (num_groups, num_slots, self.max_blocks)
        self.block_tables = torch.zeros(shape, dtype=torch.int32, device=device)
        self._floats = torch.zeros(6, num_slots, device=device)
        self.temperature, self.top_p, self.min_p = self._floats[:3]
        self.presence_penalty, self.frequency_penalty, self.repetition_penalty = self._floats[3:]
        self._counts = torch.zeros(3, num_slots, dtype=torch.int64, device=device)
        self.top_k, self.num_prompt, self.num_edits = self._counts
        self.edit_ids, self.edit_until = torch.zeros(
            2, num_slots, 0, dtype=torch.int64, device=device
        )
        self.edit_values = torch.zeros(num_slots, 0, device=device)
        self._eos_token_ids = eos_token_ids
        self._traits = np.zeros(num_slots, TRAITS)
        self._ways = [0] * num_slots  # places in `_WAYS`

    def traits(self, slots: list[int], lengths: list[int]) -> Traits:
        """[rows]; of rows in `slots`, whose next token has `lengths` tokens before it."""
        rows = self._traits[slots]
        rows["length"] = lengths
        return rows

    def kind(self, slots: list[int]) -> Kind | None:
        """How a step samples for `slots`; None where one asks for more than a kind has."""
        return _WAYS[max(map(self._ways.__getitem__, slots))]

    def to_device(self, values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        """A host list as a device tensor, without waiting for the device."""
        return self.move(torch.tensor(values, dtype=dtype))

    def move(self, host: Tensor) -> Tensor:
        """A host tensor on the device, without waiting for it."""
        return self.pin(host).to(self.device, non_blocking=True)

    def pin(self, host: Tensor) -> Tensor:
        """A host tensor where the device copies it from without anybody waiting. Its memory is
        used again only after that."""
        return host if self.device.type == "cpu" else host.pin_memory()

    def apply(self, plan: StepPlan) -> None:
        """Fills the rows of newly admitted sequences and the table entries that changed."""
        if plan.admitted:
            self._admit(plan)
        if plan.new_blocks:
            _, slots, width = self.block_tables.shape
            starts = [(n.group * slots + n.slot) * width + n.first for n in plan.new_blocks]
            self._scatter(self.block_tables, starts, [new.blocks for new in plan.new_blocks])

    def _admit(self, plan: StepPlan) -> None:
        width = self.tokens.shape[1]
        starts = [new.slot * width for new in plan.admitted]
        self._scatter(self.tokens, starts, [new.tokens for new in plan.admitted])
        slots = self.to_device([new.slot for new in plan.admitted], torch.int64)
        params = [new.sampling for new in plan.admitted]
        floats = [getattr(p, name) for name in _FLOATS for p in params]
        edits = [self._edits(p) for p in params]
        counts = [
            *(max(p.top_k, 0) for p in params),
            *(new.num_prompt for new in plan.admitted),
            *map(len, edits),
        ]
        rows = len(params)
        self._floats[:, slots] = self.to_device(floats, torch.float32).view(-1, rows)
        self._counts[:, slots] = self.to_device(counts, torch.int64).view(-1, rows)
        for new, made in zip(plan.admitted, edits, strict=True):
            self._traits[new.slot] = _traits(new.sampling, len(made))
            self._ways[new.slot] = _WAYS.index(_kind(new.sampling, len(made)))
            if made:
                self._write_edits(new.slot, made)

    def _edits(self, params: SamplingParams) -> list[tuple[int, int, float]]:
        """(id, until, value) of every token whose logit the request changes."""
        edits = [(token, ALWAYS, bias) for token, bias in params.logit_bias.items()]
        if params.min_tokens:
            ends = {*params.stop_token_ids, *(() if params.ignore_eos else self._eos_token_ids)}
            edits += [(token, params.min_tokens, FORBIDDEN) for token in sorted(ends)]
        return edits

    def _write_edits(self, slot: int, edits: list[tuple[int, int, float]]) -> None:
        missing = len(edits) - self.edit_ids.shape[1]
        if missing > 0:
            self.edit_ids, self.edit_until, self.edit_values = (
                torch.nn.functional.pad(table, (0, missing))
                for table in (self.edit_ids, self.edit_until, self.edit_values)
            )
        ids, until, values = zip(*edits, strict=True)
        self.edit_ids[slot, : len(edits)] = self.to_device(list(ids), torch.int64)
        self.edit_until[slot, : len(edits)] = self.to_device(list(until), torch.int64)
        self.edit_values[slot, : len(edits)] = self.to_device(list(values), torch.float32)

    def _scatter(self, rows: Tensor, starts: list[int], pieces: list[list[int]]) -> None:
        """Writes each piece into the flattened `rows` from its start on."""
        if self.device.type != "cpu":
            self._scatter_at_once(rows, starts, pieces)
            return
        flat = rows.view(-1).numpy()
        for start, piece in zip(starts, pieces, strict=True):
            flat[start : start + len(piece)] = piece

    def _scatter_at_once(self, rows: Tensor, starts: list[int], pieces: list[list[int]]) -> None:
        """The same in one operation of the device."""
        where = np.concatenate(
            [np.arange(s, s + len(p)) for s, p in zip(starts, pieces, strict=True)]
        )
        values = self.to_device(list(chain.from_iterable(pieces)), torch.int32)
        rows.view(-1)[self.move(torch.from_numpy(where))] = values


def _kind(params: SamplingParams, num_edits: int) -> Kind | None:
    if num_edits or params.penalized or params.logprobs is not None:
        return None
    if params.greedy:
        return "greedy"
    return "filtered" if _filtered(params) else "drawn"


def _filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _traits(params: SamplingParams, num_edits: int) -> tuple[int | bool, ...]:
    """One value of `TRAITS`."""
    asked = (params.logprobs, params.prompt_logprobs)
    counts = [-1 if count is None else count for count in asked]
    return (
        params.greedy,
        _filtered(params) and not params.greedy,
        max(params.top_k, 0),
        params.penalized,
        num_edits,
        *counts,
        0,
    )
