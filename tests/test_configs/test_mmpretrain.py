"""mmpretrain's configs: losses, augmentation, schedule and crops, and a training and test step of a classifier.

test_every_config.py tests networks, optimizers and batches.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from config_checks import blocks_without, build, flat, learning_rates, parameter_settings
from config_checks import load as load_config
from conftest import names_with_gradient

pytest.importorskip('mmpretrain', reason='these configs are for mmpretrain')

from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS
from mmpretrain.structures import DataSample

CROP_RATIOS = {'xt': 0.925, 't': 0.95, 's': 0.95, 'b': 0.975}


def load(name: str) -> Config:
    return load_config(f'mmpretrain/{name}')


def test_losses_and_mixing():
    cfg = load('overlock-t_8xb256_in1k')
    model = build(cfg, 'meta')
    assert model.head.num_classes == 1000
    for loss, weight in ((model.head.loss_module, 1.0), (model.head.aux_loss_module, 0.4)):
        assert type(loss).__name__ == 'LabelSmoothLoss'
        assert (loss.label_smooth_val, loss.mode, loss.loss_weight) == (0.1, 'original', weight)
    mixing = model.data_preprocessor.batch_augments
    assert [(type(augment).__name__, augment.alpha) for augment in mixing.augments] == [('Mixup', 0.8), ('CutMix', 1.0)]
    assert mixing.probs is None  # both have the same probability
    (ema,) = cfg.custom_hooks
    assert ema.type == 'EMAHook'
    assert 1 - ema.momentum == pytest.approx(0.9999)
    assert ema.update_buffers
    assert type(HOOKS.build(ema)).__name__ == 'EMAHook'


def test_schedule():
    cfg = load('overlock-t_8xb256_in1k')
    assert cfg.train_cfg.max_epochs == 300
    rates = learning_rates(cfg, 300 * 20, iterations_per_epoch=20)
    assert rates[0] == pytest.approx(1e-6)
    assert rates[50] == pytest.approx(1e-6 + (2e-3 - 1e-6) * 50 / 99, rel=1e-3)
    assert rates[99] == pytest.approx(2e-3)
    for epoch in (5, 100, 200, 299):
        expected = 1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * (epoch - 5) / 295)) / 2
        assert rates[epoch * 20] == pytest.approx(expected, rel=1e-3)


@pytest.fixture
def picture(tmp_path):
    cv2.imwrite(str(tmp_path / 'a.png'), np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    return dict(img_path=str(tmp_path / 'a.png'), gt_label=3)


def test_training_pipeline(picture):
    steps = load('overlock-t_8xb256_in1k').train_dataloader.dataset.pipeline
    kinds = ['LoadImageFromFile', 'RandomResizedCrop', 'RandomFlip', 'RandAugment', 'RandomErasing', 'PackInputs']
    assert [step.type for step in steps] == kinds
    crop, flip, augment, erase = steps[1:5]
    assert (crop.scale, crop.interpolation) == (224, 'bicubic')
    assert crop.get('crop_ratio_range', (0.08, 1.0)) == (0.08, 1.0)  # mmpretrain's default
    assert flip.prob == 0.5
    assert (augment.policies, augment.num_policies) == ('timm_increasing', 2)
    assert (augment.magnitude_level, augment.magnitude_std, augment.total_level) == (9, 0.5, 10)
    assert (erase.erase_prob, erase.mode) == (0.25, 'rand')
    assert Compose(steps)(picture)['inputs'].shape == (3, 224, 224)


@pytest.mark.parametrize('arch', CROP_RATIOS)
def test_test_pipeline(arch, picture):
    cfg = load(f'overlock-{arch}_8xb256_in1k')
    for dataloader in (cfg.val_dataloader, cfg.test_dataloader):
        steps = dataloader.dataset.pipeline
        assert [step.type for step in steps] == ['LoadImageFromFile', 'ResizeEdge', 'CenterCrop', 'PackInputs']
        assert (steps[1].scale, steps[1].edge) == (int(224 / CROP_RATIOS[arch]), 'short')
        assert steps[1].interpolation == 'bicubic'
    assert Compose(steps)(picture)['inputs'].shape == (3, 224, 224)


@pytest.mark.parametrize('arch', CROP_RATIOS)
def test_deploy_configs_differ_in_deploy_only(arch):
    ours, full = load(f'overlock-{arch}_deploy_in1k'), load(f'overlock-{arch}_8xb256_in1k')
    assert flat(ours.to_dict()) ^ flat(full.to_dict()) == {('model.backbone.deploy', 'True')}


def test_layer_wise_rates_with_mmpretrains_constructor():
    """It uses OverLoCK.get_layer_depth too."""
    cfg = load('overlock-xt_8xb256_in1k')
    cfg.optim_wrapper.constructor = 'LearningRateDecayOptimWrapperConstructor'
    cfg.optim_wrapper.paramwise_cfg.layer_decay_rate = 0.5
    rates = {name: settings['lr'] / 2e-3 for name, settings in parameter_settings(build(cfg, 'meta'), cfg).items()}
    # XT: stem, blocks1, blocks2, one layer of blocks3, the overview, two of sub_blocks3, sub_blocks4, the heads.
    for prefix, depth in (
        ('backbone.patch_embed1.', 8), ('backbone.blocks1.', 7), ('backbone.blocks3.2', 5), ('backbone.blocks4.', 4),
        ('backbone.sub_blocks3.2.', 3), ('backbone.sub_blocks3.3.', 2), ('backbone.sub_blocks4.', 1), ('head.head.', 0),
    ):  # fmt: skip
        assert {rate for name, rate in rates.items() if name.startswith(prefix)} == {0.5**depth}, prefix


def test_fine_tuning():
    cfg = load('overlock-t_8xb8_cub-384px')
    model = build(cfg, 'meta')
    assert model.head.num_classes == 200
    assert model.head.aux_head is None
    assert cfg.train_dataloader.dataset.type == 'CUB'
    assert cfg.train_cfg.max_epochs == 100
    rates = learning_rates(cfg, 100 * 10, iterations_per_epoch=10)
    assert rates[0] == pytest.approx(1e-6)
    assert max(rates) == pytest.approx(1e-4)
    assert rates[-1] < 1e-6


@pytest.mark.parametrize('name, classes', [('overlock-xt_8xb256_in1k', 1000), ('overlock-t_8xb8_cub-384px', 200)])
def test_training_step_and_test_step(name, classes):
    cfg = load(name)
    model = build(cfg)
    optim_wrapper = build_optim_wrapper(
        model, {key: value for key, value in cfg.optim_wrapper.items() if key != 'paramwise_cfg'}
    )
    samples = [DataSample().set_gt_label(label) for label in (1, classes - 1)]
    batch = dict(inputs=torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), data_samples=samples)
    model.train()
    with names_with_gradient(model) as found:
        logs = model.train_step(batch, optim_wrapper)
    with_auxiliary = classes == 1000
    assert ('aux_loss' in logs) == with_auxiliary
    assert all(torch.isfinite(value) for value in logs.values())
    assert 'head.head.4.weight' in found
    assert ('head.aux_head.2.weight' in found) == with_auxiliary
    assert blocks_without(model.backbone, found) == []

    model.eval()
    with torch.no_grad():
        results = model.test_step(batch)
    for result in results:
        assert result.pred_score.shape == (classes,)
        assert result.pred_score.sum().item() == pytest.approx(1, abs=1e-4)
        assert result.pred_label.item() == result.pred_score.argmax().item()
