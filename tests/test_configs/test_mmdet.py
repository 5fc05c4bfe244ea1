"""The Mask R-CNN configs are the released recipe: models, optimisers, schedules and pipelines, not only that they build.

And the ContMix plugin's example is mmdet's own recipe, and trains.
"""

from __future__ import annotations

import pytest
import torch
from conftest import names_with_gradient

pytest.importorskip('mmdet', reason='these configs are for mmdet')

from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.registry.utils import init_default_scope

import overlock_mm
from overlock_mm.models import ContMixBlock

DROP_PATH = {'xt': 0.1, 't': 0.2, 's': 0.4, 'b': 0.6}
CHANNELS = {
    'xt': [56, 112, 340, 420], 't': [64, 128, 384, 640], 's': [64, 128, 448, 640], 'b': [80, 160, 528, 720],
}  # fmt: skip
arches = pytest.mark.parametrize('arch', DROP_PATH)


def load(name: str) -> Config:
    cfg = Config.fromfile(overlock_mm.get_config_path(f'mmdet/{name}'))
    init_default_scope(cfg.default_scope)
    return cfg


@arches
def test_backbone_and_neck(arch):
    cfg = load(f'mask-rcnn_overlock-{arch}_fpn_1x_coco')
    assert cfg.model.backbone.init_cfg.checkpoint.endswith(
        f'/LMMMEng/OverLoCK/releases/download/v1/overlock_{arch}_in1k_224.pth'
    )
    assert cfg.model.neck.in_channels == CHANNELS[arch]
    backbone = MODELS.build({**cfg.model.backbone, 'init_cfg': None})
    assert list(backbone.out_channels) == CHANNELS[arch]
    assert backbone.out_type == 'pyramid_with_overview'
    assert backbone.sub_blocks4[-1].drop_path.drop_prob == pytest.approx(DROP_PATH[arch])
    assert backbone.blocks1[0].proj[9].drop_prob == 0
    assert cfg.model.type == 'MaskRCNN'
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 80


@arches
def test_data_batch_and_sync_bn(arch):
    cfg = load(f'mask-rcnn_overlock-{arch}_fpn_1x_coco')
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)
    assert cfg.sync_bn == 'torch'
    assert cfg.train_dataloader.dataset.data_root == 'data/coco/'
    steps = {step['type']: step for step in cfg.train_dataloader.dataset.pipeline}
    assert list(steps) == ['LoadImageFromFile', 'LoadAnnotations', 'Resize', 'RandomFlip', 'PackDetInputs']
    assert steps['Resize']['scale'] == (1333, 800)
    assert steps['Resize']['keep_ratio'] is True
    assert steps['RandomFlip']['prob'] == 0.5
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    assert cfg.val_evaluator.metric == ['bbox', 'segm']


def test_optimizer_groups():
    cfg = load('mask-rcnn_overlock-xt_fpn_1x_coco')
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(wrapper).__name__ == 'OptimWrapper'
    assert wrapper.clip_grad_kwargs is None
    optimizer = wrapper.optimizer
    assert type(optimizer).__name__ == 'AdamW'
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        assert group['lr'] == 2e-4
        assert group['betas'] == (0.9, 0.999)
        for parameter in group['params']:
            name = names[id(parameter)]
            seen.add(name)
            assert group['weight_decay'] == (0 if 'norm' in name else 0.05), name
    assert seen == set(names.values())
    # By substring, as released: the LayerNorms named so, not the batch norms in Sequentials, GRNs or LayerScales.
    assert 'backbone.sub_blocks3.0.norm1.weight' in seen
    assert 'backbone.extra_norm.0.weight' in seen


@arches
def test_schedule(arch):
    cfg = load(f'mask-rcnn_overlock-{arch}_fpn_1x_coco')
    assert cfg.train_cfg.max_epochs == 12
    rates = learning_rates(cfg, iterations_per_epoch=600)
    assert rates[0] == pytest.approx(2e-4 * 0.001)
    assert rates[250] == pytest.approx(2e-4 * (0.001 + 0.999 * 250 / 499), rel=1e-3)
    for iteration, rate in ((500, 2e-4), (8 * 600 - 1, 2e-4), (8 * 600, 2e-5), (11 * 600, 2e-6), (12 * 600 - 1, 2e-6)):
        assert rates[iteration] == pytest.approx(rate)


