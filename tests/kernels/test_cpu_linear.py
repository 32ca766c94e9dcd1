"""Products of few rows over oneDNN's packed layout, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.cpu_linear import MOST_ROWS, PackedLinear
from models.layers import can_pack


def packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


ONES = torch.ones(64, 32).bfloat16()
READS = can_pack(ONES) and PackedLinear.reads(ONES, packed(ONES))
needs_bfloat16 = pytest.mark.skipif(not READS, reason="needs AVX512-BF16 and the known layout")


@needs_bfloat16
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(64, 32), (128, 96), (209, 512), (2048, 544), (64, 4096), (1, 64)]
)
def test_product(outputs: int, inputs: int, threads: int, bias: bool) -> None:
    torch.manual_seed(outputs + inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight = torch.randn(outputs, inputs).bfloat16()
        offset = torch.randn(outputs).bfloat16() if bias else None
        assert PackedLinear.reads(weight, packed(weight))
        linear = PackedLinear(packed(weight), outputs, inputs, offset)
        for rows in range(1, MOST_ROWS + 1):
            x = torch.randn(rows, inputs + 2)[:, 1:-1].bfloat16()
            for given in (x, torch.cat((x, x), 1)[:, :inputs], x.t().contiguous().t()):
                exact = given.double() @ weight.double().t()
                if offset is not None:
                    exact += offset.double()
                error = (linear(given).double() - exact).abs()
                assert (error <= exact.abs() * 2**-8 + 1e-4 * inputs**0.5).all()
    finally:
        torch.set_num_threads(before)


@needs_bfloat16
def test_other_layouts_are_not_read() -> None:
    weight = torch.randn(128, 64).bfloat16()
    other = weight.clone()
    other[-1, -1] += 1
    assert PackedLinear.reads(weight, packed(weight))
    assert not PackedLinear.reads(other, packed(weight)), "another matrix, or another layout"
    odd = torch.randn(128, 48).bfloat16()  # oneDNN pads the inputs
    assert not PackedLinear.reads(odd, packed(odd))
    assert not PackedLinear.reads(weight.float(), packed(weight.float()))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_bfloat16
@pytest.mark.parametrize("outputs", [4096, 4097, 4159])
@pytest.mark.parametrize("rows", [1, 5, MOST_ROWS, 150])
def test_scores_and_the_best_of_them(rows: int, outputs: int, threads: int) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 96).bfloat16(), torch.randn(outputs, 96).bfloat16()
    bias = torch.randn(outputs).bfloat16()
    linear = PackedLinear(packed(weight), outputs, 96, bias)
    scores = linear.scores(x)
    exact = x.double() @ weight.double().T + bias.double()
    assert (scores - exact).norm() / exact.norm() < 1e-5
    assert linear.best(x).equal(scores.argmax(-1))


@needs_bfloat16
def test_the_first_of_equal_scores_is_the_best(threads: int) -> None:
    weight = torch.randn(1, 64).bfloat16().repeat(4096, 1)
    weight[:70] = -weight[:70]
    linear = PackedLinear(packed(weight), 4096, 64, None)
    x = weight[-1:] * torch.tensor([[1], [-1], [2]])
    assert linear.best(x).tolist() == [70, 0, 70]


@needs_bfloat16
@pytest.mark.parametrize("outputs", [1, 63, 65, 1009])
def test_what_fills_the_last_panel_up_is_no_output(outputs: int, threads: int) -> None:
    row = torch.rand(1, 64).bfloat16() + 1
    weight = -row.repeat(outputs, 1)
    weight[-1] /= 2
    linear = PackedLinear(packed(weight), outputs, 64, None)
    x = row.repeat(3, 1)
    assert linear.scores(x).shape == linear(x).shape == (3, outputs)
    assert linear.scores(x).max() < 0, "less than what zeros give"
    assert linear.best(x).tolist() == [outputs - 1] * 3
