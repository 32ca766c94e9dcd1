"""Log-probabilities of chosen and of given tokens, from the model's own logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scheduler.plan import Scores, StepPlan

# Logits of a long prompt are made and scored piece by piece: all at once would take gigabytes.
PIECE_ROWS = 128


class ScoreTensors(NamedTuple):
    """`Scores` before they are read: logprobs and ranks [rows], the likeliest [rows, most]."""

    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def read(self) -> Scores:
        """Waits for the device where they lie on one."""
        return Scores(
            self.logprobs.tolist(),
            self.ranks.tolist(),
            self.top_ids.tolist(),
            self.top_logprobs.tolist(),
        )


def score(logits: Tensor, tokens: Tensor, most: int) -> ScoreTensors:
    """The raw log-softmax of each row's token, its rank, and the `most` likeliest tokens.

    Args:
        logits: [rows, vocab]
        tokens: int64 [rows]
    """
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(1, tokens[:, None])
    ranks = 1 + (logits > chosen).sum(-1)
    top = logits.topk(min(most, logits.shape[1]), -1)
    return ScoreTensors((chosen - total).squeeze(1), ranks, top.indices, top.values - total)


def score_prompt(
    hidden: Tensor, logits: Callable[[Tensor], Tensor], tokens: Tensor, most: int
) -> ScoreTensors:
    """`score` of rows whose logits are not there yet and may be too many to have at once.

    Args:
        hidden: [rows, width]; the model's last hidden states
        logits: gives the logits of some of them
    """
    pieces = [slice(at, at + PIECE_ROWS) for at in range(0, hidden.shape[0], PIECE_ROWS)]
    scored = [score(logits(hidden[piece]), tokens[piece], most) for piece in pieces]
    return ScoreTensors(*(torch.cat(parts) for parts in zip(*scored, strict=True)))


def prompt_rows(plan: StepPlan) -> npt.NDArray[np.int64]:
    """[3, scored]: row of the step, slot and position of every token of a prompt that is to tell
    the log-probability of the next one."""
    pieces = [np.zeros((3, 0), np.int64)]
    first = 0
    for item in plan.scheduled:
        if item.num_scored:
            positions = np.arange(item.score_from, item.score_from + item.num_scored)
            slots = np.full_like(positions, item.slot)
            pieces.append(np.stack([positions - item.start + first, slots, positions]))
        first += item.count
    return np.concatenate(pieces, axis=1)