def learning_rates(cfg: Config, iterations_per_epoch: int) -> list[float]:
    """The learning rate at every iteration of the schedule."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = [PARAM_SCHEDULERS.build({**scheduler, 'optimizer': optimizer}) for scheduler in cfg.param_scheduler]
    rates = []
    for _ in range(cfg.train_cfg.max_epochs):
        for _ in range(iterations_per_epoch):
            rates.append(optimizer.param_groups[0]['lr'])
            optimizer.step()
            for scheduler in schedulers:
                if not scheduler.by_epoch:
                    scheduler.step()
        for scheduler in schedulers:
            if scheduler.by_epoch:
                scheduler.step()
    return rates


def test_the_demo_changes_only_what_it_says():
    """The XT config, but for data, classes, image size, schedule, and numbers of proposals and samples."""
    demo, full = load('mask-rcnn_overlock-xt_fpn_demo'), load('mask-rcnn_overlock-xt_fpn_1x_coco')
    allowed = (
        'model.backbone.init_cfg', 'model.roi_head.bbox_head.num_classes', 'model.roi_head.mask_head.num_classes',
        'model.train_cfg.rpn.sampler.num', 'model.train_cfg.rpn_proposal.', 'model.train_cfg.rcnn.sampler.num',
        'model.test_cfg.rpn.', 'model.test_cfg.rcnn.max_per_img',
        'max_epochs', 'num_classes',
        'train_cfg.', 'param_scheduler', 'default_hooks.logger.', 'default_hooks.checkpoint.', 'randomness', 'data_root',
        'metainfo', 'image_size', 'train_pipeline', 'test_pipeline', 'train_dataloader.', 'val_dataloader.',
        'test_dataloader.', 'val_evaluator.ann_file', 'test_evaluator.ann_file',
    )  # fmt: skip
    different = {key for key, _ in flat(demo.to_dict()) ^ flat(full.to_dict())}
    assert [key for key in sorted(different) if not key.startswith(allowed)] == []


def test_the_contmix_example_is_mmdets_config_with_the_plugin(tmp_path):
    (tmp_path / 'stock.py').write_text("_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'")
    ours, stock = load('mask-rcnn_r50-contmix_fpn_1x_coco'), Config.fromfile(tmp_path / 'stock.py')
    different = {key for key, _ in flat(ours.to_dict()) ^ flat(stock.to_dict())}
    assert different == {'model.backbone.plugins'}
    backbone = MODELS.build({**ours.model.backbone, 'init_cfg': None})
    names = [name for name, module in backbone.named_modules() if type(module) is ContMixBlock]
    blocks = ((2, 4), (3, 6), (4, 3))  # stages by mmdet's names of their layers, and their bottlenecks
    assert names == [f'layer{stage}.{i}.contmix_block' for stage, number in blocks for i in range(number)]
    assert backbone.layer2[0].contmix_block.in_channels == 128
    assert backbone.layer4[0].contmix_block.kernel_size == 7


def test_the_contmix_example_trains(demo_data):
    """Two steps of the config's detector and optimiser on the demo's pictures; the first moves a block's scale only."""
    cfg = load('mask-rcnn_r50-contmix_fpn_1x_coco')
    # As a pre-trained ResNet: residual branches at zero would keep gradients from the blocks at first.
    cfg.model.backbone.update(init_cfg=None, zero_init_residual=False)
    demo = load('mask-rcnn_overlock-xt_fpn_demo')
    dataset = DATASETS.build(
        {**demo.train_dataloader.dataset, 'data_root': f'{demo_data}/', 'filter_cfg': None, 'pipeline': demo.train_pipeline}
    )
    batch = pseudo_collate([dataset[0], dataset[1]])
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    blocks = {name: module for name, module in model.named_modules() if type(module) is ContMixBlock}
    assert len(blocks) == 13
    names = {f'{block}.{name}' for block, module in blocks.items() for name, _ in module.named_parameters()}
    for expected in ({name for name in names if '.layer_scale.' in name}, names):
        with names_with_gradient(model) as found:
            logs = model.train_step(batch, optim_wrapper)
        assert {'loss_rpn_cls', 'loss_cls', 'loss_bbox', 'loss_mask'} <= set(logs)
        assert torch.isfinite(logs['loss'])
        assert found & names == expected


def flat(value, prefix=''):
    if isinstance(value, dict):
        return {item for key, inner in value.items() for item in flat(inner, f'{prefix}{key}.')}
    return {(prefix.rstrip('.'), repr(value))}
