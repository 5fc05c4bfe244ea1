"""Released checkpoints, flat or wrapped, into backbones and heads."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger

from overlock_mm.models import OverLoCK


@pytest.fixture
def log(caplog):
    """Messages of mmengine's current logger, which does not propagate them."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger=logger.name)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def classifier(small_arch):
    """A classification checkpoint in the form of the release: flat names of the backbone and both heads."""
    state_dict = dict(OverLoCK(small_arch).state_dict())
    state_dict = {name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()}
    return {**state_dict, 'head.0.weight': torch.zeros(1024, 50, 1, 1), 'aux_head.2.bias': torch.zeros(1000)}


def build(arch, file, **kwargs):
    backbone = OverLoCK(arch, init_cfg=dict(type='Pretrained', checkpoint=str(file)), **kwargs)
    backbone.init_weights()
    return backbone


@pytest.mark.parametrize('out_type', ['features', 'pyramid', 'pyramid_with_overview'])
@pytest.mark.parametrize(
    'wrap',
    [
        lambda weights: weights,
        lambda weights: dict(state_dict=weights, epoch=3),
        lambda weights: dict(model=weights, metric=0.8),
        lambda weights: {f'module.{name}': tensor for name, tensor in weights.items()},
    ],
    ids=['flat', 'state_dict', 'model', 'module.'],
)
def test_classification_checkpoint(small_arch, classifier, tmp_path, log, out_type, wrap):
    torch.save(wrap(classifier), tmp_path / 'classifier.pth')
    backbone = build(small_arch, tmp_path / 'classifier.pth', out_type=out_type)
    weights = backbone.state_dict()
    shared = [name for name in weights if name in classifier]
    assert len(shared) == len(classifier) - 2
    assert all(torch.equal(weights[name], classifier[name]) for name in shared)

    messages = [message for message in log.messages if 'Loaded' in message]
    assert len(messages) == 1
    assert 'Left out 2 tensors of other modules: aux_head, head.' in messages[0]
    initialised = {'features': None, 'pyramid': 'extra_norm', 'pyramid_with_overview': 'extra_norm, h_proj'}[out_type]
    assert (f'kept as initialised: {initialised}.' in messages[0]) == (initialised is not None)
    assert not any('unexpected' in message or 'missing' in message for message in log.messages)


def test_backbone_of_a_detector_is_loaded_once(small_arch, classifier, tmp_path, log):
    """mmengine's init_weights starts at the parent."""
    from mmengine.model import BaseModule

    class Detector(BaseModule):
        def __init__(self, file):
            super().__init__()
            self.backbone = OverLoCK(small_arch, init_cfg=dict(type='Pretrained', checkpoint=str(file)))

    torch.save(classifier, tmp_path / 'classifier.pth')
    detector = Detector(tmp_path / 'classifier.pth')
    detector.init_weights()
    assert torch.equal(detector.backbone.patch_embed1[0].weight, classifier['patch_embed1.0.weight'])
    assert sum('Loaded' in message for message in log.messages) == 1


