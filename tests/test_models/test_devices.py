"""The network on a CPU and on a GPU, against its references in float64."""

from __future__ import annotations

import contextlib
import copy
from typing import Optional

import pytest
import torch
from conftest import devices, relative_error
from torch import Tensor

from overlock_mm.models import OverLoCK
from overlock_mm.ops import use_references


def make_network(arch) -> OverLoCK:
    """With weights and statistics off the zeros and ones that many start as."""
    network = OverLoCK(arch, out_type='pyramid_with_overview')
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def training_step(network, image: Tensor, context: Optional[torch.autocast] = None) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics, by name. The context is that of the forward."""
    network.train()
    with context or contextlib.nullcontext():
        outputs = network(image)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs]
    torch.autograd.backward(outputs, grads)
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    statistics = torch.cat([each.flatten() for name, each in network.named_buffers() if 'running' in name])
    return {**{f'output {i}': out for i, out in enumerate(outputs)}, 'gradient': gradient, 'statistics': statistics}


def expected_step(network, image: Tensor) -> dict[str, Tensor]:
    with use_references():
        return training_step(copy.deepcopy(network).double(), image.double())


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert relative_error(tensor.cpu(), expected[name]) < tolerance, name


@devices
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('options', [{}, dict(memory='fast'), dict(with_cp=True)], ids=['lean', 'fast', 'with_cp'])
def test_a_training_step_equals_float64(small_arch, device, layout, options):
    network, image = make_network(small_arch), torch.randn(2, 3, 96, 128)
    expected = expected_step(network, image)
    moved = OverLoCK(small_arch, out_type='pyramid_with_overview', **options)
    moved.load_state_dict(network.state_dict())
    actual = training_step(moved.to(device), image.to(device).contiguous(memory_format=layout))
    assert_close(actual, expected, 1e-4)


@devices
@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.2), (torch.float16, 0.03)], ids=['bfloat16', 'float16'])
def test_autocast_is_near_float64(small_arch, device, dtype, tolerance):
    network, image = make_network(small_arch), torch.randn(2, 3, 96, 128)
    expected = expected_step(network, image)
    actual = training_step(network.to(device), image.to(device), torch.autocast(device, dtype))
    assert_close(actual, expected, tolerance)
