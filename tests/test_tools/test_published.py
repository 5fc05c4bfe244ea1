"""The backbone is the published computation, step by step: outputs, gradients and statistics, in float64.

The computation itself is in tools/benchmarks/published_backbone.py, and shares no forward with overlock_mm.models.
"""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch
from conftest import ROOT, autocast_dtypes, relative_error

import overlock_mm
from overlock_mm.models import OverLoCK
from overlock_mm.models.overlock import OUT_TYPES

TOLERANCE = 1e-9
#: Of a gradient that is zero but for rounding (a bias before a batch norm), over the largest of all gradients.
NOISE = 1e-11

#: Sizes of the image. The small network's kernels are 9, 7, 7 and 5, at strides 4, 8, 16 and 32.
SIZES = (
    (162, 175),  # all kernels fit into their maps
    (113, 130),  # the last does not
    (61, 90),  # nor do both dynamic ones
    (20, 300),  # nor any, of flat maps
    (67, 5),  # and of upright ones
    (1, 1),
)
sizes = pytest.mark.parametrize('size', SIZES, ids=lambda size: f'{size[0]}x{size[1]}')
out_types = pytest.mark.parametrize('out_type', OUT_TYPES)


@pytest.fixture(scope='module')
def published():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'tools' / 'benchmarks')
        import published_backbone

        yield published_backbone.published
        for name in ('published_backbone', 'published'):
            sys.modules.pop(name, None)


def randomise(model):
    """Weights of which every one matters, where many start as zeros or ones, and statistics as after training."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith('num_batches_tracked'):
            continue
        tensor.normal_(generator=generator)
        if name.endswith('running_var'):
            tensor.abs_().add_(0.5)
        elif name.endswith('weight') and tensor.ndim == 4 and tensor.shape[1:].numel() > 1:
            tensor.mul_(tensor[0].numel() ** -0.5)  # of a convolution: maps neither die out nor grow
    return model


def build(arch, **settings):
    # Also the fourth output that only plain features have, and an order of its own.
    if settings.get('out_type', 'features') == 'features':
        settings.setdefault('out_indices', (4, 0, 1, 3, 2))
    return randomise(OverLoCK(arch, **settings).double())


def step(model, image, seed=0):
    """Outputs, and the gradients that random cotangents give the image and the parameters."""
    image = image.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)
    outputs = model(image)
    generator = torch.Generator().manual_seed(2)
    loss = sum((out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum() for out in outputs)
    loss.backward()
    return outputs, {'image': image.grad, **{name: p.grad for name, p in model.named_parameters()}}


def assert_same_outputs(got, expected, tolerance=TOLERANCE):
    assert len(got) == len(expected)
    for i, (ours, theirs) in enumerate(zip(got, expected)):
        assert ours.shape == theirs.shape, i
        assert relative_error(ours, theirs) < tolerance, i


def assert_same_gradients(got, expected, tolerance=TOLERANCE):
    assert got.keys() == expected.keys()
    assert {name for name in got if got[name] is None} == {name for name in got if expected[name] is None}
    largest = max(gradient.norm() for gradient in expected.values() if gradient is not None)
    for name, theirs in expected.items():
        if theirs is not None:
            assert got[name].shape == theirs.shape, name
            assert (got[name] - theirs).norm() <= tolerance * theirs.norm() + NOISE * largest, name


def assert_same_statistics(model, expected):
    buffers, theirs = dict(model.named_buffers()), dict(expected.named_buffers())
    assert buffers.keys() == theirs.keys()
    for name, buffer in buffers.items():
        if buffer.is_floating_point():
            assert relative_error(buffer, theirs[name]) < TOLERANCE, name
        else:
            assert torch.equal(buffer, theirs[name]), name


def random_image(size, batch=2):
    return torch.randn(batch, 3, *size, dtype=torch.float64)


# ------------------------------------------------------------------------------------------- the published form itself


def test_names_and_parameters_stay(published, small_arch):
    model = build(small_arch, out_type='pyramid_with_overview')
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = published(model)
    plain_state = plain.state_dict()
    assert list(plain_state) == list(before)
    assert all(torch.equal(plain_state[name], tensor) for name, tensor in before.items())
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    plain.train()(random_image((64, 64)).double())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_only_the_dilated_branches_are_folded(published, small_arch):
    model = build(small_arch).eval()
    branches = {name.rpartition('.lk_origin.')[0] for name in model.state_dict() if '.lk_origin.' in name}
    gone = [name for name in model.state_dict() if '.origin_bn.' in name or '.dil_' in name]
    assert len(branches) == 8  # one for each block
    plain = published(model, folded=True)
    expected = {*model.state_dict(), *(f'{branch}.lk_origin.bias' for branch in branches)}.difference(gone)
    assert plain.state_dict().keys() == expected
    assert not any('.lk_origin.bias' in name for name in model.state_dict())


@pytest.mark.parametrize('folded', [False, True])
def test_it_shares_no_computation(published, small_arch, folded, monkeypatch):
    """Neither a forward of the package's modules nor its operators run."""
    model = build(small_arch, out_type='pyramid_with_overview').eval()
    image = random_image((61, 90))
    with torch.no_grad():
        expected = model(image)
    plain = published(model, folded)

    def fail(*args, **kwargs):
        raise AssertionError('a forward of overlock_mm')

    for module in list(sys.modules.values()):
        if not getattr(module, '__name__', '').startswith(f'{overlock_mm.__name__}.models'):
            continue
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__.startswith(overlock_mm.__name__) and 'forward' in vars(value):
                monkeypatch.setattr(value, 'forward', fail)
            elif isinstance(value, types.FunctionType) and value.__module__.startswith(f'{overlock_mm.__name__}.ops'):
                monkeypatch.setattr(module, value.__name__, fail)
    with pytest.raises(AssertionError, match='a forward of overlock_mm'):
        model(image)
    with torch.no_grad():
        assert_same_outputs(plain(image), expected)


