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
