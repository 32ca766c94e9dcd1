"""The next token of every row: greedy, or drawn with a random number that the plan chose."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.state import SlotState, Traits

# Most of a nucleus (top-p) lies in few tokens: on CPUs that many are ranked before all are.
HEAD = 1024
CDF_BLOCK = 256


def sample(
    logits: Tensor,
    state: SlotState,
    slots: Tensor,
    traits: Traits,
    uniforms: Tensor,
) -> Tensor:
    """One token id per row.

    The order is temperature, min-p, top-k, top-p, as in vLLM. A row's token depends on its own
    logits, parameters and random number alone.

    Args:
        logits: [rows, vocab]
        slots: int64 [rows]; whose parameters apply
        traits: of the rows, on the host, to choose the cheapest path
        uniforms: float64 [rows] in [0, 1); ignored where the row is greedy

    Returns:
        int64 [rows]
    """
    greedy = logits.argmax(-1)
    if traits["greedy"].all():
        return greedy
    temperature = state.temperature[slots]
    is_greedy = temperature == 0
    # A floor keeps the division finite; at 1e-5 the distribution is a spike already.
    scale = torch.where(is_greedy, 1.0, temperature).clamp_min(1e-5)
    probs = torch.softmax(logits.float() / scale[:, None], -1)
    if traits["filtered"].any():
        max_k = int(traits["top_k"].max())
        probs = _filter(probs, state.top_k[slots], state.top_p[slots], state.min_p[slots], max_k)
    return torch.where(is_greedy, greedy, invert_cdf(probs, uniforms))


def _filter(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, max_k: int) -> Tensor:
    """Sets the probabilities of excluded tokens to 0. Tokens tied at a threshold stay.

    Args:
        probs: [rows, vocab]; top_k: int64 [rows], 0 is off; top_p, min_p: [rows]
        max_k: largest top_k, known on the host
    """
    floor = min_p * probs.amax(-1)
    likely = torch.where(probs >= floor[:, None], probs, 0.0).sum(-1)  # what min-p leaves
    head = _ranked_head(probs, floor, top_k, top_p, max_k)  # [rows, n], descending
    head = torch.where(head >= floor[:, None], head, 0.0)
    rank = torch.arange(head.shape[1], device=probs.device)
    k = torch.where(top_k > 0, top_k, probs.shape[1])
    kept = torch.where(rank < k[:, None], head, 0.0)
    kth = head.gather(1, (k - 1).clamp_max(head.shape[1] - 1)[:, None]).squeeze(1)
    floor = torch.maximum(floor, torch.where(top_k > 0, kth, 0.0))
    # The nucleus: ranks before which less than top_p of what is kept has gathered.
    before = kept.cumsum(-1) - kept
    total = torch.where(top_k > 0, kept.sum(-1), likely)
    size = (before < (top_p * total)[:, None]).sum(-1).clamp_min(1)
    nucleus = kept.gather(1, (size - 1)[:, None]).squeeze(1)
    floor = torch.maximum(floor, torch.where(top_p < 1, nucleus, 0.0))
    return torch.where(probs >= floor[:, None], probs, 0.0)


def _ranked_head(probs: Tensor, floor: Tensor, top_k: Tensor, top_p: Tensor, max_k: int) -> Tensor:
    """The largest probabilities of each row, descending: as many as the filters can need."""
    vocab = probs.shape[1]
    # On a GPU asking whether the head suffices would wait for the device; ranking all is cheaper.
    if vocab > HEAD and max_k <= HEAD and not probs.is_cuda:
        head = probs.topk(HEAD, -1).values
        enough = (top_p >= 1) | (top_k > 0) | (head.sum(-1) >= top_p) | (head[:, -1] < floor)
        if bool(enough.all()):
            return head
    return probs.sort(-1, descending=True).values


def invert_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """For each row the first token at which the cumulated probability passes its random number.

    Two levels, sums of blocks and then one block, cost one pass over `probs` and keep the sums
    exact enough (float64) at any vocabulary size.

    Args:
        probs: [rows, vocab]; not necessarily normalized, not all zero
        uniforms: float64 [rows] in [0, 1)

    Returns:
        int64 [rows]; never a token of probability 0
    """
    rows, vocab = probs.shape
    blocks = torch.nn.functional.pad(probs, (0, -vocab % CDF_BLOCK)).view(rows, -1, CDF_BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniforms[:, None] * sums[:, -1:]
    block = _first_above(sums, target)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, CDF_BLOCK)).squeeze(1)
    offset = _first_above(inside.double().cumsum(-1), target - before)
    return (block * CDF_BLOCK + offset).squeeze(1)


def _first_above(cumulated: Tensor, target: Tensor) -> Tensor:
    """[rows, 1]; first index whose cumulated value is above target. Rounding may put the target on
    or past the end: it is drawn back below it, so that the index has a positive share."""
    end = torch.nextafter(cumulated[:, -1:], torch.zeros_like(target))
    index = torch.searchsorted(cumulated, torch.minimum(target, end), right=True)
    return index.clamp_max(cumulated.shape[1] - 1)  # only NaN gets past the end
