"""The compiled ContMix operator under all the mechanisms of torch, and the loading of the binary."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import devices, instruction_sets, needs_gpu, relative_error, run_with_instruction_set
from test_contmix import SIZES, make_arguments, oracle
from torch import Tensor

from overlock_mm import ops
from overlock_mm.ops import _library, contmix, contmix_reference, use_references

pytestmark = pytest.mark.skipif(
    os.environ.get('OVERLOCK_MM_WITH_OPS') == '0', reason='OVERLOCK_MM_WITH_OPS=0: built without the compiled operator'
)


TORCH = tuple(map(int, torch.__version__.split('.')[:2]))


def tensors_of(arguments: dict) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def with_gradients(function, arguments: dict, grad_output: Tensor) -> list[Tensor]:
    """The output, and the gradients of all tensors among the arguments."""
    copies = {
        name: value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    out = function(**copies)
    grads = torch.autograd.grad(out, list(tensors_of(copies).values()), grad_output.to(out.dtype))
    return [out.detach(), *grads]


def to(arguments: dict, dtype: torch.dtype) -> dict:
    return {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def keys_of(arguments: dict) -> Tensor:
    """M = W_d kᵀ, (B, G, L, Cq/G)."""
    key, groups = arguments['key'], arguments['num_groups']
    tokens = key.reshape(key.shape[0], groups, key.shape[1] // groups, -1)
    return arguments['proj_weight'] @ tokens.transpose(-2, -1)


def internal_arguments(arguments: dict) -> list:
    """Arguments of ``_contmix``."""
    names = ('proj_bias', 'rpb_small', 'rpb_large', 'small_kernel_size', 'large_kernel_size')
    return [arguments['value'], arguments['query'], keys_of(arguments), *(arguments[name] for name in names)]


def test_is_built():
    assert _library.missing is None


def test_is_what_runs(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError('the reference ran')

    monkeypatch.setattr(_library._reference, 'contmix_reference', fail)
    contmix(**make_arguments())
    with use_references(), pytest.raises(AssertionError, match='the reference ran'):
        contmix(**make_arguments())


@pytest.mark.parametrize('height, width', [(5, 5), (7, 6), (16, 5), (12, 21)])
@pytest.mark.parametrize('small, large', [(1, 3), (3, 5), (5, 3)])
@devices
def test_gradcheck(height, width, small, large, device):
    arguments = make_arguments(
        batch=1, height=height, width=width, per_group=2, query_per_group=1, tokens=2, num_groups=1,
        small_kernel_size=small, large_kernel_size=large, device=device,
    )  # fmt: skip
    tensors = tensors_of(arguments)

    def run(*inputs):
        return contmix(**{**arguments, **dict(zip(tensors, inputs))})

    # fast mode: a random projection of the Jacobian; test_gradients checks a whole one.
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in tensors.values()], fast_mode=True)


@devices
def test_kernels_of_one_slot_copy(device):
    """On the smallest map. The softmax of one logit is 1, and its inputs have no gradient."""
    arguments = make_arguments(height=1, width=1, small_kernel_size=1, large_kernel_size=1, device=device)
    grad_output = torch.randn_like(arguments['value'])
    out, grad_value, *others = with_gradients(contmix, arguments, grad_output)
    assert torch.equal(out, arguments['value'])
    assert torch.equal(grad_value, grad_output)
    assert all(grad.abs().max() < 1e-13 for grad in others)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
@devices
def test_half_gradients(device, dtype, tolerance):
    """Parameters in float32 beside half maps, as under autocast: their gradients are not rounded to half."""
    arguments = make_arguments(height=20, width=33, per_group=10, query_per_group=16, dtype=dtype, device=device)
    arguments['query'] = arguments['query'] / 4
    for name in ('proj_weight', 'proj_bias', 'rpb_small', 'rpb_large'):
        arguments[name] = arguments[name].float()
    grad_output = torch.randn_like(arguments['value'])
    got = with_gradients(contmix, arguments, grad_output)
    expected = with_gradients(contmix_reference, to(arguments, torch.float64), grad_output)
    for name, x, y in zip(['output', *tensors_of(arguments)], got, expected):
        assert relative_error(x, y) < tolerance, name
        assert x.dtype == (dtype if name in ('output', 'value', 'query', 'key') else torch.float32)


@devices
def test_nan_stays_in_its_window(device):
    arguments = make_arguments(height=9, width=30, dtype=torch.float32, device=device)
    arguments['value'][0, 0, 4, 15] = torch.nan  # first group, small kernel: 3x3
    out = contmix(**arguments)
    expected = torch.zeros(9, 30, dtype=torch.bool, device=device)
    expected[3:6, 14:17] = True
    assert torch.equal(out[0, 0].isnan(), expected)
    assert out[0, 1:].isfinite().all()
    assert out[1].isfinite().all()


@devices
def test_biases_mask_as_in_eager_mode(device):
    """-inf masks a slot, and a kernel with all slots masked is NaN. The lowest float, also used as a mask, is finite."""
    arguments = make_arguments(dtype=torch.float32, device=device)
    lowest = torch.finfo(torch.float32).min
    for mask in (lowest, -lowest):
        for part in (slice(None), slice(1)):
            masked = {**arguments, 'rpb_small': arguments['rpb_small'].clone(), 'proj_bias': None}
            masked['rpb_small'][:, part] = mask
            out, expected = contmix(**masked), contmix_reference(**masked)
            assert expected.isfinite().all()
            assert relative_error(out, expected) < 1e-6
    arguments['rpb_small'].fill_(-torch.inf)
    assert contmix(**arguments)[:, :6].isnan().all()
    assert contmix(**arguments)[:, 6:].isfinite().all()


def naive_half(value, query, key, proj_weight, proj_bias, rpb_small, rpb_large, **sizes):
    """The published computation of the kernels' logits in the maps' own dtype, up to the softmax."""
    groups = sizes['num_groups']
    q = query.unflatten(1, (groups, -1)).flatten(3)
    k = key.unflatten(1, (groups, -1)).flatten(3)
    logits = (q.transpose(-2, -1) @ k) @ proj_weight.t()
    return logits[..., : sizes['small_kernel_size'] ** 2].softmax(dim=-1)


@pytest.mark.skipif(TORCH < (2, 3), reason='torch < 2.3 has no float16 products on the CPU to compare with')
def test_logits_that_overflow_in_half_precision():
    """Logits up to 1e4 from affinities beyond float16: the naive half path gives NaN, the operator does not."""
    arguments = make_arguments(dtype=torch.float16)
    arguments['query'] = (arguments['query'] * 64).clamp(-200, 200)
    arguments['key'] = (arguments['key'] * 2000).clamp(-6e3, 6e3)
    arguments['proj_weight'] = arguments['proj_weight'] * 0.005
    logits = arguments['proj_weight'].float() @ (
        arguments['key'].float().unflatten(1, (2, -1)).flatten(3).transpose(-2, -1)
        @ arguments['query'].float().unflatten(1, (2, -1)).flatten(3)
    )
    assert 5e3 < logits.abs().max() < 2e4
    assert naive_half(**arguments).isnan().any()
    out = contmix(**arguments)
    assert out.isfinite().all()
    assert relative_error(out, oracle(**arguments)) < 2e-3


@pytest.mark.skipif(TORCH < (2, 4), reason='torch < 2.4 has no torch.library.opcheck')
@pytest.mark.parametrize('requires_grad', [False, True])
@pytest.mark.parametrize('name', ['contmix', '_contmix_keys', '_contmix_keys_backward', '_contmix', '_contmix_backward'])
@devices
def test_opcheck(name, requires_grad, device):
    arguments = make_arguments(dtype=torch.float32, device=device)
    if name == 'contmix':
        sizes = {key: arguments.pop(key) for key in SIZES}
        inputs = list(arguments.values())
    elif name.startswith('_contmix_keys'):
        sizes, inputs = {}, [arguments['key'], arguments['proj_weight'], arguments['num_groups'], 0.7]
        if name == '_contmix_keys_backward':
            keys = torch.ops.overlock_mm._contmix_keys(*inputs)
            inputs = [torch.randn_like(keys), *inputs[:2], 0.7, [True, False]]
    else:
        sizes, inputs = {}, internal_arguments(arguments)
        if name == '_contmix_backward':
            out, logsumexp = torch.ops.overlock_mm._contmix(*inputs)
            inputs = [
                torch.randn_like(out),
                *inputs[:-2],
                out,
                logsumexp,
                *inputs[-2:],
                [True, False, True, True, False, True],
            ]
    inputs = [x.detach().requires_grad_(requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    checks = ['test_schema', 'test_faketensor', 'test_autograd_registration']
    if name in ('contmix', '_contmix_keys') or not requires_grad:
        # With gradients, this one differentiates: _contmix has an output without a gradient, backward operators none.
        checks.append('test_aot_dispatch_dynamic')
    torch.library.opcheck(getattr(torch.ops.overlock_mm, name).default, inputs, sizes, test_utils=checks)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'slice of channels_last', 'transposed'])
@devices
def test_meta_has_the_layout_of_the_real_one(device, layout, dtype):
    arguments = make_arguments(dtype=dtype, device=device)
    for name in ('value', 'query'):
        x = arguments[name]
        if layout == 'slice of channels_last':
            x = torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]
        elif layout == 'transposed':
            x = x.transpose(2, 3).contiguous().transpose(2, 3)
        else:
            x = x.contiguous(memory_format=getattr(torch, layout, torch.contiguous_format))
        arguments[name] = x
    inputs = [x.float() if i > 1 and isinstance(x, Tensor) else x for i, x in enumerate(internal_arguments(arguments))]
    outputs = torch.ops.overlock_mm._contmix(*inputs)
    gradients = torch.ops.overlock_mm._contmix_backward(
        arguments['value'], *inputs[:-2], *outputs, *inputs[-2:], [True] * 6
    )
    on_meta = [x.to('meta') if isinstance(x, Tensor) else x for x in inputs]
    # .to('meta') makes slices dense.
    on_meta[:2] = [torch.empty_strided(x.shape, x.stride(), dtype=dtype, device='meta') for x in inputs[:2]]
    meta_outputs = torch.ops.overlock_mm._contmix(*on_meta)
    meta_gradients = torch.ops.overlock_mm._contmix_backward(
        on_meta[0], *on_meta[:-2], *meta_outputs, *on_meta[-2:], [True] * 6
    )
    for real, meta in zip((*outputs, *gradients), (*meta_outputs, *meta_gradients)):
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


def test_torch_compile_traces_the_compiled_operator():
    """The graph contains the operator and not its reference, which would give the same numbers."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module.forward

    arguments = make_arguments()
    compiled = torch.compile(contmix, fullgraph=True, backend=backend)
    assert torch.equal(compiled(**arguments), contmix(**arguments))
    calls = [str(node.target) for graph in graphs for node in graph.nodes if node.op == 'call_function']
    assert calls == ['overlock_mm.contmix.default']


