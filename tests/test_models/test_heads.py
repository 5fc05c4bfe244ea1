"""The classification head in mmpretrain's ImageClassifier."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.registry.utils import init_default_scope

pytest.importorskip('mmpretrain', reason="the head is mmpretrain's")

from mmpretrain.models import ImageClassifier
from mmpretrain.models.losses import CrossEntropyLoss, LabelSmoothLoss
from mmpretrain.structures import DataSample

from overlock_mm.models import OverLoCK, OverLoCKHead


def build(arch, out_indices=(4, 3), **head):
    init_default_scope('mmpretrain')
    channels = OverLoCK(arch, out_indices=out_indices).out_channels
    return ImageClassifier(
        backbone=dict(type='overlock_mm.OverLoCK', arch=arch, out_indices=out_indices),
        head=dict(
            type='overlock_mm.OverLoCKHead',
            num_classes=6,
            in_channels=channels[-1],
            overview_channels=channels[0] if len(channels) > 1 else None,
            **head,
        ),
    )


def samples(*labels):
    return [DataSample().set_gt_label(label) for label in labels]


def test_losses_and_gradients(small_arch):
    model = build(small_arch)
    losses = model(torch.randn(3, 3, 64, 64), samples(1, 0, 5), mode='loss')
    assert set(losses) == {'loss', 'aux_loss'}
    sum(losses.values()).backward()
    head = model.head
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


@torch.no_grad()
def test_auxiliary_loss_has_weight_0_4(small_arch):
    model = build(small_arch).eval()
    features = model.extract_feat(torch.randn(2, 3, 64, 64))
    losses = model.head.loss(features, samples(1, 3))
    target = torch.tensor([1, 3])
    assert losses['loss'] == torch.nn.functional.cross_entropy(model.head(features), target)
    auxiliary = torch.nn.functional.cross_entropy(model.head.forward_aux(features), target)
    assert losses['aux_loss'].item() == pytest.approx(0.4 * auxiliary.item(), rel=1e-6)


@torch.no_grad()
def test_soft_labels(small_arch):
    """Mixup and cutmix create soft labels."""
    model = build(small_arch, loss={'type': 'CrossEntropyLoss', 'use_soft': True}).eval()
    features = model.extract_feat(torch.randn(1, 3, 64, 64))
    score = torch.tensor([0.0, 0.3, 0, 0, 0.7, 0])
    losses = model.head.loss(features, [DataSample().set_gt_score(score)])
    expected = -(score * model.head.forward_aux(features).log_softmax(1)).sum()
    assert losses['aux_loss'].item() == pytest.approx(0.4 * expected.item(), rel=1e-5)


@torch.no_grad()
def test_prediction(small_arch):
    model = build(small_arch).eval()
    image = torch.randn(2, 3, 64, 64)
    predicted = model(image, samples(0, 0), mode='predict')
    scores = model.head(model.extract_feat(image)).softmax(1)
    for sample, expected in zip(predicted, scores):
        assert torch.equal(sample.pred_score, expected)
        assert sample.pred_label.item() == expected.argmax()


def test_without_the_auxiliary_head(small_arch):
    model = build(small_arch, out_indices=(3,))
    assert set(model(torch.randn(2, 3, 64, 64), samples(1, 3), mode='loss')) == {'loss'}
    assert not any('aux' in name for name in model.state_dict())


def test_auxiliary_head_needs_the_overview():
    head = OverLoCKHead(num_classes=2, in_channels=4, overview_channels=4)
    with pytest.raises(ValueError, match=r'out_indices=\(4, 3\), got 1'):
        head.forward_aux((torch.randn(1, 4, 2, 2),))


def test_numbers_of_channels_and_classes():
    head = OverLoCKHead(num_classes=np.int64(2), in_channels=np.int32(4), overview_channels=np.int64(4))
    assert repr(head) == repr(OverLoCKHead(num_classes=2, in_channels=4, overview_channels=4))
    with pytest.raises(ValueError, match='num_classes must be a positive int, got 0'):
        OverLoCKHead(num_classes=0, in_channels=4)


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'overlock_mm'])
def test_losses_in_another_scope(scope):
    if importlib.util.find_spec(scope) is None:
        pytest.skip(f'{scope} is not installed')
    loss = dict(type='LabelSmoothLoss', label_smooth_val=0.1)
    with DefaultScope.overwrite_default_scope(scope):
        heads = [OverLoCKHead(2, 4, overview_channels=4), OverLoCKHead(2, 4, overview_channels=4, loss=loss)]
        assert DefaultScope.get_current_instance().scope_name == scope
    for head, cls in zip(heads, (CrossEntropyLoss, LabelSmoothLoss)):
        assert type(head.loss_module) is type(head.aux_loss_module) is cls
