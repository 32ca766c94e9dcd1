import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import sampler
from engine.sampler import invert_cdf, sample
from engine.state import SlotState
from scheduler.plan import Admitted, StepPlan
from scheduler.request import SamplingParams


def draw(logits: torch.Tensor, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    state = SlotState(len(params), 4, 1, torch.device("cpu"))
    state.apply(StepPlan(0, admitted=[Admitted(i, [0], 1, p) for i, p in enumerate(params)]))
    slots = list(range(len(params)))
    traits = state.traits(slots, [1] * len(slots))
    draws = torch.tensor(uniforms).double()
    return sample(logits, state, torch.tensor(slots), traits, draws).tolist()


def allowed(logits: np.ndarray, params: SamplingParams) -> set[int]:
    """The plain definition of the filters, in float64 and by sorting."""
    scaled = logits.astype(np.float64) / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    probs[probs < params.min_p * probs.max()] = 0
    order = np.argsort(-probs, kind="stable")
    if params.top_k > 0:
        probs[order[params.top_k :]] = 0
    probs /= probs.sum()
    kept, mass = set(), 0.0
    for token in order:
        if (params.top_p < 1 and mass >= params.top_p) or probs[token] == 0:
            break
        kept.add(int(token))
        mass += probs[token]
    return kept


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.sampled_from([1, 5, 255, 256, 257, 1500]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([-1, 0, 1, 3, 50, 2000]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
)
def test_draws_only_and_all_that_the_filters_leave(seed, vocab, temperature, top_k, top_p, min_p):
    rng = np.random.default_rng(seed)
    row = rng.normal(size=vocab).astype(np.float32) * 3
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = allowed(row, params)
    uniforms = np.linspace(0, 1, 200, endpoint=False)
    drawn = draw(torch.from_numpy(row).repeat(200, 1), [params] * 200, list(uniforms))
    extra = set(drawn) - kept
    # float32 against float64: the last token of a nucleus may fall to either side.
    assert len(extra) <= (1 if top_p < 1 else 0), (extra, kept)
    if len(kept) <= 3:
        assert len(kept - set(drawn)) <= 1 or min_p < 0.9


def test_greedy_and_sampled_rows_share_a_batch():
    logits = torch.tensor([[0.0, 5.0, 1.0], [5.0, 0.0, 0.0], [1.0, 1.0, 9.0]])
    greedy, hot = SamplingParams(temperature=0), SamplingParams(temperature=1.0, top_k=1)
    assert draw(logits, [greedy, hot, greedy], [0.9, 0.9, 0.9]) == [1, 0, 2]


@pytest.mark.parametrize("vocab", [7, 300, 5000])
def test_frequencies_follow_the_probabilities(vocab: int):
    torch.manual_seed(0)
    logits = torch.randn(vocab) * 2
    count = 20_000
    uniforms = (torch.arange(count).double() + 0.5) / count
    probs = torch.softmax(logits, -1)
    drawn = invert_cdf(probs.expand(count, -1), uniforms)
    found = torch.bincount(drawn, minlength=vocab).double() / count
    assert (found - probs).abs().max() < 2 / count + 1e-6


def test_never_draws_a_token_of_probability_zero():
    probs = torch.zeros(4, 700)
    probs[:, 3], probs[:, 400] = 0.25, 0.75
    ends = torch.tensor([0.0, 0.25, 0.2500001, 1 - 2**-53], dtype=torch.float64)
    assert invert_cdf(probs, ends).tolist() == [3, 400, 400, 400]


def test_the_ranked_head_does_not_change_the_answer(monkeypatch: pytest.MonkeyPatch):
    """A flat row needs more than the head for its nucleus, a peaked one does not."""
    torch.manual_seed(1)
    for spread in (0.1, 6.0):
        logits = torch.randn(8, 3000) * spread
        params = [SamplingParams(top_p=p) for p in (0.2, 0.5, 0.9, 0.99)] * 2
        uniforms = [0.1, 0.5, 0.9, 0.999] * 2
        short = draw(logits, params, uniforms)
        monkeypatch.setattr(sampler, "HEAD", 10_000)
        assert draw(logits, params, uniforms) == short
        monkeypatch.undo()
