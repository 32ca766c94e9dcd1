"""Shared blocks on real tensors: prefix hits, forks and mixed windows change no answer."""

from pathlib import Path

import pytest

from engine.loop import EngineLoop
from scheduler.request import Request, SamplingParams
from tests.engine.drive import answers, engine, request
from tests.models import checkpoints

SYSTEM = list(range(30, 100))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make("qwen2-sliding", tmp_path_factory.mktemp("sharing"))


def chats() -> list[Request]:
    """Eight prompts with a common beginning."""
    return [request(f"r{i}", [*SYSTEM, 200 + i, 7 * i + 3], max_tokens=24) for i in range(8)]


def alone(path: Path, items: list[Request]) -> dict[str, list[int]]:
    loop = engine(path, enable_prefix_caching=False)
    return {item.id: answers(loop, [item])[item.id] for item in items}


def test_hits_change_no_answer(path: Path):
    items = chats()
    want = alone(path, items)
    loop = engine(path)
    assert len(loop.scheduler.cache.windows) > 1, "the model should mix full and sliding layers"
    assert answers(loop, items) == want
    first = loop.scheduler.prefix.hits
    assert first >= 7 * 64, "in flight, all but one should find the system prompt"
    assert answers(loop, items) == want
    assert loop.scheduler.prefix.hits >= first + 8 * 64


def test_a_small_pool_with_evictions_changes_no_answer(path: Path):
    items = chats()
    want = alone(path, items)
    loop = engine(path, num_gpu_blocks_override=40, max_num_batched_tokens=64, max_num_seqs=8)
    for _ in range(3):
        assert answers(loop, items) == want
    assert loop.scheduler.cache.pool.num_evicted > 0
    assert loop.scheduler.num_preemptions > 0


def test_a_window_larger_than_the_context_hides_nothing(path: Path, tmp_path: Path):
    item = request("a", SYSTEM[:20], max_tokens=10)
    wide = checkpoints.make("qwen2-sliding", tmp_path, sliding_window=400)
    assert answers(engine(wide, max_model_len=32), [item]) == answers(engine(wide), [item])
    assert answers(engine(path, max_model_len=30), [item]) == alone(path, [item])


@pytest.mark.parametrize("length", [1, 16, 17, 70])
def test_forked_answers_are_those_of_separate_requests(path: Path, length: int):
    """Each answer of n has random numbers of its own; here greedy ones show the copied blocks."""
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=20, ignore_eos=True)
    prompt = tuple(SYSTEM[:length])
    one = request("one", prompt, max_tokens=20)
    want = alone(path, [one])["one"]
    loop = engine(path)
    many = by_index(loop, Request(id="many", prompt_ids=prompt, sampling=sampling, n=4))
    assert many == [want] * 4


def by_index(loop: EngineLoop, item: Request) -> list[list[int]]:
    loop.scheduler.add(item)
    tokens: list[list[int]] = [[] for _ in range(item.n)]
    while loop.scheduler.has_work:
        loop.step()
        for delta in loop.collect().deltas:
            tokens[delta.index].extend(delta.tokens)
    assert loop.scheduler.cache.pool.num_used == 0
    return tokens
