"""PyTorch's older tools of tracing and quantization work with OverLoCK, or are refused with the way out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from conftest import relative_error

from overlock_mm.inference import optimize
from overlock_mm.models import OverLoCK
from overlock_mm.training import fuse

ARCH = dict(channels=(8, 8, 8, 8), depths=(1, 1, 1, 1), sub_depths=(1, 1), num_groups=(2, 2), kernel_sizes=(5, 5, 5, 5))


@pytest.fixture
def model() -> OverLoCK:
    """A pyramid of which every weight counts."""
    model = OverLoCK(ARCH, out_type='pyramid').eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.rand_like(tensor)
    return model


@torch.no_grad()
@pytest.mark.parametrize('change', [lambda model: model, optimize], ids=['plain', 'optimized'])
def test_traces_at_evaluation(model, change):
    """Also for other sizes and batches than that of the trace."""
    model = change(model)
    traced = torch.jit.trace(model, torch.randn(1, 3, 129, 160), check_trace=False)
    for shape in ((1, 3, 129, 160), (2, 3, 145, 133), (1, 3, 129, 160)):
        images = torch.randn(shape)
        for got, expected in zip(traced(images), model(images)):
            assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize('change', [lambda model: model, fuse], ids=['plain', 'fused'])
def test_traces_in_training(model, change):
    """Outputs, gradients and running statistics of several steps. Tracing itself is a step: it updates the statistics."""
    model = change(model.double()).train()
    images = [torch.randn(2, 3, 40, 64).double() for _ in range(3)]
    traced = torch.jit.trace(model, images[0], check_trace=False)
    expected_model = copy.deepcopy(model)
    for batch in (images[1], images[2], images[1]):
        outputs, expected = traced(batch), expected_model(batch)
        weights = [torch.randn_like(each) for each in expected]
        for each in (outputs, expected):
            sum((out * weight).sum() for out, weight in zip(each, weights)).backward()
        for got, each in zip(outputs, expected):
            assert relative_error(got, each) < 1e-10
    # Norms make some gradients zero: all together are compared.
    gradients = [
        torch.cat([parameter.grad.flatten() for parameter in each.parameters() if parameter.grad is not None])
        for each in (model, expected_model)
    ]
    assert relative_error(*gradients) < 1e-8
    for (name, got), each in zip(model.state_dict().items(), expected_model.state_dict().values()):
        if 'running' in name or 'num_batches' in name:
            # The number of values of a channel is a float32 in the trace.
            assert relative_error(got, each) < 1e-7, name


@pytest.mark.parametrize('change', [lambda model: model, optimize], ids=['plain', 'optimized'])
def test_symbolic_traces_are_refused_with_the_way_out(model, change):
    """Where the way out is torch.export, which gives a graph of torch.fx, and ``out_indices``."""
    from torchvision.models.feature_extraction import create_feature_extractor

    model = change(model)
    for trace in (torch.fx.symbolic_trace, lambda model: create_feature_extractor(model, ['blocks1'])):
        with pytest.raises(TypeError, match=r'cannot trace OverLoCK.* torch\.export\.export.* out_indices'):
            trace(model)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        graph = torch.export.export(model, (x,)).module()
        assert isinstance(graph, torch.fx.GraphModule)
        assert relative_error(graph(x)[0], model(x)[0]) < 1e-5


@torch.no_grad()
def test_dynamic_quantization(model):
    """It changes linear layers. A plain backbone has none; an optimized one has those of its channel attention."""
    images = torch.randn(1, 3, 64, 64)
    for each, number in ((model, 0), (optimize(model), 12)):
        assert sum(isinstance(layer, nn.Linear) for layer in each.modules()) == number
        quantized = torch.ao.quantization.quantize_dynamic(each)
        assert sum(isinstance(layer, torch.ao.nn.quantized.dynamic.Linear) for layer in quantized.modules()) == number
        for got, expected in zip(quantized(images), each(images)):
            assert relative_error(got, expected) < 1e-2
            assert number == 0 or not torch.equal(got, expected)
