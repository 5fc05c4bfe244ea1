"""The counter of costs on the CUDA path: small modules that were counted by hand, and the smallest backbone."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks import gpu_cost, gpu_memory, operator_costs
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from overlock_mm.models import OverLoCK
from overlock_mm.models.overlock import ARCHITECTURES
from overlock_mm.models.reparam import DilatedReparamConv
from overlock_mm.ops.cuda_kernels import has_cuda_kernels

Cost, measure = gpu_cost.Cost, gpu_cost.measure

pytestmark = [
    pytest.mark.skipif(not has_cuda_kernels(), reason='the binary was built without CUDA'),
    pytest.mark.skipif(not hasattr(torch, 'get_autocast_dtype'), reason='torch < 2.4'),
]

XT = ('--arch', 'xt', '--size', '64x64', '--batch', '1')


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def infer(function, *shape: int, **options) -> tuple[dict, dict[str, Cost]]:
    return measure(Function(function), shape, training=False, **options)


def small_overlock(arch: str, **options) -> OverLoCK:
    """A variant with one block in each stage."""
    return OverLoCK({**ARCHITECTURES[arch], 'depths': (1, 1, 1, 1), 'sub_depths': (1, 1)}, **options)


@pytest.fixture
def counts(capsys, monkeypatch):
    """``counts(*arguments)``: the JSON that the command prints, of a small XT."""
    monkeypatch.setattr(gpu_cost, 'OverLoCK', small_overlock)

    def run(*arguments: str) -> dict[str, float]:
        assert gpu_cost.main([*XT, *arguments, '--json']) == 0
        return json.loads(capsys.readouterr().out)

    return run


# ----------------------------------------------------------------------------------------------------- counted by hand


def test_a_linear_layer():
    """Forward: x W + b. Backward: the gradient of W, a product, and that of b, a sum. The image has no gradient."""
    x, weight, bias, out = 4 * 8, 8 * 16, 16, 4 * 16
    counts, costs = measure(nn.Linear(8, 16), (4, 8))
    macs = 4 * 8 * 16
    assert costs == {
        'addmm': Cost(1, 4 * (x + weight + bias + out), macs),
        'mm': Cost(1, 4 * (out + x + weight), macs),
        'sum': Cost(1, 4 * (out + bias)),
    }
    assert counts == dict(launches=3, gigabytes=0.0, gigamacs=0.0, kept_mib=0.0, collectives=0, host_syncs=0)


def test_costs_by_module():
    """Both directions of a layer, and sums of gradients where the last of them is made."""
    model = nn.ModuleDict(dict(first=nn.Linear(8, 16), second=nn.Linear(16, 4)))
    model.forward = lambda x: model['second'](model['first'](x).tanh())
    _, costs = measure(model, (4, 8), by='module')
    # addmm, mm for the weight, sum for the bias; the second one has a mm for its input, too; tanh and its gradient.
    assert {name: cost.launches for name, cost in costs.items()} == {'first': 3, 'second': 4, '(model)': 2}


def test_convolutions():
    """The second one has gradients of its input and of its weight."""
    model = nn.Sequential(nn.Conv2d(3, 8, 2, bias=False), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False))
    _, costs = measure(model, (2, 3, 9, 11))
    x, maps, dense, depthwise = 2 * 3 * 9 * 11, 2 * 8 * 8 * 10, 8 * 3 * 2 * 2, 8 * 9
    assert costs == {
        'convolution 2x2': Cost(1, 4 * (x + dense + maps), maps * 3 * 2 * 2),
        'convolution 2x2 backward': Cost(1, 4 * (maps + x + dense), maps * 3 * 2 * 2),
        'depth-wise convolution 3x3 dilation 2': Cost(1, 4 * (maps + depthwise + maps), maps * 9),
        'depth-wise convolution 3x3 dilation 2 backward': Cost(
            1, 4 * (maps + depthwise + maps + maps + maps + depthwise), 2 * maps * 9
        ),
    }


def test_contmix():
    """A map of 4 x 5 positions, a channel in each branch, kernels of 1 and 9 slots; no position biases, one tile."""
    maps, queries, slots, sums = 2 * 20, 20, 10, 2 * 20
    value, query, keys, bias = (torch.empty(shape) for shape in ((1, 2, 4, 5), (1, 1, 4, 5), (1, 1, 10, 1), (10,)))
    logsumexp, none = torch.empty(1, 2, 1, 4, 5), torch.empty(0)
    arguments = (value, query, keys, bias, None, None)

    forward = operator_costs.cost_of_contmix(*arguments, 1, 3, outputs=(value, logsumexp))
    assert forward == Cost(1, 4 * (maps + queries + 2 * slots + maps + sums), 20 * 10 + 20 * 10)

    wanted = (True, True, True, True, False, False)
    outputs = (value, query, keys, bias, none, none)
    backward = operator_costs.cost_of_contmix_backward(value, *arguments, value, logsumexp, 1, 3, wanted, outputs=outputs)
    of_value = maps + queries + 2 * slots + sums + maps
    of_query = 3 * maps + queries + 2 * slots + sums + queries + 2 * slots  # with a partial sum of keys and of the bias
    assert backward == Cost(4, 4 * (of_value + of_query + 2 * (slots + slots)), 2 * 400 + 2 * 200)


@pytest.mark.parametrize('function', [lambda x: x.view(2, 6).t(), torch.empty_like, lambda x: x[:, 1:].detach()])
def test_views_and_allocations_launch_nothing(function):
    counts, costs = infer(function, 3, 4)
    assert counts['launches'] == 0 and costs == {}


@pytest.mark.parametrize(
    'function, numbers',
    [
        (lambda x: x + 1, 12 + 12),
        (lambda x: x * x, 12 + 12),
        (lambda x: x.expand(5, 3, 4) + 1, 12 + 60),
        (lambda x: x.add_(1), 12 + 12),
        (torch.zeros_like, 12),
        (lambda x: torch.empty_like(x).copy_(x), 12 + 12),
        (lambda x: x.new_zeros(7), 7),
        (lambda x: torch.cat([x, x[:1]]), 12 + 4 + 16),
    ],
)
def test_bytes(function, numbers):
    (cost,) = infer(function, 3, 4)[1].values()
    assert cost == Cost(1, 4 * numbers)


def test_nothing_runs_for_an_empty_tensor():
    assert infer(lambda x: x[:0] + 1, 3, 4)[0]['launches'] == 0


@pytest.mark.parametrize(
    'function, kept',
    [
        (F.relu, 1),  # its output
        (F.gelu, 2),  # its input too
        (lambda x: F.gelu(F.gelu(x)), 3),
        (lambda x: x.add(1).add(1), 1),
        (lambda x: x.view(-1), 1),
    ],
)
def test_kept_maps(function, kept):
    """In maps of 1 MiB: the input here is the output of a convolution, as a map that autograd may keep."""
    first = nn.Conv2d(1, 1, 1, bias=False)
    counts, _ = measure(nn.Sequential(first, Function(function)), (1, 1, 512, 512))
    assert counts['kept_mib'] == kept


def test_autocast_halves_what_is_kept():
    """Of x, its copy in bfloat16; the output."""
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    assert measure(model, (1024, 512), dtype='bfloat16')[0]['kept_mib'] == 2
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    assert measure(model, (1024, 512))[0]['kept_mib'] == 2  # the output alone: x was there


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_layouts_of_convolutions_are_those_of_their_input(layout):
    layouts = []
    conv = nn.Conv2d(8, 8, 5, groups=8)
    conv.register_forward_hook(lambda module, inputs, out: layouts.append(out.is_contiguous(memory_format=layout)))
    measure(nn.Sequential(Function(lambda x: x.contiguous(memory_format=layout)), conv), (2, 8, 16, 16))
    assert layouts == [True]


# --------------------------------------------------------------------------------------- other processes, and the host


@pytest.mark.parametrize(
    'training, fuse, collectives, host_syncs', [(True, False, 4, 6), (True, True, 4, 0), (False, False, 0, 0)]
)
def test_synchronised_norms(training, fuse, collectives, host_syncs):
    """Each has one exchange forward and one backward. torch's SyncBatchNorm waits for a mask three times."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    counts, _ = measure(model, (2, 3, 8, 8), sync_bn=True, fuse=fuse, training=training)
    assert (counts['collectives'], counts['host_syncs']) == (collectives, host_syncs)


