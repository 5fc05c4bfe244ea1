"""Adaptive pooling as two products of matrices, against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from overlock_mm.ops.pooling import _by_products, adaptive_avg_pool2d


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SIZES = [((7, 7), (7, 7)), ((14, 14), (7, 7)), ((50, 84), (7, 7)), ((9, 31), (7, 5)), ((3, 2), (7, 7)), ((1, 1), (1, 1))]


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'slice'])
@pytest.mark.parametrize('size, output_size', SIZES, ids=str)
def test_values_and_gradients(size, output_size, layout, deterministic):
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    if layout != 'contiguous':
        x = x.contiguous(memory_format=torch.channels_last)
    x = (x[:, 2:] if layout == 'slice' else x).requires_grad_()
    grad_output = torch.randn(2, x.shape[1], *output_size, dtype=torch.float64)
    expected, out = F.adaptive_avg_pool2d(x, output_size), adaptive_avg_pool2d(x, output_size)
    assert relative_error(out, expected.detach()) < 1e-15
    gradients = [torch.autograd.grad(each, x, grad_output)[0] for each in (out, expected)]
    assert relative_error(*gradients) < 1e-15


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision(dtype, deterministic):
    """Under autocast too, a half type is rounded twice and no more."""
    x = 3 + torch.randn(2, 8, 50, 84)
    exact = F.adaptive_avg_pool2d(x.to(dtype).double(), 7)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = adaptive_avg_pool2d(x.to(dtype), (7, 7))
    assert out.dtype == dtype
    assert relative_error(out, exact) < 2 * torch.finfo(dtype).eps


def test_who_runs():
    """PyTorch's pooling where it may, products where it may not: in an export and under deterministic algorithms."""
    x = torch.randn(1, 4, 9, 11, requires_grad=True)
    assert 'AdaptiveAvgPool2D' in type(adaptive_avg_pool2d(x, (7, 7)).grad_fn).__name__
    torch.use_deterministic_algorithms(True)
    try:
        assert 'Permute' in type(adaptive_avg_pool2d(x, (7, 7)).grad_fn).__name__
    finally:
        torch.use_deterministic_algorithms(False)
    traced = torch.jit.trace(lambda x: adaptive_avg_pool2d(x, (7, 7)), x)
    assert 'adaptive' not in str(traced.graph)


def test_export_at_other_sizes():
    """The windows are computed from the size of the map, in the graph."""

    class Pool(torch.nn.Module):
        def forward(self, x):
            return adaptive_avg_pool2d(x, (7, 7))

    height, width = torch.export.Dim('height', min=2, max=100), torch.export.Dim('width', min=2, max=100)
    exported = torch.export.export(
        Pool(), (torch.randn(1, 4, 14, 21),), dynamic_shapes={'x': {2: height, 3: width}}
    ).module()
    for size in ((14, 21), (7, 7), (50, 84), (9, 31)):
        x = torch.randn(1, 4, *size)
        assert relative_error(exported(x), F.adaptive_avg_pool2d(x, 7)) < 1e-6
    assert relative_error(_by_products(x, (7, 7)), F.adaptive_avg_pool2d(x, 7)) < 1e-6
