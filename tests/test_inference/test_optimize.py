"""Optimized copies for inference: the same function, of a snapshot of the weights, whatever the user has changed."""

from __future__ import annotations

import collections
import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn
from conftest import autocast_dtypes, relative_error
from torch import Tensor
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from overlock_mm.inference import optimize
from overlock_mm.inference.blocks import FoldedBasicBlock, FoldedDynamicBlock
from overlock_mm.inference.convolution import FoldedConv2d
from overlock_mm.inference.onednn import HAS_FAST_BFLOAT16, _has_bfloat16
from overlock_mm.models import OverLoCK
from overlock_mm.models.blocks import BasicBlock, DynamicBlock
from overlock_mm.training.norms import convert_sync_norms

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason='this torch has no oneDNN, and nothing is packed'
)


@pytest.fixture
def trained(small_arch):
    """A backbone every weight of which counts, with statistics as after training."""
    backbone = OverLoCK(small_arch, out_type='pyramid_with_overview', memory='lean', with_cp=['blocks1'])
    with torch.no_grad():
        for name, tensor in backbone.state_dict().items():
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor += 0.1 * torch.randn_like(tensor)
    return backbone.eval()


def assert_same_outputs(got, expected, tolerance=1e-5):
    assert len(got) == len(expected)
    for out, reference in zip(got, expected):
        assert relative_error(out, reference) < tolerance


def parts(backbone: nn.Module) -> list[nn.Module]:
    stages = (backbone.blocks1, backbone.blocks2, backbone.blocks3, backbone.blocks4)
    return [block for stage in (*stages, backbone.sub_blocks3, backbone.sub_blocks4) for block in stage]


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('deploy', [False, True])
@torch.no_grad()
def test_the_same_function(trained, deploy, memory_format):
    if deploy:
        trained.switch_to_deploy()
    optimized = optimize(trained)
    assert {type(part) for part in parts(optimized)} == {FoldedBasicBlock, FoldedDynamicBlock}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in optimized.modules())
    exact = copy.deepcopy(trained).double()
    for size in ((61, 90), (33, 40), (64, 64), (1, 1)):
        x = torch.randn(2, 3, *size).contiguous(memory_format=memory_format)
        expected = exact(x.double())
        assert_same_outputs(optimized(x), expected)
        for out in optimized(x):
            assert out.is_contiguous(memory_format=memory_format)
        with torch.inference_mode():
            assert_same_outputs(optimized(x), expected)


@torch.no_grad()
def test_in_double_it_is_exact(trained):
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    trained.double()
    assert_same_outputs(optimize(trained)(x), trained(x), 1e-12)


@torch.no_grad()
def test_features(small_arch):
    backbone = OverLoCK(small_arch, out_indices=(4, 3)).eval()
    x = torch.randn(1, 3, 64, 64)
    assert_same_outputs(optimize(backbone)(x), backbone(x))


@autocast_dtypes
@torch.no_grad()
def test_autocast(trained, dtype):
    optimized, x = optimize(trained), torch.randn(1, 3, 64, 64)
    expected = trained(x)
    optimized(x)
    with torch.autocast('cpu', dtype=dtype):
        outputs, rounded = optimized(x), trained(x)
    for out, plain, reference in zip(outputs, rounded, expected):
        assert out.dtype == plain.dtype
        assert relative_error(out, reference) < 2 * relative_error(plain, reference) < 1
    assert_same_outputs(optimized(x), expected)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_other_dtypes_and_back(trained, dtype):
    optimized, x = optimize(trained), torch.randn(2, 3, 64, 64)
    expected = optimized(x)
    optimized.to(dtype)
    assert all(out.dtype == dtype for out in optimized(x.to(dtype)))
    optimized.float()
    assert_same_outputs(optimized(x), expected, {torch.float64: 1e-12, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype])


@torch.no_grad()
def test_it_is_a_snapshot(trained):
    x = torch.randn(1, 3, 64, 64)
    before = copy.deepcopy(trained.state_dict())
    optimized = optimize(trained)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    expected = optimized(x)
    for tensor in trained.state_dict().values():
        tensor.data.mul_(2)
    trained.train()
    assert all(torch.equal(a, b) for a, b in zip(optimized(x), expected))
    assert_same_outputs(optimize(trained.eval())(x), trained(x))


@torch.no_grad()
def test_inputs_and_outputs_are_not_overwritten(trained):
    optimized, x = optimize(trained), torch.randn(1, 3, 64, 64)
    x = x.contiguous(memory_format=torch.channels_last)
    copied = x.clone()
    first = optimized(x)
    held = [out.clone() for out in first]
    optimized(torch.randn_like(x))
    assert torch.equal(x, copied)
    assert all(torch.equal(a, b) for a, b in zip(first, held))
    block = optimized.sub_blocks3[1]
    inputs = tuple(torch.randn(1, channels, 12, 12) for channels in (24, 10, 10))
    copies = [each.clone() for each in inputs]
    block(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies))


