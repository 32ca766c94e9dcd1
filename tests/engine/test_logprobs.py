"""Log-probabilities of answers and prompts against the whole model run at once."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import logprobs
from engine.loop import EngineLoop
from engine.protocol import Submit, TokenDelta
from scheduler.plan import Scores
from scheduler.request import Request
from tests.engine.drive import engine, request
from tests.models import checkpoints

PROMPT = list(range(40, 90))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make("qwen2-sliding", tmp_path_factory.mktemp("logprobs"))


@pytest.fixture(scope="module")
def oracle(path: Path):
    """tokens -> [tokens, vocab], the log-softmax after each of them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def run(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    return run


def deltas(loop: EngineLoop, requests: list[Request]) -> list[TokenDelta]:
    loop.take(Submit(requests))
    found = []
    while loop.scheduler.has_work:
        loop.step()
        output = loop.collect()
        assert not output.refused, output.refused
        assert not output.failed, output.failed
        found.extend(output.deltas)
    loop.scheduler.check()
    return found


def join(parts: list[Scores | None]) -> Scores:
    return Scores.join(part for part in parts if part is not None)


def check(scores: Scores, rows: torch.Tensor, tokens: list[int], most: int) -> None:
    """`rows` are the oracle's, one for each of `tokens`."""
    assert len(scores.logprobs) == len(tokens)
    chosen = rows.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
    assert torch.allclose(torch.tensor(scores.logprobs), chosen, atol=2e-3)
    top = rows.topk(most, -1)
    assert torch.allclose(torch.tensor(scores.top_logprobs), top.values, atol=2e-3)
    for place, ids in enumerate(scores.top_ids):
        assert len(ids) == most
        rank = scores.ranks[place]
        if rank <= most:
            assert ids[rank - 1] == tokens[place]


def test_answers_and_prompts_tell_the_models_own_logprobs(path: Path, oracle):
    """Before temperature, bias and penalties; each request as many as it asks for."""
    hot = {"temperature": 1.3, "logit_bias": {5: 8.0}, "presence_penalty": 1.0, "top_k": 20}
    items = [
        request("a", PROMPT, logprobs=3, prompt_logprobs=2, **hot),
        request("b", PROMPT[:7], logprobs=1),
        request("c", PROMPT, temperature=0.9),
        request("d", PROMPT, prompt_logprobs=1, max_tokens=0),
    ]
    found = deltas(engine(path, max_num_batched_tokens=24, max_num_seqs=8), items)
    asked = {"a": (3, 2), "b": (1, None), "c": (None, None), "d": (None, 1)}
    for item in items:
        own = [delta for delta in found if delta.request_id == item.id]
        tokens = [token for delta in own for token in delta.tokens]
        rows = oracle([*item.prompt_ids, *tokens])
        most, most_of_prompt = asked[item.id]
        answer = join([delta.scores for delta in own])
        if most is None:
            assert answer.logprobs == []
        else:
            check(answer, rows[len(item.prompt_ids) - 1 : -1], tokens, most)
        prompt = join([delta.prompt_scores for delta in own])
        if most_of_prompt is None:
            assert prompt.logprobs == []
        else:
            check(
                prompt, rows[: len(item.prompt_ids) - 1], list(item.prompt_ids[1:]), most_of_prompt
            )
        assert own[-1].finish_reason == "length"
    assert [delta.tokens for delta in found if delta.request_id == "d"][-1] == []


def test_prompt_logprobs_pass_the_cache_over_and_are_told_once(path: Path, oracle):
    loop = engine(path, num_gpu_blocks_override=30, max_num_batched_tokens=32, max_num_seqs=4)
    deltas(loop, [request("before", PROMPT)])
    hits = loop.scheduler.prefix.hits
    scored = Request(
        id="scored",
        prompt_ids=tuple(PROMPT),
        n=2,
        sampling=request("", PROMPT, prompt_logprobs=0, max_tokens=60).sampling,
    )
    others = [request(f"o{i}", range(60 + i, 160 + i), max_tokens=60) for i in range(2)]
    found = deltas(loop, [*others, scored])
    assert loop.scheduler.num_preemptions > 0
    told = [delta for delta in found if delta.prompt_scores is not None]
    assert {(delta.request_id, delta.index) for delta in told} == {("scored", 0)}
    check(join([d.prompt_scores for d in told]), oracle(PROMPT)[:-1], PROMPT[1:], 0)
    assert all(d.cached_tokens == 0 for d in found if (d.request_id, d.index) == ("scored", 0))
    assert loop.scheduler.prefix.hits == hits


def test_only_prompts_that_tell_have_the_results_of_all_rows(path: Path, monkeypatch):
    loop = engine(path, max_num_batched_tokens=32, max_num_seqs=4)
    model, seen = loop.runner.model, []
    forward = model.forward

    def watched(token_ids, ctx):
        hidden = forward(token_ids, ctx)
        seen.append((len(token_ids), len(hidden)))
        return hidden

    monkeypatch.setattr(model, "forward", watched)
    prompt = range(40)
    deltas(loop, [request("plain", prompt, max_tokens=2)])
    assert seen == [(32, 0), (8, 1), (1, 1)]
    seen.clear()
    deltas(loop, [request("told", prompt, max_tokens=2, prompt_logprobs=0)])
    assert seen == [(32, 32), (8, 8), (1, 1)]


def test_long_prompts_are_scored_in_pieces(monkeypatch: pytest.MonkeyPatch):
    hidden, tokens = torch.randn(10, 8), torch.arange(10)
    head = torch.randn(8, 30)
    whole = logprobs.score_prompt(hidden, lambda rows: rows @ head, tokens, 2).read()
    monkeypatch.setattr(logprobs, "PIECE_ROWS", 3)
    pieces = logprobs.score_prompt(hidden, lambda rows: rows @ head, tokens, 2).read()
    assert pieces.top_ids == whole.top_ids
    assert pieces.logprobs == pytest.approx(whole.logprobs, abs=1e-5)
