"""Bias, forbidden ends and penalties, row by row against their plain definition."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.logit_rules import apply_rules
from engine.state import FORBIDDEN, SlotState
from scheduler.plan import Admitted, StepPlan
from scheduler.request import SamplingParams

VOCAB, LONGEST, EOS = 23, 12, (2, 5)

tokens = st.integers(0, VOCAB - 1)
params = st.builds(
    SamplingParams,
    presence_penalty=st.sampled_from([0.0, 0.0, -2.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.5, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.8]),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=4),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.lists(tokens, max_size=2).map(tuple),
    ignore_eos=st.booleans(),
)
row = st.tuples(params, st.lists(tokens, min_size=1, max_size=5), st.lists(tokens, max_size=6))


def plainly(logits: np.ndarray, asked: SamplingParams, prompt: list[int], answer: list[int]):
    """The definition of OpenAI's and Hugging Face's documents, one token at a time."""
    changed = logits.astype(np.float64)
    for token, bias in asked.logit_bias.items():
        changed[token] += bias
    if len(answer) < asked.min_tokens:
        for token in {*asked.stop_token_ids, *(() if asked.ignore_eos else EOS)}:
            changed[token] += FORBIDDEN
    for token in {*prompt, *answer}:
        penalty = asked.repetition_penalty
        changed[token] *= penalty if changed[token] <= 0 else 1 / penalty
    for token in set(answer):
        changed[token] -= asked.frequency_penalty * answer.count(token) + asked.presence_penalty
    return changed


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_rows_follow_their_own_rules(rows, seed):
    """Slots are taken in reverse and for the second time: what the first had left is not seen."""
    state = SlotState(len(rows), LONGEST, 4, torch.device("cpu"), eos_token_ids=EOS)
    slots = list(reversed(range(len(rows))))
    others = SamplingParams(logit_bias={7: 50}, presence_penalty=2, min_tokens=99)
    state.apply(StepPlan(0, admitted=[Admitted(s, [7] * LONGEST, 1, others) for s in slots]))
    admitted = [
        Admitted(slot, prompt + answer, len(prompt), asked)
        for slot, (asked, prompt, answer) in zip(slots, rows, strict=True)
    ]
    state.apply(StepPlan(1, admitted=admitted))
    lengths = [len(new.tokens) for new in admitted]
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(rows), VOCAB)) * 5)
    before = logits.clone()
    traits = state.traits(slots, lengths)
    found = apply_rules(logits, state, torch.tensor(slots), torch.tensor(lengths), traits)
    assert torch.equal(logits, before)
    for i, (asked, prompt, answer) in enumerate(rows):
        want = plainly(logits[i].numpy(), asked, prompt, answer)
        np.testing.assert_allclose(found[i].numpy(), want, rtol=1e-5, atol=1e-4)


def test_rows_without_rules_cost_nothing():
    state = SlotState(2, LONGEST, 4, torch.device("cpu"), eos_token_ids=EOS)
    plain = SamplingParams(temperature=0.7, stop_token_ids=(3,))
    state.apply(StepPlan(0, admitted=[Admitted(slot, [1], 1, plain) for slot in range(2)]))
    logits, at = torch.zeros(2, VOCAB), torch.ones(2, dtype=torch.int64)
    assert apply_rules(logits, state, at - 1, at, state.traits([0, 1], [1, 1])) is logits