@pytest.mark.parametrize(
    'name', ['blocks1.0', 'blocks2.0.proj', 'blocks2.0.proj.1.dil_conv_k3_1', 'sub_blocks3.0.lepe', 'sub_blocks4.1.mlp.1']
)
@torch.no_grad()
def test_hooks_go_on(trained, name):
    """A block with a hook is left as it is, and what the hook makes goes on."""
    trained.get_submodule(name).register_forward_hook(lambda module, inputs, out: torch.sin(2 * out))
    optimized = optimize(trained)
    x = torch.randn(1, 3, 64, 64)
    assert_same_outputs(optimized(x), trained(x))
    left = [type(part) for part in parts(optimized) if not type(part).__name__.startswith('Folded')]
    assert left == [BasicBlock if name.startswith('blocks') else DynamicBlock]


def pruned(block):
    prune.l1_unstructured(block.proj[4], 'weight', amount=0.5)


def parametrize(block):
    torch.nn.utils.parametrizations.weight_norm(block.proj[4])


def replace_activation(block):
    block.proj[5] = nn.ReLU()


def approximate(block):
    block.proj[5] = nn.GELU(approximate='tanh')


def reflect(block):
    block.proj[8].padding_mode = 'reflect'
    block.proj[4] = nn.Conv2d(8, 32, 3, padding=1, padding_mode='reflect')


def remove_norm(block):
    block.proj[2] = nn.Identity()


def other_forward(block):
    block.proj[2].forward = lambda x: 2 * x


@pytest.mark.parametrize(
    'change',
    [pruned, parametrize, replace_activation, approximate, reflect, remove_norm, other_forward],
    ids=lambda change: change.__name__,
)
@torch.no_grad()
def test_changed_blocks_are_left_as_they_are(trained, change):
    change(trained.blocks1[0])
    optimized = optimize(trained)
    assert type(optimized.blocks1[0]) is BasicBlock
    assert type(optimized.blocks2[0]) is FoldedBasicBlock
    x = torch.randn(1, 3, 64, 64)
    assert_same_outputs(optimized(x), trained(x))


@torch.no_grad()
@pytest.mark.parametrize('convert', [lambda model: model, convert_sync_norms], ids=['torch', 'ours'])
def test_changed_eps_and_synchronised_norms_are_folded(trained, convert):
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.5
    x = torch.randn(1, 3, 64, 64)
    expected = trained(x)
    optimized = optimize(convert(nn.SyncBatchNorm.convert_sync_batchnorm(trained)))
    assert {type(part) for part in parts(optimized)} == {FoldedBasicBlock, FoldedDynamicBlock}
    assert_same_outputs(optimized(x), expected)


def test_gradients_are_refused(trained):
    optimized, x = optimize(trained), torch.randn(1, 3, 64, 64)
    assert not any(parameter.requires_grad for parameter in optimized.parameters())
    assert not any(out.requires_grad for out in optimized(x))  # gradients are enabled, and nobody asks for one
    with pytest.raises(RuntimeError, match='an optimized model has no gradients'):
        optimized(x.requires_grad_())
    optimized.train()
    with torch.no_grad():
        assert_same_outputs(optimized(x), trained(x))


@torch.no_grad()
def test_optimizing_twice(trained, caplog):
    x = torch.randn(1, 3, 64, 64)
    once = optimize(trained)
    assert all(torch.equal(a, b) for a, b in zip(optimize(once)(x), once(x)))
    assert 'Not as they were built' not in caplog.text


def test_weights_that_hooks_compute(trained):
    """They are results of autograd after a training step, which deepcopy refuses."""
    prune.l1_unstructured(trained.blocks2[0].proj[4], 'weight', amount=0.5)
    torch.nn.utils.weight_norm(trained.sub_blocks3[0].mlp[0])
    x = torch.randn(2, 3, 64, 64)
    trained.train()(x)[0].sum().backward()
    optimized = optimize(trained.eval())
    with torch.no_grad():
        assert_same_outputs(optimized(x), trained(x))
        before = optimized(x)
        trained.blocks2[0].proj[4].weight_orig.mul_(2)
        assert all(torch.equal(a, b) for a, b in zip(optimized(x), before))


@torch.no_grad()
def test_removed_blocks(trained):
    trained.sub_blocks3 = trained.sub_blocks3[:1]
    trained.sub_blocks4 = trained.sub_blocks4[1:]
    x = torch.randn(1, 3, 64, 64)
    optimized = optimize(trained)
    assert {type(part) for part in parts(optimized)} == {FoldedBasicBlock, FoldedDynamicBlock}
    assert_same_outputs(optimized(x), trained(x))


@torch.no_grad()
def test_norms_of_mmengine(trained):
    from mmengine.model import revert_sync_batchnorm

    x = torch.randn(1, 3, 64, 64)
    expected = trained(x)
    reverted = revert_sync_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(trained)).eval()
    optimized = optimize(reverted)
    assert {type(part) for part in parts(optimized)} == {FoldedBasicBlock, FoldedDynamicBlock}
    assert_same_outputs(optimized(x), expected)


