"""Memory policies: what the backward makes again instead of keeping it."""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import KeptBytes, autocast_dtypes, relative_error
from test_reparam import randomise_statistics
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from overlock_mm.models import OverLoCK
from overlock_mm.models.blocks import BasicBlock, DynamicBlock
from overlock_mm.models.economy import lean, run_block
from overlock_mm.models.layers import (
    DepthwiseConv,
    GlobalResponseNorm,
    LayerNorm2d,
    LayerScale,
    ResidualDepthwiseConv,
    SqueezeExcitation,
)
from overlock_mm.ops import _library, depthwise_conv2d, gelu_residual_depthwise_norm, use_references


class Calls(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter = collections.Counter()
        self.dtypes: dict[str, list[torch.dtype]] = collections.defaultdict(list)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.counts[name] += 1
        if isinstance(out, Tensor):
            self.dtypes[name].append(out.dtype)
        return out


def leaves(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def chain_loss(x, w, v):
    """Values of values, of parameters, of two values, used more than once, and never used."""
    y = F.gelu(x)
    z = F.silu(y)
    z = torch.tanh(z * w)  # tanh keeps its output, and is not cheap
    u = z * y
    F.silu(u)  # never used
    s = u[:, 1:]  # a view
    t = torch.cat([s, s.permute(1, 0).contiguous().permute(1, 0)], dim=0)
    total = (t * t * w[1:]).sum() + (u @ v).square().sum() + (s @ v[1:]).sum()
    first, second = u.split([2, 3], dim=1)
    summed = F.gelu(u) + z * w
    return total + (first * second[:, 1:]).sum() + (summed * summed).sum() + (F.gelu(u) * u).sum()


def chain_leaves():
    return leaves((7, 5), (5,), (5, 3))


def test_gradients_are_the_same():
    x, w, v = chain_leaves()
    expected = torch.autograd.grad(chain_loss(x, w, v), (x, w, v))
    with lean():
        loss = chain_loss(x, w, v)
    for got, plain in zip(torch.autograd.grad(loss, (x, w, v)), expected):
        assert torch.equal(got, plain)


def test_a_value_is_made_once_for_all_its_users():
    x, w = leaves((7, 5), (5,))

    def loss():
        y = F.gelu(x)
        z = F.silu(y)
        return (y * w).sum() + (y * y).sum() + (z * w).sum() + (z * z * z).sum()

    expected = torch.autograd.grad(loss(), (x, w))
    with Calls() as forward, lean():
        out = loss()
    assert (forward.counts['gelu'], forward.counts['silu']) == (1, 1)
    for _ in range(2):
        with Calls() as backward:
            got = torch.autograd.grad(out, (x, w), retain_graph=True)
        assert (backward.counts['gelu'], backward.counts['silu']) == (1, 1)
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_a_value_without_users_is_not_made_again():
    (x,) = leaves((7, 5))
    with lean():
        loss = (F.gelu(x) + 1).sum()
    with Calls() as backward:
        loss.backward()
    assert backward.counts['gelu'] == 0
    assert backward.counts['gelu_backward'] == 1


def test_backwards_of_parts_of_the_graph():
    """One that asks for some gradients only, between others that ask for all."""
    x, w, v = chain_leaves()
    expected = torch.autograd.grad(chain_loss(x, w, v), (x, w, v))
    with lean():
        loss = chain_loss(x, w, v)
    for asked in ((2,), (1,), (0, 1, 2), (1, 2), (0, 1, 2)):
        got = torch.autograd.grad(loss, [(x, w, v)[i] for i in asked], retain_graph=True)
        assert all(torch.equal(a, expected[i]) for a, i in zip(got, asked))


def test_saved_tensors_that_are_looked_at():
    (x,) = leaves((7, 5))
    with lean():
        out = F.gelu(x).square()
    assert torch.equal(out.grad_fn._saved_self, F.gelu(x))
    assert torch.equal(out.grad_fn._saved_self, F.gelu(x))
    expected = torch.autograd.grad(F.gelu(x).square().sum(), x)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected[0])


def test_second_derivatives():
    x, w, v = (leaf.detach().double().requires_grad_() for leaf in chain_leaves())

    def second(loss):
        first = torch.autograd.grad(loss, (x, w, v), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), (x, w, v))

    expected = second(chain_loss(x, w, v))
    with lean():
        loss = chain_loss(x, w, v)
    assert all(relative_error(got, plain) < 1e-12 for got, plain in zip(second(loss), expected))


