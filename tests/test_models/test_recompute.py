"""What the backward makes again in place of keeping it, and batch norms that are folded at inference."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import KeptBytes, autocast_dtypes, relative_error
from test_reparam import randomise_statistics
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from overlock_mm.models import OverLoCK
from overlock_mm.models.blocks import BasicBlock, DynamicBlock
from overlock_mm.models.convolutions import ConvSequential
from overlock_mm.models.layers import DepthwiseConv, LayerNorm2d, ResidualDepthwiseConv, SqueezeExcitation, batch_norm
from overlock_mm.models.recompute import checkpoint_block, recomputing


def plainly(function, *inputs, again=None):
    """In place of a context: nothing is made again."""
    return function(*inputs)


def left(storages: KeptBytes, *known: Tensor) -> int:
    """Bytes that a context of KeptBytes has seen and that still live, but for those of known tensors."""
    known_storages = {tensor.untyped_storage()._cdata for tensor in known}
    kept = [value for place, value in storages._storages.items() if place not in known_storages]
    return sum(size for storage, size in kept if not storage.expired())


class Counted:
    """A pure function that counts how often it ran, and in which dtype it gave its output."""

    def __init__(self, function) -> None:
        self.function = function
        self.dtypes: list[torch.dtype] = []

    def __call__(self, *inputs):
        out = self.function(*inputs)
        self.dtypes.append(out.dtype)
        return out


def leaves(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def chain_loss(again, x, w, v):
    """Values of values, of parameters, of two values, used more than once, and never used."""
    y = again(F.gelu, x)
    z = again(torch.sigmoid, y)  # keeps its own output
    z = torch.tanh(z * w)  # so does this one, and is not made again
    u = again(torch.mul, z, y)
    again(torch.exp, u)  # never used
    s = again(lambda u: u[:, 1:], u)  # a view
    t = again(nn.Identity(), s)  # itself
    return (s * t * w[1:]).sum() + (u @ v).square().sum() + (t @ v[1:]).sum() + (again(torch.cos, u) * u).sum()


def test_gradients_are_the_same():
    x, w, v = leaves((7, 5), (5,), (5, 3))
    expected = torch.autograd.grad(chain_loss(plainly, x, w, v), (x, w, v))
    with recomputing() as again:
        loss = chain_loss(again, x, w, v)
    for got, plain in zip(torch.autograd.grad(loss, (x, w, v)), expected):
        assert torch.equal(got, plain)


def test_values_are_made_once_for_all_that_use_them():
    function, second = Counted(F.gelu), Counted(torch.sin)
    x, w = leaves((7, 5), (5,))
    with recomputing() as again:
        y = again(function, x)
        z = again(second, y)
        loss = (y * w).sum() + (y * y).sum() + (z * w).sum() + (z * z * z).sum()
    assert len(function.dtypes) == len(second.dtypes) == 1
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    assert len(function.dtypes) == len(second.dtypes) == 2
    again_first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    assert len(function.dtypes) == len(second.dtypes) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, again_first))
    expected = torch.autograd.grad(
        (F.gelu(x) * w).sum() + F.gelu(x).square().sum() + (F.gelu(x).sin() * w).sum() + F.gelu(x).sin().pow(3).sum(),
        (x, w),
    )
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(first, expected))


def test_what_nobody_wants_is_not_made_again():
    function = Counted(torch.sin)
    (x,) = leaves((7, 5))
    with recomputing() as again:
        y = again(function, x)
        loss = (y + 1).sum()
    loss.backward()
    assert len(function.dtypes) == 1
    assert torch.equal(x.grad, x.detach().cos())


def test_backwards_of_parts_of_the_graph():
    """One that asks for some gradients only, between others that ask for all."""
    x, w, v = leaves((7, 5), (5,), (5, 3))
    expected = torch.autograd.grad(chain_loss(plainly, x, w, v), (x, w, v))
    with recomputing() as again:
        loss = chain_loss(again, x, w, v)
    for asked in ((2,), (1,), (0, 1, 2), (1, 2), (0, 1, 2)):
        got = torch.autograd.grad(loss, [(x, w, v)[i] for i in asked], retain_graph=True)
        assert all(torch.equal(a, expected[i]) for a, i in zip(got, asked))


def test_saved_tensors_that_are_looked_at():
    (x,) = leaves((7, 5))
    with recomputing() as again:
        out = again(torch.sin, x).square()
    assert torch.equal(out.grad_fn._saved_self, x.sin())
    assert torch.equal(out.grad_fn._saved_self, x.sin())
    out.sum().backward()
    assert torch.equal(x.grad, 2 * x.detach().sin() * x.detach().cos())


def test_second_derivatives():
    x, w, v = (leaf.detach().double().requires_grad_() for leaf in leaves((7, 5), (5,), (5, 3)))

    def second(loss):
        first = torch.autograd.grad(loss, (x, w, v), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), (x, w, v))

    expected = second(chain_loss(plainly, x, w, v))
    with recomputing() as again:
        loss = chain_loss(again, x, w, v)
    assert all(relative_error(got, plain) < 1e-12 for got, plain in zip(second(loss), expected))


def test_keeps_fewer_bytes():
    x, matrix = leaves((1000, 100), (100, 100))

    def kept(again):
        y = x
        for function in (F.gelu, torch.sin, torch.cos):
            y = again(function, y)
            y = F.linear(again(torch.cos, y), matrix)
        return y

    counts = []
    for context in (None, recomputing()):
        with KeptBytes() as storages:
            if context is None:
                out = kept(plainly)
            else:
                with context as again:
                    out = kept(again)
            counts.append(left(storages, x, matrix))
        del out
    assert counts[1] < 0.7 * counts[0]


def test_a_graph_that_is_dropped_frees_everything():
    x, w = leaves((100, 100), (100,))
    context = recomputing()
    with KeptBytes() as storages:
        with context as again:
            y = again(torch.sin, x * 1)
            out = (again(torch.cos, y) * w).sum() + (y * w).sum()
        made = weakref.ref(y)
        del y
        gc.disable()  # it goes without a search for cycles
        try:
            assert made() is None
            del out
            assert left(storages, x, w) == 0
        finally:
            gc.enable()


def test_a_backward_frees_everything():
    x, w = leaves((100, 100), (100,))
    with KeptBytes() as storages:
        with recomputing() as again:
            y = again(torch.sin, x * 1)
            out = (again(torch.cos, y) * w).sum() + (y * w).sum()
            del y
        torch.autograd.grad(out, (x, w))
        assert left(storages, x, w) <= out.nbytes


def test_an_error_leaves_nothing_behind():
    (x,) = leaves((7, 5))
    context = recomputing()
    with KeptBytes() as storages:
        with pytest.raises(ZeroDivisionError), context as again:
            again(torch.sin, x)
            raise ZeroDivisionError
        gc.collect()
        assert left(storages, x) == 0
    (x.exp() * 2).sum().backward()
    assert torch.equal(x.grad, x.detach().exp() * 2)


def test_addresses_are_used_again_by_other_tensors():
    """What dies in the context leaves its address to what comes next, of the same shape."""
    x, w = leaves((64, 64), (64,))

    def loss(again):
        total = x.sum()
        for i in range(30):
            y = again(torch.sin, x * (i + 1))
            first = (y * w).exp()
            del y
            second = again(torch.cos, first * w)
            total = total + (second * first).sum()
            del first, second
            for _ in range(3):
                third = x * w + i
                total = total + (third * third * w).mean()
                del third
        return total

    expected = torch.autograd.grad(loss(plainly), (x, w))
    with recomputing() as again:
        out = loss(again)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, (x, w)), expected))


def test_contexts_within_contexts():
    x, w, v = leaves((7, 5), (5,), (5, 3))
    expected = torch.autograd.grad(chain_loss(plainly, torch.sin(x), w, v) + (x.sin() * x).sum(), (x, w, v))
    with recomputing() as outer:
        y = outer(torch.sin, x)
        with recomputing() as inner:
            loss = chain_loss(inner, y, w, v)
        loss = loss + (y * x).sum()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(torch.autograd.grad(loss, (x, w, v)), expected))


def test_nothing_is_made_again_without_gradients():
    function = Counted(torch.sin)
    (x,) = leaves((7, 5))
    with torch.no_grad(), recomputing() as again:
        assert torch.equal(again(function, x), x.sin())
    with torch.inference_mode(), recomputing() as again:
        assert torch.equal(again(function, x), x.sin())
    with recomputing() as again:
        assert not again(function, x.detach()).requires_grad
    assert len(function.dtypes) == 3


@autocast_dtypes
@pytest.mark.parametrize('inside', ['forward', 'backward', 'both'])
def test_autocast(dtype, inside):
    """A value is made again in the dtype in which it was made, wherever the backward runs."""
    function = Counted(nn.Linear(5, 6))
    x, w = leaves((7, 5), (6, 4))

    def gradients(again, context):
        with context, torch.autocast('cpu', dtype=dtype, enabled=inside != 'backward'):
            y = again(function, x)
            loss = (y @ w.to(y.dtype)).square().sum().float() + (y * y).sum().float()
        with torch.autocast('cpu', dtype=dtype, enabled=inside != 'forward'):
            return torch.autograd.grad(loss, (x, w, function.function.weight))

    expected = gradients(plainly, torch.enable_grad())
    context = recomputing()
    got = gradients(context, context)
    assert len(function.dtypes) == 3
    assert set(function.dtypes) == {torch.float32 if inside == 'backward' else dtype}
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    'make',
    [
        lambda: LayerNorm2d(12),
        lambda: ResidualDepthwiseConv(12),
        lambda: DepthwiseConv(12, 3),
        lambda: DepthwiseConv(12, 7),
        lambda: DepthwiseConv(12, 3, dilation=2),
        lambda: SqueezeExcitation(12),
    ],
    ids=['LayerNorm2d', 'ResidualDepthwiseConv', 'DepthwiseConv3', 'DepthwiseConv7', 'dilated', 'SqueezeExcitation'],
)
def test_modules_give_the_same_bits_again(make, memory_format):
    """The second run has no gradients, which must not lead it another way."""
    module = make()
    x = torch.randn(2, 12, 15, 16).contiguous(memory_format=memory_format).requires_grad_()
    with recomputing() as again:
        y = again(module, x)
        out = y.square()
    assert torch.equal(out.grad_fn._saved_self, y)
    assert out.grad_fn._saved_self.stride() == y.stride()


@pytest.mark.parametrize('training', [True, False])
def test_batch_norms_update_their_statistics_once(training):
    norms = [nn.BatchNorm2d(6) for _ in range(2)]
    x = torch.randn(3, 6, 8, 9).requires_grad_()
    for norm in norms:
        norm.train(training)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1, 1, 6))
    expected = torch.autograd.grad(norms[0](x).pow(3).sum(), x)[0]
    with recomputing() as again:
        loss = batch_norm(again, norms[1], x).pow(3).sum()
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)
    assert norms[1].num_batches_tracked == int(training)
    for name, buffer in norms[0].named_buffers():
        assert torch.equal(buffer, getattr(norms[1], name)), name


@pytest.mark.parametrize('kind', ['kept', 'source'])
def test_what_was_kept_may_not_change(kind):
    """PyTorch refuses a backward through what was changed in place since; wrong gradients would be worse."""
    x, w = leaves((7, 5), (5,))
    base = x * 1
    with recomputing() as again:
        y = base if kind == 'kept' else again(torch.sin, base)
        out = (y * w).sum()
    expected = (base if kind == 'kept' else base.sin()).detach().sum(dim=0)
    with torch.no_grad():
        base.add_(1)
    try:
        (got,) = torch.autograd.grad(out, w)
    except RuntimeError as error:
        assert 'in place' in str(error) or 'inplace' in str(error)
    else:
        assert torch.allclose(got, expected)


def test_features_that_are_changed_in_place(small_arch):
    """As a neck may do it, and as PyTorch refuses it: stage 2 has kept the first map."""
    backbone = OverLoCK(small_arch, out_indices=(0, 1))
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    first, second = backbone(x)
    first.mul_(2)
    with pytest.raises(RuntimeError, match='in place|inplace'):
        second.sum().backward()


# The blocks and the network.


def make_block(kind: str):
    if kind == 'basic':
        return BasicBlock(8, 7, mlp_ratio=4, drop_path=0.0, layer_scale=True), (torch.randn(2, 8, 20, 22),)
    block = DynamicBlock(8, 4, num_groups=2, kernel_size=7, mlp_ratio=3, drop_path=0.0, mix_context=True)
    return block, (torch.randn(2, 8, 20, 22), torch.randn(2, 4, 20, 22), torch.randn(2, 4, 20, 22))


blocks = pytest.mark.parametrize('kind', ['basic', 'dynamic'])


def randomise(module):
    randomise_statistics(module)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # response norms start at zero, and block gradients there
    return module


def without_recomputing(monkeypatch):
    monkeypatch.setattr(recomputing, '__enter__', lambda self: self)


def run_block(block, inputs, how):
    """Outputs, gradients of inputs and parameters, and buffers afterwards."""
    block = copy.deepcopy(block)
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = how(block, *inputs)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(2)
    loss = sum((each * torch.randn(each.shape, generator=generator).to(each.dtype)).sum() for each in out)
    loss.backward()
    grads = [leaf.grad for leaf in (*inputs, *block.parameters())]
    return [each.detach() for each in out], [grad for grad in grads if grad is not None], dict(block.named_buffers())


def assert_same(got, expected, how):
    """To the bit, but for outputs of a forward that knows of no gradients: it has kernels of its own."""
    outputs, gradients, expected_outputs, expected_gradients = *got[:2], *expected[:2]
    assert len(gradients) == len(expected_gradients)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients))
    for out, reference in zip(outputs, expected_outputs):
        assert relative_error(out, reference) < 1e-6 if how == 'reentrant' else torch.equal(out, reference)


HOW = {
    'plain': lambda block, *inputs: block(*inputs),
    'checkpoint_block': checkpoint_block,
    'reentrant': lambda block, *inputs: checkpoint(block, *inputs, use_reentrant=True),
    'not reentrant': lambda block, *inputs: checkpoint(block, *inputs, use_reentrant=False),
    'both': lambda block, *inputs: checkpoint(checkpoint_block, block, *inputs, use_reentrant=False),
}


@blocks
@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('training', [True, False])
def test_blocks_have_the_same_gradients(kind, how, training, monkeypatch):
    """With and without, and in blocks that are themselves computed again."""
    block, inputs = make_block(kind)
    randomise(block).train(training)
    if how in ('reentrant', 'not reentrant') and training:
        pytest.skip("PyTorch's checkpoint updates statistics twice, with blocks of all kinds")
    got = run_block(block, inputs, HOW[how])
    without_recomputing(monkeypatch)
    expected = run_block(block, inputs, HOW['plain'])
    assert_same(got, expected, how)
    buffers, expected_buffers = got[2], expected[2]
    assert all(torch.equal(buffers[name], expected_buffers[name]) for name in buffers)
    assert all(buffer == int(training) for name, buffer in buffers.items() if name.endswith('num_batches_tracked'))


@blocks
def test_blocks_in_a_users_checkpoint(kind, monkeypatch):
    """In training: its second run updates the statistics once more, and the gradients are the same."""
    block, inputs = make_block(kind)
    randomise(block)
    for how in ('reentrant', 'not reentrant'):
        with monkeypatch.context() as patch:
            got = run_block(block, inputs, HOW[how])
            without_recomputing(patch)
            expected = run_block(block, inputs, HOW['plain'])
        assert_same(got, expected, how)


def kept_by(block, inputs, how):
    inputs = [x.clone().requires_grad_() for x in inputs]
    with KeptBytes() as storages:
        out = how(block, *inputs)
        return left(storages, *inputs, *block.state_dict().values()), out


@blocks
def test_blocks_keep_fewer_bytes(kind, monkeypatch):
    block, inputs = make_block(kind)
    with_it = kept_by(block, inputs, HOW['plain'])[0]
    checkpointed = kept_by(block, inputs, HOW['checkpoint_block'])[0]
    without_recomputing(monkeypatch)
    assert checkpointed < with_it < 0.8 * kept_by(block, inputs, HOW['plain'])[0]


@blocks
@pytest.mark.parametrize('how', ['reentrant', 'not reentrant', 'both'])
def test_a_users_checkpoint_keeps_what_it_would(kind, how):
    """Nothing but inputs and outputs: what the block would keep by itself does not escape it."""
    block, inputs = make_block(kind)
    of_ours, _ = kept_by(block, inputs, HOW['checkpoint_block'])
    assert kept_by(block, inputs, HOW[how])[0] <= 1.1 * of_ours


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    'settings', [dict(), dict(drop_path_rate=0.3), dict(norm_eval=True), dict(with_cp=['blocks1'])], ids=str
)
def test_the_backbone_has_the_same_gradients(small_arch, dtype, settings, monkeypatch):
    x = torch.randn(2, 3, 64, 64, dtype=dtype)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        backbone = randomise(OverLoCK(small_arch, out_type='pyramid_with_overview', **settings)).to(dtype)
        outputs = backbone(x)
        sum(out.square().sum() for out in outputs).backward()
        results.append((outputs, {n: p.grad for n, p in backbone.named_parameters()}, dict(backbone.named_buffers())))
        without_recomputing(monkeypatch)
    (outputs, gradients, buffers), (plain_outputs, plain_gradients, plain_buffers) = results
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain_outputs))
    assert [name for name in gradients if not torch.equal(gradients[name], plain_gradients[name])] == []
    assert [name for name in buffers if not torch.equal(buffers[name], plain_buffers[name])] == []


@autocast_dtypes
def test_the_backbone_under_autocast(small_arch, dtype, monkeypatch):
    """The backward runs outside of it, as OpenMMLab's does."""
    x = torch.randn(2, 3, 64, 64)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        backbone = randomise(OverLoCK(small_arch))
        with torch.autocast('cpu', dtype=dtype):
            out = backbone(x)[0]
        out.float().square().mean().backward()
        results.append({name: p.grad for name, p in backbone.named_parameters()})
        without_recomputing(monkeypatch)
    got, expected = results
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def test_the_backbone_frees_everything(small_arch):
    backbone = OverLoCK(small_arch)
    x = torch.randn(2, 3, 64, 64)
    backbone(x)  # whatever is made once
    for backward in (False, True):
        with KeptBytes() as storages:
            out = backbone(x)[0].sum()
            if backward:
                torch.autograd.grad(out, list(backbone.patch_embed1.parameters()))
            del out
            gc.collect()
            assert left(storages, x, *backbone.state_dict().values()) == 0


