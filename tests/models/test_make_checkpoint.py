"""The synthetic checkpoint loads, and its tokenizer encodes any text."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from tokenizers import Tokenizer

from benchmarks import make_checkpoint
from benchmarks.shapes import LLAMA_56M, SHAPES
from models import loader
from models.registry import build, parse_config

TEXTS = ["The quick brown fox.", " \n\t x = f(1) # ok", "žluťoučký 日本語 🙂", "\x00\x7f"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    size = LLAMA_56M["vocab_size"]
    return Tokenizer.from_str(json.dumps(make_checkpoint.tokenizer(size)))


def test_small_shape_loads(tmp_path, monkeypatch):
    tiny = LLAMA_56M | {"num_hidden_layers": 2, "hidden_size": 64}
    monkeypatch.setitem(SHAPES, "tiny", tiny)
    monkeypatch.setattr(make_checkpoint, "PIECE", 100_000)  # several pieces per tensor
    first = make_checkpoint.write(tmp_path / "a", "tiny")
    again = make_checkpoint.write(tmp_path / "b", "tiny")
    digests = {
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in (first, again)
    }
    assert len(digests) == 1
    config = loader.load_config(first)
    assert config.eos_token_ids == (make_checkpoint.EOS_TOKEN_ID,)
    model = loader.load_model(first, config, dtype=torch.float32, device=torch.device("cpu"))
    assert model.embed.weight.std().item() == pytest.approx(64**-0.5, rel=0.01)
    assert model.norm.weight.eq(1).all()


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama-56m", 55_976_448),
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen3-0.6b", 596_049_920),
        ("gpt2", 124_439_808),
    ],
)
def test_shapes_are_the_published_ones(shape, parameters):
    config = parse_config(SHAPES[shape])
    model = build(config, torch.bfloat16, torch.device("meta"))
    assert sum(t.numel() for t in model.checkpoint_tensors().values()) == parameters


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == LLAMA_56M["vocab_size"]
    assert tokenizer.encode("<|im_start|>x<|im_end|>").ids[::2] == [1, 2]
    assert tokenizer.encode(" the").tokens == ["Ġthe"]