@devices
def test_torch_compile_with_dynamic_shapes(device):
    compiled = torch.compile(contmix, fullgraph=True, dynamic=True, backend='aot_eager')
    for height, width, batch in ((6, 9, 2), (11, 7, 3)):
        arguments = make_arguments(batch=batch, height=height, width=width, device=device)
        grad_output = torch.randn_like(arguments['value'])
        for x, y in zip(with_gradients(compiled, arguments, grad_output), with_gradients(contmix, arguments, grad_output)):
            assert relative_error(x, y) < 1e-13


@devices
def test_torch_compile_with_inductor(device):
    arguments = make_arguments(dtype=torch.float32, device=device)

    def between(**arguments):
        return torch.relu(contmix(**{**arguments, 'query': arguments['query'] * 0.5})) + 1

    compiled = torch.compile(between, fullgraph=True)
    grad_output = torch.randn_like(arguments['value'])
    for x, y in zip(with_gradients(compiled, arguments, grad_output), with_gradients(between, arguments, grad_output)):
        assert relative_error(x, y) < 1e-6


@pytest.mark.skipif(TORCH < (2, 7), reason='torch < 2.7 does not say that it exports')
def test_a_graph_for_elsewhere_has_no_compiled_operator():
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return contmix(*tensors, **SIZES)

    arguments = make_arguments(dtype=torch.float32)
    tensors = tuple(tensors_of(arguments).values())
    expected = contmix(**arguments)
    exported = torch.export.export(Module(), tensors)
    traced = torch.jit.trace(Module(), tensors, check_trace=False)
    assert not any('overlock_mm' in str(node.target) for node in exported.graph.nodes)
    assert not any('overlock_mm' in node.kind() for node in traced.inlined_graph.nodes())
    assert relative_error(exported.module()(*tensors), expected) < 1e-6
    assert relative_error(traced(*tensors), expected) < 1e-6