def test_a_synchronised_norm_without_waiting():
    """Its launches beside the exchanges: of torch's SyncBatchNorm, those that make and apply masks are missing."""
    _, costs = measure(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), (2, 3, 8, 8), sync_bn=True, fuse=True)
    launches = {name: cost.launches for name, cost in costs.items() if 'convolution' not in name}
    assert launches == {
        # The statistics of this process, with their count, in one message; those of all; the number of batches; the output.
        'batch_norm_stats': 1, 'new_full': 1, 'cat': 1, 'batch_norm_gather_stats_with_counts': 1, '_foreach_add_': 1,
        'batch_norm_elemt': 1,
        # Two sums in one message; the gradient, which takes counts as integers.
        'batch_norm_backward_reduce': 1, 'stack': 1, '_to_copy': 1, 'batch_norm_backward_elemt': 1,
    }  # fmt: skip


def test_a_layer_of_branches_exchanges_once():
    counts, _ = measure(small_overlock('xt'), (1, 3, 64, 64), sync_bn=True, fuse=True)
    model = small_overlock('xt')
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    layers = [module for module in model.modules() if isinstance(module, DilatedReparamConv)]
    assert len(layers) > 3
    together = sum(len(layer.branches()) - 1 for layer in layers)
    assert (counts['collectives'], counts['host_syncs']) == (2 * (norms - together), 0)


