"""When an answer ends. Stop strings are text and are found at the HTTP edge, not here."""

from __future__ import annotations

from typing import Literal

from scheduler.sequence import Sequence

FinishReason = Literal["stop", "length", "abort"]


def finish_reason(
    seq: Sequence, eos_token_ids: frozenset[int]
) -> tuple[FinishReason | None, int | None]:
    """Whether the newest token ends `seq`. The end of the context needs no case of its own: a
    request's max_tokens never reaches past it.

    Returns:
        (reason, stop_reason): reason is None while it goes on; stop_reason is the id of the
        request's own stop token that ended it (None for the model's end-of-sequence).
    """
    sampling = seq.request.sampling
    token = seq.tokens[-1]
    if token in sampling.stop_token_ids:
        return "stop", token
    # A grammar allows the end only where nothing else may follow, or where the model chose it.
    if token in eos_token_ids and (not sampling.ignore_eos or sampling.grammar is not None):
        return "stop", None
    generated = len(seq.tokens) - seq.num_prompt
    if sampling.max_tokens is not None and generated >= sampling.max_tokens:
        return "length", None
    return None, None