@devices
def test_autocast_of_the_binary(device):
    """torch.ops.overlock_mm.contmix casts the maps by itself, and nothing else."""
    arguments = make_arguments(dtype=torch.float32, device=device)
    rounded = {name: arguments[name].bfloat16() for name in ('value', 'query', 'key')}
    expected = contmix(**{**arguments, **rounded})
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(torch.ops.overlock_mm.contmix(**arguments), expected)
    with torch.autocast(device, enabled=False):
        assert torch.ops.overlock_mm.contmix(**arguments).dtype == torch.float32


@devices
def test_activation_checkpointing(device):
    arguments = make_arguments(dtype=torch.float32, device=device)

    def checkpointed(**arguments):
        return torch.utils.checkpoint.checkpoint(contmix, use_reentrant=False, **arguments)

    grad_output = torch.randn_like(arguments['value'])
    for x, y in zip(with_gradients(checkpointed, arguments, grad_output), with_gradients(contmix, arguments, grad_output)):
        assert torch.equal(x, y)


@devices
def test_saves_little_more_than_inputs_and_output(device):
    """The kernels are not kept. There are a log-sum-exp for each and the folded keys besides."""
    arguments = make_arguments(
        batch=1, height=50, width=84, per_group=16, query_per_group=16, tokens=7, num_groups=8, dtype=torch.float32,
        small_kernel_size=5, large_kernel_size=13, device=device,
    )  # fmt: skip
    tensors = {name: value.requires_grad_() for name, value in tensors_of(arguments).items()}
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = contmix(**{**arguments, **tensors})
    inputs_and_output = sum(x.numel() * 4 for x in (*tensors.values(), out))
    assert sum(saved.values()) <= 1.1 * inputs_and_output