@pytest.mark.parametrize('prefix', [None, 'backbone', 'backbone.'])
def test_backbone_of_a_detection_checkpoint(small_arch, tmp_path, prefix):
    source = OverLoCK(small_arch, out_type='pyramid_with_overview')
    weights = {f'backbone.{name}': tensor for name, tensor in source.state_dict().items()}
    weights['neck.lateral_convs.0.conv.weight'] = torch.zeros(1)
    torch.save(dict(meta=dict(epoch=12), state_dict=weights), tmp_path / 'detector.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'detector.pth'))
    if prefix is not None:
        init_cfg['prefix'] = prefix
    backbone = OverLoCK(small_arch, out_type='pyramid_with_overview', init_cfg=init_cfg)
    backbone.init_weights()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize('family, out_type', [('det', 'pyramid_with_overview'), ('seg', 'pyramid')])
def test_dense_checkpoints_load_strictly(parity, family, out_type):
    state_dict = parity.state_dict(family, 'xt')
    OverLoCK('xt', out_type=out_type).load_state_dict(state_dict, strict=True)


def test_released_classification_file(parity, tmp_path, log):
    torch.save(parity.state_dict('cls', 'xt'), tmp_path / 'overlock_xt_in1k_224.pth')
    build('xt', tmp_path / 'overlock_xt_in1k_224.pth', out_type='pyramid_with_overview')
    assert any('Left out 15 tensors of other modules: aux_head, head.' in message for message in log.messages)


def test_released_folded_file(parity, tmp_path):
    weights = parity.state_dict('cls_reparam', 'xt')
    torch.save(weights, tmp_path / 'overlock_xt_in1k_224_reparam.pth')
    backbone = build('xt', tmp_path / 'overlock_xt_in1k_224_reparam.pth', deploy=True)
    assert torch.equal(backbone.blocks1[0].proj[1].lk_origin.bias, weights['blocks1.0.proj.1.lk_origin.bias'])


@pytest.mark.parametrize('prefix', ['', 'head.'], ids=['released', 'mmpretrain'])
@pytest.mark.parametrize('with_aux_head', [True, False])
def test_head_loads_its_weights(tmp_path, prefix, with_aux_head):
    pytest.importorskip('mmpretrain', reason="the head is mmpretrain's")
    from overlock_mm.models import OverLoCKHead

    settings = dict(num_classes=7, in_channels=10)
    source = OverLoCKHead(**settings, overview_channels=8).state_dict()
    weights = {f'{prefix}{name}': tensor for name, tensor in source.items()}
    torch.save({**weights, 'backbone.patch_embed1.0.weight': torch.zeros(3)}, tmp_path / 'classifier.pth')
    settings['overview_channels'] = 8 if with_aux_head else None
    head = OverLoCKHead(**settings, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'classifier.pth')))
    head.init_weights()
    assert any(name.startswith('aux_head') for name in head.state_dict()) == with_aux_head
    assert all(torch.equal(value, source[name]) for name, value in head.state_dict().items())


def test_checkpoint_of_another_variant(small_arch, classifier, tmp_path):
    torch.save(classifier, tmp_path / 'other.pth')
    with pytest.raises(
        ValueError, match=r'is of another variant: OverLoCK has .*256.* got channels \(8, 12, 24, 40\), depths'
    ):
        build('xt', tmp_path / 'other.pth')
    deeper = {**small_arch, 'sub_depths': (3, 2)}
    with pytest.raises(ValueError, match=r'OverLoCK has .*\(1, 1, 1, 1, 3, 2\), got .*depths \(1, 1, 1, 1, 2, 2\)'):
        build(deeper, tmp_path / 'other.pth')


def test_mmengine_refuses_another_variant(small_arch, tmp_path):
    """tools/test.py and load_from use mmengine's loader, which logs missing and unknown weights without an error."""
    from mmengine.runner import load_checkpoint

    weights = {f'backbone.{name}': tensor for name, tensor in OverLoCK(small_arch).state_dict().items()}
    torch.save(dict(state_dict=weights), tmp_path / 'detector.pth')
    detector = torch.nn.Module()
    detector.backbone = OverLoCK({**small_arch, 'depths': (1, 1, 2, 1)})
    with pytest.raises(ValueError, match='is of another variant'):
        load_checkpoint(detector, str(tmp_path / 'detector.pth'))


def test_init_cfg_list(small_arch, classifier, tmp_path, log):
    torch.save(classifier, tmp_path / 'classifier.pth')
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'classifier.pth'))
    init_cfg = [dict(type='Constant', layer='Conv2d', val=3.0), pretrained]
    backbone = OverLoCK(small_arch, out_type='pyramid_with_overview', init_cfg=init_cfg)
    backbone.init_weights()
    assert torch.equal(backbone.patch_embed1[0].weight, classifier['patch_embed1.0.weight'])
    assert (backbone.h_proj[0].weight == 3).all()
    assert backbone.init_cfg == init_cfg


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A folder as torch's cache, and a list of functions that write the files of the next downloads."""
    contents = []
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url, file: contents.pop(0)(Path(file)))
    return contents


