"""Which family serves which architecture name."""

from __future__ import annotations

from types import ModuleType

import torch

from models import gpt2, llama, mistral, qwen2, qwen3, smollm3
from models.config import CheckpointError, Fields, ModelConfig, architecture
from models.decoder import CausalLM

FAMILIES: dict[str, ModuleType] = {
    family.ARCHITECTURE: family for family in (gpt2, llama, mistral, qwen2, qwen3, smollm3)
}


def parse_config(raw: dict, generation: dict | None = None) -> ModelConfig:
    """The config of a checkpoint from its `config.json` and, if any, `generation_config.json`.

    Raises CheckpointError, in one line, for anything this server would get wrong.
    """
    fields = Fields(raw, generation)
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method", "unknown") if isinstance(raw[key], dict) else "?"
            raise CheckpointError(
                f"the checkpoint is quantized ({method}), which is not supported;"
                " use the original bfloat16 or float16 one"
            )
    return _family(architecture(fields)).parse(fields)


def build(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """The decoder of `config` with allocated, unset weights; on device "meta" without memory."""
    return _family(config.architecture).Model(config, dtype, device)


def _family(name: str) -> ModuleType:
    if name not in FAMILIES:
        raise CheckpointError(
            f"architecture {name!r} is not supported (supported: {', '.join(sorted(FAMILIES))})"
        )
    return FAMILIES[name]
