"""Counts of a training step under torch.compile, without a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from benchmarks import FOLDER  # noqa: F401  it makes its modules known

from overlock_mm.models import OverLoCK
from overlock_mm.models.overlock import ARCHITECTURES
from overlock_mm.models.reparam import DilatedReparamConv
from overlock_mm.ops.cuda_kernels import has_cuda_kernels

pytestmark = [
    pytest.mark.skipif(not has_cuda_kernels(), reason='the binary was built without CUDA'),
    pytest.mark.skipif(not torch.__version__.startswith('2.11.'), reason="it calls internals of torch 2.11's Inductor"),
]


@pytest.fixture(scope='module')
def compiled_cost():
    pytest.importorskip('triton')
    return pytest.importorskip('compiled_cost')


class Chain(nn.Module):
    """Elementwise operators on a map of 16.8 MB."""

    shape = 1, 64, 256, 256

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(self.shape))

    def forward(self, x):
        return [torch.sin(self.weight * x.exp()) + 1]


def test_an_elementwise_chain_is_one_kernel_each_way(compiled_cost):
    """The forward reads x and the weight and writes the output. The backward reads both, and a gradient, and writes one."""
    counts, calls = compiled_cost.measure(Chain(), Chain.shape)
    assert dict(calls) == {'triton': 2}
    assert counts == dict(launches=2, gigabytes=round((3 + 4) * 64 * 256**2 * 4 / 1e9, 3))


def test_a_fused_step(compiled_cost):
    model = OverLoCK({**ARCHITECTURES['xt'], 'depths': (1, 1, 1, 1), 'sub_depths': (1, 1)})
    branches = sum(isinstance(module, DilatedReparamConv) for module in model.modules())
    counts, calls = compiled_cost.measure(model, (1, 3, 224, 224), fuse=True)
    for name, number in {
        'branch_norms': branches,
        '_branch_norms_backward': branches,
        '_gelu_residual_depthwise_norm': 6,  # MLPs
        '_gelu_residual_depthwise_norm_backward': 6,
        '_contmix': 2,
        '_contmix_backward': 2,
    }.items():
        assert calls[f'overlock_mm.{name}'] == number, name
    assert 'overlock_mm.gelu' not in calls  # Inductor has fused it
    fewer = 3 * calls['overlock_mm.branch_norms'] + 2 * calls['overlock_mm._gelu_residual_depthwise_norm']
    assert counts['launches'] > sum(calls.values()) + fewer  # these two launch 4 and 3 kernels
