"""What requests change about their logits before temperature and filters: bias, forbidden ends,
penalties. One pass over all rows that ask for something; the others cost nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.state import SlotState, Traits


def apply_rules(
    logits: Tensor, state: SlotState, slots: Tensor, at: Tensor, traits: Traits
) -> Tensor:
    """Logits with every row's own rules applied.

    The order is bias, forbidden ends, repetition, frequency and presence penalty, as in vLLM.

    Args:
        logits: [rows, vocab]; left as they are
        slots: int64 [rows]; whose rules apply
        at: int64 [rows]; position of the token that is about to be chosen
        traits: of the rows, on the host

    Returns:
        [rows, vocab]; `logits` itself where no row has a rule
    """
    ruled = np.flatnonzero(traits["num_edits"] | traits["penalized"])
    if not len(ruled):
        return logits
    if len(ruled) == len(traits):
        return _change(logits.float(), state, slots, at, traits)
    rows = state.to_device(ruled.tolist(), torch.int64)
    changed = _change(logits[rows].float(), state, slots[rows], at[rows], traits[ruled])
    return logits.float().index_copy(0, rows, changed)


def _change(logits: Tensor, state: SlotState, slots: Tensor, at: Tensor, traits: Traits) -> Tensor:
    if traits["num_edits"].any():
        logits = _edit(logits, state, slots, at, int(traits["num_edits"].max()))
    if traits["penalized"].any():
        history = state.tokens[slots][:, : int(traits["length"].max())].long()
        logits = _penalize(logits, state, slots, at, history)
    return logits


def _edit(logits: Tensor, state: SlotState, slots: Tensor, at: Tensor, width: int) -> Tensor:
    """Adds what the slots' edits say: entry e counts while fewer than `until` tokens are there."""
    generated = at - state.num_prompt[slots]
    place = torch.arange(width, device=logits.device)
    counts = (place < state.num_edits[slots, None]) & (
        generated[:, None] < state.edit_until[slots, :width]
    )
    values = torch.where(counts, state.edit_values[slots, :width], 0.0)
    return logits.scatter_add(1, state.edit_ids[slots, :width], values)


def _penalize(
    logits: Tensor, state: SlotState, slots: Tensor, at: Tensor, history: Tensor
) -> Tensor:
    """The tokens so far lie on the device, so counting them anew each step keeps no counts that
    preemption, forks or a second plan in flight could get wrong; it costs less than the one pass
    over the vocabulary that any penalty takes.

    Args:
        history: int64 [rows, width]; ids from position 0 on, anything from position `at` on
    """
    position = torch.arange(history.shape[1], device=logits.device)
    there = position < at[:, None]
    generated = there & (position >= state.num_prompt[slots, None])
    zeros = torch.zeros_like(logits)
    seen = zeros.scatter_add(1, history, there.float()) > 0
    counts = zeros.scatter_add(1, history, generated.float())
    repetition = state.repetition_penalty[slots, None]
    scale = torch.where(logits > 0, 1 / repetition, repetition)
    logits = torch.where(seen, logits * scale, logits)
    logits = logits - state.frequency_penalty[slots, None] * counts
    return logits - state.presence_penalty[slots, None] * (counts > 0)
