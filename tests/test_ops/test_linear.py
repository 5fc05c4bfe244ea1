"""Matrix products by oneDNN against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from overlock_mm.ops._linear import has_linear, linear

pytestmark = pytest.mark.skipif(not has_linear(torch.ones(1)), reason='PyTorch has no oneDNN, or not its products')


@pytest.mark.parametrize('rows, channels, outputs', [(1, 1, 1), (49, 80, 33), (3, 700, 5), (400, 16, 64)])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('strided', [True, False])
def test_results_and_gradients(rows, channels, outputs, bias, strided):
    x, weight = torch.randn(rows, channels), torch.randn(outputs, channels)
    grad_output = torch.randn(rows, outputs)
    if strided:
        x, weight, grad_output = (torch.stack([each, each], dim=-1)[..., 0] for each in (x, weight, grad_output))
    leaves = [x, weight, torch.randn(outputs)] if bias else [x, weight]
    leaves = [each.requires_grad_() for each in leaves]
    out = linear(*leaves)
    exact = [each.detach().double().requires_grad_() for each in leaves]
    expected = F.linear(*exact)
    assert out.shape == expected.shape
    assert relative_error(out, expected) < 1e-6
    for got, wanted in zip(
        torch.autograd.grad(out, leaves, grad_output), torch.autograd.grad(expected, exact, grad_output.double())
    ):
        assert got.shape == wanted.shape
        assert relative_error(got, wanted) < 1e-6


@pytest.mark.parametrize('wanted', ['x', 'weight', 'bias'])
def test_only_the_gradients_asked_for(wanted):
    tensors = dict(x=torch.randn(5, 7), weight=torch.randn(3, 7), bias=torch.randn(3))
    tensors[wanted].requires_grad_()
    (got,) = torch.autograd.grad(linear(**tensors).square().sum(), tensors[wanted])
    (expected,) = torch.autograd.grad(F.linear(*tensors.values()).square().sum(), tensors[wanted])
    assert relative_error(got, expected) < 1e-6


def test_a_second_derivative_is_refused():
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7)
    (grad,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


def test_what_it_does_not_take():
    x = torch.randn(5, 7)
    assert has_linear(x)
    assert not has_linear(x.double())
    assert not has_linear(x.to('meta'))
    assert not has_linear(torch.nn.Parameter(x))
    with torch.autocast('cpu', torch.bfloat16):
        assert not has_linear(x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not has_linear(x)


def test_operations_are_counted():
    """By PyTorch's counter, forward and backward, as those of its own products."""
    counters = pytest.importorskip('torch.utils.flop_counter')
    if not hasattr(counters, 'register_flop_formula'):
        pytest.skip('this torch counts no operators but its own')
    counts = []
    for function in (linear, F.linear):
        x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
        with counters.FlopCounterMode(display=False) as counter:
            function(x, weight).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [3 * 2 * 5 * 7 * 3] * 2
