"""Writes a checkpoint with random weights in Hugging Face format, to measure speed without files.

    python -m benchmarks.make_checkpoint --shape llama-56m build/llama-56m

The tensors are written one after the other, so that memory stays at one piece of one tensor. The
tokenizer is a byte-level BPE with a text for every id, built from the alphabet, not from a corpus:
any text encodes, at about two characters of English per token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from benchmarks.shapes import SHAPES
from models import registry

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = 2  # <|im_end|>
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIECE = 1 << 24  # elements written at once


def write(folder: Path, shape: str, *, seed: int = 0) -> Path:
    """Writes the checkpoint of `shape` (one of SHAPES, bfloat16) into `folder`, creating it."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": 0, "eos_token_id": EOS_TOKEN_ID}
    config = SHAPES[shape] | ids | {"torch_dtype": "bfloat16"}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ids)
    _write_json(folder / "tokenizer.json", tokenizer(config["vocab_size"]))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(config))
    write_weights(folder / "model.safetensors", config, seed)
    return folder


def write_weights(file: Path, config: dict[str, Any], seed: int) -> None:
    """Random bfloat16 weights: matrices normal with deviation hidden ** -0.5, norms 1, biases 0."""
    parsed = registry.parse_config(config)
    skeleton = registry.build(parsed, torch.bfloat16, torch.device("meta"))
    shapes = {name: tuple(t.shape) for name, t in skeleton.checkpoint_tensors().items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = torch.Generator().manual_seed(seed)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shapes.items():
            _write_tensor(stream, name, shape, parsed.hidden_size**-0.5, generator)


def _write_tensor(
    stream: BinaryIO, name: str, shape: tuple[int, ...], std: float, generator: torch.Generator
) -> None:
    left = torch.Size(shape).numel()
    while left:
        piece = torch.empty(min(left, PIECE))
        if len(shape) > 1:
            piece.normal_(0.0, std, generator=generator)
        else:
            piece.fill_(0.0 if name.endswith(".bias") else 1.0)
        stream.write(piece.bfloat16().view(torch.uint8).numpy().data)
        left -= piece.numel()


def tokenizer(size: int) -> dict[str, Any]:
    """A `tokenizer.json` of exactly `size` entries: specials, bytes, then letter groups."""
    symbols = _byte_symbols()
    vocab = {token: i for i, token in enumerate([*SPECIALS, *symbols])}
    merges: list[list[str]] = []
    for left, right in _merges(symbols[ord(" ")]):
        if left + right not in vocab:
            if len(vocab) == size:
                break
            vocab[left + right] = len(vocab)
        merges.append([left, right])
    specials = [
        {"id": i, "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, token in enumerate(SPECIALS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials,
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": True},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    """A `tokenizer_config.json` with a chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[EOS_TOKEN_ID],
        "pad_token": SPECIALS[0],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("max_position_embeddings", config.get("n_positions")),
        "chat_template": CHAT_TEMPLATE,
    }


def _byte_symbols() -> list[str]:
    """The printable stand-in of every byte, as GPT-2 chose them: odd bytes move beyond U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = itertools.count(256)
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _merges(space: str) -> Iterator[tuple[str, str]]:
    """More merges than needed, by rank: a space and its letter, letter pairs, groups of these.

    "the" after a space becomes [space t] he -> [space the].
    """
    lower, upper = string.ascii_lowercase, string.ascii_uppercase
    pairs = [a + b for a in lower for b in lower]
    yield from ((space, letter) for letter in lower + upper)
    yield from ((a, b) for a in lower for b in lower)
    yield from ((space + letter, pair) for letter in lower for pair in pairs)
    yield from ((pair, letter) for pair in pairs for letter in lower)
    yield from ((left, right) for left in pairs for right in pairs)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-56m")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(write(options.folder, options.shape, seed=options.seed))


if __name__ == "__main__":
    main()
