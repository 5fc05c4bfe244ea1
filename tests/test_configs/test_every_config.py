"""Every shipped config follows its recipe: network, optimizer groups, batches, batch norms.

The recipes are repeated here from the published tables, so that an error in a config or in its base fails a test.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Callable, Optional

import pytest
import torch
from config_checks import build, flat, load, parameter_settings
from mmengine.registry import HOOKS

pytest.importorskip('mmdet', reason='some configs are for it')
pytest.importorskip('mmseg', reason='some configs are for it')
pytest.importorskip('mmpretrain', reason='some configs are for it')

import overlock_mm
from overlock_mm.checkpoints.release import find_released
from overlock_mm.models import OverLoCK
from overlock_mm.models.overlock import STAGES

#: Reading a config and building its model must not download anything.
pytestmark = pytest.mark.usefixtures('no_network')

CHANNELS = {
    'xt': [56, 112, 340, 420], 't': [64, 128, 384, 640], 's': [64, 128, 448, 640], 'b': [80, 160, 528, 720],
}  # fmt: skip
BLOCKS = {'xt': (2, 2, 3, 2, 6, 2), 't': (4, 4, 6, 2, 12, 2), 's': (6, 6, 8, 3, 16, 3), 'b': (8, 8, 10, 4, 20, 4)}


def norms_by_name(name: str, parameter: torch.nn.Parameter) -> bool:
    """The rule of the release: a substring."""
    return 'norm' in name


def vectors(name: str, parameter: torch.nn.Parameter) -> bool:
    """The rule of timm."""
    return parameter.ndim == 1 or name.endswith('.bias')


def no_parameter(name: str, parameter: torch.nn.Parameter) -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Recipe:
    arch: str
    drop_path: float
    lr: float
    weight_decay: float
    batch_size: int
    undecayed: Callable[[str, torch.nn.Parameter], bool] = norms_by_name
    backbone_lr: float = 1.0
    out_type: str = 'pyramid_with_overview'
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    amp: bool = False
    clip: Optional[dict] = None
    pretrained: bool = True
    deploy: bool = False
    sync_bn: Optional[str] = 'torch'


def recipes() -> dict[str, Recipe]:
    table = {}
    for arch, drop_path in (('xt', 0.1), ('t', 0.2), ('s', 0.4), ('b', 0.6)):
        detector = functools.partial(Recipe, arch, drop_path, weight_decay=0.05, batch_size=2)
        for amp in (False, True) if arch == 't' else (False,):
            mark = 'amp-' if amp else ''
            table[f'mmdet/mask-rcnn_overlock-{arch}_fpn_{mark}1x_coco'] = detector(lr=2e-4, amp=amp)
            table[f'mmdet/mask-rcnn_overlock-{arch}_fpn_{mark}ms-crop-3x_coco'] = detector(lr=1e-4, amp=amp)
            table[f'mmdet/cascade-mask-rcnn_overlock-{arch}_fpn_{mark}ms-crop-3x_coco'] = detector(lr=1e-4, amp=amp)
    table['mmdet/mask-rcnn_overlock-xt_fpn_demo'] = Recipe('xt', 0.1, 2e-4, 0.05, batch_size=2, pretrained=False)
    table['mmdet/retinanet_overlock-t_fpn_1x_coco'] = Recipe('t', 0.2, 1e-4, 0.05, batch_size=2, out_indices=(1, 2, 3))
    table['mmdet/dino-4scale_overlock-t_8xb2-12e_coco'] = Recipe(
        't', 0.2, 1e-4, 1e-4, batch_size=2, undecayed=no_parameter, backbone_lr=0.1, out_indices=(1, 2, 3),
        clip=dict(max_norm=0.1, norm_type=2),
    )  # fmt: skip
    for arch, drop_path in (('xt', 0.1), ('t', 0.2), ('s', 0.3), ('b', 0.5)):
        segmentor = Recipe(arch, drop_path, 6e-5, 0.01, batch_size=2, out_type='pyramid')
        table[f'mmseg/overlock-{arch}_upernet_8xb2-160k_ade20k-512x512'] = segmentor
        if arch == 't':
            amp = dataclasses.replace(segmentor, amp=True)
            table['mmseg/overlock-t_upernet_8xb2-amp-160k_ade20k-512x512'] = amp
    for arch, drop_path in (('xt', 0.1), ('t', 0.15), ('s', 0.4), ('b', 0.5)):
        classifier = Recipe(
            arch, drop_path, 2e-3, 0.05, batch_size=256, undecayed=vectors, out_type='features', out_indices=(4, 3),
            clip=dict(max_norm=5.0), pretrained=False,
        )  # fmt: skip
        table[f'mmpretrain/overlock-{arch}_8xb256_in1k'] = classifier
        table[f'mmpretrain/overlock-{arch}_deploy_in1k'] = dataclasses.replace(classifier, deploy=True)
    table['mmpretrain/overlock-t_8xb8_cub-384px'] = Recipe(
        't', 0.15, 1e-4, 0.05, batch_size=8, undecayed=vectors, out_type='features', out_indices=(3,),
        clip=dict(max_norm=5.0), sync_bn=None,
    )  # fmt: skip
    return table


RECIPES = recipes()
#: Tested elsewhere: another backbone, or other rules for decay and rates.
OTHER_CONFIGS = {
    'mmdet/mask-rcnn_r50-contmix_fpn_1x_coco',
    'mmdet/cascade-mask-rcnn_overlock-t_fpn_layer-decay-ms-crop-3x_coco',
    'mmseg/overlock-t_mask2former_8xb2-160k_ade20k-512x512',
}
every_config = pytest.mark.parametrize('name', RECIPES)


def test_every_config_is_tested():
    assert {name[:-3] for name in overlock_mm.list_configs()} == {*RECIPES, *OTHER_CONFIGS}
    assert not {*RECIPES} & OTHER_CONFIGS


@every_config
def test_backbone_and_input_channels_of_necks_and_heads(name):
    cfg, recipe = load(name), RECIPES[name]
    settings = cfg.model.backbone
    if recipe.pretrained:
        released = find_released(settings.init_cfg.checkpoint)
        assert (released.family, released.arch) == ('classification', recipe.arch)
    else:
        assert settings.get('init_cfg') is None

    model = build(cfg, 'meta')
    backbone = model.backbone
    assert type(backbone) is OverLoCK
    assert (backbone.arch, backbone.out_type, backbone.out_indices) == (recipe.arch, recipe.out_type, recipe.out_indices)
    assert backbone.deploy is recipe.deploy
    assert not backbone.norm_eval
    assert backbone.frozen_stages == -1

    blocks = [block for stage in STAGES for block in getattr(backbone, stage)]
    assert [len(getattr(backbone, stage)) for stage in STAGES] == list(BLOCKS[recipe.arch])
    rates = [getattr(block.drop_path if hasattr(block, 'drop_path') else block.proj[9], 'drop_prob', 0) for block in blocks]
    assert rates == pytest.approx(torch.linspace(0, recipe.drop_path, len(blocks)).tolist(), abs=1e-7)

    channels = [CHANNELS[recipe.arch][i] for i in recipe.out_indices if i < 4]
    if 'neck' in cfg.model:
        assert list(cfg.model.neck.in_channels) == channels == list(backbone.out_channels)
    elif 'decode_head' in cfg.model:
        assert list(cfg.model.decode_head.in_channels) == channels == list(backbone.out_channels)
        assert cfg.model.auxiliary_head.in_channels == channels[2]
    else:
        head = cfg.model.head
        assert backbone.out_channels[-1] == head.in_channels
        assert head.get('overview_channels') == (backbone.out_channels[0] if len(backbone.out_channels) == 2 else None)


@every_config
def test_optimizer_settings_of_every_parameter(name):
    cfg, recipe = load(name), RECIPES[name]
    assert cfg.optim_wrapper.get('type', 'OptimWrapper') == ('AmpOptimWrapper' if recipe.amp else 'OptimWrapper')
    assert cfg.optim_wrapper.get('loss_scale') == ('dynamic' if recipe.amp else None)
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    clip = cfg.optim_wrapper.get('clip_grad')
    assert (clip and clip.to_dict()) == recipe.clip
    model = build(cfg, 'meta')
    found = parameter_settings(model, cfg)
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == set(found)
    for key, parameter in model.named_parameters():
        settings = found.get(key)
        if settings is None:
            continue
        assert settings.get('betas', (0.9, 0.999)) == (0.9, 0.999)  # torch's default
        assert settings['lr'] == pytest.approx(recipe.lr * (recipe.backbone_lr if key.startswith('backbone.') else 1)), key
        assert settings['weight_decay'] == (0 if recipe.undecayed(key, parameter) else recipe.weight_decay), key


@every_config
def test_batches_and_batch_norms(name):
    cfg, recipe = load(name), RECIPES[name]
    assert cfg.train_dataloader.batch_size == recipe.batch_size
    assert cfg.auto_scale_lr.base_batch_size == 8 * recipe.batch_size
    assert not cfg.auto_scale_lr.get('enable', False)
    assert cfg.get('sync_bn') == recipe.sync_bn
    # No setting of the inherited networks is left.
    assert not re.search('swin|convnext|resnet|SGD', str(cfg.to_dict()), re.IGNORECASE)


@pytest.mark.parametrize('name', [*RECIPES, *sorted(OTHER_CONFIGS)])
def test_dumped_config_imports_the_package(name):
    """Inferencers read a checkpoint before they build the model, so the config must import what allows its objects."""
    assert 'overlock_mm' in load(name).custom_imports.imports


@pytest.mark.parametrize('name', [*RECIPES, *sorted(OTHER_CONFIGS)])
def test_killed_runs_are_resumed_exactly(name):
    hooks = load(name).default_hooks
    assert type(HOOKS.build(hooks.random_state)) is overlock_mm.RandomStateHook
    assert hooks.checkpoint.get('max_keep_ckpts', -1) != 1  # mmengine would remove the last one before it writes the next


@pytest.mark.parametrize('name', RECIPES)
def test_models_are_trained_with_fused_layers(name):
    assert type(HOOKS.build(load(name).default_hooks.fuse)) is overlock_mm.FuseForTrainingHook


@pytest.mark.parametrize('name', [name for name in RECIPES if '-t_' not in name and not name.endswith('_demo')])
def test_variants_differ_from_t_in_the_network_only(name):
    """So the detailed tests of T hold for all variants."""
    arch = RECIPES[name].arch
    ours, t = load(name), load(name.replace(f'overlock-{arch}_', 'overlock-t_'))
    allowed = {
        'model.backbone.arch', 'model.backbone.drop_path_rate', 'model.backbone.init_cfg.checkpoint',
        'model.neck.in_channels', 'model.decode_head.in_channels', 'model.auxiliary_head.in_channels',
        'model.head.in_channels', 'model.head.overview_channels',
        # each variant has its own crop ratio
        'test_pipeline', 'val_dataloader.dataset.pipeline', 'test_dataloader.dataset.pipeline',
    }  # fmt: skip
    if not name.startswith('mmpretrain/'):
        allowed = {key for key in allowed if 'pipeline' not in key}
    assert {key for key, _ in flat(ours.to_dict()) ^ flat(t.to_dict())} <= allowed


@pytest.mark.parametrize('name', [name for name in RECIPES if 'amp-' in name])
def test_amp_configs_differ_in_the_wrapper_only(name):
    ours, full = load(name), load(name.replace('amp-', ''))
    different = {key for key, _ in flat(ours.to_dict()) ^ flat(full.to_dict())}
    assert different == {'optim_wrapper.type', 'optim_wrapper.loss_scale'}
