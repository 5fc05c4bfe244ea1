"""tools/visualize.py: what the pictures show has the right values, and the page needs no other file."""

from __future__ import annotations

import base64
import copy
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, import_file, relative_error

pytest.importorskip('matplotlib', reason='it draws')
sys.path.insert(0, str(ROOT / 'tools'))

from visualize import cam, erf, kernels, networks, predictions, prior  # noqa: E402

from overlock_mm.models import OverLoCK  # noqa: E402
from overlock_mm.ops._reference import aggregate  # noqa: E402

CLASSIFIER = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='overlock_mm.OverLoCK', arch=dict(
            channels=(8, 12, 24, 40), depths=(1, 1, 1, 1), sub_depths=(2, 2), num_groups=(2, 4),
            kernel_sizes=(9, 7, 7, 5))),
    head=dict(type='overlock_mm.OverLoCKHead', num_classes=7, in_channels=50))
data_preprocessor = dict(mean=[100, 110, 120], std=[50, 60, 70], to_rgb=True, num_classes=7)
"""


@pytest.fixture
def backbone(small_arch):
    """Every weight of it counts."""
    backbone = OverLoCK(small_arch, out_indices=(2, 3)).eval().requires_grad_(False)
    for name, tensor in backbone.state_dict().items():
        if name.endswith('running_var'):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor += 0.2 * torch.randn_like(tensor)
    return backbone


@pytest.fixture
def image():
    return torch.randn(1, 3, 128, 160)


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / 'pictures'
    folder.mkdir()
    for i, name in enumerate(('one.png', 'two.jpg')):
        cv2.imwrite(str(folder / name), np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    (folder / 'notes.txt').write_text('no picture')
    return folder


@pytest.fixture
def visualize(monkeypatch):
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, 'argv', ['visualize.py', *map(str, arguments)])
        import_file(ROOT / 'tools' / 'visualize.py').main()

    return run


# Receptive fields.


def test_field_of_a_convolution_is_its_kernel():
    conv = nn.Conv2d(3, 4, 5, padding=2)
    conv.weight.data.uniform_(0.1, 1)
    field = erf.receptive_fields(conv, dict(conv=conv), torch.randn(2, 1, 3, 11, 14))['conv']
    expected = torch.zeros(11, 14)
    expected[3:8, 5:10] = conv.weight.sum(dim=(0, 1)).detach()  # 2 positions around (5, 7)
    assert field.centre == (5, 7)
    assert relative_error(torch.from_numpy(field.gradient), expected) < 1e-6
    assert np.count_nonzero(field.gradient) == 25


def test_negative_gradients_do_not_count():
    conv = nn.Conv2d(1, 1, 3, padding=1, stride=2, bias=False)
    conv.weight.data = torch.tensor([[[[1.0, -2, 3], [-4, 5, -6], [7, -8, 9]]]])
    field = erf.receptive_fields(conv, dict(conv=conv), [torch.zeros(1, 1, 8, 8)])['conv']
    expected = np.zeros((8, 8))
    expected[3:6, 3:6] = [[1, 0, 3], [0, 5, 0], [7, 0, 9]]
    assert np.array_equal(field.gradient, expected)
    assert field.centre == (5, 5)  # in the middle of the pixels 4 and 5 of position 2


def test_field_is_the_mean_over_pictures():
    class Square(nn.Module):
        def forward(self, x):
            return x**2

    square = Square()
    images = [torch.full((1, 1, 3, 3), value) for value in (1.0, 3.0)]
    field = erf.receptive_fields(nn.Sequential(square), dict(square=square), images)['square']
    assert field.gradient[1, 1] == 4  # the mean of 2 * 1 and 2 * 3
    assert field.gradient.sum() == 4


def test_fields_of_stages_are_gradients_of_the_backbone(backbone, image):
    blocks = dict(sub_blocks3=backbone.sub_blocks3[-1], sub_blocks4=backbone.sub_blocks4[-1])
    fields = erf.receptive_fields(backbone, blocks, [image])
    image = image.requires_grad_()
    for field, output in zip(fields.values(), backbone(image)):
        centre = output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum()
        (gradient,) = torch.autograd.grad(centre, image, retain_graph=True)
        assert relative_error(torch.from_numpy(field.gradient), gradient.relu().sum(dim=(0, 1))) < 1e-5
    assert not any(module._forward_hooks for module in backbone.modules())


@pytest.mark.parametrize('share, side', [(0.01, 1), (0.5, 7), (49 / 81, 7), (0.7, 9), (1.0, 9)])
def test_side_that_holds_a_share(share, side):
    assert erf.side_that_holds(erf.Field(np.ones((9, 9), dtype=np.float32), (4, 4)), share) == side


def test_side_around_a_position_beside_the_middle():
    gradient = np.zeros((9, 9), dtype=np.float32)
    gradient[6, 6] = 1
    assert erf.side_that_holds(erf.Field(gradient, (6, 6)), 0.99) == 1
    assert erf.side_that_holds(erf.Field(gradient, (4, 5)), 0.99) == 5


def test_other_networks_are_looked_at_before_their_norms():
    pytest.importorskip('mmpretrain', reason='their models')
    images = torch.randn(1, 3, 64, 64)
    for candidate in erf.others('xt', ['blocks2', 'sub_blocks4'], None, None):
        assert list(candidate.blocks) == ['stage 2', 'stage 4']
        assert candidate.name in ('ConvNeXt-T', 'Swin-T')
        with torch.no_grad(), networks.recorded(candidate.blocks) as outputs:
            expected = candidate.network(images)[-1]
        features = networks.as_map(outputs['stage 4'])
        assert features.shape[2:] == (2, 2)
        if candidate.name == 'ConvNeXt-T':
            got = candidate.network.norm3(features.mean(dim=(2, 3), keepdim=True)).flatten(1)
        else:
            got = candidate.network.norm3(features.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(expected)
        assert relative_error(got, expected) < 1e-6


def test_weights_of_other_networks(tmp_path):
    """The released files are those of classifiers."""
    pytest.importorskip('mmpretrain', reason='their models')
    checkpoint = str(tmp_path / 'convnext.pth')
    cfg = dict(type='mmpretrain.ConvNeXt', arch=dict(depths=[1, 1, 1, 1], channels=[8, 8, 8, 8]))
    state_dict = erf.MODELS.build(cfg).state_dict()
    released = {f'backbone.{name}': tensor + 1 for name, tensor in state_dict.items()}
    torch.save(dict(state_dict={**released, 'head.fc.bias': torch.zeros(3)}), checkpoint)
    loaded = erf.other('ConvNeXt', cfg, ['blocks1'], checkpoint)
    assert loaded.weights == 'weights of convnext.pth'
    assert all(torch.equal(each, state_dict[name] + 1) for name, each in loaded.network.state_dict().items())
    del released['backbone.stages.0.0.gamma']
    torch.save(dict(state_dict=released), checkpoint)
    with pytest.raises(ValueError, match=r'convnext.pth does not fit ConvNeXt (.|\n)*stages.0.0.gamma'):
        erf.other('ConvNeXt', cfg, ['blocks1'], checkpoint)


# The context prior.


def test_main_colours_are_the_main_directions():
    """A map that is made of three patterns, in ten channels at right angles, has these patterns as its colours."""
    patterns = torch.randn(3, 40, 50) * torch.tensor([9.0, 3.0, 1.0]).view(3, 1, 1)
    directions = torch.linalg.qr(torch.randn(10, 10))[0][:, :3]
    colours = prior.main_colours(torch.einsum('cd,dhw->chw', directions, patterns) + 5)
    assert colours.shape == (40, 50, 3)
    assert colours.min() == 0 and colours.max() == 1
    for colour, pattern in zip(np.moveaxis(colours, 2, 0), patterns.numpy()):
        assert abs(np.corrcoef(colour.ravel(), pattern.ravel())[0, 1]) > 0.99


def test_colours_of_a_constant_map_are_constant():
    assert np.unique(prior.main_colours(torch.ones(8, 5, 6))).size == 1
    assert prior.main_colours(torch.ones(8, 1, 1)).shape == (1, 1, 3)


def test_relative_change():
    features = torch.zeros(2, 1, 2)
    features[:, 0, 0] = torch.tensor([3.0, 4.0])
    features[:, 0, 1] = torch.tensor([0.0, 2.0])
    changed = features.clone()
    changed[:, 0, 0] += torch.tensor([0.0, 1.0])
    assert np.allclose(prior.relative_change(features, changed), [[0.2, 0]])


def test_maps_are_those_of_the_backbone(backbone, image):
    maps = prior.network_maps(backbone, image)
    outputs = backbone(image)
    assert torch.equal(maps['Focus-Net\nsub_blocks3, block 2'], outputs[0][0, :24])
    assert torch.equal(maps['Focus-Net\nsub_blocks4'], outputs[1][0, :40])
    assert maps['context prior\nhigh_level_proj'].shape == (10, 4, 5)


def test_without_places_the_prior_is_its_mean(backbone, image):
    before = prior.network_maps(backbone, image)
    with prior.prior_without_places(backbone):
        changed = prior.network_maps(backbone, image)
    after = prior.network_maps(backbone, image)
    name = 'context prior\nhigh_level_proj'
    mean = before[name].mean(dim=(1, 2), keepdim=True)
    with prior.prior_without_places(backbone), networks.recorded(dict(block=backbone.sub_blocks3[0])):
        inputs = []
        hook = backbone.sub_blocks3[0].register_forward_pre_hook(lambda module, args: inputs.append(args[1]))
        backbone(image)
        hook.remove()
    assert relative_error(inputs[0][0], mean.expand_as(inputs[0][0])) < 1e-6
    for key, features in before.items():
        assert torch.equal(features, after[key])  # the hook is gone
        change = prior.relative_change(features, changed[key])
        assert (change > 1e-4).any() == key.startswith(('Focus-Net', 'context'))


def test_a_prior_of_one_value_changes_nothing(backbone, image):
    backbone.high_level_proj.weight.zero_()
    before = prior.network_maps(backbone, image)
    with prior.prior_without_places(backbone):
        changed = prior.network_maps(backbone, image)
    for name, features in before.items():
        assert prior.relative_change(features, changed[name]).max() < 1e-5


# Dynamic kernels.


@pytest.mark.parametrize('stage, size', [('sub_blocks3', (8, 10)), ('sub_blocks4', (5, 6))], ids=['fits', 'enlarged'])
def test_kernels_are_those_of_the_block(backbone, image, stage, size):
    """The values of the block, mixed with these kernels, are what its ContMix gives."""
    block = getattr(backbone, stage)[1]
    inputs = []
    hook = block.dyconv_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with networks.recorded(dict(value=block.fusion)) as outputs:
        both = kernels.dynamic_kernels(backbone, block, image)
    hook.remove()
    assert both[0].shape == (block.num_groups, *size, 5, 5)
    assert both[1].shape == (block.num_groups, *size, block.kernel_size, block.kernel_size)
    value = nn.functional.interpolate(outputs['value'], size, mode='bilinear', align_corners=False)
    halves = [half.unflatten(1, (block.num_groups, -1)) for half in value.chunk(2, dim=1)]
    mixed = torch.cat([aggregate(half, each[None]).flatten(1, 2) for half, each in zip(halves, both)], dim=1)
    assert relative_error(nn.functional.adaptive_avg_pool2d(mixed, inputs[0].shape[2:]), inputs[0]) < 1e-5


def test_kernels_that_are_drawn_sum_to_one(backbone, image):
    both = kernels.dynamic_kernels(backbone, backbone.sub_blocks3[0], image)
    position = (3, 4)
    shown = kernels.kernels_at(position, both)
    for kernel in shown.values():
        assert abs(kernel.sum().item() - 1) < 1e-6
    small, large, one = shown.values()
    assert torch.allclose(small, both[0][:, 3, 4].mean(dim=0))
    assert torch.allclose(large, both[1][:, 3, 4].mean(dim=0))
    group = int(re.fullmatch(r'7 x 7, group (\d) of 2', list(shown)[2]).group(1)) - 1
    assert torch.equal(one, both[1][group, 3, 4])
    assert one.max() == both[1][:, 3, 4].max()


def test_a_bias_by_offset_is_drawn_at_its_offset(backbone, image):
    """A kernel that looks at the neighbour above alone."""
    block = backbone.sub_blocks3[0]
    block.rpb2.fill_(-1e4)
    block.rpb2[:, 5, 6] = 0  # offset (-1, 0) of a 7 x 7 kernel
    both = kernels.dynamic_kernels(backbone, block, image)
    kernel = kernels.kernels_at((4, 5), both)['7 x 7, mean of the groups']
    assert kernel[2, 3] == 1 and kernel.count_nonzero() == 1


@pytest.mark.parametrize(
    'place, position, window',
    [((0, 0), (0, 0), (0, 0)), ((0.5, 0.5), (4, 5), (1, 2)), ((1, 1), (7, 9), (1, 3)), ((0.09, 0.9), (7, 0), (1, 0))],
)
def test_places_and_windows(place, position, window):
    assert kernels.position_at(place, 8, 10) == position
    assert kernels.window_at(position, 7, 8, 10) == window


@pytest.mark.parametrize('text', ['0.5', '0.5;0.5', '1.5,0', 'a,b', ',', '-0.1,0.2'])
def test_bad_places(text):
    with pytest.raises(Exception, match=re.escape(f'as 0.5,0.25, got {text}')):
        kernels.place_of(text)


# Grad-CAM.


def test_grad_cam_of_a_linear_head_is_exact():
    """The mean of a map, then a linear layer: the gradient of a class is its weights, at every position the same."""
    pytest.importorskip('pytorch_grad_cam', reason='the extra visualize')
    features = nn.Conv2d(3, 5, 3, padding=1)
    head = nn.Linear(5, 4)
    classifier = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).requires_grad_(False)
    image = torch.randn(1, 3, 12, 12)
    for category in range(4):
        got = cam.grad_cam(classifier, features, image, category)
        expected = torch.einsum('c,chw->hw', head.weight[category], features(image)[0]).relu()
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        assert relative_error(torch.from_numpy(got), expected) < 1e-5
    assert not features._forward_hooks


# Predictions.


def test_predictions_equal_to_the_truth_look_like_it():
    pytest.importorskip('mmseg', reason='its visualizer')
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    labels = torch.randint(0, 3, (1, 20, 30))
    metainfo = dict(classes=('a', 'b', 'c'), palette=[[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    sample = SegDataSample(gt_sem_seg=PixelData(data=labels), pred_sem_seg=PixelData(data=labels))
    panels = predictions.segmentor_panels(picture, sample, metainfo, 0.3)
    assert list(panels) == ['picture', 'ground truth', 'prediction']
    assert np.array_equal(panels['picture'], picture)
    assert np.array_equal(panels['prediction'], panels['ground truth'])
    # The colour of the class is the strongest, with the visualizer's opacity of 0.8.
    assert np.array_equal(panels['prediction'].argmax(axis=2), labels[0].numpy())

    wrong = (labels + 1) % 3
    sample.pred_sem_seg = PixelData(data=wrong)
    panels = predictions.segmentor_panels(picture, sample, metainfo, 0.3)
    assert np.array_equal(panels['ground truth'].argmax(axis=2), labels[0].numpy())
    assert np.array_equal(panels['prediction'].argmax(axis=2), wrong[0].numpy())


def test_boxes_are_drawn_where_they_are():
    """On a picture that is too small for names, and is enlarged 10 times."""
    pytest.importorskip('mmdet', reason='its visualizer')
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    mask = np.zeros((1, 40, 50), dtype=np.uint8)
    mask[:, 10:20, 5:25] = 1
    box = torch.tensor([[5.0, 10.0, 25.0, 20.0]])
    label = torch.tensor([0])
    truth = InstanceData(bboxes=box, labels=label, masks=BitmapMasks(mask, 40, 50))
    found = InstanceData(bboxes=box, labels=label, masks=torch.from_numpy(mask).bool(), scores=torch.tensor([0.4]))
    metainfo = dict(classes=('a',), palette=[(255, 0, 0)])
    picture = np.full((40, 50, 3), 100, dtype=np.uint8)

    def panels(score):
        sample = DetDataSample(gt_instances=copy.deepcopy(truth), pred_instances=copy.deepcopy(found))
        return predictions.detector_panels(picture, sample, metainfo, score)

    drawn = panels(score=0.3)
    assert drawn['picture'].shape == (400, 500, 3)
    for title in ('ground truth', 'prediction'):
        changed = (drawn[title] != 100).any(axis=2)
        assert changed[102:198, 52:248].all()  # the mask, and the box around it
        changed[90:210, 40:260] = False
        assert not changed.any()
    assert np.array_equal(panels(score=0.5)['prediction'], drawn['picture'])  # it has a score of 0.4


def test_names_of_a_classifier():
    result = SimpleNamespace(
        gt_label=torch.tensor([1]), pred_label=torch.tensor([2]), pred_score=torch.tensor([0.1, 0.2, 0.7])
    )
    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    (title,) = predictions.classifier_panels(picture, result, dict(classes=('cat', 'dog', 'cow')), 0.3)
    assert title == 'ground truth: dog\nprediction: cow, score 0.7'
    with pytest.raises(ValueError, match='the 3 classes of its model, got 2'):
        predictions.classifier_panels(picture, result, dict(classes=('cat', 'dog')), 0.3)


def test_chosen_samples():
    class Data(list):
        def get_data_info(self, index):
            return dict(img_path=f'folder/{self[index]}.jpg')

    data = Data('abc')
    assert list(predictions.chosen_indices(data, [], 2)) == [0, 1]
    assert list(predictions.chosen_indices(data, [], 9)) == [0, 1, 2]
    assert list(predictions.chosen_indices(data, [Path('c.jpg'), Path('elsewhere/a.jpg')], 9)) == [2, 0]
    with pytest.raises(ValueError, match='as a.jpg is, got d.jpg'):
        list(predictions.chosen_indices(data, [Path('d.jpg')], 9))


# Pictures and networks.


def test_pictures_are_found_and_normalised(pictures):
    assert [each.name for each in networks.find_pictures([pictures, pictures / 'one.png'])] == [
        'one.png',
        'two.jpg',
        'one.png',
    ]
    whole = networks.read_picture(pictures / 'one.png', 48)
    assert np.array_equal(whole, cv2.imread(str(pictures / 'one.png'))[..., ::-1])  # in RGB
    assert np.array_equal(networks.read_picture(pictures / 'one.png', 48, square=True), whole[:, 8:56])
    assert networks.read_picture(pictures / 'one.png', 96).shape == (96, 128, 3)
    normalised = networks.normalised(whole)
    assert normalised.shape == (1, 3, 48, 64)
    assert normalised[0, 2, 5, 7].item() == pytest.approx((whole[5, 7, 2] - 103.53) / 57.375, abs=1e-5)


@pytest.mark.parametrize('kind', ['kernels', 'prior', 'cam'])
def test_page_of_a_folder(visualize, pictures, tmp_path, capsys, kind):
    pytest.importorskip('mmpretrain', reason='the model')
    if kind == 'cam':
        pytest.importorskip('pytorch_grad_cam', reason='the extra visualize')
    config = tmp_path / 'classifier.py'
    config.write_text(CLASSIFIER)
    visualize(kind, '--config', config, '--size', 64, '--out', tmp_path / 'out', pictures)
    assert 'weights are random' in capsys.readouterr().err
    page = (tmp_path / 'out' / 'index.html').read_text()
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    files = [tmp_path / 'out' / f'{stem}_{kind}.png' for stem in ('one', 'two')]
    assert embedded == [file.read_bytes() for file in files]
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert len(re.findall(r'alt="[^"]*OverLoCK-CUSTOM, random weights', page)) == 2

    checkpoint = tmp_path / 'trained.pth'
    torch.save(dict(state_dict=networks.load_network(None, str(config), None).model.state_dict()), checkpoint)
    visualize(
        kind, '--config', config, '--checkpoint', checkpoint, '--size', 64, '--out', tmp_path / 'out', pictures / 'one.png'
    )  # fmt: skip
    assert 'random' not in capsys.readouterr().err
    page = (tmp_path / 'out' / 'index.html').read_text()
    assert page.count('OverLoCK-CUSTOM, weights of trained.pth') == 1 and 'random' not in page


def test_page_of_receptive_fields(visualize, pictures, tmp_path, monkeypatch):
    pytest.importorskip('mmpretrain', reason='the model')
    monkeypatch.setattr(erf, 'others', lambda *args: ())
    config = tmp_path / 'classifier.py'
    config.write_text(CLASSIFIER)
    visualize(
        'erf', '--config', config, '--stage', 'blocks1', '--stage', 'sub_blocks3', '--size', 64, '--out', tmp_path / 'out',
        pictures,
    )  # fmt: skip
    page = (tmp_path / 'out' / 'index.html').read_text()
    assert 'mean over 2 pictures of 64 x 64' in page
    assert 'Only trained weights compare networks' in page
    assert [each.name for each in (tmp_path / 'out').glob('*.png')] == ['erf.png']


def test_config_decides_how_pictures_are_normalised(tmp_path):
    pytest.importorskip('mmpretrain', reason='the model')
    config = tmp_path / 'classifier.py'
    config.write_text(CLASSIFIER)
    network = networks.load_network(None, str(config), None)
    picture = np.array([[[150, 170, 190]]], dtype=np.uint8)
    assert networks.normalised(picture, network).flatten().tolist() == [1, 1, 1]


def test_weights_of_a_file_are_loaded(tmp_path):
    """Into a whole model, and into a backbone by itself."""
    pytest.importorskip('mmpretrain', reason='the model')
    config, checkpoint = tmp_path / 'classifier.py', tmp_path / 'trained.pth'
    config.write_text(CLASSIFIER)
    for name, path in ((None, str(config)), ('xt', None)):
        state_dict = networks.load_network(name, path, None).model.state_dict()
        trained = {name: tensor + 1 for name, tensor in state_dict.items()}
        torch.save(dict(state_dict=trained), checkpoint)
        network = networks.load_network(name, path, str(checkpoint))
        assert network.weights == 'weights of trained.pth'
        for name, tensor in network.model.state_dict().items():
            assert torch.equal(tensor, trained[name]), name
    incomplete = dict(state_dict=networks.load_network(None, str(config), None).model.state_dict())
    del incomplete['state_dict']['head.head.4.bias']
    torch.save(incomplete, checkpoint)
    with pytest.raises(ValueError, match=r'--checkpoint does not fit --config: (.|\n)*head.head.4.bias'):
        networks.load_network(None, str(config), str(checkpoint))


def test_random_weights_are_the_same_in_every_run():
    one, other = (networks.load_network('xt', None, None).backbone.blocks1[0].proj[4].weight for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['kernels', 'nowhere'], 'PICTURE must be .* got nowhere, which does not exist'),
        (['kernels', 'empty'], 'PICTURE must be .* got empty: no image'),
        (['kernels', 'notes.txt', '--arch', 'xt'], 'PICTURE must be an image, got notes.txt'),
        (['kernels', 'one.png', '--arch', 'xt', '--block', '6'], r'--block must be in -6..5 for sub_blocks3, got 6'),
        (['prior', 'one.png', '--arch', 'xt', '--checkpoint', 'no.pth'], 'no.pth'),
        (['prior', 'one.png', '--config', 'no.py'], "no config 'no.py'"),
        (['predictions', '--arch', 'xt'], 'predictions needs --config'),
        (
            ['cam', 'one.png', '--config', 'mmdet/mask-rcnn_overlock-xt_fpn_demo'],
            'cam needs a classifier, got the MaskRCNN',
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else ' '.join(value[:2]),
)
def test_errors(visualize, pictures, monkeypatch, arguments, message):
    pytest.importorskip('mmdet', reason='the models')
    if arguments[0] == 'cam':
        pytest.importorskip('pytorch_grad_cam', reason='the extra visualize')
    monkeypatch.chdir(pictures)
    (pictures / 'empty').mkdir()
    with pytest.raises(SystemExit, match=f'no picture was drawn: .*{message}'):
        visualize(*arguments, '--out', 'out')
    assert not list(pictures.glob('out/*.png'))
