"""mmdet's configs: heads, schedules and pipelines, and a training and test step of each kind of detector.

test_every_config.py tests networks, optimizers and batches.
"""

from __future__ import annotations

import pytest
import torch
from config_checks import blocks_without, build, flat, learning_rates, parameter_settings
from config_checks import load as load_config
from conftest import names_with_gradient

pytest.importorskip('mmdet', reason='these configs are for mmdet')

from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper

from overlock_mm.layer_decay import LayerDecayOptimWrapperConstructor
from overlock_mm.models import ContMixBlock, OverLoCK

SHORT_SIDES = [(side, 1333) for side in range(480, 801, 32)]


def load(name: str) -> Config:
    return load_config(f'mmdet/{name}')


def test_mask_rcnn():
    cfg = load('mask-rcnn_overlock-t_fpn_1x_coco')
    assert cfg.model.type == 'MaskRCNN'
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 80
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    assert cfg.train_dataloader.dataset.data_root == 'data/coco/'
    assert cfg.val_evaluator.metric == ['bbox', 'segm']


@pytest.mark.parametrize('name', ['mask-rcnn_overlock-t_fpn_1x_coco', 'retinanet_overlock-t_fpn_1x_coco'])
def test_1x(name):
    cfg = load(name)
    steps = {step['type']: step for step in cfg.train_dataloader.dataset.pipeline}
    assert list(steps) == ['LoadImageFromFile', 'LoadAnnotations', 'Resize', 'RandomFlip', 'PackDetInputs']
    assert steps['Resize']['scale'] == (1333, 800)
    assert steps['Resize']['keep_ratio'] is True
    assert steps['RandomFlip']['prob'] == 0.5
    assert cfg.train_cfg.max_epochs == 12
    full = cfg.optim_wrapper.optimizer.lr
    rates = learning_rates(cfg, 12 * 600, iterations_per_epoch=600)
    assert rates[0] == pytest.approx(full * 0.001)
    assert rates[250] == pytest.approx(full * (0.001 + 0.999 * 250 / 499), rel=1e-3)
    for iteration, factor in ((500, 1), (8 * 600 - 1, 1), (8 * 600, 0.1), (11 * 600, 0.01), (12 * 600 - 1, 0.01)):
        assert rates[iteration] == pytest.approx(full * factor)


@pytest.mark.parametrize(
    'name', ['mask-rcnn_overlock-t_fpn_ms-crop-3x_coco', 'cascade-mask-rcnn_overlock-t_fpn_ms-crop-3x_coco']
)
def test_3x(name, demo_data):
    cfg = load(name)
    pipeline = cfg.train_dataloader.dataset.pipeline
    kinds = ['LoadImageFromFile', 'LoadAnnotations', 'RandomFlip', 'RandomChoice', 'PackDetInputs']
    assert [step.type for step in pipeline] == kinds
    assert pipeline[1].with_mask
    assert pipeline[2].prob == 0.5
    resized, cropped = pipeline[3].transforms
    assert [step.type for step in resized] == ['RandomChoiceResize']
    assert [step.type for step in cropped] == ['RandomChoiceResize', 'RandomCrop', 'RandomChoiceResize']
    for step in (resized[0], cropped[2]):
        assert step.scales == SHORT_SIDES
        assert step.keep_ratio
    assert cropped[0].scales == [(400, 1333), (500, 1333), (600, 1333)]
    assert cropped[1].crop_type == 'absolute_range'
    assert cropped[1].crop_size == (384, 600)
    # Run the pipeline: square pictures get one of the short sides; crops have a longer side of at most 1333.
    classes = load('mask-rcnn_overlock-xt_fpn_demo').metainfo
    dataset = {**cfg.train_dataloader.dataset, 'data_root': f'{demo_data}/', 'metainfo': classes, 'filter_cfg': None}
    sizes = [sample['inputs'].shape[1:] for sample in (DATASETS.build(dataset)[0] for _ in range(6))]
    assert all(480 <= min(size) <= 800 or max(size) == 1333 for size in sizes)
    assert len(set(sizes)) > 1
    # Crops of at most 384 rows and 600 columns are rarely square.
    dataset['pipeline'] = [*pipeline[:3], *cropped, pipeline[4]]
    sizes = [sample['inputs'].shape[1:] for sample in (DATASETS.build(dataset)[0] for _ in range(6))]
    assert any(height != width for height, width in sizes)

    assert cfg.train_cfg.max_epochs == 36
    rates = learning_rates(cfg, 36 * 200, iterations_per_epoch=200)
    assert rates[0] == pytest.approx(1e-4 * 0.001)
    assert rates[498] < rates[499] == pytest.approx(1e-4)
    for epoch, rate in ((26, 1e-4), (27, 1e-5), (32, 1e-5), (33, 1e-6), (35, 1e-6)):
        assert rates[epoch * 200] == pytest.approx(rate)
        assert rates[epoch * 200 + 199] == pytest.approx(rate)