@pytest.mark.parametrize(
    'wanted',
    [('value',), ('query',), ('key', 'proj_weight'), ('proj_bias',), ('rpb_small',), ('rpb_large', 'value')],
    ids=str,
)
@devices
def test_only_the_gradients_asked_for(wanted, device):
    arguments = make_arguments(height=18, width=21, device=device)
    grad_output = torch.randn_like(arguments['value'])
    names = ['output', *tensors_of(arguments)]
    expected = dict(zip(names, with_gradients(contmix_reference, arguments, grad_output)))
    for name in wanted:
        arguments[name].requires_grad_()
    grads = torch.autograd.grad(contmix(**arguments), [arguments[name] for name in wanted], grad_output)
    for name, grad in zip(wanted, grads):
        assert relative_error(grad, expected[name]) < 1e-12


@devices
def test_second_derivative_is_refused_and_named(device):
    arguments = make_arguments(device=device)
    arguments['value'].requires_grad_()
    arguments['query'].requires_grad_()
    (grad,) = torch.autograd.grad(contmix(**arguments).pow(2).sum(), arguments['query'], create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative.* overlock_mm.ops.use_references'):
        grad.sum().backward()


@pytest.mark.skipif(not hasattr(torch._C, '_is_cow_tensor'), reason='this torch has no copy-on-write tensors')
def test_inputs_are_not_copied_on_reading():
    """A tensor that is copied on writing still shares its memory after a forward and a backward have read it."""
    arguments = make_arguments()
    lazy = {name: torch._lazy_clone(x) for name, x in tensors_of(arguments).items()}
    leaves = {name: x.detach().requires_grad_() for name, x in lazy.items()}
    torch.autograd.grad(contmix(**{**arguments, **leaves}), list(leaves.values()), arguments['value'])
    assert all(torch._C._is_cow_tensor(lazy[name]) for name in ('value', 'query', 'rpb_small', 'rpb_large'))


def test_numbers_of_threads_give_the_same_bits():
    arguments = make_arguments(
        height=40, width=37, per_group=14, query_per_group=14, tokens=7, num_groups=8, dtype=torch.float32,
        small_kernel_size=5, large_kernel_size=13,
    )  # fmt: skip
    grad_output = torch.randn_like(arguments['value'])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(contmix, arguments, grad_output))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(others, results[0]))


