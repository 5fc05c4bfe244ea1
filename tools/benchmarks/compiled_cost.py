"""What a training step costs on CUDA under torch.compile: counted without a GPU, not measured.

    python tools/benchmarks/compiled_cost.py                    # OverLoCK-T, a training step at 800x1344
    python tools/benchmarks/compiled_cost.py --arch convnext-t --json

AOTAutograd traces the forward and the backward, and Inductor makes the code for an H100. Nothing of it runs. The settings
are torch.compile's own: no autotuning, no CUDA graphs. (With CUDA graphs, the host launches each graph once.)

    launches   of kernels: those that Inductor made for Triton, and operators that it calls. One of PyTorch's counts as one,
               those of this package as their CUDA kernels (operator_costs.py)
    gigabytes  10^9 bytes moved: each operand of a kernel once

gpu_cost.py counts the same step without torch.compile. It needs torch 2.11: it calls Inductor's internal functions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional
from unittest import mock

import torch
import torch._inductor.utils
import torch.nn as nn
import torch.utils._triton
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._functorch import config as aot_config
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.insert(0, str(Path(__file__).parent))
import operator_costs  # noqa: E402
from gpu_cost import ARCHS, PEERS, build, positive, size  # noqa: E402
from operator_costs import Cost, bytes_of  # noqa: E402

from overlock_mm import training as for_training  # noqa: E402

GPU = torch.device('cuda', 0)
#: What Inductor asks of a device: those of an H100.
H100 = SimpleNamespace(
    name='NVIDIA H100', major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, warp_size=32,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, L2_cache_size=50 * 2**20,
    shared_memory_per_block=48 * 2**10, shared_memory_per_block_optin=operator_costs.SHARED_MEMORY,
)  # fmt: skip


class Graph(NamedTuple):
    """A forward or a backward, and the fake tensors that it takes."""

    module: fx.GraphModule
    inputs: list[Any]


def trace(model: nn.Module, shape: tuple[int, ...]) -> list[Graph]:
    """The forward and the backward of a model, as torch.compile splits them.

    They are traced on the CPU, because the autograd engine asks for a driver of the GPU. Under torch.compile, this package
    does the same on both. ``model`` is of no use afterwards.
    """
    graphs: list[Graph] = []

    def keep(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        graphs.append(Graph(module, list(inputs)))
        return make_boxed_func(module.forward)

    def split(module: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        joint_graph_passes(module)
        return min_cut_rematerialization_partition(module, inputs, compiler='inductor', **settings)

    with compiling(), mode_of_fake_tensors():
        model.to_empty(device='cpu')
        image = torch.empty(shape, memory_format=torch.channels_last)
        aot_module_simplified(
            _Outputs(model), (image,), keep, keep, split, select_decomp_table(), keep_inference_input_mutations=True
        )
    return graphs


class _Outputs(nn.Module):
    """A model whose outputs are one tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(self.model(x)))


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Context in which this package takes the way that it takes under torch.compile."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(aot_config.patch(force_non_lazy_backward_lowering=True))
        for module in [module for name, module in sys.modules.items() if name.startswith('overlock_mm.')]:
            if hasattr(module, 'is_compiling'):
                stack.enter_context(mock.patch.object(module, 'is_compiling', lambda: True))
        yield


@contextlib.contextmanager
def mode_of_fake_tensors() -> Iterator[None]:
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


