"""Runs the Triton cases and the ahead-of-time compilation in processes of their own.

Triton decides when it is imported whether kernels are interpreted or compiled. A fresh process
per mode keeps this independent of what the rest of the test run has imported, in any order.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.paged_decode import MAX_SPLITS, choose_splits

ROOT = Path(__file__).parents[2]


def run(*command: str, interpret: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1" if interpret else "0"
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(600)
def test_cases_interpreted():
    run("pytest", "-p", "no:cacheprovider", "tests/kernels/triton_cases.py", interpret=True)


@pytest.mark.timeout(600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cases_on_the_device():
    run("pytest", "-p", "no:cacheprovider", "tests/kernels/triton_cases.py", interpret=False)


@pytest.mark.timeout(600)
def test_compiles_ahead_of_time_without_spills():
    run("tests.kernels.aot", "--few", interpret=False)


def test_full_batches_are_not_split():
    assert choose_splits(seqs=64, kv_heads=8, max_context_len=32_768, processors=132) == 1


def test_few_long_sequences_fill_the_processors():
    splits = choose_splits(seqs=1, kv_heads=8, max_context_len=32_768, processors=132)
    assert 132 <= splits * 8 <= 2 * 132


def test_short_contexts_are_not_split():
    for context in (1, 64, 255):
        assert choose_splits(seqs=1, kv_heads=1, max_context_len=context, processors=132) == 1


@pytest.mark.parametrize("seqs", [0, 1, 3, 1000])
@pytest.mark.parametrize("context", [0, 17, 4096, 1 << 20])
def test_split_count_is_always_usable(seqs, context):
    splits = choose_splits(seqs, kv_heads=2, max_context_len=context, processors=132)
    assert 1 <= splits <= MAX_SPLITS