def test_fewer_bytes_are_kept():
    x, matrix = leaves((1000, 100), (100, 100))
    counts = []
    for context in (contextlib.nullcontext(), lean()):
        with KeptBytes() as storages:
            with context:
                y = x
                for function in (F.gelu, F.silu, F.gelu):
                    y = F.linear(F.silu(function(y)), matrix)
            counts.append(storages.count(x, matrix))
        del y
    assert counts[1] == counts[0] / 3  # of three maps a step, the products


def test_a_graph_that_is_dropped_frees_everything():
    x, w = leaves((100, 100), (100,))
    with KeptBytes() as storages:
        with lean():
            y = F.gelu(x * 1)
            out = (F.silu(y) * w).sum() + (y * w).sum()
        made = weakref.ref(y)
        del y
        gc.disable()  # everything must go without a search for cycles
        try:
            assert made() is None
            del out
            assert storages.count(x, w) == 0
        finally:
            gc.enable()


def test_a_backward_frees_everything():
    x, w = leaves((100, 100), (100,))
    with KeptBytes() as storages:
        with lean():
            y = F.gelu(x * 1)
            out = (F.silu(y) * w).sum() + (y * w).sum()
            del y
        torch.autograd.grad(out, (x, w))
        assert storages.count(x, w) <= out.nbytes


def test_an_error_leaves_nothing_behind():
    (x,) = leaves((7, 5))
    with KeptBytes() as storages:
        with pytest.raises(ZeroDivisionError), lean():
            F.gelu(x)
            raise ZeroDivisionError
        gc.collect()
        assert storages.count(x) == 0
    (x.exp() * 2).sum().backward()
    assert torch.equal(x.grad, x.detach().exp() * 2)


def test_addresses_are_used_again_by_other_tensors():
    """A tensor that dies in the context leaves its address to the next one of the same shape."""
    x, w = leaves((64, 64), (64,))

    def loss():
        total = x.sum()
        for i in range(30):
            y = F.gelu(x * (i + 1))
            first = (y * w).tanh()
            del y
            second = F.silu(first * w)
            total = total + (second * first).sum()
            del first, second
            for _ in range(3):
                third = x * w + i
                total = total + (third * third * w).mean()
                del third
        return total

    expected = torch.autograd.grad(loss(), (x, w))
    with lean():
        out = loss()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, (x, w)), expected))


def test_contexts_within_contexts():
    x, w, v = chain_leaves()
    expected = torch.autograd.grad(chain_loss(F.gelu(x), w, v) + (F.gelu(x) * x).sum(), (x, w, v))
    with lean():
        y = F.gelu(x)
        with lean():
            loss = chain_loss(y, w, v)
        loss = loss + (y * x).sum()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(torch.autograd.grad(loss, (x, w, v)), expected))


def test_values_that_were_changed_in_place_are_not_taken_for_their_notes():
    """A note is of what was made. What came of it by an operation in place is kept, or refused as PyTorch does."""
    x, w = leaves((7, 5), (5,))

    def loss():
        y = F.gelu(x)
        y = y.mul_(w)  # changes the noted tensor, which still has its address and shape
        return (y * y * y).sum()

    expected = torch.autograd.grad(loss(), (x, w))
    with lean():
        out = loss()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, (x, w)), expected))


def test_the_modes_of_others_see_every_function():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    (x,) = leaves((2, 4, 6, 6))
    weight = torch.randn(4, 1, 3, 3)
    for inside in (True, False):
        seen.clear()
        with lean() if inside else Watch(), Watch() if inside else lean():
            depthwise_conv2d(F.gelu(x), weight)
        assert F.gelu in seen
        assert torch.ops.overlock_mm.depthwise_conv2d.default in seen


@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
def test_nothing_is_noted_without_gradients(context):
    x = torch.randn(7, 5)
    with context(), lean():
        assert torch.equal(F.gelu(x), F.gelu(x))
    with lean():
        assert not F.gelu(x).requires_grad


