"""tools/convert_checkpoint.py on checkpoints of every released family and variant, in both directions."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from conftest import ROOT, import_file

pytest.importorskip('mmdet', reason='the checkpoints are for its models')
pytest.importorskip('mmseg', reason='the checkpoints are for its models')
pytest.importorskip('mmpretrain', reason='the checkpoints are for its models')

from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.registry.utils import init_default_scope
from mmengine.runner import load_checkpoint

import overlock_mm
from overlock_mm.models import OverLoCK
from overlock_mm.models.conversion import describe_checkpoint, fold

CONFIGS = {
    'cls': 'mmpretrain/overlock-{}_8xb256_in1k',
    'cls_reparam': 'mmpretrain/overlock-{}_deploy_in1k',
    'det': 'mmdet/mask-rcnn_overlock-{}_fpn_1x_coco',
    'seg': 'mmseg/overlock-{}_upernet_8xb2-160k_ade20k-512x512',
}


# Models on the meta device compare names and shapes. Loading into them copies nothing, and torch warns for each tensor.
pytestmark = pytest.mark.filterwarnings('ignore:for .* copying from a non-meta parameter')


@pytest.fixture(scope='module')
def tool():
    return import_file(ROOT / 'tools' / 'convert_checkpoint.py')


@pytest.fixture
def convert(tool, monkeypatch, capsys):
    """Run the tool as from a command line and return its output."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out

    return run


@functools.cache
def model_of(config: str, **backbone) -> torch.nn.Module:
    """The model of a shipped config on the meta device. Loading into it compares names and shapes and changes nothing."""
    cfg = Config.fromfile(overlock_mm.get_config_path(config))
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.update(init_cfg=None, **backbone)
    with torch.device('meta'):
        return MODELS.build(cfg.model)


def random_bits(shape) -> torch.Tensor:
    return torch.randint(-(2**15), 2**15, tuple(shape), dtype=torch.int16).view(torch.float16)