@devices
def test_repeats_itself_to_the_bit(device):
    arguments = make_arguments(height=30, width=45, per_group=10, query_per_group=16, device=device, dtype=torch.float32)
    grad_output = torch.randn_like(arguments['value'])
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (with_gradients(contmix, arguments, grad_output) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@needs_gpu
def test_cuda_graph():
    arguments = make_arguments(height=20, width=33, per_group=16, query_per_group=16, device='cuda', dtype=torch.float32)
    tensors = {name: value.requires_grad_() for name, value in tensors_of(arguments).items()}
    grad_output = torch.randn_like(arguments['value'])

    def forward_backward():
        out = contmix(**arguments)
        return [out, *torch.autograd.grad(out, list(tensors.values()), grad_output)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward_backward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = forward_backward()
    with torch.no_grad():
        arguments['value'].normal_()
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(got, with_gradients(contmix_reference, to(arguments, torch.float64), grad_output)):
        assert relative_error(x, y) < 1e-4


@needs_gpu
def test_runs_on_the_current_stream():
    arguments = make_arguments(height=20, width=33, device='cuda', dtype=torch.float32)
    expected = contmix(**arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)
        late = {**arguments, 'value': arguments['value'] * 1}
        out = contmix(**late)
    stream.synchronize()
    assert torch.equal(out, expected)


DDP = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_contmix import make_arguments
from overlock_mm.ops import contmix

rank = int(sys.argv[1])
dist.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
arguments = make_arguments(batch=4, dtype=torch.float64)

class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in ('proj_weight', 'proj_bias', 'rpb_small', 'rpb_large'):
            setattr(self, name, torch.nn.Parameter(arguments[name].clone()))

    def forward(self, value, query, key):
        return contmix(**{{**arguments, **dict(self.named_parameters()), 'value': value, 'query': query, 'key': key}})

module = Module()
maps = [arguments[name] for name in ('value', 'query', 'key')]
(module(*maps).pow(2).sum() / 2).backward()
expected = [p.grad.clone() for p in module.parameters()]
module.zero_grad()
parallel = torch.nn.parallel.DistributedDataParallel(module)
parallel(*(x[2 * rank : 2 * rank + 2] for x in maps)).pow(2).sum().backward()
for parameter, grad in zip(module.parameters(), expected):
    torch.testing.assert_close(parameter.grad, grad)
print('same gradients')
"""


def test_distributed_data_parallel(tmp_path):
    script = tmp_path / 'ddp.py'
    script.write_text(DDP.format(tests=os.path.dirname(__file__)))
    path = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.environ.get('PYTHONPATH', '')])
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': path}
    processes = [
        subprocess.Popen(
            [sys.executable, '-W', 'ignore', script, str(rank), tmp_path / 'store'], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:  # one may still wait for another that has failed
            process.kill()
    assert all('same gradients' in output for output in outputs), outputs


@instruction_sets
def test_every_instruction_set(capability, instruction_set):
    """The same binary with the kernels of older processors, which torch's environment variable selects."""
    code = """
import torch
from test_compiled import with_gradients, contmix, contmix_reference, make_arguments, relative_error, to
for settings in (
    dict(height=20, width=33, per_group=16, query_per_group=16, tokens=7, small_kernel_size=5, large_kernel_size=13),
    dict(height=9, width=8, per_group=10, query_per_group=8, small_kernel_size=5, large_kernel_size=7),
    dict(height=33, width=40, per_group=3, query_per_group=2, small_kernel_size=3, large_kernel_size=31),
    dict(height=7, width=7, per_group=1, query_per_group=1, small_kernel_size=1, large_kernel_size=3),
):
    arguments = make_arguments(**settings)
    arguments['query'] = arguments['query'] / 8
    grad_output = torch.randn_like(arguments['value'])
    expected = with_gradients(contmix_reference, arguments, grad_output)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        for x, y in zip(with_gradients(contmix, to(arguments, dtype), grad_output), expected):
            assert (x.double() - y).norm() <= tolerance * max(y.norm(), 1e-6), (settings, dtype)
"""
    run_with_instruction_set(code, __file__, capability, instruction_set)


def call(name, change):
    """A call of an internal operator with one argument changed."""
    arguments = make_arguments()
    names = ['value', 'query', 'keys', 'bias', 'rpb_small', 'rpb_large', 'small_kernel_size', 'large_kernel_size']
    inputs = dict(zip(names, internal_arguments(arguments)))
    if name == '_contmix_backward':
        out, logsumexp = torch.ops.overlock_mm._contmix(**inputs)
        inputs.update(grad_output=out, output=out, logsumexp=logsumexp, output_mask=[True] * 6)
    argument, changed = change
    getattr(torch.ops.overlock_mm, name)(**{**inputs, argument: changed(inputs[argument])})


# ruff: noqa: E501 (a table)
@pytest.mark.parametrize(
    'name, argument, change, error, message',
    [
        ('_contmix', 'keys', lambda x: x[0], ValueError, r'keys must have 4 dimensions, got shape \(2, 34, 2\)'),
        ('_contmix', 'keys', lambda x: x[:, :, 1:], ValueError, r'keys must have shape \(2, G, 34, 4 / G\), got \(2, 2, 33, 2\)'),
        ('_contmix', 'keys', lambda x: x.float(), TypeError, 'keys must have dtype torch.float64, got torch.float32'),
        ('_contmix', 'keys', lambda x: x.to('meta'), ValueError, 'keys must be on the device of value, cpu, got meta'),
        ('_contmix', 'keys', lambda x: x[:, :0], ValueError, 'num_groups must be at least 1, got 0'),
        ('_contmix', 'bias', lambda x: x[1:], ValueError, r'proj_bias must have shape \(34,\), got \(33,\)'),
        ('_contmix', 'bias', lambda x: x.to('meta'), ValueError, 'proj_bias must be on the device of value, cpu, got meta'),
        ('_contmix', 'bias', lambda x: x.float(), TypeError, 'proj_bias must have dtype torch.float64 .* got torch.float32'),
        ('_contmix', 'small_kernel_size', lambda x: -1, ValueError, 'small_kernel_size must be at least 1, got -1'),
        ('_contmix_backward', 'output', lambda x: x[:1], ValueError, r'output must have the shape of value, \(2, 12, 6, 9\), got'),
        ('_contmix_backward', 'output', lambda x: x.to('meta'), ValueError, 'output must be on the device of value, cpu, got'),
        ('_contmix_backward', 'grad_output', lambda x: x.float(), TypeError, 'grad_output must have dtype torch.float64 with'),
        ('_contmix_backward', 'logsumexp', lambda x: x[:, :1], ValueError, r'logsumexp must have shape \(2, 2, 2, 6, 9\), got'),
        ('_contmix_backward', 'logsumexp', lambda x: x.float(), TypeError, 'logsumexp must have dtype torch.float64, got'),
        ('_contmix_backward', 'logsumexp', lambda x: x.to('meta'), ValueError, 'logsumexp must be on the device of value, cpu'),
    ],
)  # fmt: skip
def test_bad_internal_arguments(name, argument, change, error, message):
    with pytest.raises(error) as raised:
        call(name, (argument, change))
    assert re.search(message, str(raised.value))


def test_biases_are_of_the_accumulation_type():
    inputs = internal_arguments(make_arguments(dtype=torch.float16))
    inputs[2] = inputs[2].float()
    with pytest.raises(TypeError, match='bias must have dtype torch.float32, got torch.float16'):
        torch.ops.overlock_mm._contmix(*inputs)


def test_reports_what_is_built():
    done = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'overlock_mm.ops'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split('  ', 1) for line in done.stdout.splitlines())
    lines = {name.strip(): value.strip() for name, value in lines.items()}
    assert lines['torch'].startswith(torch.__version__)
    assert lines['used on the CPU'] == f'compiled operators, {_library.build_info["cpu"]}'
    assert lines['compiled operators'].startswith(f'torch {torch.__version__.split("+")[0]}')


def run_without_binary(code: str, folder: Path) -> str:
    """Run code, which may import the tests beside this file, with a copy of the package without its binary: its output."""
    package = Path(ops.__file__).parents[1]
    shutil.copytree(package, folder / 'overlock_mm', ignore=shutil.ignore_patterns('*.so', 'csrc'))
    script = folder / 'without_binary.py'
    tests = Path(__file__).parent
    script.write_text(f'import sys\nsys.path += {[str(tests), str(tests.parent)]!r}\nimport torch\n{code}')
    environment = {**os.environ, 'PYTHONPATH': str(folder)}
    done = subprocess.run([sys.executable, script], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def test_the_fallback_is_announced_once(tmp_path):
    """On import, or at the first call with a device that has no compiled operator, with the line of the call."""
    output = run_without_binary(
        """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    from overlock_mm.ops import _library, contmix
assert [each.category for each in caught if 'overlock_mm' in str(each.message)] == [RuntimeWarning]
from test_contmix import make_arguments, oracle
arguments = make_arguments()
with warnings.catch_warnings():
    warnings.simplefilter('error')
    out = contmix(**arguments)
assert (out - oracle(**arguments)).norm() < 1e-14 * out.norm()
_library._announce_fallback.cache_clear()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    contmix(**arguments)
    contmix(**arguments)
assert [each.filename for each in caught] == [__file__]
print(caught[0].message)
""",
        tmp_path,
    )
    assert re.search('without its compiled operators: .* reference(.|\n)*pip install', output)


def test_a_binary_without_cuda_says_so_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_library, 'build_info', {'cuda': None})
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    _library._announce_fallback.cache_clear()
    with pytest.warns(RuntimeWarning, match='built without CUDA, but there is a GPU(.|\n)*FORCE_CUDA=1 pip install'):
        _library.announce_on_import()
    _library._announce_fallback.cache_clear()


def test_a_missing_binary_is_announced_on_import(tmp_path):
    output = run_without_binary('import overlock_mm.ops', tmp_path)
    assert 'RuntimeWarning: overlock_mm was installed without its compiled operators' in output


def test_the_fallback_compiles_too(tmp_path):
    run_without_binary(
        """
from overlock_mm.ops import contmix
from test_contmix import make_arguments, oracle
arguments = make_arguments()
out = torch.compile(contmix, fullgraph=True, backend='aot_eager')(**arguments)
assert (out - oracle(**arguments)).norm() < 1e-14 * out.norm()
""",
        tmp_path,
    )


def test_a_binary_that_does_not_load_says_why(monkeypatch):
    def fail(path):
        raise OSError('undefined symbol: _ZN3c10')

    monkeypatch.setattr(torch.ops, 'load_library', fail)
    assert re.search('do not load with torch .*undefined symbol', _library._load()[0])


def test_a_binary_for_another_torch_is_refused(monkeypatch):
    """It might load, and is not loaded."""

    def fail(path):
        raise AssertionError('it was loaded')

    monkeypatch.setattr(torch.ops, 'load_library', fail)
    monkeypatch.setattr(torch, '__version__', '2.99.1')
    missing, info = _library._load()
    assert re.fullmatch(r'the compiled operators were built for torch 2\.\d+\.\d+, this is torch 2.99.1', missing)
    assert info == {}


def test_exports():
    assert set(ops.__all__) == {
        'branch_norms',
        'branch_norms_given',
        'contmix',
        'contmix_kernels',
        'contmix_reference',
        'conv2d',
        'cuda_choices',
        'depthwise_conv2d',
        'gelu',
        'gelu_residual_depthwise_norm',
        'keep_operators',
        'layer_norm',
        'set_cuda_kernels',
        'residual_depthwise_norm',
        'global_response_norm',
        'residual_depthwise_conv2d',
        'sync_branch_norms',
        'use_references',
    }
    assert all(callable(getattr(ops, name)) for name in ops.__all__)