def test_norms_by_themselves_exchange_nothing():
    counts, costs = measure(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)), (2, 3, 8, 8))
    assert (counts['collectives'], counts['host_syncs']) == (0, 0)
    assert sum(cost.launches for name, cost in costs.items() if 'batch_norm' in name) == 2


@pytest.mark.parametrize(
    'function, host_syncs',
    [
        (lambda x: x.cpu(), 1),
        (lambda x: x + torch.ones(3, 4, device='cpu').to('cuda'), 1),
        (lambda x: x.to('cpu', non_blocking=True), 0),
        (lambda x: x[x > 0], 1),
        (lambda x: x.index_put_((x > 0,), x.new_zeros(12)), 1),
        (lambda x: x.index_put_((x > 0,), x.new_zeros(())), 0),
        (lambda x: x[torch.zeros(2, dtype=torch.int64, device='cuda')], 0),
        (lambda x: x.to(torch.float16), 0),
    ],
)
def test_host_synchronisations(function, host_syncs):
    assert infer(function, 3, 4)[0]['host_syncs'] == host_syncs


# --------------------------------------------------------------------------------------------------------- the backbone


def test_the_walk_through_the_graph_has_autograds_gradients():
    """On the CPU, where the engine runs: to the bit of float64's rounding, for every parameter."""
    torch.manual_seed(0)
    model = small_overlock('xt', out_type='pyramid_with_overview', drop_path_rate=0.0).double()
    outputs = model(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    gradients = [torch.randn_like(each) for each in outputs]
    parameters = [each for each in model.parameters() if each.requires_grad]
    expected = torch.autograd.grad(outputs, parameters, gradients, retain_graph=True, allow_unused=True)
    actual = gpu_cost.backward(outputs, gradients)
    assert any(each is not None for each in expected)
    for parameter, gradient in zip(parameters, expected):
        if gradient is None:
            assert parameter not in actual
        else:
            torch.testing.assert_close(actual[parameter], gradient)


def test_fused_blocks_add_and_scale_in_their_operators():
    """Of four basic blocks, two with a LayerScale, and three dynamic ones, two of which mix the context."""
    model = OverLoCK({**ARCHITECTURES['xt'], 'depths': (1, 1, 1, 1), 'sub_depths': (2, 1)})
    _, costs = measure(model, (1, 3, 256, 256), fuse=True)
    assert costs['_squeeze_excitation'].launches == 3 * (4 + 3)
    assert costs['_squeeze_excitation_backward'].launches == 4 * (4 + 3)
    assert costs['_gated'].launches == 4 + 3
    assert costs['scale_and_shift'].launches == 2 + 3 * 2  # shortcuts
    assert costs['scaled_sum'].launches == 2  # alpha and beta of the context
    assert 'silu' not in costs and 'silu_backward' not in costs and 'zeros' not in costs
    # All numbers of batches; of all branches, the means and, for each of four sizes of maps, the variances.
    assert costs['_foreach_add_'].launches == 1 + 1 + 4
    assert costs['_foreach_mul_'].launches == 1


def test_response_norms_are_made_again_in_one_launch():
    """By the lean policy, from their scales: of seven MLPs, and of the norms by themselves of three dynamic blocks."""
    model = OverLoCK({**ARCHITECTURES['xt'], 'depths': (1, 1, 1, 1), 'sub_depths': (2, 1)})
    _, costs = measure(model, (1, 3, 256, 256), fuse=True)
    assert costs['_gelu_residual_depthwise_norm'].launches == 3 * (4 + 3)
    assert costs['_gelu_residual_depthwise_normed'].launches == 4 + 3
    assert costs['_gelu_residual_depthwise_norm_backward'].launches == 4 * (4 + 3)
    assert costs['_response_norm'].launches == costs['_response_norm_backward'].launches == 3 * 3
    assert costs['_response_normed'].launches == 3


def test_maps_of_dynamic_blocks_stay_channels_last():
    """Slices of channels go into the next block, and its maps have the layout of all others."""
    model, layouts = small_overlock('xt'), []
    for block in (*model.sub_blocks3, *model.sub_blocks4):
        for layer in (block.dwconv1, block.norm1, block.dwconv2, block.norm2):
            layer.register_forward_hook(
                lambda module, inputs, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    measure(model, (1, 3, 256, 256), fuse=True)
    assert layouts == [True] * 8


def test_contmix_is_the_kernels():
    """Forward one kernel; backward two, and four sums. The reference in plain PyTorch is not there."""
    _, costs = measure(small_overlock('xt'), (1, 3, 64, 64))
    assert costs['_contmix'].launches == 2  # of two dynamic blocks
    assert costs['_contmix_backward'].launches == 6 * 2
    assert '_softmax' not in costs and 'unfold' not in costs


def test_the_lean_policy_is_in_force(monkeypatch):
    """It leaves subclasses of tensors alone, which fake tensors are."""
    monkeypatch.setattr(gpu_cost, 'backward', lambda *_: None)
    kept = {
        memory: measure(small_overlock('xt', memory=memory), (1, 3, 64, 64))[0]['kept_mib'] for memory in ('lean', 'fast')
    }
    assert kept['lean'] < kept['fast'] * 0.6


def test_a_checkpointed_step_keeps_less_and_computes_more(counts):
    step, checkpointed, inference = counts(), counts('--with-cp'), counts('--mode', 'eval')
    assert set(step) == {'launches', 'gigabytes', 'gigamacs', 'kept_mib', 'collectives', 'host_syncs'}
    assert checkpointed['kept_mib'] < step['kept_mib'] / 2
    assert step['gigamacs'] * 1.1 < checkpointed['gigamacs'] < step['gigamacs'] * 4 / 3
    assert inference['launches'] < step['launches']
    assert 0 < inference['gigamacs'] < step['gigamacs'] / 3


def test_options_reach_the_count(monkeypatch, capsys):
    calls = []

    def record(model, shape, **options):
        calls.append((type(model), shape, options))
        return {}, {}

    monkeypatch.setattr(gpu_cost, 'measure', record)
    gpu_cost.main([])
    gpu_cost.main([*XT, '--sync-bn', '--fuse', '--dtype', 'bfloat16', '--mode', 'eval', '--by', 'module'])
    assert calls == [
        (OverLoCK, (2, 3, 800, 1344), dict(dtype='float32', sync_bn=False, fuse=False, training=True, by='operator')),
        (OverLoCK, (1, 3, 64, 64), dict(dtype='bfloat16', sync_bn=True, fuse=True, training=False, by='module')),
    ]


def test_a_peer(capsys):
    pytest.importorskip('mmpretrain')
    assert gpu_cost.main(['--arch', 'convnext-t', '--size', '64x64', '--mode', 'eval']) == 0
    lines = capsys.readouterr().out.splitlines()
    depthwise = next(line for line in lines if line.startswith('depth-wise convolution 7x7'))
    assert depthwise.split()[3] == '18'


def test_the_state_of_torch_is_as_before():
    before = torch.Tensor.data_ptr, torch.__future__.get_overwrite_module_params_on_conversion()
    measure(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), (2, 3, 8, 8), sync_bn=True)
    assert (torch.Tensor.data_ptr, torch.__future__.get_overwrite_module_params_on_conversion()) == before
    assert not torch.distributed.is_initialized()
    assert torch.ones(1).data_ptr() != 0


# --------------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--size', '800'], "a size looks like 800x1344, got '800'"),
        (['--size', '0x64'], "got '0x64'"),
        (['--batch', '0'], "it must be a positive integer, got '0'"),
        (['--dtype', 'int8'], 'int8'),
        (['--arch', 'resnet'], 'resnet'),
        (['--arch', 'swin-t', '--with-cp'], "got 'swin-t'"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        gpu_cost.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_values_are_not_made_up():
    with pytest.raises(DataDependentOutputException):
        infer(lambda x: x.sum().item(), 3, 4)


def test_an_unknown_backbone():
    with pytest.raises(ValueError, match=r"arch must be one of .* got 'resnet'"):
        gpu_cost.build('resnet')


def test_a_mask_among_other_indices_is_refused():
    with pytest.raises(NotImplementedError, match='2 indices'):
        infer(lambda x: x[x[:, 0] > 0, torch.zeros(3, dtype=torch.int64, device='cuda')], 3, 4)


def test_measured_memory_stands_beside_the_counted_one(monkeypatch):
    monkeypatch.setattr(gpu_cost, 'OverLoCK', small_overlock)
    names = ('published', 'ours', 'channels-last', 'ours-with-cp', 'convnext-tiny')
    results = {name: dict(kept_bytes=3 << 20, peak_bytes=5 << 20) for name in names}
    cases = [
        dict(name='xt, 64x64, batch 1', section=f'train, {precision}', implementations=results)
        for precision in ('float32 in TF32', 'bfloat16')
    ]
    cases.append(dict(name='xt, 64x64, batch 1', section='eval, float32', implementations=dict(ours=dict(peak_bytes=1))))
    head, *rows = gpu_memory.rows_of(dict(cases=cases))
    sections = [f'xt, 64x64, batch 1, {case["section"]}' for case in cases[:2]]
    assert [row[:2] for row in rows] == [[section, name] for section in sections for name in names[1:]]
    for row in rows:
        cells = dict(zip(head, row))
        assert (cells['kept MiB'], cells['peak MiB']) == ('3', '5')
        assert float(cells['kept / counted']) == pytest.approx(3 / float(cells['counted']), rel=0.02)
    counted = [float(row[head.index('counted')]) for row in rows]
    assert counted[0] == counted[1] > 3 * counted[2]
    assert all(exact != half for exact, half in zip(counted[:4], counted[4:]))
