"""Greedy float32 answers equal those of transformers, token for token, however they are cut."""

import random
from pathlib import Path

import pytest
import torch

from models.loader import load_config
from paged_cache.layout import group_layers, most_blocks
from scheduler.request import Request
from tests.engine.drive import answers, engine, request
from tests.models import checkpoints

KINDS = [
    "llama",
    "llama-mha",
    "llama-mqa",
    "llama-tied",
    "llama3",
    "mistral",
    "qwen2",
    "qwen2-sliding",
    "qwen3",
    "smollm3",
    "gemma2",
    "gemma3",
    "gpt2",
]
NEW_TOKENS = 48
SHAPES = [(block_size, budget) for block_size in (16, 32) for budget in (16, 64, 512)]


def make_requests() -> list[Request]:
    """24 prompts of 1 to 300 tokens, both ends included."""
    rng = random.Random(5)
    lengths = [1, 300, 2, 15, 16, 17, 31, 32, 33] + [rng.randint(1, 300) for _ in range(15)]
    rng.shuffle(lengths)
    ids = range(3, checkpoints.VOCAB_SIZE)
    return [
        request(f"r{i}", rng.choices(ids, k=length), max_tokens=NEW_TOKENS)
        for i, length in enumerate(lengths)
    ]


@torch.no_grad()
def assert_greedy(model: torch.nn.Module, item: Request, answer: list[int]) -> None:
    """Every token is the likeliest one after all before it. By induction that makes `answer` what
    greedy decoding gives, for the price of one forward pass."""
    assert len(answer) == NEW_TOKENS
    ids = torch.tensor([[*item.prompt_ids, *answer]])
    logits = model(ids).logits[0, len(item.prompt_ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == answer


def pool_size(path: Path, block_size: int, budget: int) -> int:
    """Little more than the longest request needs, so that sequences are preempted."""
    groups = group_layers(load_config(path).layer_windows)
    windows = tuple(group.window for group in groups)
    return most_blocks(windows, block_size, 300 + NEW_TOKENS - 1, budget) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_answers_equal_transformers(kind: str, tmp_path: Path):
    path = checkpoints.make(kind, tmp_path)
    requests = make_requests()
    oracle = checkpoints.network(kind)
    first: dict[str, list[int]] = {}
    preemptions = []
    for block_size, budget in SHAPES:
        loop = engine(
            path,
            block_size=block_size,
            max_num_batched_tokens=budget,
            max_num_seqs=min(24, budget),
            num_gpu_blocks_override=pool_size(path, block_size, budget),
            admission_watermark=0.0,  # preemptions are wanted
        )
        result = answers(loop, requests)
        preemptions.append(loop.scheduler.num_preemptions)
        if not first:
            first = result
            for item in requests:
                assert_greedy(oracle, item, result[item.id])
        assert result == first, f"block size {block_size}, budget {budget}"
    # Windows leave so little to hold that a whole chunk may not find anybody to preempt.
    assert min(preemptions) >= (1 if "mistral" in kind or "sliding" in kind else 5), preemptions
    assert sum(preemptions) >= 5 * len(SHAPES), preemptions