@autocast_dtypes
@pytest.mark.parametrize('inside', ['forward', 'backward', 'both'])
def test_autocast(dtype, inside):
    """A value is made again in the dtype in which it was made, wherever the backward runs."""
    x, w = leaves((7, 5, 4, 4), (4, 6))
    norm = LayerNorm2d(5)  # float32 under autocast, then cast

    def gradients(context):
        with context, torch.autocast('cpu', dtype=dtype, enabled=inside != 'backward'):
            y = norm(x)
            loss = (y @ w.to(y.dtype)).square().sum().float() + (y * y).sum().float()
        with torch.autocast('cpu', dtype=dtype, enabled=inside != 'forward'), Calls() as backward:
            return torch.autograd.grad(loss, (x, w, norm.weight)), backward

    expected, _ = gradients(contextlib.nullcontext())
    got, backward = gradients(lean())
    assert backward.counts['native_layer_norm'] == 1
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    'make',
    [
        lambda: LayerNorm2d(12),
        lambda: LayerScale(12, 0.7),
        lambda: ResidualDepthwiseConv(12),
        lambda: DepthwiseConv(12, 5),
        lambda: DepthwiseConv(12, 7),
        lambda: DepthwiseConv(12, 3, dilation=2),
        lambda: SqueezeExcitation(12),
        lambda: randomise(GlobalResponseNorm(12)),
        lambda: randomise(MiddleOfMLP(12)),
    ],
    ids=[
        'LayerNorm2d', 'LayerScale', 'Residual', 'Depthwise5', 'Depthwise7', 'dilated', 'SqueezeExcitation',
        'GlobalResponseNorm', 'MiddleOfMLP',
    ],
)  # fmt: skip
def test_layers_give_the_same_bits_again(make, memory_format):
    """The second run has no gradients, which must not lead it another way."""
    module = make()
    x = torch.randn(2, 12, 15, 16).contiguous(memory_format=memory_format).requires_grad_()
    with KeptBytes() as storages, lean():
        y = module(x)
        out = y.square()
    copied = y.detach().clone(memory_format=torch.preserve_format)
    del y
    assert storages.count(x, *module.parameters()) < 1.2 * out.nbytes  # out, and not y
    assert torch.equal(out.grad_fn._saved_self, copied)
    assert out.grad_fn._saved_self.stride() == copied.stride()


