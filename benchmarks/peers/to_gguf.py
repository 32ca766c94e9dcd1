"""Writes a random Llama or Qwen3 checkpoint as GGUF, weights in bfloat16. Needs `gguf` and numpy.

.peers/llama.cpp/bin/python -m benchmarks.peers.to_gguf FOLDER FILE.gguf
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

from benchmarks.peers import gguf_names


def write(folder: Path, target: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(target, config["model_type"])
    add_shape(writer, config)
    add_tokenizer(writer, folder, config)
    add_weights(writer, folder / "model.safetensors", config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_shape(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def add_tokenizer(writer: GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab: dict[str, int] = whole["model"]["vocab"]
    specials = {token["content"] for token in whole["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [TokenType.CONTROL if token in specials else TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in whole["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    writer.add_chat_template(template["chat_template"])


def add_weights(writer: GGUFWriter, file: Path, config: dict[str, Any]) -> None:
    """Matrices in bfloat16, vectors in float32, which is the only form llama.cpp has of norms."""
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
    data = np.memmap(file, np.uint8, "r", offset=8 + size)
    for tensor, entry in header.items():
        if tensor == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        numbers = data[start:end].view(np.uint16).reshape(entry["shape"])
        heads = gguf_names.rotary_heads(tensor, config)
        if heads is not None:
            numbers = gguf_names.interleaved(numbers, heads)
        if numbers.ndim == 1:
            wide = (numbers.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(gguf_names.name(tensor), wide)
        else:
            kind = GGMLQuantizationType.BF16
            writer.add_tensor(gguf_names.name(tensor), numbers.view(np.uint8), raw_dtype=kind)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