def released(parity, family: str, arch: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and file content in the form of the release. The bits are random and include NaN and infinity."""
    backbone = {name: random_bits(shape) for name, shape in parity.keys(family, arch).items()}
    if family.startswith('cls'):
        return backbone, backbone
    weights = {f'backbone.{name}': tensor for name, tensor in backbone.items()}
    own = model_of(CONFIGS[family].format(arch)).state_dict()
    weights.update({name: random_bits(t.shape) for name, t in own.items() if not name.startswith('backbone.')})
    version = dict(det=dict(mmdet_version='2.28.1'), seg=dict(mmseg_version='0.30.0'))[family]
    meta = dict(**version, CLASSES=('person', 'car'), PALETTE=[(1, 2, 3), (4, 5, 6)], epoch=12)
    return weights, dict(meta=meta, state_dict=weights, optimizer=dict(state={}, param_groups=[]))


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.int16), b[name].view(torch.int16)) for name in a)


@pytest.mark.parametrize('arch', ['xt', 't', 's', 'b'])
@pytest.mark.parametrize('family', CONFIGS)
def test_conversion_in_both_directions(parity, convert, tmp_path, family, arch):
    weights, content = released(parity, family, arch)
    torch.save(content, tmp_path / 'released.pth')
    output = convert(tmp_path / 'released.pth', tmp_path / 'ours.pth')
    config = CONFIGS[family].format(arch)
    assert f'released.pth: OverLoCK-{arch.upper()}, ' in output
    assert ('flat names' in output) == family.startswith('cls')
    assert f'It loads strictly into the model of configs/{config}.py\n' in output
    assert ('written by mmdet 2.28.1' in output) == (family == 'det')
    assert ('written by mmseg 0.30.0' in output) == (family == 'seg')
    ours = load_checkpoint(model_of(config), str(tmp_path / 'ours.pth'), strict=True)
    if not family.startswith('cls'):
        assert ours['meta']['dataset_meta'] == dict(classes=('person', 'car'), palette=[(1, 2, 3), (4, 5, 6)])
    assert 'optimizer' not in ours

    output = convert(tmp_path / 'ours.pth', tmp_path / 'back.pth', '--to', 'released')
    assert f'ours.pth: OverLoCK-{arch.upper()}, ' in output
    back = torch.load(tmp_path / 'back.pth', weights_only=True)
    if not family.startswith('cls'):
        assert back['meta'] == dict(CLASSES=('person', 'car'), PALETTE=[(1, 2, 3), (4, 5, 6)])
        back = back['state_dict']
    assert same_bits(back, weights)


def test_own_checkpoint_of_a_training(convert, tmp_path):
    """A classifier of 7 classes without an auxiliary head, as mmengine saves it.

    Its state_dict has the averaged weights, which validation used. The raw weights are left out.
    """
    from overlock_mm.models import OverLoCKHead

    weights = {f'backbone.{name}': tensor for name, tensor in OverLoCK('xt').state_dict().items()}
    head = OverLoCKHead(num_classes=7, in_channels=420)
    weights.update({f'head.{name}': tensor for name, tensor in head.state_dict().items()})
    content = dict(
        meta=dict(mmengine_version='0.10.7', dataset_meta=dict(classes=list('abcdefg'))),
        state_dict=weights,
        ema_state_dict={'module.backbone.patch_embed1.0.weight': torch.zeros(28, 3, 3, 3)},
        optimizer=dict(state={}),
        message_hub=dict(log_scalars={}),
    )
    torch.save(content, tmp_path / 'own.pth')
    output = convert(tmp_path / 'own.pth', tmp_path / 'ours.pth')
    assert 'written by mmengine 0.10.7' in output
    options = 'model.head.num_classes=7 model.head.overview_channels=None'
    assert f'configs/mmpretrain/overlock-xt_8xb256_in1k.py with --cfg-options {options}' in output
    ours = torch.load(tmp_path / 'ours.pth', weights_only=True)
    assert ours.keys() == {'meta', 'state_dict'}
    assert ours['meta'] == dict(dataset_meta=dict(classes=tuple('abcdefg')))
    assert all(torch.equal(ours['state_dict'][name], tensor) for name, tensor in weights.items())
    convert(tmp_path / 'ours.pth', tmp_path / 'flat.pth', '--to', 'released')
    flat = torch.load(tmp_path / 'flat.pth', weights_only=True)
    assert {'patch_embed1.0.weight', 'head.0.weight'} <= flat.keys()
    assert len(flat) == len(weights)


def test_backbone_alone(parity, convert, tmp_path):
    weights = parity.state_dict('det', 'xt')
    torch.save(weights, tmp_path / 'backbone.pth')
    output = convert(tmp_path / 'backbone.pth', tmp_path / 'ours.pth')
    assert 'backbone (pyramid_with_overview)' in output
    assert "load it with its own config, or as a backbone's init_cfg" in output
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'ours.pth'))
    backbone = OverLoCK('xt', out_type='pyramid_with_overview', init_cfg=init_cfg)
    backbone.init_weights()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize('family, out_type', [('cls', 'features'), ('seg', 'pyramid')])
def test_folding(parity, convert, tmp_path, family, out_type):
    """The folded file has the weights that a deploy=True model folds from the unfolded file."""
    weights = parity.state_dict(family, 'xt')
    torch.save(weights, tmp_path / 'unfolded.pth')
    output = convert(tmp_path / 'unfolded.pth', tmp_path / 'folded.pth', '--fold', '--to', 'released')
    assert 'folded.pth: OverLoCK-XT, ' in output
    assert ', not folded, ' in output
    assert ', folded, ' in output
    folded = torch.load(tmp_path / 'folded.pth', weights_only=True)
    backbones = [OverLoCK('xt', out_type=out_type, deploy=True) for _ in range(2)]
    own = set(backbones[0].state_dict())
    backbones[0].load_state_dict({name: tensor for name, tensor in folded.items() if name in own}, strict=True)
    backbones[1].load_state_dict({name: t for name, t in weights.items() if name.split('.')[0] not in ('head', 'aux_head')})
    for name, tensor in backbones[0].state_dict().items():
        assert torch.equal(tensor, backbones[1].state_dict()[name]), name
    assert fold(folded).keys() == folded.keys()


def test_options_for_a_folded_detector(convert, tmp_path):
    model = model_of('mmdet/mask-rcnn_overlock-xt_fpn_1x_coco')
    weights = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    torch.save(weights, tmp_path / 'detector.pth')
    output = convert(tmp_path / 'detector.pth', tmp_path / 'folded.pth', '--fold')
    assert 'configs/mmdet/mask-rcnn_overlock-xt_fpn_1x_coco.py with --cfg-options model.backbone.deploy=True' in output
    folded = model_of('mmdet/mask-rcnn_overlock-xt_fpn_1x_coco', deploy=True)
    load_checkpoint(folded, str(tmp_path / 'folded.pth'), strict=True)


@pytest.mark.parametrize(
    'config, options',
    [
        (
            'mmdet/mask-rcnn_overlock-xt_fpn_1x_coco',
            'model.roi_head.bbox_head.num_classes=3 model.roi_head.mask_head.num_classes=3',
        ),
        (
            'mmdet/cascade-mask-rcnn_overlock-xt_fpn_ms-crop-3x_coco',
            'model.roi_head.bbox_head.0.num_classes=3 model.roi_head.bbox_head.1.num_classes=3 '
            'model.roi_head.bbox_head.2.num_classes=3 model.roi_head.mask_head.num_classes=3',
        ),
        ('mmdet/retinanet_overlock-t_fpn_1x_coco', 'model.bbox_head.num_classes=3'),
        ('mmdet/dino-4scale_overlock-t_8xb2-12e_coco', 'model.bbox_head.num_classes=3'),
        (
            'mmseg/overlock-xt_upernet_8xb2-160k_ade20k-512x512',
            'model.decode_head.num_classes=3 model.auxiliary_head.num_classes=3',
        ),
        ('mmseg/overlock-t_mask2former_8xb2-160k_ade20k-512x512', 'model.decode_head.num_classes=3'),
    ],
)
@pytest.mark.parametrize('classes', ['as in the config', 3])
def test_named_config_and_options_fit_the_weights(tool, config, options, classes):
    cfg = Config.fromfile(overlock_mm.get_config_path(config))
    if classes == 3:
        cfg.merge_from_dict(dict(option.split('=') for option in options.split()))
        for option in options.split():  # DictAction reads numbers
            cfg.merge_from_dict({option.split('=')[0]: 3})
        if 'mask2former' in config:
            cfg.model.decode_head.loss_cls.class_weight = [1.0] * 3 + [0.1]
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        weights = MODELS.build(cfg.model).state_dict()
    output = tool.how_to_load(describe_checkpoint(weights), weights)
    named = f'It loads strictly into the model of configs/{config}.py'
    assert output == (f'{named} with --cfg-options {options}' if classes == 3 else named)


def without(weights: dict, name: str) -> dict:
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda w: {'layer1.0.conv1.weight': torch.zeros(1)}, 'not an OverLoCK: .* got layer1'),
        (lambda w: without(w, 'blocks1.0.dwconv.weight'), 'the variant must be one of xt, t, s, b, got no blocks'),
        (lambda w: {k: t for k, t in w.items() if not k.startswith('blocks2.1.')}, r'got channels .* depths \(2, 1, 3'),
        (
            lambda w: without(w, 'blocks2.1.proj.8.bias'),
            r'look like OverLoCK-XT \(features\), but some are missing: blocks2.1.proj.8.bias',
        ),
        (lambda w: {**w, 'blocks2.1.extra': torch.zeros(1)}, 'some are unknown: blocks2.1.extra'),
        (lambda w: {**w, 'patch_embed2.0.weight': torch.zeros(1)}, 'some are of another shape: patch_embed2.0.weight'),
        (lambda w: {**w, 'backbone.conv.weight': torch.zeros(1)}, 'the names must be flat or those of a whole model'),
        (
            lambda w: {**{f'backbone.{k}': t for k, t in w.items()}, 'keypoint_head.weight': torch.zeros(1)},
            'the backbone has an unknown head, got keypoint_head',
        ),
        (lambda w: dict(epoch=3), r"has no weights, .* got \['epoch'\]"),
        (lambda w: {0: torch.zeros(1)}, r"has no weights, .* got \['0'\]"),
    ],
)
def test_unknown_weights_are_refused(convert, tmp_path, change, message):
    with torch.device('meta'):
        names = OverLoCK('xt').state_dict()
    weights = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in names.items()}
    torch.save(change(weights), tmp_path / 'foreign.pth')
    with pytest.raises(SystemExit, match=f'foreign.pth was not converted: .*{message}'):
        convert(tmp_path / 'foreign.pth', tmp_path / 'ours.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['foreign.pth']


def test_existing_files_and_missing_folders(convert, tmp_path):
    torch.save(OverLoCK('xt').state_dict(), tmp_path / 'a.pth')
    (tmp_path / 'b.pth').write_text('keep')
    with pytest.raises(SystemExit, match='b.pth already exists: remove it, or use --overwrite'):
        convert(tmp_path / 'a.pth', tmp_path / 'b.pth')
    assert (tmp_path / 'b.pth').read_text() == 'keep'
    convert(tmp_path / 'a.pth', tmp_path / 'b.pth', '--overwrite')
    assert describe_checkpoint(torch.load(tmp_path / 'b.pth', weights_only=True)['state_dict']).arch == 'xt'
    with pytest.raises(SystemExit, match='none is not a folder'):
        convert(tmp_path / 'a.pth', tmp_path / 'none' / 'c.pth')
    with pytest.raises(SystemExit, match='nowhere.pth was not converted: .*nowhere.pth can not be found'):
        convert(tmp_path / 'nowhere.pth', tmp_path / 'c.pth')
    with pytest.raises(SystemExit, match='DST must be a file, got the folder'):
        convert(tmp_path / 'a.pth', tmp_path, '--overwrite')


def damage_zip(file):
    content = bytearray(file.read_bytes())
    content[1000:2000] = bytes(1000)  # the names, at the start
    file.write_bytes(content)


def old_format(file):
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    'damages',
    [
        [halve],
        [damage_zip],
        [old_format, halve],
        [lambda file: file.write_text('hello')],
        [lambda file: file.write_bytes(b'')],
    ],
    ids=['half', 'zeros inside', 'half of the old format', 'text', 'empty'],
)
def test_damaged_files_are_named(convert, tmp_path, damages):
    weights = {name: tensor + 1 for name, tensor in OverLoCK('xt').state_dict().items()}
    torch.save(weights, tmp_path / 'a.pth')
    for damage in damages:
        damage(tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match=r'a.pth is damaged or not a checkpoint \(\d+ bytes, .*\): replace it'):
        convert(tmp_path / 'a.pth', tmp_path / 'c.pth')


def test_old_format_is_read(convert, tmp_path):
    torch.save(OverLoCK('xt').state_dict(), tmp_path / 'a.pth')
    old_format(tmp_path / 'a.pth')
    assert 'OverLoCK-XT' in convert(tmp_path / 'a.pth', tmp_path / 'c.pth')
