"""Training under ``torch.use_deterministic_algorithms(True)``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import overlock_mm.ops
from overlock_mm.models import OverLoCK
from overlock_mm.ops import use_references

#: ATen's names of the operations that have no deterministic form on CUDA: from the documentation of
#: torch.use_deterministic_algorithms, those that raise an error.
NOT_DETERMINISTIC = {
    '_adaptive_avg_pool2d_backward', '_adaptive_avg_pool3d_backward', 'adaptive_max_pool2d_backward', 'avg_pool3d_backward',
    'fractional_max_pool2d_backward', 'fractional_max_pool3d_backward', 'max_pool3d_with_indices_backward', 'max_unpool2d',
    'max_unpool3d', 'upsample_linear1d_backward', 'upsample_bilinear2d_backward', 'upsample_bicubic2d_backward',
    'upsample_trilinear3d_backward', 'reflection_pad1d_backward', 'reflection_pad2d_backward', 'reflection_pad3d_backward',
    'replication_pad1d_backward', 'replication_pad2d_backward', 'replication_pad3d_backward', 'nll_loss2d_forward',
    '_ctc_loss_backward', '_embedding_bag_dense_backward', 'put_', 'histc', 'bincount', 'kthvalue', 'median', 'nanmedian',
    'mode', 'grid_sampler_2d_backward', 'grid_sampler_3d_backward', 'cumsum', 'cumprod', 'scatter_reduce', 'resize_',
}  # fmt: skip


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Names(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function._opname)
        return function(*args, **(kwargs or {}))


def operations_of_a_step(size: tuple[int, int]) -> set[str]:
    """What a training step of the network runs on devices other than the CPU, on the meta device."""
    model = OverLoCK('xt', out_type='pyramid_with_overview', drop_path_rate=0.1).to('meta').train()
    with use_references(), Names() as names:
        sum(out.sum() for out in model(torch.empty(2, 3, *size, device='meta'))).backward()
    return names.seen


@pytest.mark.parametrize('size', [(224, 288), (64, 96)], ids=['maps that hold the kernels', 'smaller maps'])
def test_no_operation_without_a_deterministic_form(size, deterministic):
    assert not operations_of_a_step(size) & NOT_DETERMINISTIC
    torch.use_deterministic_algorithms(False)
    expected = {'_adaptive_avg_pool2d_backward', 'upsample_bilinear2d_backward'}
    assert operations_of_a_step(size) & NOT_DETERMINISTIC == expected, 'else this test would see nothing'


def test_cuda_kernels_have_no_atomic_sums():
    sources = sorted((Path(overlock_mm.ops.__file__).parent / 'csrc' / 'cuda').iterdir())
    assert len(sources) >= 4
    assert [path.name for path in sources if 'atomic' in path.read_text()] == []


def gradients(model: OverLoCK, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(out.square().sum() for out in model(x)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_training_gives_the_same(small_arch, deterministic):
    """As without it, to rounding, and the same bits in every run."""
    model, x = OverLoCK(small_arch, out_type='pyramid_with_overview').double(), torch.randn(2, 3, 64, 96).double()
    first, second = gradients(model, x), gradients(model, x)
    torch.use_deterministic_algorithms(False)
    expected = gradients(model, x)
    for name, each in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], each, rtol=1e-9, atol=1e-9), name