class MiddleOfMLP(nn.Module):
    """GELU, residual 3x3 convolution and response norm, as `overlock_mm.training.fuse` makes them one."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = ResidualDepthwiseConv(channels), GlobalResponseNorm(channels)

    def forward(self, x):
        gamma, beta = self.norm.gamma.flatten(), self.norm.beta.flatten()
        return gelu_residual_depthwise_norm(x, self.conv.weight, self.conv.bias, gamma, beta, self.norm.eps)


@pytest.mark.skipif(_library.missing is not None, reason='the references are not in the dispatcher')
@pytest.mark.parametrize(
    'make, name, again',
    [
        (GlobalResponseNorm, 'response_norm', '_response_normed'),
        (MiddleOfMLP, 'gelu_residual_depthwise_norm', '_gelu_residual_depthwise_normed'),
    ],
)
def test_response_norms_are_made_again_from_their_scales(make, name, again):
    """Without their sums."""
    module = randomise(make(12))
    x = torch.randn(2, 12, 15, 16).requires_grad_()
    with lean():
        loss = module(x).square().sum()
    with Calls() as backward:
        loss.backward()
    assert {each: n for each, n in backward.counts.items() if name in each or each == again} == {
        again: 1,
        f'_{name}_backward': 1,
    }


@pytest.mark.parametrize('training', [True, False])
def test_batch_norms_update_their_statistics_once(training):
    norms = [nn.BatchNorm2d(6) for _ in range(2)]
    x = torch.randn(3, 6, 8, 9).requires_grad_()
    for norm in norms:
        norm.train(training)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1, 1, 6))
    expected = torch.autograd.grad(norms[0](x).pow(3).sum(), x)[0]
    with lean():
        loss = norms[1](x).pow(3).sum()
    with Calls() as backward:
        assert torch.equal(torch.autograd.grad(loss, x)[0], expected)
    assert backward.counts['native_batch_norm'] == 1
    assert norms[1].num_batches_tracked == int(training)
    for name, buffer in norms[0].named_buffers():
        assert torch.equal(buffer, getattr(norms[1], name)), name


@pytest.mark.parametrize('kind', ['kept', 'source', 'parameter of a source'])
def test_kept_tensors_may_not_change(kind):
    """PyTorch refuses a backward through what was changed in place since. Wrong gradients would be worse."""
    x, w, v = leaves((7, 5), (5,), (5,))
    base = x * 1
    with lean():
        y = base if kind == 'kept' else base * v
        out = (y * w).sum()
    with torch.no_grad():
        (v if kind == 'parameter of a source' else base).add_(1)
    with pytest.raises(RuntimeError, match='in place|inplace'):
        torch.autograd.grad(out, w)


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


def run_with_gradients(block, inputs, how):
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


def run_as(policy):
    return lambda block, *inputs: run_block(policy, block, *inputs)


HOW = {
    'fast': run_as('fast'),
    'lean': run_as('lean'),
    'checkpoint': run_as('checkpoint'),
    'reentrant': lambda block, *inputs: checkpoint(run_as('lean'), block, *inputs, use_reentrant=True),
    'not reentrant': lambda block, *inputs: checkpoint(run_as('lean'), block, *inputs, use_reentrant=False),
    'both': lambda block, *inputs: checkpoint(run_as('checkpoint'), block, *inputs, use_reentrant=False),
}


@blocks
@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('training', [True, False])
def test_blocks_have_the_same_gradients(kind, how, training):
    """Under every policy, and in blocks that somebody else checkpoints."""
    block, inputs = make_block(kind)
    randomise(block).train(training)
    if how in ('reentrant', 'not reentrant') and training:
        pytest.skip("PyTorch's checkpoint updates statistics twice, with blocks of all kinds")
    got = run_with_gradients(block, inputs, HOW[how])
    expected = run_with_gradients(block, inputs, HOW['fast'])
    assert_same(got, expected, how)
    buffers, expected_buffers = got[2], expected[2]
    assert all(torch.equal(buffers[name], expected_buffers[name]) for name in buffers)
    assert all(buffer == int(training) for name, buffer in buffers.items() if name.endswith('num_batches_tracked'))


@blocks
def test_blocks_in_a_users_checkpoint(kind):
    """In training: its second run updates the statistics once more, and the gradients are the same."""
    block, inputs = make_block(kind)
    randomise(block)
    expected = run_with_gradients(block, inputs, HOW['fast'])
    for how in ('reentrant', 'not reentrant'):
        assert_same(run_with_gradients(block, inputs, HOW[how]), expected, how)


def kept_by(block, inputs, how):
    inputs = [x.clone().requires_grad_() for x in inputs]
    with KeptBytes() as storages:
        out = how(block, *inputs)
        return storages.count(*inputs, *block.state_dict().values()), out


#: Maps of C channels that blocks keep for the backward, with their output: C + Ch channels are 1.25 maps.
KEPT_MAPS = {
    # The input; dilated convolution 1, hidden map 4; the output.
    'basic': 1 + 1 + 4 + 1,
    # x and h, and both beside each other; fusion 1.25 + 1, query 0.5; gate, lepe, ContMix, its projection, their sum 5;
    # shortcut 1.25, hidden map 3; the output.
    'dynamic': 2.5 + 2.25 + 0.5 + 5 + 1.25 + 3 + 1.25,
}


@pytest.mark.skipif(_library.missing is not None, reason='the references of operators keep more')
@blocks
def test_what_blocks_keep(kind):
    """Of each policy. What is no map is small on a map of 60 x 60."""
    if kind == 'basic':
        block, inputs = BasicBlock(64, 7, 4, 0.0, layer_scale=True), (torch.randn(1, 64, 60, 60),)
    else:
        block = DynamicBlock(64, 16, num_groups=2, kernel_size=7, mlp_ratio=3, drop_path=0.0, mix_context=True)
        inputs = [torch.randn(1, channels, 60, 60) for channels in (64, 16, 16)]
    inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    size_of_map = inputs[0].nbytes
    given = sum(x.nbytes for x in inputs[:2]) / size_of_map
    lean_maps = kept_by(block, inputs, HOW['lean'])[0] / size_of_map + given
    fast_maps = kept_by(block, inputs, HOW['fast'])[0] / size_of_map + given
    checkpointed_maps = kept_by(block, inputs, HOW['checkpoint'])[0] / size_of_map + given
    output = 1 if kind == 'basic' else 1.25
    assert lean_maps == pytest.approx(KEPT_MAPS[kind], rel=0.06)
    assert checkpointed_maps == pytest.approx(given + output, rel=0.06)
    assert fast_maps > 2 * lean_maps


@blocks
@pytest.mark.parametrize('how', ['reentrant', 'not reentrant', 'both'])
def test_a_users_checkpoint_keeps_what_it_would(kind, how):
    """Nothing but inputs and outputs: what the block would keep by itself does not escape it."""
    block, inputs = make_block(kind)
    of_ours, _ = kept_by(block, inputs, HOW['checkpoint'])
    assert kept_by(block, inputs, HOW[how])[0] <= 1.1 * of_ours


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    'settings', [dict(), dict(drop_path_rate=0.3), dict(norm_eval=True), dict(with_cp=['blocks1'])], ids=str
)
def test_the_backbone_has_the_same_gradients(small_arch, dtype, settings):
    """Under both policies."""
    x = torch.randn(2, 3, 64, 64, dtype=dtype)
    results = []
    for memory in ('lean', 'fast'):
        torch.manual_seed(0)
        backbone = randomise(OverLoCK(small_arch, out_type='pyramid_with_overview', memory=memory, **settings)).to(dtype)
        outputs = backbone(x)
        sum(out.square().sum() for out in outputs).backward()
        results.append((outputs, {n: p.grad for n, p in backbone.named_parameters()}, dict(backbone.named_buffers())))
    (outputs, gradients, buffers), (plain_outputs, plain_gradients, plain_buffers) = results
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain_outputs))
    assert [name for name in gradients if not torch.equal(gradients[name], plain_gradients[name])] == []
    assert [name for name in buffers if not torch.equal(buffers[name], plain_buffers[name])] == []


@autocast_dtypes
def test_the_backbone_under_autocast(small_arch, dtype):
    """The backward runs outside of it, as OpenMMLab's does."""
    x = torch.randn(2, 3, 64, 64)
    results = []
    for memory in ('lean', 'fast'):
        torch.manual_seed(0)
        backbone = randomise(OverLoCK(small_arch, memory=memory))
        with torch.autocast('cpu', dtype=dtype):
            out = backbone(x)[0]
        out.float().square().mean().backward()
        results.append({name: p.grad for name, p in backbone.named_parameters()})
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
            assert storages.count(x, *backbone.state_dict().values()) == 0