@torch.no_grad()
def test_copies_and_files(trained):
    optimized, x = optimize(trained), torch.randn(2, 3, 64, 64)
    expected = optimized(x)
    file = io.BytesIO()
    torch.save(optimized, file)
    file.seek(0)
    others = copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized)), torch.load(file, weights_only=False)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other(x), expected))
    fresh = optimize(OverLoCK(trained.arch, out_type=trained.out_type))
    assert relative_error(fresh(x)[0], expected[0]) > 1e-3
    fresh.load_state_dict(optimized.state_dict())
    assert_same_outputs(fresh(x), expected)


class Counter(TorchDispatchMode):
    """Counts operators by their namespaces."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.namespace] += 1
        return function(*args, **(kwargs or {}))


@needs_onednn
@pytest.mark.parametrize('kind, number, depthwise', [('basic', 2, 1), ('dynamic', 9, 2)])
@torch.no_grad()
def test_convolutions_are_packed_once(kind, number, depthwise, monkeypatch):
    """Depth-wise 3x3 ones only in bfloat16, and on a large map."""
    from overlock_mm.inference import convolution

    if kind == 'basic':
        block, inputs = FoldedBasicBlock(BasicBlock(16, 7, 4, 0.0, True).eval()), (torch.randn(2, 16, 65, 65),)
    else:
        block = FoldedDynamicBlock(DynamicBlock(16, 8, 2, 7, 3, 0.0, mix_context=True).eval())
        inputs = tuple(torch.randn(2, channels, 65, 65) for channels in (16, 8, 8))
    made = []

    class Counted(convolution.PackedConv2d):
        def __init__(self, *args):
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr(convolution, 'PackedConv2d', Counted)
    for _ in range(2):
        with Counter() as packed:
            block(*inputs)
        with torch.autocast('cpu', torch.bfloat16), Counter() as packed_bfloat16:
            block(*inputs)
    in_bfloat16 = number + depthwise * HAS_FAST_BFLOAT16 if _has_bfloat16() else 0
    assert packed.counts['mkldnn'] == number
    assert packed_bfloat16.counts['mkldnn'] == in_bfloat16
    first = len(made)
    block(*inputs)
    assert len(made) == first > 0


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_inputs_of_another_dtype_are_refused(dtype):
    block = FoldedBasicBlock(BasicBlock(16, 7, 4, 0.0, False).eval())
    x = torch.randn(1, 16, 20, 20)
    with pytest.raises((RuntimeError, TypeError), match='type'):
        block.bfloat16()(x) if dtype == torch.float32 else block(x.double())


@torch.no_grad()
def test_compiles_into_one_graph(trained):
    torch._dynamo.reset()
    optimized = optimize(trained)
    compiled = torch.compile(optimized, fullgraph=True, backend='aot_eager')
    for size in ((64, 64), (96, 64)):
        x = torch.randn(1, 3, *size)
        assert_same_outputs(compiled(x), optimized(x))


@pytest.mark.skipif(
    tuple(int(number) for number in torch.__version__.split('.')[:2]) < (2, 7),
    reason='torch < 2.7 does not say that it exports',
)
@torch.no_grad()
def test_exports_with_free_sizes(trained):
    optimized = optimize(trained)
    batch, height, width = (
        torch.export.Dim(name, min=2 if name == 'batch' else 5, max=16) for name in ('batch', 'height', 'width')
    )
    sizes = {0: batch, 2: 32 * height, 3: 32 * width}
    exported = torch.export.export(optimized, (torch.randn(2, 3, 192, 256),), dynamic_shapes=(sizes,))
    assert not any('overlock_mm' in str(node.target) for node in exported.graph.nodes)
    for size in ((2, 3, 192, 256), (3, 3, 160, 320)):
        x = torch.randn(size)
        assert_same_outputs(exported.module()(x), trained(x))


def test_bad_models():
    with pytest.raises(TypeError, match='model must be a torch.nn.Module, got str'):
        optimize('overlock-t')
    with pytest.raises(ValueError, match='model must be or contain an OverLoCK, got Linear without one'):
        optimize(nn.Linear(2, 2))


@torch.no_grad()
def test_whole_models(small_arch):
    """The rest of a model is copied as it is, and runs."""
    model = nn.ModuleDict(dict(backbone=OverLoCK(small_arch), head=nn.Conv2d(50, 4, 1))).eval()
    optimized = optimize(model)
    x: Tensor = torch.randn(1, 3, 64, 64)
    assert optimized['head'].weight is not model['head'].weight
    assert_same_outputs([optimized['head'](optimized['backbone'](x)[0])], [model['head'](model['backbone'](x)[0])])
    assert isinstance(optimized['backbone'].high_level_proj, FoldedConv2d)
