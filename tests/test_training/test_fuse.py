"""Models whose layers run together in training: the same function, gradients, names and objects."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from conftest import KeptBytes, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode

from overlock_mm.inference import optimize
from overlock_mm.inference.blocks import FoldedBasicBlock
from overlock_mm.models import OverLoCK
from overlock_mm.models.blocks import BasicBlock
from overlock_mm.models.economy import run_block
from overlock_mm.models.layers import GELU, Conv2d, GlobalResponseNorm, ResidualDepthwiseConv, SqueezeExcitation
from overlock_mm.models.norms import BatchNorm2d, updating_together
from overlock_mm.models.reparam import DilatedReparamConv
from overlock_mm.ops import _library, norms, use_references
from overlock_mm.training import fuse, unfuse
from overlock_mm.training.fuse import FusedSequential

FUSED = _library.operator('gelu_residual_depthwise_norm')


class Calls(TorchFunctionMode):
    """Counts the calls of the fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is FUSED
        return function(*args, **(kwargs or {}))


def make_mlp(channels: int = 6, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers = [Conv2d(3, channels, 1), GELU(), ResidualDepthwiseConv(channels), GlobalResponseNorm(channels), nn.Tanh()]
    return randomise(nn.Sequential(*layers)).to(dtype)


def make_backbone(arch, **settings) -> OverLoCK:
    torch.manual_seed(0)
    return randomise(OverLoCK(arch, **settings)).double()


def randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def results(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, and gradients of all parameters that have one."""
    out = model(x)
    out = out if isinstance(out, torch.Tensor) else out[-1]
    out.sin().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return dict(out=out.detach(), **gradients)


def assert_same(got: dict, expected: dict, tolerance: float = 1e-10) -> None:
    assert got.keys() == expected.keys()
    worst = {name: (got[name] - each).norm().item() for name, each in expected.items()}
    scale = max(each.norm().item() for each in expected.values())
    assert max(worst.values()) <= tolerance * scale, max(worst, key=worst.get)


def calls_of(model: nn.Module, x: torch.Tensor) -> int:
    with Calls() as calls, torch.no_grad():
        model(x)
    return calls.count


def test_the_layers_run_as_one_operator():
    model, x = make_mlp(), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    expected = results(model, x)
    assert fuse(model) is model
    assert type(model) is FusedSequential
    with Calls() as calls:
        assert_same(results(model, x), expected)
    assert calls.count == 1


def test_modules_parameters_and_names_stay(small_arch):
    backbone = make_backbone(small_arch)
    modules, parameters, state = list(backbone.modules()), dict(backbone.named_parameters()), backbone.state_dict()
    fuse(backbone)
    assert list(backbone.modules()) == modules
    assert all(parameter is parameters[name] for name, parameter in backbone.named_parameters())
    assert list(backbone.state_dict()) == list(state)
    backbone.load_state_dict(state)


def test_every_mlp_of_a_backbone(small_arch):
    """Of its nine blocks, and nothing else."""
    backbone, x = make_backbone(small_arch), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = results(backbone, x)
    fuse(backbone)
    fused = [name for name, module in backbone.named_modules() if type(module) is FusedSequential]
    blocks = len([name for name, _ in backbone.named_modules() if name.endswith(('dwconv', 'dwconv2'))])
    assert len(fused) == calls_of(backbone, x) == blocks > 5
    assert_same(results(backbone, x), expected)


@pytest.mark.parametrize(
    'name',
    [
        'blocks1.0.proj', 'blocks1.0.proj.0', 'blocks3.0.ls', 'sub_blocks3.0.norm1', 'sub_blocks3.0.ls2',
        'sub_blocks4.0.x_scale', 'sub_blocks3.0.se_layer', 'sub_blocks3.0.se_layer.proj', 'sub_blocks3.0.se_layer.proj.1',
    ],
)  # fmt: skip
def test_a_layer_with_a_hook_is_called(small_arch, name):
    backbone, x = make_backbone(small_arch), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected, calls = results(backbone, x), []
    fuse(backbone).get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    assert_same(results(backbone, x), expected)
    assert calls == [name]


@pytest.mark.parametrize('momentum', [0.1, None])
def test_batches_are_counted_once(small_arch, momentum):
    """Together or not, also where blocks run twice, and running statistics move alike."""
    plain, x = make_backbone(small_arch, with_cp=['sub_blocks3']), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    fused = fuse(copy.deepcopy(plain))
    for _ in range(2):
        results(plain, x)
        results(fused, x)
    for (name, buffer), other in zip(plain.named_buffers(), fused.buffers()):
        torch.testing.assert_close(other, buffer, msg=name)
        if name.endswith('num_batches_tracked'):
            assert buffer == 2


def test_a_norm_that_is_used_twice_counts_twice():
    norm, x = BatchNorm2d(3), torch.randn(2, 3, 4, 5)
    with updating_together():
        norm(norm(x))
        assert norm.num_batches_tracked == 1
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize('momentum', [0.1, None])
def test_branches_that_are_used_twice_move_their_statistics_twice(momentum):
    """In the order of the calls, at the end."""
    plain = randomise(DilatedReparamConv(3, 7)).double().train()
    for _, norm in plain.branches():
        norm.momentum = momentum
    together, inputs = copy.deepcopy(plain), torch.randn(2, 2, 3, 9, 8, dtype=torch.float64)
    before = {name: buffer.clone() for name, buffer in together.named_buffers()}
    with updating_together():
        together(inputs[0])
        if momentum is not None:
            assert all(torch.equal(buffer, before[name]) for name, buffer in together.named_buffers())
        together(inputs[1])
    for x in inputs:
        plain(x)
    for (name, buffer), other in zip(plain.named_buffers(), together.buffers()):
        assert torch.equal(other, buffer), name


def test_a_norm_that_does_not_track_statistics():
    """As torch's: it leaves its buffers alone, though it has some."""
    norm = BatchNorm2d(3)
    norm.track_running_stats = False
    norm(torch.randn(2, 3, 4, 5))
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(3))


def test_a_hook_of_a_norm_sees_its_count():
    norm, counts = BatchNorm2d(3), []
    norm.register_forward_hook(lambda norm, *_: counts.append(norm.num_batches_tracked.item()))
    with updating_together():
        norm(torch.randn(2, 3, 4, 5))
    assert counts == [1]


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize('change', [lambda proj: nn.Identity(), lambda proj: Doubled(*proj), nn.Sequential], ids=range(3))
@pytest.mark.parametrize('first', ['change', 'fuse'])
def test_other_layers_of_a_squeeze_excitation_are_called(change, first):
    layer = randomise(SqueezeExcitation(16)).double()
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64, requires_grad=True)
    if first == 'fuse':
        fuse(layer)
    layer.proj = change(layer.proj)
    assert_same(results(fuse(layer), x), results(unfuse(layer), x))