def test_references_keep_everything(small_arch):
    """Within them, 'lean' is 'fast': the published computation in eager PyTorch."""
    backbone = OverLoCK(small_arch)
    x = torch.randn(2, 3, 64, 64)
    kept = {}
    for memory in ('lean', 'fast'):
        backbone.memory = memory
        with KeptBytes() as storages, use_references():
            out = backbone(x)[0]
            kept[memory] = storages.count(x, *backbone.state_dict().values())
    assert out.requires_grad
    assert kept['lean'] == kept['fast']


def test_unknown_policies():
    with pytest.raises(ValueError, match="policy must be one of .*'lean', 'fast', 'checkpoint'.*, got 'leen'"):
        run_block('leen', nn.Identity(), torch.ones(1))


def test_calls_by_keywords():
    (x,) = leaves((7, 5))
    expected = torch.autograd.grad(F.gelu(x).square().sum(), x)[0]
    with lean():
        y = torch.cat(tensors=[F.gelu(input=x)])
        out = y.square().sum()
    assert torch.equal(torch.autograd.grad(out, x)[0], expected)


def test_complex_and_sparse_tensors():
    """A conjugate has the address of its tensor, and a sparse tensor has none."""
    v, w = (torch.randn(5, dtype=torch.complex128, requires_grad=True) for _ in range(2))

    def loss():
        s = v * w
        return (s.conj() * w * s).abs().sum()

    expected = torch.autograd.grad(loss(), (v, w))
    with lean():
        out = loss()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, (v, w)), expected))
    (x,) = leaves((5, 5))
    with lean():
        out = torch.sparse.mm(torch.eye(5).to_sparse(), F.gelu(x)).sum()
    assert torch.autograd.grad(out, x)[0].shape == (5, 5)


@pytest.mark.parametrize('part', ['', 'proj', 'proj.8'])
@pytest.mark.parametrize('how', ['compile', 'wrap'])
def test_parts_of_blocks_that_are_compiled(part, how):
    """Without breaks: the policy does not watch inside of compiled code."""
    torch._dynamo.reset()
    block, inputs = make_block('basic')
    expected = run_with_gradients(block, inputs, HOW['fast'])
    if how == 'compile':
        block.get_submodule(part).compile(backend='aot_eager', fullgraph=True)
    else:
        compiled = torch.compile(block.get_submodule(part), backend='aot_eager', fullgraph=True)
        if part:
            parent, _, key = part.rpartition('.')
            block.get_submodule(parent).add_module(key, compiled)
        else:
            block = compiled
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = run_block('lean', block, *inputs)
    generator = torch.Generator().manual_seed(2)
    grad = torch.autograd.grad((out * torch.randn(out.shape, generator=generator)).sum(), inputs)[0]
    assert relative_error(out, expected[0][0]) < 1e-6
    assert relative_error(grad, expected[1][0]) < 1e-5