@contextlib.contextmanager
def described_gpu() -> Iterator[None]:
    """Context in which Inductor and Triton find an H100 that nothing can run on."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = SimpleNamespace(get_current_target=lambda: GPUTarget('cuda', 90, 32), get_current_device=lambda: 0)
    answers = {
        torch.cuda: dict(
            is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0,
            get_device_properties=lambda *_: H100, get_device_capability=lambda *_: (9, 0),
        ),
        fake_tensor: dict(init_gpu_context=lambda device: None),
        torch.utils._triton: dict(triton_hash_with_backend=lambda: ''),
        CudaInterface: dict(
            is_available=lambda: True, current_device=lambda: 0, get_device_properties=lambda *_: H100,
            get_compute_capability=lambda *_: 90,
        ),
        CudaInterface.Worker: dict(current_device=lambda: 0, get_device_properties=lambda *_: H100),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, '_active', target))
        for owner, functions in answers.items():
            for name, function in functions.items():
                function = staticmethod(function) if isinstance(owner, type) else function
                stack.enter_context(mock.patch.object(owner, name, function))
        forget_devices()
        stack.callback(forget_devices)
        yield


def forget_devices() -> None:
    """Inductor asks once in a process."""
    for module in (torch.utils._triton, torch._inductor.utils):
        for function in vars(module).values():
            if hasattr(function, 'cache_clear'):
                function.cache_clear()


def on_gpu(graph: Graph) -> Graph:
    """The same graph of fake tensors on the GPU."""
    mode = next(each.fake_mode for each in graph.inputs if isinstance(each, FakeTensor))

    def moved(x: Tensor) -> FakeTensor:
        return FakeTensor(mode, torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device='meta'), GPU)

    inputs = tree_map_only(Tensor, moved, graph.inputs)
    for node in graph.module.graph.nodes:
        if 'device' in node.kwargs:
            node.kwargs = {**node.kwargs, 'device': GPU}
    FakeTensorProp(graph.module, mode).propagate_dont_convert_inputs(*inputs)
    return Graph(graph.module, inputs)


#: A call in Inductor's code: of a kernel of Triton's, of a function, or of an operator.
CALL = re.compile(r'(\w+)\.run\(|extern_kernels\.(\w+)\(|torch\.ops\.([\w.]+)\(')


def cost_of_graph(graph: Graph, is_backward: bool) -> tuple[Cost, Counter[str]]:
    """What Inductor's code for a graph costs, and how often it calls what."""
    mode = next(each.fake_mode for each in graph.inputs if isinstance(each, FakeTensor))
    with V.set_fake_mode(mode):
        post_grad_passes(graph.module, is_inference=False)
        ours = cost_of_operators(graph.module)
        lowering = GraphLowering(graph.module, example_inputs=graph.inputs, is_backward=is_backward)
        with V.set_graph_handler(lowering), V.set_debug_handler(mock.MagicMock()):
            lowering.run(*graph.inputs)
            code = lowering.codegen()[0].value
            moved, of_nodes, _ = lowering.count_bytes()
    calls: Counter[str] = Counter()
    for kernel, function, operator in CALL.findall(code[code.index('def call(') :]):
        calls['triton' if kernel else function or operator.removesuffix('.default')] += 1
    launches = sum(count for name, count in calls.items() if not name.startswith('overlock_mm.'))
    # Inductor's counts of nodes are in words of 4 bytes.
    moved -= sum(4 * words for node, words in of_nodes if is_ours(getattr(node.node, 'op_overload', None)))
    return ours + Cost(launches, moved), calls


def is_ours(target: Any) -> bool:
    return getattr(target, 'namespace', None) == 'overlock_mm'


def cost_of_operators(module: fx.GraphModule) -> Cost:
    """Of this package's operators in a graph."""
    total = Cost()
    for node in module.graph.nodes:
        if is_ours(node.target):
            args = tree_map_only(fx.Node, lambda each: each.meta['val'], list(node.args))
            outputs = [each for each in tree_leaves(node.meta['val']) if isinstance(each, Tensor)]
            name = node.target._schema.name.split('::')[1]
            if name in NOT_ON_CUDA:  # PyTorch's run there, in one kernel
                total += Cost(1, bytes_of([each for each in args if isinstance(each, Tensor)]) + bytes_of(outputs))
            else:
                total += operator_costs.cost_of(name, args, outputs)[1]
    return total


#: Operators without kernels for CUDA.
NOT_ON_CUDA = ('gelu', '_gelu_backward')


def measure(model: nn.Module, shape: tuple[int, ...], fuse: bool = False) -> tuple[dict[str, float], Counter[str]]:
    """Count a training step: the counts of this file's description, and the calls in Inductor's code.

    Args:
        model: on the CPU. It is of no use afterwards.
        shape: of the images.
        fuse: with what ``overlock_mm.training`` has in the place of PyTorch's modules.
    """
    if fuse:
        for_training.fuse(model)
    model.train()  # of some backbones it returns nothing
    graphs = trace(model, shape)
    total, calls = Cost(), Counter()
    with described_gpu():
        for graph, is_backward in zip(graphs, (False, True)):
            cost, calls_of_graph = cost_of_graph(on_gpu(graph), is_backward)
            total, calls = total + cost, calls + calls_of_graph
    return dict(launches=total.launches, gigabytes=round(total.bytes / 1e9, 3)), calls


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='t', choices=(*ARCHS, *PEERS))
    parser.add_argument('--size', type=size, default=(800, 1344), metavar='HxW', help='of the image (default: 800x1344)')
    parser.add_argument('--batch', type=positive, default=2, help='images (default: 2)')
    parser.add_argument('--fuse', action='store_true', help='with the modules of overlock_mm.training')
    parser.add_argument('--json', action='store_true', help='print the counts alone, as JSON')
    options = parser.parse_args(arguments)
    counts, calls = measure(build(options.arch), (options.batch, 3, *options.size), options.fuse)
    if options.json:
        print(json.dumps(counts))
        return 0
    for name, count in counts.items():
        print(f'{name:12}{count:>12,}')
    print(f'\n{"calls":54}{"times":>10}')
    for name, count in calls.most_common():
        print(f'{name:54}{count:10,}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
