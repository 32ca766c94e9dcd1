"""The embedded model: a very small chat model that lets Quire be tried without a download.

This package is light on purpose. Asking where the checkpoint lies imports neither torch nor the
training code.
"""

from pathlib import Path


def path() -> Path:
    """The folder of the checkpoint: config, weights, tokenizer and chat template."""
    return Path(__file__).resolve().parent
