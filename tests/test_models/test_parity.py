"""The network is the published one: names, shapes, outputs, gradients and statistics, to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import relative_error

from overlock_mm.models import OverLoCK

ARCHES = ('xt', 't', 's', 'b')
OUT_TYPES = {'cls': 'features', 'seg': 'pyramid', 'det': 'pyramid_with_overview'}
OUTPUT_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-7}
GRADIENT_TOLERANCE = {torch.float32: 5e-4, torch.float64: 1e-6}
BLOCKS = (
    'b_sub4_0_7x12', 's_sub3_1_15x22', 's_sub4_1_8x10', 't_sub3_1_14x20', 't_sub4_0_3x5', 't_sub4_0_6x5', 't_sub4_0_9x7',
    't_sub4_1_16x11', 'xt_sub3_0_13x13', 'xt_sub3_1_12x20', 'xt_sub3_1_30x41', 'xt_sub3_1_3x27', 'xt_sub3_1_7x9',
    'xt_sub3_2_9x7',
)  # fmt: skip
both_precisions = pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])


def build(parity, family, arch, dtype, **kwargs):
    backbone = OverLoCK(arch, out_type=OUT_TYPES[family], **kwargs)
    state_dict = parity.state_dict(family, arch)
    if family == 'cls':
        state_dict = {name: tensor for name, tensor in state_dict.items() if 'head' not in name.split('.')[0]}
    backbone.load_state_dict(state_dict)
    return backbone.to(dtype)


def build_head(parity, arch, dtype, backbone):
    pytest.importorskip('mmpretrain', reason="the head is mmpretrain's")
    from overlock_mm.models import OverLoCKHead

    overview, features = backbone.out_channels
    head = OverLoCKHead(num_classes=1000, in_channels=features, overview_channels=overview)
    state_dict = parity.state_dict('cls', arch)
    head.load_state_dict({name: state_dict[name] for name in head.state_dict()})
    return head.to(dtype)


@pytest.mark.parametrize('arch', ARCHES)
@pytest.mark.parametrize('family', ['seg', 'det'])
def test_dense_names_and_shapes(parity, family, arch):
    state_dict = OverLoCK(arch, out_type=OUT_TYPES[family]).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state_dict.items()} == parity.keys(family, arch)


@pytest.mark.parametrize('arch', ARCHES)
@pytest.mark.parametrize('family', ['cls', 'cls_reparam'])
def test_classification_names_and_shapes(parity, family, arch):
    pytest.importorskip('mmpretrain', reason="the head is mmpretrain's")
    from overlock_mm.models import OverLoCKHead

    backbone = OverLoCK(arch, out_indices=(4, 3), deploy=family == 'cls_reparam')
    overview, features = backbone.out_channels
    head = OverLoCKHead(num_classes=1000, in_channels=features, overview_channels=overview)
    state_dict = {**backbone.state_dict(), **head.state_dict()}
    assert {name: list(tensor.shape) for name, tensor in state_dict.items()} == parity.keys(family, arch)


@both_precisions
@pytest.mark.parametrize('name', ['det_t_64x96', 'det_xt_32x48', 'det_xt_96x128', 'seg_xt_97x131'])
@torch.no_grad()
def test_pyramid(parity, name, dtype):
    family, arch, size = name.split('_')
    backbone = build(parity, family, arch, dtype).eval()
    expected = np.load(parity.folder / f'{name}.npz')
    image = parity.input_for(f'{family}-{arch}', (1, 3, *map(int, size.split('x'))))
    outputs = backbone(image.to(dtype))
    assert len(outputs) == len(expected) == 4
    for i, out in enumerate(outputs):
        assert out.shape == expected[f'out{i}'].shape
        assert relative_error(out, expected[f'out{i}']) < OUTPUT_TOLERANCE[dtype]


@both_precisions
@pytest.mark.parametrize('name', BLOCKS)
@torch.no_grad()
def test_dynamic_block(parity, name, dtype):
    """Also on maps smaller than the kernel, which are enlarged first."""
    arch, stage, index, size = name.split('_')
    height, width = map(int, size.split('x'))
    backbone = build(parity, 'det', arch, dtype).eval()
    block = getattr(backbone, f'{stage[:3]}_blocks{stage[3]}')[int(index)]
    inputs = [
        parity.input_for(tag, (1, channels, height, width)).to(dtype)
        for tag, channels in (('x', block.channels), ('h_x', block.context_channels), ('h_r', block.context_channels))
    ]
    outputs = block(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = np.load(parity.folder / f'block_{name}.npz')
    assert len(outputs) == len(expected)
    for out, key in zip(outputs, 'xh'):
        assert out.shape == expected[key].shape
        assert relative_error(out, expected[key]) < OUTPUT_TOLERANCE[dtype]


@both_precisions
@torch.no_grad()
def test_classification(parity, dtype):
    backbone = build(parity, 'cls', 'xt', dtype, out_indices=(4, 3)).eval()
    head = build_head(parity, 'xt', dtype, backbone).eval()
    logits = head(backbone(parity.input_for('cls-xt', (1, 3, 224, 224)).to(dtype)))
    expected = np.load(parity.folder / 'cls_xt_224x224.npz')['logits']
    assert relative_error(logits, expected) < OUTPUT_TOLERANCE[dtype]


@both_precisions
@torch.no_grad()
def test_classification_in_training_mode(parity, dtype):
    """Batch statistics, and the auxiliary head."""
    backbone = build(parity, 'cls', 'xt', dtype, out_indices=(4, 3)).train()
    head = build_head(parity, 'xt', dtype, backbone).train()
    features = backbone(parity.input_for('cls-xt', (2, 3, 64, 64)).to(dtype))
    expected = np.load(parity.folder / 'cls_xt_train_2x64x64.npz')
    assert relative_error(head(features), expected['main']) < OUTPUT_TOLERANCE[dtype]
    assert relative_error(head.forward_aux(features), expected['aux']) < OUTPUT_TOLERANCE[dtype]


@both_precisions
@pytest.mark.parametrize('with_cp', [False, True], ids=['kept', 'recomputed'])
def test_gradients_and_running_statistics(parity, dtype, with_cp):
    backbone = build(parity, 'det', 'xt', dtype, with_cp=with_cp).train()
    image = parity.input_for('det-xt', (2, 3, 64, 64)).to(dtype).requires_grad_()
    outputs = backbone(image)
    loss = sum((out * parity.input_for(f'cotangent{i}', out.shape).to(dtype)).sum() for i, out in enumerate(outputs))
    loss.backward()

    expected = np.load(parity.folder / 'grad_det_xt_2x64x64.npz')
    parameters, buffers = dict(backbone.named_parameters()), dict(backbone.named_buffers())
    compared = 0
    for key in expected:
        if key.startswith('out'):
            assert relative_error(outputs[int(key[3:])], expected[key]) < OUTPUT_TOLERANCE[dtype]
        elif key == 'loss':
            assert relative_error(loss, expected[key]) < GRADIENT_TOLERANCE[dtype]
        elif key == 'input':
            assert relative_error(image.grad, expected[key]) < GRADIENT_TOLERANCE[dtype]
        elif key.startswith('grad:'):
            assert relative_error(parameters[key[5:]].grad, expected[key]) < GRADIENT_TOLERANCE[dtype], key
        else:
            statistic, module = key.split(':')
            assert relative_error(buffers[f'{module}.{statistic}'], expected[key]) < OUTPUT_TOLERANCE[dtype], key
        compared += 1
    assert compared == len(expected.files) >= 20