def test_cascade_heads():
    heads = load('cascade-mask-rcnn_overlock-t_fpn_ms-crop-3x_coco').model.roi_head.bbox_head
    assert len(heads) == 3
    for head, deviations in zip(heads, ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])):
        assert head.type == 'ConvFCBBoxHead'
        assert (head.num_shared_convs, head.num_shared_fcs) == (4, 1)
        assert head.norm_cfg.type == 'SyncBN'
        assert not head.reg_class_agnostic
        assert head.reg_decoded_bbox
        assert head.loss_bbox == dict(type='GIoULoss', loss_weight=10.0)
        assert head.bbox_coder.target_stds == deviations


def test_layer_decay():
    """Every layer has 0.8 times the rate of the next one. Weight decay follows the rule of the release."""
    cfg, plain = (load(f'cascade-mask-rcnn_overlock-t_fpn_{kind}ms-crop-3x_coco') for kind in ('layer-decay-', ''))
    different = {key for key, _ in flat(cfg.to_dict()) ^ flat(plain.to_dict())}
    assert different == {'optim_wrapper.constructor', 'optim_wrapper.paramwise_cfg.layer_decay_rate'}
    model = build(cfg, 'meta')
    settings = parameter_settings(model, cfg)
    assert set(settings) == {name for name, _ in model.named_parameters()}
    for name, found in settings.items():
        assert found['weight_decay'] == (0 if 'norm' in name else 0.05), name
    layers = {
        name: round(torch.log(torch.tensor(found['lr'] / 1e-4)).item() / -0.2231436) for name, found in settings.items()
    }
    assert all(settings[name]['lr'] == pytest.approx(1e-4 * 0.8**layer) for name, layer in layers.items())
    # Layers below the top, counted by hand. OverLoCK-T has 12 layers (0 to 11).
    expected = {
        'backbone.patch_embed1.': 11, 'backbone.blocks1.': 10, 'backbone.patch_embed2.': 9, 'backbone.blocks2.': 9,
        'backbone.patch_embed3.': 8, 'backbone.blocks3.0.': 8, 'backbone.blocks3.2.': 8, 'backbone.blocks3.3.': 7,
        'backbone.blocks3.5.': 7, 'backbone.patch_embed4.': 6, 'backbone.blocks4.': 6, 'backbone.high_level_proj.': 6,
        'backbone.sub_blocks3.0.': 5, 'backbone.sub_blocks3.3.': 4, 'backbone.sub_blocks3.6.': 3,
        'backbone.sub_blocks3.11.': 2,
        'backbone.patch_embedx.': 1, 'backbone.sub_blocks4.': 1, 'backbone.extra_norm.': 0, 'backbone.h_proj.': 0,
        'neck.': 0, 'rpn_head.': 0, 'roi_head.': 0,
    }  # fmt: skip
    for prefix, depth in expected.items():
        found = {layer for name, layer in layers.items() if name.startswith(prefix)}
        assert found == {depth}, prefix


