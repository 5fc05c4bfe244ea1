"""The published form of the backbone, and ours: the same outputs, gradients and statistics, in float64.

The published form runs the references of all operators, and a ContMix of its own.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from benchmarks import bench_backbone
from conftest import autocast_dtypes, relative_error

from overlock_mm.inference import optimize
from overlock_mm.models import OverLoCK
from overlock_mm.models.overlock import OUT_TYPES

TOLERANCE = 1e-9
#: Of a gradient that is zero up to rounding (a bias before a batch norm), over the largest of all gradients.
NOISE = 1e-11

#: Sizes of the image. The small network's kernels are 9, 7, 7 and 5, at strides 4, 8, 16 and 32.
SIZES = (
    (162, 175),  # all kernels fit into their maps
    (113, 130),  # the last one does not
    (61, 90),  # both dynamic ones do not
    (20, 300),  # none fits, on flat maps
    (67, 5),  # none fits, on upright maps
    (1, 1),
)
sizes = pytest.mark.parametrize('size', SIZES, ids=lambda size: f'{size[0]}x{size[1]}')
out_types = pytest.mark.parametrize('out_type', OUT_TYPES)


def published(model, folded=False):
    """The published form of a copy of the model."""
    model = copy.deepcopy(model)
    model.memory, model.checkpointed_stages = 'fast', frozenset()
    if folded:
        model.switch_to_deploy()
    return bench_backbone.Published(model)


def randomise(model):
    """Set weights that all matter, where many start as zeros or ones, and statistics as after training."""
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
    # With the fifth output that only plain features have, and in another order.
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
    return outputs, {'image': image.grad, **{name.removeprefix('model.'): p.grad for name, p in model.named_parameters()}}


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
    buffers, theirs = dict(model.named_buffers()), dict(expected.model.named_buffers())
    assert buffers.keys() == theirs.keys()
    for name, buffer in buffers.items():
        if buffer.is_floating_point():
            assert relative_error(buffer, theirs[name]) < TOLERANCE, name
        else:
            assert torch.equal(buffer, theirs[name]), name


def random_image(size, batch=2):
    return torch.randn(batch, 3, *size, dtype=torch.float64)


@sizes
@out_types
def test_training(small_arch, out_type, size):
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
def test_evaluation(small_arch, out_type, size, batch):
    model = build(small_arch, out_type=out_type).eval()
    plain = published(model)
    folded = published(model, folded=True)
    image = random_image(size, batch)
    expected = plain(image)
    assert_same_outputs(model(image), expected)
    assert_same_outputs(folded(image), expected)
    assert_same_outputs(optimize(model)(image), expected)
    assert_same_statistics(model, plain)  # untouched
    model.switch_to_deploy()
    assert_same_outputs(model(image), expected)


@out_types
def test_gradients_at_evaluation(small_arch, out_type):
    """Gradients through running statistics, as norm_eval trains."""
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
def test_training_with_other_settings(small_arch, settings):
    settings = dict(dict(out_type='pyramid_with_overview'), **settings)
    model = build(small_arch, **settings).train()
    plain = published(model)
    assert [module.training for module in plain.model.modules()] == [module.training for module in model.modules()]
    image = random_image((113, 130))[:, : settings.get('in_channels', 3)].contiguous()
    outputs, gradients = step(model, image)
    expected, expected_gradients = step(plain, image)
    assert_same_outputs(outputs, expected)
    assert_same_gradients(gradients, expected_gradients)
    assert_same_statistics(model, plain)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def sliced(tensor):
    """The same numbers with the strides of a larger tensor."""
    large = torch.zeros(2, 5, tensor.shape[2] + 3, 2 * tensor.shape[3], dtype=tensor.dtype)
    view = large[:, 1:4, 2:-1, ::2]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize('layout', [channels_last, sliced])
@pytest.mark.parametrize('of_the_model_too', [False, True])
@pytest.mark.parametrize('training', [True, False])
def test_layouts(small_arch, layout, of_the_model_too, training):
    """Of the image, and of the weights with it."""
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


@torch.no_grad()
def test_the_current_weights_count(small_arch):
    """However they were changed, and in either layout."""
    model = build(small_arch, out_type='pyramid_with_overview').eval()
    image = random_image((113, 130))
    model(image)
    model.load_state_dict(
        {name: tensor * 0.9 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    )
    assert_same_outputs(model(image), published(model)(image))
    for parameter in model.parameters():
        parameter.mul_(1.1)  # as an optimizer does
    assert_same_outputs(model(image), published(model)(image))
    for parameter in model.parameters():
        parameter.data.mul_(1.1)  # unseen by PyTorch's version counters
    assert_same_outputs(model(channels_last(image)), published(model)(image))
    model.train()(image)
    assert_same_outputs(model.eval()(image), published(model)(image))


@out_types
@pytest.mark.parametrize('training', [True, False])
def test_float32(small_arch, out_type, training):
    """About as close to float64 as the published computation in float32."""
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
def test_autocast(small_arch, dtype, training):
    """About as close to float64 as the published computation under autocast, which rounds a map at every step."""
    model = build(small_arch, out_type='pyramid_with_overview').train(training)
    image = random_image((113, 130))
    expected = published(model)(image)
    plain = published(model.float())
    with torch.autocast('cpu', dtype), torch.no_grad():
        outputs, theirs = model(image.float()), plain(image.float())
    for out, their, exact in zip(outputs, theirs, expected):
        assert relative_error(out, exact) < 2 * relative_error(their, exact) < 1