# Folding.


def deployed(small_arch, **settings):
    """A model as it was trained, and the same as deployed."""
    plain = randomise(OverLoCK(small_arch, out_type='pyramid_with_overview', **settings)).eval()
    folded = copy.deepcopy(plain)
    folded.switch_to_deploy()
    return plain, folded


def assert_same_outputs(got, expected, tolerance=1e-5):
    for out, reference in zip(got, expected):
        assert relative_error(out, reference) < tolerance


def unfolded_outputs(model, x):
    """Of a deployed model with its norms applied one by one: what gradients lead it to."""
    with torch.enable_grad():
        return [out.detach() for out in model(x)]


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_folded_equals_unfolded(small_arch, memory_format):
    plain, folded = deployed(small_arch)
    for size in ((61, 90), (33, 40), (64, 64)):
        x = torch.randn(2, 3, *size).contiguous(memory_format=memory_format)
        expected = plain.double()(x.double())
        assert_same_outputs(folded(x), expected)
        assert_same_outputs(unfolded_outputs(folded, x), expected)
        with torch.inference_mode():
            assert_same_outputs(folded(x), expected)


@torch.no_grad()
def test_folded_in_double_is_exact(small_arch):
    plain, folded = deployed(small_arch)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert_same_outputs(folded.double()(x), plain.double()(x), 1e-6)  # the branches were folded in float32
    assert_same_outputs(folded(x), unfolded_outputs(folded, x), 1e-12)


