"""Which backend serves which device."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import reference
from kernels.dispatch import backend, warm_up
from kernels.pages import FORMATS

CPU = torch.device("cpu")


def test_cpus_get_numba():
    chosen = backend(CPU)
    assert chosen.name == "numba"
    assert chosen.paged_decode.__module__ == "kernels.cpu_attention"


def test_cuda_devices_get_triton():
    chosen = backend(torch.device("cuda", 0))
    assert chosen.name == "triton"
    assert chosen.paged_prefill.__module__ == "kernels.paged_prefill"


def test_a_name_wins():
    chosen = backend(torch.device("cuda"), "torch")
    assert chosen.name == "torch" and chosen.store_kv is reference.store_kv


def test_unknown_names_and_devices_are_refused():
    with pytest.raises(ValueError, match="known"):
        backend(CPU, "cublas")
    with pytest.raises(ValueError, match="meta"):
        backend(torch.device("meta"))


@pytest.mark.parametrize("name", ["torch", "numba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_format", [None, *FORMATS])
def test_warm_up(name, dtype, kv_format):
    warm_up(
        backend(CPU, name),
        device=CPU,
        dtype=dtype,
        heads=6,
        kv_heads=2,
        head_dim=32,
        block_size=16,
        window=8,
        kv_format=kv_format,
    )


def test_only_the_chosen_backend_is_imported():
    script = (
        "import sys, torch; from kernels.dispatch import backend;"
        "backend(torch.device('cpu'), 'torch');"
        "assert 'numba' not in sys.modules and 'kernels.paged_decode' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)
