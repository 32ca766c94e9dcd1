"""Llama 1 to 3 and everything published under their class name, such as SmolLM 1 and 2."""

from models.config import Fields, ModelConfig, llama_like


def parse(fields: Fields) -> ModelConfig:
    return llama_like(fields)