@pytest.mark.parametrize(
    'paramwise, message',
    [
        ({}, r'layer_decay_rate must be in \(0, 1\], got None'),
        (dict(layer_decay_rate=1.5), r'layer_decay_rate must be in \(0, 1\], got 1.5'),
    ],
)
def test_layer_decay_rate_out_of_range(paramwise, message):
    with pytest.raises(ValueError, match=message):
        LayerDecayOptimWrapperConstructor(dict(optimizer=dict(type='AdamW', lr=1e-4)), paramwise)


def detector_with(backbone: torch.nn.Module) -> torch.nn.Module:
    model = torch.nn.Module()
    model.backbone = backbone
    return model


def test_layer_decay_needs_get_layer_depth_and_lr():
    constructor = LayerDecayOptimWrapperConstructor(dict(optimizer=dict(type='SGD', lr=0.1)), dict(layer_decay_rate=0.5))
    with pytest.raises(TypeError, match='backbone has get_layer_depth, got Linear'):
        constructor(detector_with(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match='must have an lr'):
        LayerDecayOptimWrapperConstructor(dict(optimizer=dict(type='Adadelta')), dict(layer_decay_rate=0.5))


def test_layer_decay_multiplies_other_factors():
    model = detector_with(OverLoCK('xt'))
    model.backbone.patch_embed1.requires_grad_(False)
    paramwise = dict(layer_decay_rate=0.5, bias_lr_mult=3.0, custom_keys={'blocks1.1': dict(lr_mult=0.1, decay_mult=0.0)})
    optimizer = LayerDecayOptimWrapperConstructor(dict(optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.1)), paramwise)(
        model
    ).optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {names[id(group['params'][0])]: group for group in optimizer.param_groups}
    layers = model.backbone.get_layer_depth('neck', 'backbone.')[1]
    top = layers - 1
    assert not any('patch_embed1' in name for name in groups)
    assert groups['backbone.blocks1.0.dwconv.weight']['lr'] == 0.5 ** (top - 1)
    assert groups['backbone.blocks1.0.dwconv.bias']['lr'] == 3 * 0.5 ** (top - 1)
    assert groups['backbone.blocks1.1.dwconv.weight']['lr'] == pytest.approx(0.1 * 0.5 ** (top - 1))
    assert groups['backbone.blocks1.1.dwconv.weight']['weight_decay'] == 0
    assert groups['backbone.sub_blocks4.0.dwconv1.weight']['lr'] == 0.5


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
    # A substring, as in the release: it matches LayerNorms, but not GRNs, LayerScales or batch norms in a Sequential.
    assert 'backbone.sub_blocks3.0.norm1.weight' in seen
    assert 'backbone.extra_norm.0.weight' in seen