def fail(file):
    raise OSError('no route')


ADDRESS = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_xt_in1k_224.pth'
both_names = pytest.mark.parametrize('name', ['overlock_mm://overlock_xt_in1k_224.pth', ADDRESS])


@both_names
@pytest.mark.parametrize(
    'write',
    [
        fail,
        lambda file: file.write_bytes(b'PK' + bytes(100)),
        lambda file: file.touch(),
        lambda file: file.write_text('<html>'),
    ],
    ids=['no network', 'incomplete', 'empty', 'HTML'],
)
def test_failed_download_says_what_to_do(downloads, tmp_path, write, name):
    """A failed or incomplete download leaves no file."""
    downloads += [write]
    message = (
        rf'overlock_xt_in1k_224.pth could not be downloaded \(.+\); download {ADDRESS} by other means .* into .*checkpoints'
    )
    with pytest.raises(OSError, match=message):
        build('xt', name)
    assert list((tmp_path / 'checkpoints').iterdir()) == []


@both_names
def test_incomplete_file_is_named(downloads, tmp_path, name):
    """A part of a file, put into the cache by hand; also with mmengine's loader."""
    from mmengine.runner import load_checkpoint

    folder = tmp_path / 'checkpoints'
    folder.mkdir()
    torch.save(dict(a=torch.zeros(1000)), folder / 'whole.pth')
    (folder / 'overlock_xt_in1k_224.pth').write_bytes((folder / 'whole.pth').read_bytes()[:-100])
    message = rf'overlock_xt_in1k_224.pth is damaged or not a checkpoint \(.*\): delete it, and download {ADDRESS} again'
    with pytest.raises(OSError, match=message):
        build('xt', name)
    with pytest.raises(OSError, match=message):
        load_checkpoint(OverLoCK('xt'), name)


def test_downloads_are_loaded_as_weights_only(small_arch, classifier, downloads):
    foreign = dict(state_dict=classifier, config=Path('foreign'))
    downloads += [lambda file, content=content: torch.save(content, file) for content in (classifier, foreign)]
    backbone = build(small_arch, 'https://host.invalid/v1/good.pth')
    assert torch.equal(backbone.patch_embed1[0].weight, classifier['patch_embed1.0.weight'])
    build(small_arch, 'https://host.invalid/v1/good.pth')  # not downloaded again
    with pytest.raises(pickle.UnpicklingError):
        build(small_arch, 'https://host.invalid/v1/foreign.pth')


def test_cache_without_write_access(downloads, tmp_path):
    (tmp_path / 'checkpoints').write_text('a file instead of the folder')
    with pytest.raises(OSError, match='overlock_xt_in1k_224.pth could not be downloaded .* or give its path'):
        build('xt', ADDRESS)


@pytest.mark.parametrize('checkpoint', [None, 3, ''])
def test_init_cfg_without_a_checkpoint(checkpoint):
    with pytest.raises(TypeError, match=f'checkpoint must be a path, an address or overlock_mm://NAME, got {checkpoint!r}'):
        OverLoCK('xt', init_cfg=dict(type='Pretrained', checkpoint=checkpoint))


def test_pretrained_is_not_a_bool():
    with pytest.raises(TypeError, match='checkpoint must be a path, an address or overlock_mm://NAME, got True'):
        OverLoCK('xt', pretrained=True)


