"""What torch's counter of floating-point operations says of the operators, by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils import flop_counter

from overlock_mm.models import OverLoCK
from overlock_mm.ops import (
    _library,
    branch_norms,
    branch_norms_given,
    contmix,
    depthwise_conv2d,
    gelu_residual_depthwise_norm,
    residual_depthwise_norm,
)
from overlock_mm.training import fuse

pytestmark = [
    pytest.mark.skipif(bool(_library.missing), reason='the references count as what they call'),
    pytest.mark.skipif(not hasattr(flop_counter, 'register_flop_formula'), reason='torch < 2.2'),
]


def count(function) -> int:
    counter = flop_counter.FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


def test_depthwise_convolution():
    x, weight = torch.randn(2, 3, 5, 7, requires_grad=True), torch.randn(3, 1, 3, 3, requires_grad=True)
    one = 2 * (2 * 3 * 5 * 7) * 9
    assert count(lambda: depthwise_conv2d(x.detach(), weight.detach())) == one
    assert count(lambda: depthwise_conv2d(x, weight).sum().backward()) == 3 * one
    assert count(lambda: depthwise_conv2d(x.detach(), weight).sum().backward()) == 2 * one


def test_residual_depthwise_norm():
    x, parameters = torch.randn(1, 4, 6, 5), torch.randn(2, 4)
    assert count(lambda: residual_depthwise_norm(x, torch.randn(4, 1, 3, 3), None, *parameters)) == 2 * x.numel() * 9


def test_gelu_residual_depthwise_norm():
    x, parameters = torch.randn(1, 4, 6, 5, requires_grad=True), torch.randn(2, 4)
    arguments = (torch.randn(4, 1, 3, 3), None, *parameters)
    one = 2 * x.numel() * 9
    assert count(lambda: gelu_residual_depthwise_norm(x.detach(), *arguments)) == one
    assert count(lambda: gelu_residual_depthwise_norm(x, *arguments).sum().backward()) == 4 * one


def test_branch_norms():
    x = torch.randn(2, 3, 8, 9, requires_grad=True)
    weights = [torch.randn(3, 1, k, k) for k in (5, 3)]
    ones = [torch.ones(3)] * 2
    forward = 2 * x.numel() * ((25 + 9) + 25)
    assert count(lambda: branch_norms(x.detach(), weights, ones, ones, (1, 2))) == forward
    assert count(lambda: branch_norms(x, weights, ones, ones, (1, 2))[0].sum().backward()) == forward + 6 * x.numel() * 34


@pytest.mark.parametrize('wanted', ['value', 'query', 'both'])
def test_contmix(wanted):
    groups, channels, query_channels, size, kernels = 2, 8, 6, (7, 9), (3, 5)
    value, query = torch.randn(1, channels, *size), torch.randn(1, query_channels, *size)
    value.requires_grad_(wanted != 'query')
    query.requires_grad_(wanted != 'value')
    slots, tokens = sum(k * k for k in kernels), 4
    matrix = 2 * groups * slots * tokens * (query_channels // groups)  # the keys of all slots, from those of the tokens
    products, sums = 2 * 63 * slots * query_channels, 2 * 63 * (channels // 2) * slots

    def run():
        key, weight = torch.randn(1, query_channels, 2, 2), torch.randn(slots, tokens)
        sizes = dict(num_groups=groups, small_kernel_size=3, large_kernel_size=5)
        contmix(value, query, key, weight, None, None, None, **sizes).sum().backward()

    of_value, of_query = products + sums, 3 * products + sums
    backward = {'value': of_value, 'query': of_query, 'both': of_value + of_query}[wanted]
    assert count(run) == matrix + products + sums + backward


def test_a_fused_training_step():
    """The backward of the fused operator makes the convolution of the MLP's hidden map again."""
    arch = dict(channels=(8, 8, 8, 8), depths=(1, 1, 1, 1), sub_depths=(1, 1), num_groups=(2, 2), kernel_sizes=(5, 5, 5, 5))
    model, x = OverLoCK(arch).train(), torch.randn(2, 3, 64, 64)
    plain = count(lambda: model(x)[0].sum().backward())
    basic, dynamic = 4 * 8 * (16**2 + 8**2 + 4**2 + 2**2), 3 * 8 * (4**2 + 2**2)  # numbers of hidden maps of an image
    assert count(lambda: fuse(model)(x)[0].sum().backward()) == plain + 2 * 9 * len(x) * (basic + dynamic)


class Operators(torch.nn.Module):
    """A call of several operators on a map of 4 channels."""

    def forward(self, x):
        weights, ones = [torch.ones(4, 1, k, k) for k in (5, 3)], [torch.ones(4)] * 2
        x = branch_norms_given(x, weights, ones, ones, torch.ones(2, 4), torch.ones(2, 4), (1, 2))
        x = gelu_residual_depthwise_norm(x, torch.ones(4, 1, 3, 3), None, *ones)
        keys, matrix = torch.ones(x.shape[0], 4, 7, 7), torch.ones(9 + 25, 49)
        return contmix(x, x, keys, matrix, None, None, None, num_groups=2, small_kernel_size=3, large_kernel_size=5)


def test_mmengine_counts_the_operators_as_torch():
    analysis = pytest.importorskip('mmengine.analysis', reason='mmengine is not installed')
    from overlock_mm.complexity import operators_counted

    model, x = Operators(), torch.randn(2, 4, 9, 8)
    with torch.no_grad(), operators_counted():
        found = analysis.FlopAnalyzer(model, (x,)).unsupported_ops_warnings(False).by_operator()
    with torch.no_grad():
        total = count(lambda: model(x))
    assert set(found) == {'_branch_norms_given', 'gelu_residual_depthwise_norm', 'contmix'}
    assert found['_branch_norms_given'] == x.numel() * 25
    assert found['gelu_residual_depthwise_norm'] == x.numel() * 9
    assert sum(found.values()) == total / 2
    with torch.no_grad():  # without the context: the operations of plain PyTorch
        assert set(analysis.FlopAnalyzer(model, (x,)).unsupported_ops_warnings(False).by_operator()).isdisjoint(found)
