"""Names of released files and shipped configs, in the metafiles and in the frameworks."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, import_file
from mmengine.fileio import load

import overlock_mm
from overlock_mm.checkpoints.release import RELEASE, RELEASED, find_released

CONFIGS = sorted(name for name in overlock_mm.list_configs() if not name.endswith('_demo.py'))
FRAMEWORKS = ('mmdet', 'mmseg', 'mmpretrain')


def metafiles() -> dict[str, dict]:
    index = load(str(ROOT / 'model-index.yml'))
    return {file.split('/')[1]: load(str(ROOT / file)) for file in index['Import']}


def models() -> dict[str, dict]:
    """Models of all metafiles by their configs."""
    return {model['Config'].removeprefix('configs/'): model for file in metafiles().values() for model in file['Models']}


def test_every_config_is_in_its_metafile():
    assert set(metafiles()) == set(FRAMEWORKS)
    assert sorted(models()) == CONFIGS
    assert sum(len(file['Models']) for file in metafiles().values()) == len(CONFIGS)
    collections = {collection['Name'] for file in metafiles().values() for collection in file.get('Collections', [])}
    for config, model in models().items():
        assert config == f'{config.split("/")[0]}/{model["Name"]}.py'
        assert model['In Collection'] in collections


def test_metafiles_have_the_released_weights():
    released = {file.config: file.url for file in RELEASED.values()}
    assert {config: model['Weights'] for config, model in models().items() if 'Weights' in model} == released
    assert len(released) == len(RELEASED) == 17
    for file in RELEASED.values():
        assert file.url == RELEASE + file.name
        assert f'overlock-{file.arch}_' in file.config


def test_results_are_marked_as_reported_by_the_release():
    with_results = {config: model for config, model in models().items() if 'Results' in model}
    assert len(with_results) == 6 + 3 + 8
    for config, model in with_results.items():
        assert config in {file.config for file in RELEASED.values()}
        for result in model['Results']:
            assert result['Reported by'] == 'the release, not reproduced here'
    # From the published tables.
    found = {
        config: {name: value for result in model['Results'] for name, value in result['Metrics'].items()}
        for config, model in with_results.items()
    }
    for arch, first, third, miou in (
        ('t', (48.3, 43.3), (49.6, 43.9), 50.3),
        ('s', (49.4, 44.0), (51.0, 45.0), 51.3),
        ('b', (49.9, 44.4), (51.4, 45.3), 51.7),
    ):
        for schedule, (box, mask) in (('1x', first), ('ms-crop-3x', third)):
            assert found[f'mmdet/mask-rcnn_overlock-{arch}_fpn_{schedule}_coco.py'] == {'box AP': box, 'mask AP': mask}
        assert found[f'mmseg/overlock-{arch}_upernet_8xb2-160k_ade20k-512x512.py'] == {'mIoU': miou}
    for arch, top1 in (('xt', 82.7), ('t', 84.2), ('s', 84.8), ('b', 85.1)):
        for kind in ('8xb256', 'deploy'):
            assert found[f'mmpretrain/overlock-{arch}_{kind}_in1k.py'] == {'Top 1 Accuracy': top1}


@pytest.fixture(scope='module')
def counter():
    for framework in FRAMEWORKS:
        pytest.importorskip(framework, reason='models of all three frameworks are counted')
    return import_file(ROOT / 'tools' / 'complexity.py')


def is_counted(config: str) -> bool:
    """One config of each network is counted. The others must have the same numbers."""
    return not any(part in config for part in ('amp-', 'layer-decay', 'ms-crop-3x')) or config.endswith(
        '/cascade-mask-rcnn_overlock-xt_fpn_ms-crop-3x_coco.py'
    )


@pytest.mark.parametrize('config', filter(is_counted, CONFIGS))
def test_parameters_and_flops_match_the_metafile(counter, config):
    metadata = models()[config]['Metadata']
    counted = counter.complexity(config)
    key = 'Backbone FLOPs ({} x {})'.format(*counted.shape) if counted.of_backbone else 'FLOPs'
    assert metadata['Parameters'] == counted.parameters
    assert metadata[key] == counted.multiply_adds


def test_same_networks_have_the_same_counts():
    everything = {config: model['Metadata'] for config, model in models().items()}
    heads = 'Parameters', 'FLOPs', 'Backbone FLOPs (800 x 1280)'
    for config, metadata in everything.items():
        if is_counted(config):
            continue
        same = config.replace('amp-', '').replace('layer-decay-', '').replace('mmdet/cascade-', 'mmdet/')
        same = same.replace('ms-crop-3x', '1x') if config.startswith('mmdet/') else same
        counts, expected = ({key: of[key] for key in heads if key in of} for of in (metadata, everything[same]))
        if '/cascade-' in config:
            # The heads of both detectors do not depend on the backbone.
            xt = [
                everything[name]['Parameters']
                for name in (
                    'mmdet/cascade-mask-rcnn_overlock-xt_fpn_ms-crop-3x_coco.py',
                    'mmdet/mask-rcnn_overlock-xt_fpn_1x_coco.py',
                )
            ]
            expected['Parameters'] += xt[0] - xt[1]
        assert counts == expected, config


@pytest.mark.parametrize('arch, parameters, flops', [('xt', 16, 2.6), ('t', 33, 5.5), ('s', 56, 9.7), ('b', 95, 16.7)])
def test_counts_match_the_paper(arch, parameters, flops):
    """Within 2.5 %: the paper rounds and does not explain all its counts of S and B."""
    metadata = models()[f'mmpretrain/overlock-{arch}_deploy_in1k.py']['Metadata']
    assert round(metadata['Parameters'] / 1e6) == parameters
    assert metadata['FLOPs'] / 1e9 == pytest.approx(flops, rel=0.025)


def test_get_checkpoint():
    name = 'mmdet/mask-rcnn_overlock-t_fpn_ms-crop-3x_coco'
    assert overlock_mm.get_checkpoint(name) == overlock_mm.get_checkpoint(f'{name}.py')
    assert overlock_mm.get_checkpoint(name) == 'overlock_mm://maskrcnn3x_overlock_tiny_coco.pth'
    with pytest.raises(
        ValueError, match=r"there are no released weights for 'mmdet/mask-rcnn_overlock-xt.* nearest .*overlock-t_fpn"
    ):
        overlock_mm.get_checkpoint('mmdet/mask-rcnn_overlock-xt_fpn_1x_coco')
    with pytest.raises(
        ValueError, match=r"there is no config 'mmdet/mask-rcnn_overlok-t_fpn_1x_coco'; nearest .*overlock-t_"
    ):
        overlock_mm.get_checkpoint('mmdet/mask-rcnn_overlok-t_fpn_1x_coco')


def test_find_released_by_name_or_address():
    for checkpoint in ('overlock_mm://overlock_s_in1k_224.pth', f'{RELEASE}overlock_s_in1k_224.pth'):
        assert find_released(checkpoint).config == 'mmpretrain/overlock-s_8xb256_in1k.py'
    with pytest.raises(ValueError, match="no file 'overlock_s_in1k_384.pth'; nearest: overlock_s_in1k_224.pth"):
        find_released('overlock_mm://overlock_s_in1k_384.pth')


@pytest.mark.parametrize(
    'framework, module, name',
    [
        ('mmdet', 'mmdet.apis.DetInferencer', 'mask-rcnn_overlock-t_fpn_1x_coco'),
        ('mmdet', 'mmdet.apis.DetInferencer', 'mask-rcnn_overlock-xt_fpn_1x_coco'),
        ('mmseg', 'mmseg.apis.MMSegInferencer', 'overlock-b_upernet_8xb2-160k_ade20k-512x512'),
    ],
)
def test_inferencers_find_the_names(framework, module, name):
    pytest.importorskip(framework, reason='its inferencer')
    overlock_mm.register_models()
    overlock_mm.register_models()
    package, _, cls = module.rpartition('.')
    inferencer_type = getattr(importlib.import_module(package), cls)
    inferencer = inferencer_type.__new__(inferencer_type)
    inferencer.scope = framework
    cfg, weights = inferencer._load_model_from_metafile(name)
    assert cfg.filename == overlock_mm.get_config_path(f'{framework}/{name}')
    assert weights == models()[f'{framework}/{name}.py'].get('Weights', f'overlock_mm://{framework}/{name}')
    listed = inferencer_type.list_models(framework, '.*overlock.*')
    assert sorted(listed) == sorted(
        model['Name'] for model in metafiles()[framework]['Models'] if 'overlock' in model['Name']
    )
    # The other framework does not find them.
    other = 'mmseg' if framework == 'mmdet' else 'mmdet'
    pytest.importorskip(other, reason='its inferencer')
    inferencer.scope = other
    with pytest.raises(ValueError, match=f'Cannot find model: {name}'):
        inferencer._load_model_from_metafile(name)


@pytest.mark.parametrize(
    'framework, inferencer, name',
    [
        ('mmdet', 'DetInferencer', 'mask-rcnn_overlock-xt_fpn_1x_coco'),
        ('mmdet', 'DetInferencer', 'dino-4scale_overlock-t_8xb2-12e_coco'),
        ('mmseg', 'MMSegInferencer', 'overlock-xt_upernet_8xb2-160k_ade20k-512x512'),
    ],
)
def test_inferencers_refuse_a_name_without_released_weights(no_network, framework, inferencer, name):
    """They would draw the pictures of a random network."""
    apis = pytest.importorskip(f'{framework}.apis', reason='its inferencer')
    overlock_mm.register_models()
    with pytest.raises(ValueError, match=f"the release has no file '{framework}/{name}'; .* Give a file of your own"):
        getattr(apis, inferencer)(name, device='cpu')


def test_mmpretrain_finds_the_names():
    mmpretrain = pytest.importorskip('mmpretrain', reason='its model hub')
    overlock_mm.register_models()
    overlock_mm.register_models()
    names = mmpretrain.list_models('overlock', task='Image Classification')
    assert names == sorted(
        f'overlock-{arch}_{kind}_in1k' for arch in ('xt', 't', 's', 'b') for kind in ('8xb256', 'deploy')
    )
    model = mmpretrain.get_model('overlock-xt_deploy_in1k', backbone=dict(out_indices=(3,)))
    assert model._metainfo.weights == f'{RELEASE}overlock_xt_in1k_224_reparam.pth'
    assert model.backbone.deploy
    assert 'resnet50_8xb32_in1k' in mmpretrain.list_models()


@pytest.mark.parametrize('checkpoint', ['overlock_mm://overlock_xt_in1k_224.pth', f'{RELEASE}overlock_xt_in1k_224.pth'])
@pytest.mark.parametrize('wrap', [lambda weights: weights, lambda weights: dict(model=weights)], ids=['flat', 'model'])
def test_released_classifier_by_name(parity, tmp_path, monkeypatch, checkpoint, wrap):
    """mmpretrain builds the model by the name of its config and loads the file from torch's cache strictly."""
    mmpretrain = pytest.importorskip('mmpretrain', reason='its model hub')
    from mmengine.runner import load_checkpoint

    weights = parity.state_dict('cls', 'xt')
    (tmp_path / 'checkpoints').mkdir()
    torch.save(wrap(weights), tmp_path / 'checkpoints' / 'overlock_xt_in1k_224.pth')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    overlock_mm.register_models()
    model = mmpretrain.get_model('overlock-xt_8xb256_in1k', pretrained=True)
    assert torch.equal(model.head.head[4].bias, weights['head.4.bias'])
    assert torch.equal(model.backbone.patch_embed1[0].weight, weights['patch_embed1.0.weight'])
    load_checkpoint(model, checkpoint, strict=True)


def test_import_downloads_nothing():
    """Importing the package and building a backbone work where every connection fails."""
    code = (
        'import socket\n'
        'def refuse(*args, **kwargs): raise AssertionError("a connection")\n'
        'socket.socket.connect = socket.create_connection = refuse\n'
        'import overlock_mm\n'
        'from overlock_mm.models import OverLoCK\n'
        'OverLoCK("xt", init_cfg=dict(type="Pretrained", checkpoint="overlock_mm://overlock_xt_in1k_224.pth"))\n'
        'print("built")'
    )
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ['built'], done.stderr