def test_a_folded_model_is_refused(published, small_arch):
    model = OverLoCK(small_arch, deploy=True)
    with pytest.raises(ValueError, match='must not be folded.*deploy=False'):
        published(model)


# ------------------------------------------------------------------------------------------------ the backbone against it


@sizes
@out_types
def test_training(published, small_arch, out_type, size):
    """Batch statistics, their running averages over two steps, and every gradient."""
    model = build(small_arch, out_type=out_type).train()
    plain = published(model)
    for _ in range(2):
        image = random_image(size)
        outputs, gradients = step(model, image)
        expected, expected_gradients = step(plain, image)
        assert_same_outputs(outputs, expected)
        assert_same_gradients(gradients, expected_gradients)
        assert_same_statistics(model, plain)
        model.zero_grad()
        plain.zero_grad()


@sizes
@out_types
@pytest.mark.parametrize('batch', [1, 3])
@torch.no_grad()
def test_evaluation(published, small_arch, out_type, size, batch):
    model = build(small_arch, out_type=out_type).eval()
    plain = published(model)
    folded = published(model, folded=True)
    image = random_image(size, batch)
    expected = plain(image)
    assert_same_outputs(model(image), expected)
    assert_same_outputs(folded(image), expected)
    assert_same_statistics(model, plain)  # untouched
    model.switch_to_deploy()
    assert_same_outputs(model(image), expected)


@out_types
def test_gradients_at_evaluation(published, small_arch, out_type):
    """Running statistics, with a gradient: what norm_eval trains with."""
    model = build(small_arch, out_type=out_type).eval()
    plain = published(model)
    image = random_image((113, 130))
    outputs, gradients = step(model, image)
    expected, expected_gradients = step(plain, image)
    assert_same_outputs(outputs, expected)
    assert_same_gradients(gradients, expected_gradients)
    assert_same_statistics(model, plain)