def test_another_norm_of_a_block_runs_after_the_shortcut():
    """It may overwrite its input."""
    block = randomise(BasicBlock(16, 7, 4, 0.0, layer_scale=True)).double()
    block.proj[0] = nn.ReLU(inplace=True)
    x = torch.randn(2, 16, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        plain = block(x)
        assert relative_error(fuse(block)(x), plain) < 1e-12


@pytest.mark.parametrize('way', ['references', 'without CUDA'])
def test_the_norm_of_a_branch_without_kernels(monkeypatch, way):
    """On a GPU whose kernels are not there, or not wanted, it is the plain norm."""
    monkeypatch.setattr(norms, 'has_cuda_kernels', lambda: way == 'references')
    monkeypatch.setattr(norms, 'norm_and_input', lambda *_: pytest.fail('the kernel was called'))
    with FakeTensorMode(), torch.device('cuda'), use_references():
        x = torch.empty(2, 8, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
        normed, same = norms.layer_norm_of_branch(x, torch.empty(8), torch.empty(8))
        assert normed.shape == x.shape and same is x


def test_gates_of_half_precision_are_computed_in_float32():
    """The weights are float32 under autocast."""
    layer, x = fuse(SqueezeExcitation(32)), torch.randn(2, 32, 9, 10).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(x)
    exact = SqueezeExcitation(32)
    exact.load_state_dict(layer.state_dict())
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact.double()(x.double())) < 4e-3


def test_a_second_call_changes_nothing_and_unfuse_undoes_both(small_arch):
    backbone = make_backbone(small_arch)
    kinds = [type(module) for module in backbone.modules()]
    once = [type(module) for module in fuse(backbone).modules()]
    assert [type(module) for module in fuse(backbone).modules()] == once != kinds
    assert unfuse(backbone) is backbone
    assert [type(module) for module in backbone.modules()] == kinds


@pytest.mark.parametrize('model', [None, 'overlock', OverLoCK, {}], ids=str)
@pytest.mark.parametrize('function', [fuse, unfuse])
def test_only_modules_can_be_fused(function, model):
    with pytest.raises(TypeError, match=f'model must be a torch.nn.Module, got {type(model).__name__}'):
        function(model)


class Derived(ResidualDepthwiseConv):
    def forward(self, x):
        return 2 * super().forward(x)


def replace_a_layer(model: nn.Sequential) -> None:
    model[2] = Derived(6).double()


def register_a_hook(model: nn.Sequential) -> None:
    model[1].register_forward_hook(lambda module, inputs, out: 2 * out)


def change_a_forward(model: nn.Sequential) -> None:
    model[3].forward = lambda x: 2 * x


def parametrize(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[2])


def prune_weights(model: nn.Sequential) -> None:
    prune.random_unstructured(model[2], 'weight', 0.5)


def remove_a_layer(model: nn.Sequential) -> None:
    del model[1]


def wrap(model: nn.Sequential) -> None:
    model[2] = nn.Sequential(model[2])


CHANGES = [replace_a_layer, register_a_hook, change_a_forward, parametrize, prune_weights, remove_a_layer, wrap]


@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize('first', ['change', 'fuse'])
def test_layers_that_are_not_as_built_are_called(change, first):
    """Whether they were changed before or after."""
    model, x = make_mlp(), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    if first == 'fuse':
        fuse(model)
    torch.manual_seed(1)
    change(model)
    fuse(model)
    assert (type(model) is FusedSequential) == (first == 'fuse')
    assert calls_of(model, x) == 0
    assert_same(results(model, x), results(unfuse(model), x))


def test_a_layer_without_bias():
    model, x = make_mlp(), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    model[2].bias = None
    assert calls_of(fuse(model), x) == 0  # it is not as it was built


def test_several_runs_of_layers_in_one_sequence():
    layers = [GELU(), ResidualDepthwiseConv(3), GlobalResponseNorm(3), GELU(), GELU(), ResidualDepthwiseConv(3)]
    model = randomise(nn.Sequential(*layers, GlobalResponseNorm(3), GELU())).double()
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    expected = results(model, x)
    assert calls_of(fuse(model), x) == 2
    assert_same(results(model, x), expected)


def test_hooks_of_the_sequence_itself():
    model, x = make_mlp(), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    model.register_forward_hook(lambda module, inputs, out: 2 * out)
    plain = model(x)
    assert relative_error(fuse(model)(x), plain) < 1e-12


def test_copies_and_files(small_arch):
    backbone, x = fuse(make_backbone(small_arch)).eval(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = backbone(x)[0]
        for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            assert calls_of(other, x) == calls_of(backbone, x) > 0
            assert torch.equal(other(x)[0], expected)


@pytest.mark.parametrize(
    'settings', [dict(memory='fast'), dict(with_cp=['blocks1']), dict(frozen_stages=1), dict(norm_eval=True)], ids=str
)
def test_settings_of_the_backbone(small_arch, settings):
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    plain, fused = make_backbone(small_arch, **settings), fuse(make_backbone(small_arch, **settings))
    assert_same(results(fused.train(), x), results(plain.train(), x))


def test_the_lean_policy_makes_its_output_again():
    """Of the MLP's hidden map, x is kept, and neither the output nor a map between the layers."""
    block = fuse(BasicBlock(16, 7, 4, 0.0, layer_scale=False))
    x = torch.randn(1, 16, 60, 60).contiguous(memory_format=torch.channels_last).requires_grad_()
    kept = {}
    for policy in ('lean', 'fast'):
        with KeptBytes() as storages:
            out = run_block(policy, block, x)
            kept[policy] = storages.count(x, *block.state_dict().values()) / out.nbytes
    if _library.missing is None:
        assert kept['lean'] == pytest.approx(1 + 4 + 1, rel=0.06)  # dilated convolution, hidden map, output
    assert kept['fast'] > kept['lean'] + 4  # the MLP's output
    with Calls() as calls:
        run_block('lean', block, x).sum().backward()
    assert calls.count == 1


def test_under_autocast():
    model = make_mlp(dtype=torch.float32)
    x = torch.randn(2, 3, 16, 16)
    expected = results(copy.deepcopy(model).double(), x.double())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert_same(results(fuse(model), x), expected, 2e-2)


def test_optimize_takes_a_fused_model(small_arch):
    backbone, x = make_backbone(small_arch).float().eval(), torch.randn(1, 3, 64, 64)
    fused = fuse(copy.deepcopy(backbone))
    optimized = optimize(fused)
    assert type(optimized.blocks1[0]) is FoldedBasicBlock
    assert type(fused.blocks1[0].proj) is FusedSequential
    with torch.no_grad():
        assert relative_error(optimized(x)[0], backbone(x)[0]) < 1e-4


def test_torch_compile():
    """One graph, with the fused operator in it where there is a binary."""
    model, x = make_mlp(), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    expected = results(model, x)
    targets = []

    def backend(module, inputs):
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    torch._dynamo.reset()
    assert_same(results(torch.compile(fuse(model), fullgraph=True, backend=backend)._orig_mod, x), expected)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert relative_error(compiled(x), expected['out']) < 1e-12
    assert any('gelu_residual_depthwise_norm' in target for target in targets)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    gradients = torch.autograd.grad(compiled(x).sin().sum(), list(model.parameters()))
    assert_same(dict(zip(dict(model.named_parameters()), gradients), out=expected['out']), expected)


def test_references_and_exports_have_no_compiled_operator():
    model, x = fuse(make_mlp()), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    expected = model(x)
    with use_references():
        assert calls_of(model, x) == 0
        assert relative_error(model(x), expected) < 1e-12
    traced = torch.jit.trace(model, x, check_trace=False)
    assert not any('overlock_mm' in node.kind() for node in traced.inlined_graph.nodes())
    assert relative_error(traced(x), expected) < 1e-12


@pytest.mark.parametrize('order', ['fused first', 'wrapped first'])
def test_distributed_data_parallel(small_arch, order):
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        expected = results(make_backbone(small_arch), x)
        backbone = make_backbone(small_arch)
        if order == 'fused first':
            fuse(backbone)
        wrapped = nn.parallel.DistributedDataParallel(backbone)
        fuse(wrapped)
        got = results(wrapped, x)
        assert type(backbone.blocks1[0].proj) is FusedSequential
        assert_same({name.removeprefix('module.'): each for name, each in got.items()}, expected)
    finally:
        dist.destroy_process_group()