@pytest.mark.parametrize('init_cfg', ['a.pth', ['a.pth']])
def test_init_cfg_is_a_dict(init_cfg):
    message = rf'init_cfg must be a dict or a list of dicts, .*checkpoint=FILE\), got {re.escape(repr(init_cfg))}'
    with pytest.raises(TypeError, match=message):
        OverLoCK('xt', init_cfg=init_cfg)


def test_checkpoint_as_a_path_object(small_arch, classifier, tmp_path):
    torch.save(classifier, tmp_path / 'a.pth')
    backbone = OverLoCK(small_arch, pretrained=tmp_path / 'a.pth')
    backbone.init_weights()
    assert torch.equal(backbone.patch_embed1[0].weight, classifier['patch_embed1.0.weight'])


def test_unknown_released_file():
    with pytest.raises(ValueError, match="no file 'overlock_m_in1k_224.pth'; nearest: overlock_"):
        build('xt', 'overlock_mm://overlock_m_in1k_224.pth')


def test_weight_of_another_shape_is_named(small_arch, classifier, tmp_path):
    classifier['patch_embed1.3.weight'] = torch.zeros(4, 4, 5, 5)
    torch.save(classifier, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=r'patch_embed1.3.weight must have shape \(4, 4, 3, 3\), got \(4, 4, 5, 5\)'):
        build(small_arch, tmp_path / 'other.pth')


@pytest.mark.parametrize('in_channels', [1, 4, 6])
def test_first_convolution_is_adapted_if_asked(small_arch, classifier, tmp_path, log, in_channels):
    """1 or a multiple of 3 channels that are equal give what three give."""
    torch.save(classifier, tmp_path / 'rgb.pth')
    grey = torch.randn(2, 1, 32, 40)
    rgb = OverLoCK.from_pretrained(small_arch, tmp_path / 'rgb.pth').eval()
    backbone = OverLoCK.from_pretrained(
        small_arch, tmp_path / 'rgb.pth', adapt_channels=True, in_channels=in_channels
    ).eval()
    assert 'Adapted to other channels: patch_embed1.0.' in log.text
    assert 'kept as initialised' not in log.text
    weight, of_rgb = backbone.patch_embed1[0].weight, rgb.patch_embed1[0].weight
    expected = {
        1: of_rgb.sum(1, keepdim=True),
        4: torch.cat([of_rgb, of_rgb[:, :1]], dim=1) * 3 / 4,
        6: torch.cat([of_rgb, of_rgb], dim=1) / 2,
    }
    assert torch.allclose(weight, expected[in_channels])
    if in_channels != 4:
        with torch.no_grad():
            out, expected = (net(grey.expand(-1, n, -1, -1))[-1] for net, n in ((backbone, in_channels), (rgb, 3)))
        assert torch.allclose(out, expected, atol=1e-5)
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'rgb.pth'), adapt_channels=True)
    configured = OverLoCK(small_arch, in_channels=in_channels, init_cfg=init_cfg)
    configured.init_weights()
    assert torch.equal(configured.patch_embed1[0].weight, weight)


@pytest.mark.parametrize('in_channels', [1, 4])
def test_first_convolution_starts_fresh_with_other_images(small_arch, classifier, tmp_path, log, in_channels):
    torch.save(classifier, tmp_path / 'rgb.pth')
    torch.manual_seed(0)
    initial = OverLoCK(small_arch, in_channels=in_channels).patch_embed1[0].weight
    torch.manual_seed(0)
    weights = build(small_arch, tmp_path / 'rgb.pth', in_channels=in_channels).state_dict()
    assert torch.equal(weights.pop('patch_embed1.0.weight'), initial)
    assert all(torch.equal(value, classifier[name]) for name, value in weights.items())
    (message,) = (message for message in log.messages if 'Loaded' in message)
    assert message.endswith('Of another shape in the checkpoint, so kept as initialised: patch_embed1.0.')