@pytest.mark.parametrize(
    'name, losses',
    [
        ('mask-rcnn_overlock-xt_fpn_1x_coco', {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask'}),
        (
            'cascade-mask-rcnn_overlock-xt_fpn_ms-crop-3x_coco',
            {'loss_rpn_cls', 's0.loss_cls', 's2.loss_bbox', 's2.loss_mask'},
        ),
        ('retinanet_overlock-t_fpn_1x_coco', {'loss_cls', 'loss_bbox'}),
        ('dino-4scale_overlock-t_8xb2-12e_coco', {'loss_cls', 'loss_bbox', 'loss_iou', 'd4.loss_cls', 'dn_loss_cls'}),
    ],
)
def test_training_step_and_test_step(name, losses):
    """Each kind of detector, complete, on small pictures with few proposals."""
    from mmdet.testing import demo_mm_inputs

    cfg = load(name)
    if 'rpn_head' in cfg.model:
        for settings in (cfg.model.train_cfg.rpn_proposal, cfg.model.test_cfg.rpn, cfg.model.test_cfg.rcnn):
            settings.max_per_img = 16
        stages = cfg.model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 16
    elif name.startswith('dino'):
        cfg.model.num_queries = 30
    model = revert_sync_batchnorm(build(cfg))
    if name.startswith('dino'):
        # Uninitialised memory until init_weights, which a runner calls.
        torch.nn.init.normal_(model.level_embed)
    with_masks = 'mask' in name
    batch = demo_mm_inputs(2, [[3, 64, 96]] * 2, num_items=[2, 2], num_classes=80, with_mask=with_masks)
    # Without clipping, which makes DINO's first step too small for float32.
    optim_wrapper = build_optim_wrapper(model, dict(optimizer=cfg.optim_wrapper.optimizer))
    model.train()
    before = model.backbone.extra_norm['3'].weight.clone()
    with names_with_gradient(model) as found:
        logs = model.train_step(batch, optim_wrapper)
    assert losses <= set(logs)
    assert all(torch.isfinite(value) for value in logs.values())
    assert not torch.equal(model.backbone.extra_norm['3'].weight, before)
    # Scales that start at zero (GRN) block gradients at first, but each block has some parameter with a gradient.
    assert blocks_without(model.backbone, found) == []

    model.eval()
    with torch.no_grad():
        samples = model.test_step(batch)
    assert len(samples) == 2
    for sample in samples:
        instances = sample.pred_instances
        assert instances.bboxes.shape == (len(instances.scores), 4)
        assert instances.scores.isfinite().all()
        if with_masks:
            assert instances.masks.shape == (len(instances), 64, 96)


def test_demo_differs_as_documented():
    """The demo changes data, classes, image size, schedule, numbers of proposals and samples, and, to train from scratch,
    the norms of the neck and of the mask head; and what counts as a duplicate."""
    demo, full = load('mask-rcnn_overlock-xt_fpn_demo'), load('mask-rcnn_overlock-xt_fpn_1x_coco')
    allowed = (
        'model.backbone.init_cfg', 'model.roi_head.bbox_head.num_classes', 'model.roi_head.mask_head.num_classes',
        'model.train_cfg.rpn.sampler.num', 'model.train_cfg.rpn_proposal.', 'model.train_cfg.rcnn.sampler.num',
        'model.test_cfg.rpn.', 'model.test_cfg.rcnn.max_per_img', 'model.test_cfg.rcnn.nms.iou_threshold',
        'model.neck.norm_cfg.', 'model.roi_head.mask_head.norm_cfg.', 'norm_cfg.',
        'max_epochs', 'num_classes',
        'train_cfg.', 'param_scheduler', 'default_hooks.logger.', 'default_hooks.checkpoint.', 'custom_hooks', 'randomness',
        'data_root', 'metainfo', 'image_size', 'train_pipeline', 'test_pipeline', 'train_dataloader.', 'val_dataloader.',
        'test_dataloader.', 'val_evaluator.ann_file', 'test_evaluator.ann_file',
    )  # fmt: skip
    different = {key for key, _ in flat(demo.to_dict()) ^ flat(full.to_dict())}
    assert [key for key in sorted(different) if not key.startswith(allowed)] == []


def test_contmix_example_is_mmdets_config_with_the_plugin(tmp_path):
    (tmp_path / 'stock.py').write_text("_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'")
    ours, stock = load('mask-rcnn_r50-contmix_fpn_1x_coco'), Config.fromfile(tmp_path / 'stock.py')
    different = {key for key, _ in flat(ours.to_dict()) ^ flat(stock.to_dict())}
    assert different == {
        'model.backbone.plugins', 'custom_imports.imports', 'custom_imports.allow_failed_imports',
        'default_hooks.random_state.type',
    }  # fmt: skip
    backbone = MODELS.build({**ours.model.backbone, 'init_cfg': None})
    names = [name for name, module in backbone.named_modules() if type(module) is ContMixBlock]
    blocks = ((2, 4), (3, 6), (4, 3))  # mmdet's layer numbers and their bottlenecks
    assert names == [f'layer{stage}.{i}.contmix_block' for stage, number in blocks for i in range(number)]
    assert backbone.layer2[0].contmix_block.in_channels == 128
    assert backbone.layer4[0].contmix_block.kernel_size == 7


def test_contmix_example_trains(demo_data):
    """Two steps on the demo's pictures. The first step changes only the scale of each block, which starts at zero."""
    cfg = load('mask-rcnn_r50-contmix_fpn_1x_coco')
    # Like a pre-trained ResNet: residual branches at zero would block the gradients of the plugins at first.
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
