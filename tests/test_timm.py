"""overlock_mm.timm: timm's models are ours, with its interface."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error

timm = pytest.importorskip('timm', reason='the extra timm')

from mmengine.config import Config  # noqa: E402

import overlock_mm.timm  # noqa: E402
from overlock_mm.checkpoints.loading import describe_variant  # noqa: E402
from overlock_mm.checkpoints.release import find_released  # noqa: E402
from overlock_mm.models import OverLoCK  # noqa: E402
from overlock_mm.models.overlock import ARCHITECTURES, STAGES  # noqa: E402
from overlock_mm.timm import OverLoCKClassifier  # noqa: E402

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def created(**kwargs):
    return timm.create_model('overlock_xt', **kwargs).eval()


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    """A file as the released ones: flat names, with the auxiliary head."""
    torch.manual_seed(5)
    state_dict = {name: torch.randn_like(each) * 0.1 + each for name, each in created().state_dict().items() if each.ndim}
    state_dict = {name: each.abs() if name.endswith('running_var') else each for name, each in state_dict.items()}
    state_dict['aux_head.2.weight'] = torch.zeros(1000, 336, 1, 1)
    file = tmp_path_factory.mktemp('released') / 'overlock_xt.pth'
    torch.save(state_dict, file)
    return file


def backbone_with(file, **kwargs):
    return OverLoCK.from_pretrained('xt', file, **kwargs).eval()


@pytest.fixture
def from_file(released):
    return dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(released)))


@torch.no_grad()
def test_features_are_ours(released, from_file):
    model = created(features_only=True, **from_file)
    got, expected = model(IMAGES), backbone_with(released, out_indices=(0, 1, 2, 3))(IMAGES)
    assert [each.shape for each in got] == [each.shape for each in expected]
    for one, other in zip(got, expected):
        assert torch.equal(one, other)
    assert model.feature_info.channels() == [each.shape[1] for each in expected] == [56, 112, 340, 420]
    assert model.feature_info.reduction() == [64 // each.shape[2] for each in expected] == [4, 8, 16, 32]


@torch.no_grad()
def test_scores_are_ours(released, from_file):
    pytest.importorskip('mmpretrain', reason='the head')
    from overlock_mm.models import OverLoCKHead

    head = OverLoCKHead(1000, 420, init_cfg=dict(type='Pretrained', checkpoint=str(released)))
    head.init_weights()
    expected = head.eval()(backbone_with(released)(IMAGES))
    assert torch.equal(created(**from_file)(IMAGES), expected)
    assert torch.equal(created(checkpoint_path=str(released))(IMAGES), expected)


@torch.no_grad()
@pytest.mark.parametrize('indices, depth', [((0,), 1), ((1, 2), 5), ((-1,), 6)])
def test_only_the_stages_of_chosen_maps_run(released, from_file, indices, depth):
    model = timm.create_model('overlock_xt', features_only=True, out_indices=indices, **from_file)
    trained = {name.split('.')[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained & set(STAGES) == set(STAGES[:depth])
    model.eval()
    ran = []
    for stage in STAGES:
        getattr(model.model, stage)[-1].register_forward_hook(lambda *_, stage=stage: ran.append(stage))
    got = model(IMAGES)
    every = backbone_with(released, out_indices=(0, 1, 2, 3))(IMAGES)
    assert all(torch.equal(one, every[index]) for one, index in zip(got, indices))
    assert ran == list(STAGES[:depth])
    assert model.feature_info.channels() == [every[index].shape[1] for index in indices]


@torch.no_grad()
def test_parts_of_the_head(from_file):
    model = created(**from_file)
    features = model.forward_features(IMAGES)
    assert features.shape == (2, model.num_features, 2, 2)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size)
    scores = hidden @ model.get_classifier().weight.flatten(1).t() + model.get_classifier().bias
    assert relative_error(model(IMAGES), scores) < 1e-5
    final, maps = model.forward_intermediates(IMAGES, indices=2)
    assert torch.equal(final, features)
    assert [each.shape[1] for each in maps] == [340, 420]
    assert torch.equal(maps[1], features)

    model.reset_classifier(0)
    assert torch.equal(model(IMAGES), hidden)
    model.reset_classifier(0, '')
    assert model(IMAGES).shape == (2, 1024, 2, 2)
    assert relative_error(model(IMAGES).mean(dim=(2, 3)), hidden) < 1e-5
    model.reset_classifier(7, 'avg')
    assert model(IMAGES).shape == (2, 7)


@torch.no_grad()
def test_weights_for_other_channels_and_classes(released, from_file):
    hidden = created(**from_file).forward_head(backbone_with(released)(IMAGES)[0], pre_logits=True)
    assert torch.equal(created(num_classes=0, **from_file)(IMAGES), hidden)
    model = created(num_classes=5, **from_file)
    assert torch.equal(model.forward_head(model.forward_features(IMAGES), pre_logits=True), hidden)
    assert model(IMAGES).shape == (2, 5)
    grey = created(num_classes=0, in_chans=1, **from_file)
    assert (
        relative_error(grey(IMAGES[:, :1]), created(num_classes=0, **from_file)(IMAGES[:, :1].expand(-1, 3, -1, -1))) < 1e-4
    )


@torch.no_grad()
def test_wrapped_weights(released, from_file):
    """As training scripts save them."""
    wrapped = dict(model={f'module.{name}': each for name, each in torch.load(released).items()})
    model = created(pretrained=True, pretrained_cfg_overlay=dict(state_dict=wrapped))
    assert torch.equal(model(IMAGES), created(**from_file)(IMAGES))


def test_weights_of_another_variant_are_refused(released):
    with pytest.raises(ValueError, match='of another variant'):
        timm.create_model('overlock_t', pretrained=True, pretrained_cfg_overlay=dict(file=str(released)))


@pytest.mark.parametrize('arch', list(ARCHITECTURES))
def test_registered(arch):
    """With the released file, and the crop of its config."""
    pytest.importorskip('mmpretrain', reason='its config')
    assert f'overlock_{arch}' in timm.list_models('overlock*')
    cfg = timm.get_pretrained_cfg(f'overlock_{arch}')
    released_file = find_released(cfg.url)
    assert (released_file.arch, released_file.family) == (arch, 'classification')
    pipeline = Config.fromfile(overlock_mm.get_config_path(released_file.config)).val_dataloader.dataset.pipeline
    assert [step.scale for step in pipeline if step.type == 'ResizeEdge'] == [int(224 / cfg.crop_pct)]
    with torch.device('meta'):
        model = timm.create_model(f'overlock_{arch}', drop_path_rate=0.1)
    settings = ARCHITECTURES[arch]
    expected = f'channels {settings["channels"]}, depths {settings["depths"] + settings["sub_depths"]}'
    assert describe_variant(model.state_dict()) == expected
    assert model.sub_blocks4[-1].drop_path.drop_prob == pytest.approx(0.1)


def test_training(small_arch):
    """Checkpointing changes no gradient. Layer decay goes by the depth. Dropout is before the classifier."""
    torch.manual_seed(0)
    model = OverLoCKClassifier(small_arch, num_classes=3).eval()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(IMAGES).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))

    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert layers['patch_embed1.0.weight'] == 0
    assert layers['head.4.weight'] == max(layers.values())
    for name, layer in layers.items():
        assert layer == model.get_layer_depth(name)[0]

    model.drop_rate = 1 - 1e-9
    features = model.forward_features(IMAGES)
    assert torch.equal(model.train().forward_head(features), model.head[4].bias.expand(2, 3))


@torch.no_grad()
@pytest.mark.parametrize('scope', ['mmpretrain', 'mmseg'])
def test_backbone_of_openmmlab(released, from_file, scope):
    pytest.importorskip(scope, reason='its TIMMBackbone')
    from mmengine.registry import MODELS
    from mmengine.registry.utils import init_default_scope

    init_default_scope(scope)
    cfg = dict(type='TIMMBackbone', model_name='overlock_xt', features_only=True, out_indices=(1, 3), **from_file)
    backbone = MODELS.build(cfg)
    backbone.eval()  # mmpretrain's returns None
    expected = backbone_with(released, out_indices=(1, 3))(IMAGES)
    assert all(torch.equal(one, other) for one, other in zip(backbone(IMAGES), expected))


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(num_classes=-1), 'num_classes must be .* got -1'),
        (dict(global_pool='max'), "global_pool must be 'avg' or '', got 'max'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        created(**arguments)


def test_bad_format_of_maps(small_arch):
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        OverLoCKClassifier(small_arch).forward_intermediates(IMAGES, output_fmt='NLC')