@autocast_dtypes
@torch.no_grad()
def test_folded_under_autocast(small_arch, dtype):
    plain, folded = deployed(small_arch)
    x = torch.randn(1, 3, 64, 64)
    expected = plain(x)
    folded(x)
    with torch.autocast('cpu', dtype=dtype):
        outputs = folded(x)
        plain_outputs = plain(x)
    for out, rounded, reference in zip(outputs, plain_outputs, expected):
        assert out.dtype == rounded.dtype
        assert relative_error(out, reference) < 2 * relative_error(rounded, reference) < 1
    assert_same_outputs(folded(x), expected)


def changed_state(model):
    return {
        name: value * 0.9 + 0.05 if value.is_floating_point() else value.clone()
        for name, value in model.state_dict().items()
    }


@torch.no_grad()
def load(model, x):
    model.load_state_dict(changed_state(model))


@torch.no_grad()
def load_and_assign(model, x):
    model.load_state_dict(changed_state(model), assign=True)


@torch.no_grad()
def change_parameters(model, x):
    for parameter in model.parameters():
        parameter.mul_(1.1)


@torch.no_grad()
def change_buffers(model, x):
    for name, buffer in model.named_buffers():
        if 'running' in name:
            buffer.mul_(1.5)


def step_of_an_optimiser(model, x):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    with torch.enable_grad():
        model(x)[0].square().mean().backward()
    optimiser.step()


