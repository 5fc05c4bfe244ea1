"""mmseg's configs: heads, schedules and pipelines, and a training and test step of each kind of segmentor.

test_every_config.py tests networks, optimizers and batches of every config except Mask2Former's.
"""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from config_checks import blocks_without, build, flat, learning_rates, parameter_settings
from config_checks import load as load_config
from conftest import names_with_gradient

pytest.importorskip('mmseg', reason='these configs are for mmsegmentation')

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData
from mmseg.registry import DATASETS
from mmseg.structures import SegDataSample

from overlock_mm.models import OverLoCK

UPERNET = 'overlock-t_upernet_8xb2-160k_ade20k-512x512'
MASK2FORMER = 'overlock-t_mask2former_8xb2-160k_ade20k-512x512'


def load(name: str) -> Config:
    return load_config(f'mmseg/{name}')


def test_upernet_heads():
    model = load(UPERNET).model
    main, auxiliary = model.decode_head, model.auxiliary_head
    assert (main.type, main.channels, main.in_index, main.num_classes) == ('UPerHead', 512, [0, 1, 2, 3], 150)
    assert (auxiliary.type, auxiliary.channels, auxiliary.in_index, auxiliary.num_classes) == ('FCNHead', 256, 2, 150)
    assert auxiliary.num_convs == 1
    assert auxiliary.loss_decode.loss_weight == 0.4
    assert main.norm_cfg.type == auxiliary.norm_cfg.type == 'SyncBN'
    assert model.test_cfg.mode == 'whole'
    assert model.data_preprocessor.size == (512, 512)


def test_upernet_schedule():
    cfg = load(UPERNET)
    assert cfg.train_cfg.type == 'IterBasedTrainLoop'
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (160000, 8000)
    checkpoint = cfg.default_hooks.checkpoint
    assert (checkpoint.interval, checkpoint.save_best, checkpoint.by_epoch) == (8000, 'mIoU', False)
    rates = learning_rates(cfg, 160000)
    assert rates[0] == pytest.approx(6e-5 * 1e-6)
    assert rates[1499] == pytest.approx(6e-5, rel=1e-3)
    assert max(rates) == pytest.approx(6e-5, rel=1e-3)
    for iteration in (1500, 40000, 100000, 159999):
        assert rates[iteration] == pytest.approx(6e-5 * (160000 - iteration) / (160000 - 1500), rel=1e-3, abs=1e-9)


def test_pipelines(tmp_path):
    """The pipelines' steps and outputs: training crops of 512 x 512, test pictures with sides that 32 divides."""
    cfg = load(UPERNET)
    train, test = cfg.train_dataloader.dataset, cfg.test_dataloader.dataset
    assert [step.type for step in train.pipeline] == [
        'LoadImageFromFile', 'LoadAnnotations', 'RandomResize', 'RandomCrop', 'RandomFlip', 'PhotoMetricDistortion',
        'PackSegInputs',
    ]  # fmt: skip
    assert train.pipeline[2].ratio_range == (0.5, 2.0)
    assert train.pipeline[3].crop_size == (512, 512)
    assert cfg.val_dataloader.dataset.pipeline == test.pipeline
    rng = np.random.default_rng(0)
    for split in ('training', 'validation'):
        for kind, form, channels in (('images', 'jpg', (3,)), ('annotations', 'png', ())):
            folder = tmp_path / kind / split
            folder.mkdir(parents=True)
            picture = rng.integers(0, 151 if kind == 'annotations' else 256, (300, 420, *channels), dtype=np.uint8)
            cv2.imwrite(str(folder / f'0.{form}'), picture)
    sample = DATASETS.build({**train, 'data_root': str(tmp_path)})[0]
    assert max(sample['inputs'].shape[1:]) <= 512
    sample = DATASETS.build({**test, 'data_root': str(tmp_path)})[0]
    # 300 x 420 is resized to 512 x 717 by its short side.
    assert sample['inputs'].shape[1:] == (512, 736)
    assert sample['data_samples'].gt_sem_seg.shape == (300, 420)
    assert sample['data_samples'].ori_shape == (300, 420)


def test_mask2former_is_mmsegs_with_another_backbone(tmp_path):
    (tmp_path / 'stock.py').write_text("_base_ = 'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'")
    ours, stock = load(MASK2FORMER), Config.fromfile(tmp_path / 'stock.py')
    different = {key for key, _ in flat(ours.to_dict()) ^ flat(stock.to_dict())}
    assert {key for key in different if not key.startswith('model.backbone.')} == {
        'custom_imports.imports', 'default_hooks.random_state.type', 'default_hooks.fuse.type',
        'model.decode_head.in_channels', 'sync_bn',
    }  # fmt: skip
    model = build(ours, 'meta')
    assert type(model.backbone) is OverLoCK
    assert (model.backbone.arch, model.backbone.out_type) == ('t', 'pyramid')
    assert model.backbone.sub_blocks4[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert list(ours.model.decode_head.in_channels) == list(model.backbone.out_channels) == [64, 128, 384, 640]
    for name, settings in parameter_settings(model, ours).items():
        in_backbone = name.startswith('backbone.')
        assert settings['lr'] == pytest.approx(1e-5 if in_backbone else 1e-4), name
        if in_backbone:
            assert settings['weight_decay'] == 0.05


@pytest.mark.parametrize(
    'name, losses',
    [
        (UPERNET.replace('-t_', '-xt_'), {'decode.loss_ce', 'aux.loss_ce'}),
        (MASK2FORMER, {'decode.loss_cls', 'decode.loss_mask', 'decode.loss_dice', 'decode.d8.loss_dice'}),
    ],
)
def test_training_step_and_test_step(name, losses):
    """Each kind of segmentor, complete, on small pictures."""
    if name == MASK2FORMER:
        pytest.importorskip('mmdet', reason="mmseg's Mask2Former uses mmdet's")
    cfg = load(name)
    cfg.model.data_preprocessor.size = (64, 64)
    model = revert_sync_batchnorm(build(cfg))
    optim_wrapper = build_optim_wrapper(
        model, {key: value for key, value in cfg.optim_wrapper.items() if key != 'paramwise_cfg'}
    )
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 150, (1, 64, 64)))) for _ in range(2)]
    for sample in samples:
        sample.set_metainfo(dict(ori_shape=(64, 64), img_shape=(64, 64), pad_shape=(64, 64)))
    batch = dict(inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in samples], data_samples=samples)
    model.train()
    before = model.backbone.extra_norm['3'].weight.clone()
    with names_with_gradient(model) as found:
        logs = model.train_step(batch, optim_wrapper)
    assert losses <= set(logs)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in logs.values())
    assert not torch.equal(model.backbone.extra_norm['3'].weight, before)
    assert blocks_without(model.backbone, found) == []

    model.eval()
    with torch.no_grad():
        results = model.test_step(batch)
    assert len(results) == 2
    for result in results:
        labels = result.pred_sem_seg.data
        assert labels.shape == (1, 64, 64)
        assert 0 <= labels.min() <= labels.max() < 150