@pytest.mark.parametrize('overview_channels', [None, 8])
def test_last_layers_of_the_head_start_fresh_with_other_classes(tmp_path, log, overview_channels):
    pytest.importorskip('mmpretrain', reason="the head is mmpretrain's")
    from overlock_mm.models import OverLoCKHead

    source = OverLoCKHead(num_classes=7, in_channels=10, overview_channels=8).state_dict()
    source = {name: tensor + 1 for name, tensor in source.items()}
    torch.save(source, tmp_path / 'classifier.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'classifier.pth'))
    torch.manual_seed(0)
    head = OverLoCKHead(num_classes=5, in_channels=10, overview_channels=overview_channels, init_cfg=init_cfg)
    initial = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.init_weights()
    fresh = ('head.4.', 'aux_head.2.')
    for name, value in head.state_dict().items():
        assert torch.equal(value, initial[name] if name.startswith(fresh) else source[name]), name
    (message,) = (message for message in log.messages if 'Loaded' in message)
    layers = 'head.4' if overview_channels is None else 'aux_head.2, head.4'
    assert message.endswith(f'kept as initialised: {layers}.')


def test_missing_and_unknown_weights(small_arch, classifier, tmp_path):
    del classifier['blocks1.0.proj.2.weight']
    classifier.update({f'blocks1.0.extra{i}': torch.zeros(1) for i in range(6)})
    torch.save(classifier, tmp_path / 'broken.pth')
    message = r'it lacks blocks1.0.proj.2.weight and it has unknown blocks1.0.extra0, .*extra4, ... \(6 in all\)$'
    with pytest.raises(ValueError, match=message):
        build(small_arch, tmp_path / 'broken.pth')


@pytest.mark.parametrize(
    'content, message',
    [
        ({'layer1.0.weight': torch.zeros(2)}, 'has no weights for OverLoCK, got layer1'),
        ({'epoch': 3}, r"has no weights, .* got \['epoch'\]"),
        ([torch.zeros(1)], 'has no weights, .* got list'),
    ],
)
def test_checkpoint_of_another_network(small_arch, tmp_path, content, message):
    torch.save(content, tmp_path / 'foreign.pth')
    with pytest.raises(ValueError, match=message):
        build(small_arch, tmp_path / 'foreign.pth')


def test_missing_file(small_arch, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.pth'):
        build(small_arch, tmp_path / 'nowhere.pth')


def test_folded_checkpoint_into_unfolded_model(small_arch, tmp_path):
    torch.save(OverLoCK(small_arch, deploy=True).state_dict(), tmp_path / 'folded.pth')
    with pytest.raises(ValueError, match='is folded .* build the model with deploy=True'):
        build(small_arch, tmp_path / 'folded.pth')


def test_unfolded_checkpoint_into_folded_model_is_logged(small_arch, tmp_path, log):
    torch.save(OverLoCK(small_arch).state_dict(), tmp_path / 'unfolded.pth')
    build(small_arch, tmp_path / 'unfolded.pth', deploy=True)
    assert log.messages.count('The checkpoint is not folded: its dilated branches are folded on loading.') == 1
    torch.save(OverLoCK(small_arch, deploy=True).state_dict(), tmp_path / 'folded.pth')
    log.clear()
    build(small_arch, tmp_path / 'folded.pth', deploy=True)
    assert not any('folded on loading' in message for message in log.messages)


def test_from_pretrained_with_a_file(small_arch, classifier, tmp_path, log, no_network):
    torch.save(classifier, tmp_path / 'classifier.pth')
    backbone = OverLoCK.from_pretrained(small_arch, tmp_path / 'classifier.pth', out_type='pyramid', out_indices=(3,))
    weights = backbone.state_dict()
    assert all(torch.equal(weights[name], classifier[name]) for name in weights if not name.startswith('extra_norm.'))
    assert backbone.out_channels == (50,)
    assert [message for message in log.messages if 'Loaded' in message]


@pytest.mark.parametrize('arch', ['xt', 'overlock_xt', 'extreme-tiny'])
def test_from_pretrained_with_the_released_file(downloads, arch):
    source = OverLoCK('xt').state_dict()
    downloads += [lambda file: torch.save(source, file)]
    backbone = OverLoCK.from_pretrained(arch)
    assert all(torch.equal(value, source[name]) for name, value in backbone.state_dict().items())


def test_from_pretrained_without_a_checkpoint(small_arch):
    with pytest.raises(ValueError, match='checkpoint must be given, because there is none for arch={'):
        OverLoCK.from_pretrained(small_arch)


def test_pretrained_is_short_for_init_cfg(small_arch, classifier, tmp_path):
    torch.save(classifier, tmp_path / 'classifier.pth')
    backbone = OverLoCK(small_arch, pretrained=str(tmp_path / 'classifier.pth'))
    backbone.init_weights()
    assert torch.equal(backbone.patch_embed1[0].weight, classifier['patch_embed1.0.weight'])
    with pytest.raises(ValueError, match="pretrained and init_cfg exclude each other, got 'a.pth' and"):
        OverLoCK(small_arch, pretrained='a.pth', init_cfg=dict(type='Constant', layer='Conv2d', val=1.0))


def test_pretrained_of_a_segmentor(small_arch, classifier, tmp_path):
    """mmseg passes its model's ``pretrained`` to the backbone."""
    pytest.importorskip('mmseg', reason="this is mmsegmentation's model")
    from mmengine.config import ConfigDict
    from mmseg.registry import MODELS

    torch.save(classifier, tmp_path / 'classifier.pth')
    head = dict(type='mmseg.FCNHead', in_channels=50, channels=4, num_classes=2, in_index=3)
    backbone = dict(type='overlock_mm.OverLoCK', arch=small_arch, out_type='pyramid')
    segmentor = dict(type='mmseg.EncoderDecoder', backbone=backbone, decode_head=head)
    model = MODELS.build(ConfigDict(**segmentor, pretrained=str(tmp_path / 'classifier.pth')))
    model.init_weights()
    assert torch.equal(model.backbone.patch_embed1[0].weight, classifier['patch_embed1.0.weight'])


@pytest.mark.parametrize(
    'wrap', [lambda w: w, lambda w: dict(model=w), lambda w: dict(state_dict=w)], ids=['flat', 'model', 'state_dict']
)
def test_pretrained_of_a_classifier(parity, tmp_path, wrap):
    """mmpretrain loads ``pretrained`` into the whole model. A released file fits without conversion, with its heads."""
    pytest.importorskip('mmpretrain', reason="this is mmpretrain's model")
    from mmengine.config import Config
    from mmengine.registry.utils import init_default_scope
    from mmpretrain.registry import MODELS

    import overlock_mm

    weights = parity.state_dict('cls', 'xt')
    torch.save(wrap(weights), tmp_path / 'released.pth')
    cfg = Config.fromfile(overlock_mm.get_config_path('mmpretrain/overlock-xt_8xb256_in1k'))
    init_default_scope('mmpretrain')
    model = MODELS.build({**cfg.model, 'pretrained': str(tmp_path / 'released.pth')})
    model.init_weights()
    assert torch.equal(model.backbone.patch_embed1[0].weight, weights['patch_embed1.0.weight'])
    assert torch.equal(model.head.head[4].bias, weights['head.4.bias'])
    assert torch.equal(model.head.aux_head[2].bias, weights['aux_head.2.bias'])
    # A model without an auxiliary head leaves out that of the file.
    head = {**cfg.model.head, 'overview_channels': None}
    backbone = {**cfg.model.backbone, 'out_indices': (3,)}
    model = MODELS.build({**cfg.model, 'pretrained': str(tmp_path / 'released.pth'), 'head': head, 'backbone': backbone})
    model.init_weights()
    assert torch.equal(model.head.head[4].bias, weights['head.4.bias'])
    model.load_state_dict(weights, strict=True)