@torch.no_grad()
def train_a_little(model, x):
    model.train()
    model(x * 3 + 1)
    model.eval()


@torch.no_grad()
def swap_averages(model, x):
    """As mmengine's EMAHook around a validation: through .data, which counts no version."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 1.1)
    model.eval()


@torch.no_grad()
def replace_parameters(model, x):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            for _ in range(3):
                module.weight = nn.Parameter(module.weight * 1.05)


CHANGES = [
    load, load_and_assign, change_parameters, change_buffers, step_of_an_optimiser, train_a_little, swap_averages,
    replace_parameters,
]  # fmt: skip


@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_folded_weights_follow(small_arch, change):
    _, model = deployed(small_arch)
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    for _ in range(2):
        change(model, x)
        after = model(x)
        assert_same_outputs(after, unfolded_outputs(model, x))
        assert relative_error(after[0], before[0]) > 1e-4
        before = after


def test_folded_weights_follow_in_inference_mode(small_arch):
    """Where tensors count no versions."""
    with torch.inference_mode():
        _, model = deployed(small_arch)
        x = torch.randn(2, 3, 64, 64)
        model(x)
        model.load_state_dict(changed_state(model))
        fresh = OverLoCK(small_arch, out_type='pyramid_with_overview', deploy=True).eval()
        fresh.load_state_dict(model.state_dict())
        assert_same_outputs(model(x), fresh(x))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_folded_weights_follow_dtypes(small_arch, dtype):
    """To another dtype and back: half types leave rounded parameters."""
    _, model = deployed(small_arch)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    model.to(dtype)
    assert all(out.dtype == dtype for out in model(x.to(dtype)))
    model.float()
    assert_same_outputs(model(x), unfolded_outputs(model, x))
    assert_same_outputs(model(x), expected, {torch.float64: 1e-6, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype])


@pytest.mark.parametrize('kind', ['stem', 'basic', 'dynamic'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_parts_follow_dtypes(kind, dtype):
    """Parts of a network on their own: the memory of a parameter may come back to its successor."""
    if kind == 'stem':
        layers = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.GELU()
        module, inputs = ConvSequential(*layers), (torch.randn(2, 8, 20, 20),)
    else:
        module, inputs = make_block(kind)
    randomise(module).eval()
    for child in module.modules():
        if hasattr(child, 'switch_to_deploy'):
            child.switch_to_deploy()

    def output():
        out = module(*inputs)
        return out[0] if isinstance(out, tuple) else out

    for _ in range(5):
        output()
        for parameter in module.parameters():
            parameter.add_(torch.rand_like(parameter) * 1e-2)
        output()
        module.to(dtype)
        module.float()
        with torch.enable_grad():
            expected = output().detach()
        assert relative_error(output(), expected) < 1e-5


@torch.no_grad()
def test_copies_have_their_own_folded_weights(small_arch):
    _, model = deployed(small_arch)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    for other in (copied, pickled, saved):
        assert_same_outputs(other(x), expected, 1e-6)
        change_parameters(other, x)
        assert_same_outputs(other(x), unfolded_outputs(other, x))
        assert_same_outputs(model(x), expected, 1e-12)
    change_parameters(model, x)
    assert_same_outputs(model(x), copied(x), 1e-6)


@torch.no_grad()
def test_files_do_not_hold_folded_weights(small_arch):
    _, model = deployed(small_arch)
    before, names = len(pickle.dumps(model)), list(model.state_dict())
    model(torch.randn(2, 3, 64, 64))
    assert list(model.state_dict()) == names
    assert len(pickle.dumps(model)) < 1.01 * before


@pytest.mark.parametrize('switched', [True, False])
def test_names_are_those_of_the_released_files(small_arch, switched):
    """Of the re-parameterised ones: branches are gone for a bias, and every other batch norm is there."""
    names = set(OverLoCK(small_arch).state_dict())
    model = OverLoCK(small_arch, deploy=not switched)
    if switched:
        model.switch_to_deploy()
    model.eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    branches = {name for name in names if '.origin_bn.' in name or '.dil_conv_' in name or '.dil_bn_' in name}
    biases = {name.replace('lk_origin.weight', 'lk_origin.bias') for name in names if name.endswith('lk_origin.weight')}
    assert set(model.state_dict()) == (names - branches) | biases
    for expected in (
        'blocks1.0.proj.1.lk_origin.bias', 'blocks1.0.proj.2.running_mean', 'patch_embed1.1.weight',
        'sub_blocks3.0.lepe.0.lk_origin.weight', 'sub_blocks3.0.lepe.1.running_var', 'sub_blocks3.0.proj.0.weight',
        'sub_blocks3.0.fusion.1.num_batches_tracked', 'sub_blocks3.0.dyconv_proj.1.bias',
    ):  # fmt: skip
        assert expected in model.state_dict()


@pytest.mark.parametrize('gradients', [True, False])
def test_a_deployed_model_in_training_normalises_by_the_batch(small_arch, gradients):
    _, model = deployed(small_arch)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
    other = copy.deepcopy(model)
    change_buffers(other, x)
    model.train()
    other.train()
    with torch.set_grad_enabled(gradients):
        outputs, others = model(x), other(x)
    assert all(torch.equal(a, b) for a, b in zip(outputs, others))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.num_batches_tracked == 1 for norm in norms)
    with torch.no_grad():
        model.eval()
        assert_same_outputs(model(x), unfolded_outputs(model, x))


def test_a_deployed_model_has_gradients(small_arch):
    """Also in evaluation mode, after it has run folded."""
    _, model = deployed(small_arch)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
    sum(out.square().mean() for out in model(x)).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    norms = [name for name in trained if '.fusion.1.' in name or '.proj.2.' in name]
    assert norms
    assert all(trained[name] is not None for name in norms)


@torch.no_grad()
def test_switching_twice_changes_nothing(small_arch):
    _, model = deployed(small_arch)
    x: Tensor = torch.randn(1, 3, 64, 64)
    expected = model(x)
    model.switch_to_deploy()
    assert all(torch.equal(a, b) for a, b in zip(model(x), expected))
