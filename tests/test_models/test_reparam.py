"""Folding of the dilated branches: exact, and faithful to dtype, device and what else the model holds."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from conftest import relative_error

from overlock_mm.models import OverLoCK
from overlock_mm.models.reparam import DILATED_BRANCHES, DilatedReparamConv


def randomise_statistics(module):
    for child in module.modules():
        if isinstance(child, torch.nn.BatchNorm2d):
            child.weight.data.uniform_(0.5, 1.5)
            child.bias.data.normal_()
            child.running_mean.normal_()
            child.running_var.uniform_(0.5, 2)


@pytest.mark.parametrize('kernel_size', sorted(DILATED_BRANCHES))
@torch.no_grad()
def test_folding_is_exact(kernel_size):
    conv = DilatedReparamConv(6, kernel_size).eval()
    randomise_statistics(conv)
    x = torch.randn(2, 6, 20, 23)
    expected = conv.double()(x.double())
    conv.float().switch_to_deploy()
    assert [name for name, _ in conv.named_parameters()] == ['lk_origin.weight', 'lk_origin.bias']
    assert relative_error(conv(x), expected) < 1e-6
    conv.switch_to_deploy()
    assert relative_error(conv(x), expected) < 1e-6


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_folding_keeps_dtype_and_mode(dtype):
    conv = DilatedReparamConv(4, 7).to(dtype).eval().requires_grad_(False)
    conv.switch_to_deploy()
    assert all(p.dtype == dtype and not p.requires_grad for p in conv.parameters())
    assert not conv.lk_origin.training


@torch.no_grad()
def test_the_whole_backbone_folds(small_arch):
    backbone = OverLoCK(small_arch, out_type='pyramid_with_overview').eval()
    randomise_statistics(backbone)
    backbone.register_buffer('users_own', torch.arange(3))
    buffers = {name: value.clone() for name, value in backbone.named_buffers() if '.dil_bn' not in name}
    x = torch.randn(1, 3, 61, 90)
    expected = backbone(x)
    backbone.switch_to_deploy()
    assert backbone.deploy
    for out, reference in zip(backbone(x), expected):
        assert relative_error(out, reference) < 1e-5
    for name, value in backbone.named_buffers():
        assert torch.equal(value, buffers[name])
    assert 'users_own' in dict(backbone.named_buffers())


@torch.no_grad()
def test_loading_between_the_forms(small_arch):
    unfolded = OverLoCK(small_arch).eval()
    randomise_statistics(unfolded)
    x = torch.randn(1, 3, 40, 40)
    expected = unfolded(x)[0]

    from_unfolded = OverLoCK(small_arch, deploy=True).eval()
    from_unfolded.load_state_dict(unfolded.state_dict())
    assert relative_error(from_unfolded(x)[0], expected) < 1e-5

    from_folded = OverLoCK(small_arch, deploy=True).eval()
    from_folded.load_state_dict(from_unfolded.state_dict())
    assert torch.equal(from_folded(x)[0], from_unfolded(x)[0])

    with pytest.raises(ValueError, match=r'folded .* blocks1.0.proj.1.lk_origin.bias .* deploy=True'):
        unfolded.load_state_dict(from_unfolded.state_dict())


def test_loading_does_not_change_what_is_loaded(small_arch):
    state_dict = OverLoCK(small_arch).state_dict()
    names = list(state_dict)
    OverLoCK(small_arch, deploy=True).load_state_dict(state_dict)
    assert list(state_dict) == names


def test_unknown_kernel():
    with pytest.raises(ValueError, match=r'kernel_size must be one of \[5, 7, .*\], got 19'):
        DilatedReparamConv(4, 19)


@pytest.mark.parametrize('settings', ['all alike', 'cumulative', 'mixed', 'one does not track'])
def test_running_statistics_are_those_of_the_norms(settings):
    """Also of norms that somebody has set otherwise; three batches."""
    layer = DilatedReparamConv(6, 7).double().train()
    norms = [module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)]
    for i, norm in enumerate(norms):
        norm.momentum = {'all alike': 0.3, 'cumulative': None, 'mixed': (0.1, None, 0.4)[i % 3]}.get(settings, 0.1)
    if settings == 'one does not track':
        norms[1].track_running_stats = False
        norms[1].running_mean = norms[1].running_var = norms[1].num_batches_tracked = None
    expected = copy.deepcopy(layer)
    for _ in range(3):
        x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
        out = layer(x)
        plain = sum(norm(conv(x)) for conv, norm in expected.branches())
        assert relative_error(out, plain) < 1e-12
    state = layer.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12, msg=name)


@torch.no_grad()
def test_branches_fold_after_their_norms_were_fused(small_arch):
    """As the options --fuse-conv-bn of the frameworks' scripts do."""
    fuse_conv_bn = pytest.importorskip('mmcv.cnn', reason='it fuses the norms').fuse_conv_bn
    backbone = OverLoCK(small_arch).double().eval()
    randomise_statistics(backbone)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    (expected,) = backbone(x)
    fused = fuse_conv_bn(backbone)
    fused.switch_to_deploy()
    assert relative_error(fused(x)[0], expected) < 1e-12