@pytest.mark.parametrize(
    'settings',
    [
        dict(with_cp=True),
        dict(with_cp=('blocks2', 'sub_blocks3')),
        dict(norm_eval=True),
        dict(frozen_stages=2),
        dict(frozen_stages=6),
        dict(drop_path_rate=0.5),
        dict(drop_path_rate=0.5, with_cp=True),
        dict(out_indices=(0,)),
        dict(out_indices=(1,)),
        dict(out_indices=(2, 0)),
        dict(out_indices=(4,), out_type='features'),
        dict(in_channels=1),
    ],
    ids=lambda settings: ','.join(f'{name}={value}' for name, value in settings.items()),
)
def test_training_with_other_settings(published, small_arch, settings):
    settings = dict(dict(out_type='pyramid_with_overview'), **settings)
    model = build(small_arch, **settings).train()
    plain = published(model)
    assert [module.training for module in plain.modules()] == [module.training for module in model.modules()]
    image = random_image((113, 130))[:, : settings.get('in_channels', 3)].contiguous()
    outputs, gradients = step(model, image)
    expected, expected_gradients = step(plain, image)
    assert_same_outputs(outputs, expected)
    assert_same_gradients(gradients, expected_gradients)
    assert_same_statistics(model, plain)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def sliced(tensor):
    """The same numbers with strides of a larger tensor."""
    large = torch.zeros(2, 5, tensor.shape[2] + 3, 2 * tensor.shape[3], dtype=tensor.dtype)
    view = large[:, 1:4, 2:-1, ::2]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize('layout', [channels_last, sliced])
@pytest.mark.parametrize('of_the_model_too', [False, True])
@pytest.mark.parametrize('training', [True, False])
def test_layouts(published, small_arch, layout, of_the_model_too, training):
    """Of the image, and with it of the weights."""
    model = build(small_arch, out_type='pyramid_with_overview').train(training)
    plain = published(model)
    if of_the_model_too:
        model.to(memory_format=torch.channels_last)
    image = random_image((113, 130))
    expected, expected_gradients = step(plain, image)
    outputs, gradients = step(model, layout(image))
    assert_same_outputs(outputs, expected)
    assert_same_gradients(gradients, expected_gradients)
    assert_same_statistics(model, plain)
    memory_format = torch.channels_last if layout is channels_last else torch.contiguous_format
    assert all(out.is_contiguous(memory_format=memory_format) for out in outputs)


@pytest.mark.parametrize('to_memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@torch.no_grad()
def test_what_was_folded_follows_the_weights(published, small_arch, to_memory_format):
    """Nothing that the backbone prepared for evaluation outlives the weights and statistics that it was made from."""
    model = build(small_arch, out_type='pyramid_with_overview').eval()
    image = random_image((113, 130)).contiguous(memory_format=to_memory_format)
    model(image)

    other = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in other.values():
        if tensor.is_floating_point():
            tensor.mul_(0.9)
    model.load_state_dict(other)
    assert_same_outputs(model(image), published(model)(image))

    for parameter in model.parameters():
        parameter.mul_(1.1)  # as an optimiser does
    assert_same_outputs(model(image), published(model)(image))

    model.train()(image)
    model.eval()
    assert_same_outputs(model(image), published(model)(image))


@out_types
@pytest.mark.parametrize('training', [True, False])
def test_float32(published, small_arch, out_type, training):
    """To the rounding of float32, as near to float64 as the published computation comes, or nearly."""
    model = build(small_arch, out_type=out_type).train(training)
    image = random_image((113, 130))
    expected = published(model)(image)
    plain = published(model.float())
    with torch.no_grad() if not training else contextlib.nullcontext():
        outputs, theirs = model(image.float()), plain(image.float())
    for out, their, exact in zip(outputs, theirs, expected):
        assert out.dtype == torch.float32
        assert relative_error(out, exact) < max(2e-6, 3 * relative_error(their, exact))


@autocast_dtypes
@pytest.mark.parametrize('training', [True, False])
def test_autocast(published, small_arch, dtype, training):
    """Half types round a map at every step: as near to float64 as the published computation comes, or nearly."""
    model = build(small_arch, out_type='pyramid_with_overview').train(training)
    image = random_image((113, 130))
    expected = published(model)(image)
    plain = published(model.float())
    with torch.autocast('cpu', dtype), torch.no_grad():
        outputs, theirs = model(image.float()), plain(image.float())
    for out, their, exact in zip(outputs, theirs, expected):
        assert relative_error(out, exact) < 2 * relative_error(their, exact) < 1
