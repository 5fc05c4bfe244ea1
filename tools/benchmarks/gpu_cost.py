"""What a training step or an inference costs on the CUDA path: counted without a GPU, not measured.

    python tools/benchmarks/gpu_cost.py                                      # OverLoCK-T, a training step at 800x1344
    python tools/benchmarks/gpu_cost.py --arch b --batch 1 --dtype bfloat16 --sync-bn --fuse --json
    python tools/benchmarks/gpu_cost.py --arch convnext-t                    # a peer, by the same rules
    python tools/benchmarks/gpu_cost.py --fuse --by module                   # which layers cost how much

The backbone, with four outputs and without drop path, runs on fake tensors on the device 'cuda': they have shapes, dtypes,
strides and shared storages, but no data. A step is a forward and a backward, without an optimizer. Half types are autocast.

    launches     operators that launch kernels: not views and allocations. One of PyTorch's counts as one launch.
    gigabytes    10^9 bytes moved: each operand of an operator once, as if no kernel read anything twice
    gigamacs     10^9 multiply-adds of convolutions, matrix products and ContMix
    kept_mib     MiB that the forward leaves allocated, its outputs included: in training, what is kept for the backward
    collectives  exchanges with other processes (of --sync-bn, with 8 processes)
    host_syncs   operators for which the host waits: those that read values, and copies between host and device

The operators of this package count as their CUDA kernels (operator_costs.py). The binary must be built with CUDA, which
needs a toolkit and no GPU. Operators run one by one, as in eager PyTorch. One of PyTorch's may read more than its operands
once (a batch norm reads its map twice), and cuDNN may launch more than one kernel: the counts compare implementations, and
are no times. It needs torch >= 2.4.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from overlock_mm import training as for_training
from overlock_mm.models import OverLoCK
from overlock_mm.ops.cuda_kernels import has_cuda_kernels

sys.path.insert(0, str(Path(__file__).parent))
import operator_costs  # noqa: E402
from operator_costs import Cost, bytes_of, kind_of_convolution  # noqa: E402

ARCHS = ('xt', 't', 's', 'b')
#: Names of other backbones: class of mmpretrain, and its arguments.
PEERS = {
    'convnext-t': ('ConvNeXt', dict(arch='tiny', gap_before_final_norm=False)),
    'convnext-s': ('ConvNeXt', dict(arch='small', gap_before_final_norm=False)),
    'convnext-b': ('ConvNeXt', dict(arch='base', gap_before_final_norm=False)),
    'swin-t': ('SwinTransformer', dict(arch='tiny')),
    'swin-s': ('SwinTransformer', dict(arch='small')),
}
DTYPES = ('float32', 'bfloat16', 'float16')
MODES = ('train', 'eval')
#: Among which SyncBatchNorm exchanges its statistics.
PROCESSES = 8

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------------------------- counting


class Meter(TorchDispatchMode):
    """Counts the operators that run on the GPU.

    Those that read values (``x.item()``) raise PyTorch's errors, because there are none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[str, Cost] = {}  # of all calls of an operator, by its name
        self.by_module: dict[str, Cost] = {}
        self.modules = [WHOLE_MODEL]  # names of those that run now
        self._numbers: list[int] = []  # of autograd's nodes, of which the next ones have ...
        self._owners: list[str] = []  # ... been made by these modules
        self.collectives = self.host_syncs = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def total(self) -> Cost:
        return sum(self.costs.values(), Cost())

    @property
    def allocated(self) -> int:
        """Bytes that were allocated under the meter and are not free yet."""
        return sum(size for storage, size in self._storages.values() if not storage.expired())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_masked = function is aten.index.Tensor and has_mask(args)
        run = index_of_masks if is_masked else OUTPUTS.get(function, function)
        out = run(*args, **kwargs)
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(out)
        known = {each.untyped_storage()._cdata for each in inputs}
        fresh = [each.untyped_storage() for each in outputs if each.untyped_storage()._cdata not in known]
        self._storages.update({storage._cdata: (StorageWeakRef(storage), storage.nbytes()) for storage in fresh})

        self.collectives += is_collective(function)
        self.host_syncs += bool(inputs or outputs) and waits_for_device(function, args, kwargs, out)
        written = [each for each in outputs or inputs if each.numel()]
        if written and (fresh or function._schema.is_mutable) and name_of(function) not in ALLOCATIONS:
            label, cost = cost_of(function, args, inputs, outputs)
            module = self.modules[-1]
            self.costs[label] = self.costs.get(label, Cost()) + cost
            self.by_module[module] = self.by_module.get(module, Cost()) + cost
        return out

    def note_forward(self) -> None:
        """From now on, nodes of the graph are made by the module that runs."""
        self._numbers.append(torch.autograd._get_sequence_nr())
        self._owners.append(self.modules[-1])

    @contextlib.contextmanager
    def running(self, module: str) -> Iterator[None]:
        self.modules.append(module)
        self.note_forward()
        try:
            yield
        finally:
            self.modules.pop()
            self.note_forward()

    @contextlib.contextmanager
    def backward_of(self, node: Any) -> Iterator[None]:
        """What a node does is of the module that made it."""
        self.modules.append(self._owners[bisect.bisect_right(self._numbers, node._sequence_nr()) - 1])
        try:
            yield
        finally:
            self.modules.pop()


#: A name for what runs in no other module.
WHOLE_MODEL = '(model)'


@contextlib.contextmanager
def modules_of(model: nn.Module, meter: Meter) -> Iterator[None]:
    """Context in which a meter knows which module runs. The blocks of a stage have one name."""
    names = {module: re.sub(r'(blocks\d)\.\d+', r'\1.*', name) for name, module in model.named_modules() if name}
    call = nn.Module.__call__

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with meter.running(names.get(module, meter.modules[-1])):
            return call(module, *args, **kwargs)

    meter.note_forward()
    with mock.patch.object(nn.Module, '__call__', called):
        yield


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors on the GPU among arguments or results, each once."""
    tensors = {id(each): each for each in tree_leaves(values) if isinstance(each, Tensor) and each.device.type == 'cuda'}
    return list(tensors.values())


def name_of(function: OpOverload) -> str:
    """Without namespace and overload."""
    return function._schema.name.split('::')[1]


def is_collective(function: OpOverload) -> bool:
    return function.namespace in ('c10d', '_c10d_functional') and 'wait' not in name_of(function)


def has_mask(args: tuple) -> bool:
    """Whether the arguments of an index have a mask: the device alone knows how many elements it takes."""
    return any(each is not None and each.dtype == torch.bool for each in args[1])


def index_of_masks(x: Tensor, indices: list[Optional[Tensor]]) -> Tensor:
    """``x[mask]`` for a mask that is true everywhere, as that of the processes with data in SyncBatchNorm.

    Raises:
        NotImplementedError: there are more indices than the mask.
    """
    if len(indices) != 1:
        raise NotImplementedError(f'x[mask] is known, but not with {len(indices)} indices')
    return x.new_empty(indices[0].numel(), *x.shape[indices[0].ndim :])


#: Outputs of SyncBatchNorm's operators, which PyTorch does not know for fake tensors. Statistics are float32.
OUTPUTS = {
    aten.batch_norm_stats.default: lambda x, *_: per_channel(x, 2),
    aten.batch_norm_gather_stats_with_counts.default: lambda x, *_: per_channel(x, 2),
    aten.batch_norm_elemt.default: lambda x, *_: torch.empty_like(x),
    aten.batch_norm_backward_reduce.default: lambda grad_output, *_: per_channel(grad_output, 4),
    aten.batch_norm_backward_elemt.default: lambda grad_output, x, *_: torch.empty_like(x),
}


def per_channel(x: Tensor, number: int) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(number))


def waits_for_device(function: OpOverload, args: tuple, kwargs: dict[str, Any], out: Any) -> bool:
    """Whether the host waits: for values, for a number of elements, or for a copy from or to pageable memory."""
    if name_of(function) == 'index':
        return has_mask(args)
    if name_of(function) in ('index_put', 'index_put_'):
        return has_mask(args) and args[2].numel() != 1  # one value fills the mask
    if torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags:
        return True
    if name_of(function) not in ('_to_copy', 'copy_'):
        return False
    devices = {each.device.type for each in tree_leaves((args, out)) if isinstance(each, Tensor)}
    return len(devices) > 1 and not kwargs.get('non_blocking', args[2:3] == (True,))


# -------------------------------------------------------------------------------------------------- costs of operators

#: They launch nothing.
ALLOCATIONS = {'empty', 'empty_like', 'empty_strided', 'empty_permuted', 'new_empty', 'new_empty_strided'}
#: They take shape and dtype of their first argument, or write over it, and do not read it.
NOT_READING_THE_FIRST = {
    'zeros_like', 'ones_like', 'full_like', 'rand_like', 'randn_like', 'new_zeros', 'new_ones', 'new_full',
    'zero_', 'fill_', 'copy_', 'bernoulli_', 'uniform_', 'normal_',
}  # fmt: skip
PRODUCTS = {'mm', 'bmm', 'addmm', 'baddbmm'}


def cost_of(function: OpOverload, args: tuple, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[str, Cost]:
    """A name for the operator in a list, and what this call costs."""
    name = name_of(function)
    if function.namespace == 'overlock_mm':
        return operator_costs.cost_of(name, args, outputs)
    if name == 'convolution':
        x, weight, _, _, _, dilation, _, _, groups = args
        macs = outputs[0].numel() * weight[0].numel()
        return kind_of_convolution(weight, dilation, groups), Cost(1, bytes_of(inputs) + bytes_of(outputs), macs)
    if name == 'convolution_backward':
        grad_output, x, weight, _, _, _, dilation, _, _, groups, wanted = args
        read = [grad_output, weight] * wanted[0] + [grad_output, x] * wanted[1]
        macs = grad_output.numel() * weight[0].numel() * sum(wanted[:2])
        kind = kind_of_convolution(weight, dilation, groups)
        return f'{kind} backward', Cost(1, bytes_of(read) + bytes_of(outputs), macs)
    read = [each for each in inputs if each is not args[0]] if name in NOT_READING_THE_FIRST else inputs
    macs = outputs[0].numel() * args[-1].shape[-2] if name in PRODUCTS else 0
    return name, Cost(1, bytes_of(read) + bytes_of(outputs), macs)


# --------------------------------------------------------------------------------------------- a device that is not there


def address(tensor: Tensor) -> int:
    """A number that tells fake tensors apart as data_ptr does real ones."""
    return tensor.untyped_storage()._cdata * 2**20 + tensor.storage_offset() * tensor.element_size()


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Context in which fake tensors are on a GPU, with autocast, and in which modules can be moved there."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.Tensor, 'data_ptr', address),
            (torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False),
            (torch.cuda, 'is_bf16_supported', lambda *_, **__: True),
            # Checkpoints run a block once in each backward, and ask which one it is.
            (torch._C, '_current_graph_task_id', lambda: 0),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        # The package leaves subclasses of tensors alone, and here all tensors are of one.
        for module in [module for name, module in sys.modules.items() if name.startswith('overlock_mm.')]:
            for name, value in (('Tensor', FakeTensor), ('_PLAIN', (FakeTensor,))):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@contextlib.contextmanager
def fake_processes() -> Iterator[None]:
    """Context with a process group whose exchanges do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=PROCESSES)
    try:
        yield
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def backward(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    around: Callable[[Any], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> dict[Tensor, Tensor]:
    """What torch.autograd.grad(outputs, leaves, gradients) does, but the autograd engine asks for a driver.

    Args:
        around: makes the context of a node. It holds for the sums of what the node gives, too.

    Returns:
        The gradients of all leaves, which the engine takes over without a copy, if they have the leaf's layout.
    """
    arrived: dict[Any, list[Optional[Tensor]]] = {}
    of_leaves: dict[Tensor, Tensor] = {}

    def give(node: Any, index: int, gradient: Tensor) -> None:
        wanted = node._input_metadata[index]
        gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
        given = arrived.setdefault(node, [None] * len(node._input_metadata))
        given[index] = gradient if given[index] is None else given[index] + gradient

    for output, gradient in zip(outputs, gradients):
        give(output.grad_fn, output.output_nr, gradient)
    # A node is younger than the nodes that its gradients go to. Those of leaves have the largest number.
    for node in sorted(nodes_of(arrived), key=lambda node: -1 if is_leaf(node) else node._sequence_nr(), reverse=True):
        given = arrived.pop(node, None)
        if given is None:
            continue
        if is_leaf(node):
            of_leaves[node.variable] = given[0].contiguous() if node.variable.is_contiguous() else given[0]
            continue
        with around(node):
            for (before, index), gradient in zip(*edges_and_gradients(node, given)):
                if before is not None and gradient is not None:
                    give(before, index, gradient)
    return of_leaves


def is_leaf(node: Any) -> bool:
    return hasattr(node, 'variable')


def edges_and_gradients(node: Any, given: list[Optional[Tensor]]) -> tuple[Sequence[tuple[Any, int]], Sequence[Any]]:
    """Apply a node: where its gradients go to, and the gradients."""
    if not hasattr(node, 'apply'):
        out = node(*given)
        return node.next_functions, out if isinstance(out, tuple) else (out,)
    # A Python function. The engine gives it zeros for missing gradients, and it returns one for every argument.
    of_outputs = [
        torch.zeros(output.shape, dtype=output.dtype, device=output.device) if gradient is None else gradient
        for output, gradient in zip(node._input_metadata, given)
    ]
    out = node.apply(*of_outputs)
    out = out if isinstance(out, tuple) else (out,)
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    return edges, [gradient for gradient, needed in zip(out, node.needs_input_grad) if needed]


def nodes_of(nodes: Iterable[Any]) -> set[Any]:
    """The nodes of the graph that gradients of these nodes go to, with them."""
    found, waiting = set(), list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions if before is not None]
    return found


# ------------------------------------------------------------------------------------------------------------- backbones


def build(arch: str, with_cp: bool = False) -> nn.Module:
    """A backbone with four outputs, without drop path.

    Raises:
        ValueError: there is no such backbone, or it is a peer and with_cp is asked for.
        ImportError: a peer, and mmpretrain is not installed.
    """
    if arch in ARCHS:
        return OverLoCK(arch, out_type='pyramid_with_overview', drop_path_rate=0.0, with_cp=with_cp)
    if arch not in PEERS:
        raise ValueError(f'arch must be one of {(*ARCHS, *PEERS)}, got {arch!r}')
    if with_cp:
        raise ValueError(f'with_cp is for {ARCHS} alone, got {arch!r}')
    import mmpretrain.models

    kind, arguments = PEERS[arch]
    return getattr(mmpretrain.models, kind)(out_indices=(0, 1, 2, 3), drop_path_rate=0.0, **arguments)


def measure(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    dtype: str = 'float32',
    sync_bn: bool = False,
    fuse: bool = False,
    training: bool = True,
    by: str = 'operator',
) -> tuple[dict[str, float], dict[str, Cost]]:
    """Count a training step or an inference.

    Args:
        model: on the CPU. It is moved to the fake GPU, and of no use afterwards.
        shape: of the image.
        dtype: of autocast, unless it is float32.
        sync_bn: with SyncBatchNorm in the place of batch norms.
        fuse: with what ``overlock_mm.training`` has in the place of PyTorch's modules.
        training: a forward and a backward, or a forward without gradients.
        by: what the costs are listed by, 'operator' or 'module'. Maps that are made again belong to their reader.

    Returns:
        The counts of this file's description, and the costs by operator or module.

    Raises:
        RuntimeError: the binary was built without CUDA, or there is none.
    """
    if not has_cuda_kernels():
        raise RuntimeError('overlock_mm must be built with CUDA (a GPU is not needed): `python -m overlock_mm.ops`')
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if fuse:
        for_training.fuse(model)
    model.train(training)
    autocast = contextlib.nullcontext()
    with fake_gpu(), fake_processes() if sync_bn else contextlib.nullcontext():
        model.to_empty(device='cuda')
        image = torch.empty(shape, device='cuda')
        if dtype != 'float32':
            autocast = torch.autocast('cuda', getattr(torch, dtype))
        with Meter() as meter:
            with autocast, torch.set_grad_enabled(training), modules_of(model, meter):
                outputs = tree_leaves(model(image))
            kept = meter.allocated
            if training:
                backward(outputs, [torch.empty_like(each) for each in outputs], meter.backward_of)
    total = meter.total
    counts = dict(
        launches=total.launches,
        gigabytes=round(total.bytes / 1e9, 3),
        gigamacs=round(total.macs / 1e9, 3),
        kept_mib=round(kept / 2**20, 1),
        collectives=meter.collectives,
        host_syncs=meter.host_syncs,
    )
    return counts, meter.costs if by == 'operator' else meter.by_module


# ---------------------------------------------------------------------------------------------------------- command line


def size(text: str) -> tuple[int, int]:
    height, _, width = text.partition('x')
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f'a size looks like 800x1344, got {text!r}')
    return int(height), int(width)


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f'it must be a positive integer, got {text!r}')
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='t', choices=(*ARCHS, *PEERS))
    parser.add_argument('--size', type=size, default=(800, 1344), metavar='HxW', help='of the image (default: 800x1344)')
    parser.add_argument('--batch', type=positive, default=2, help='images (default: 2)')
    parser.add_argument('--dtype', default='float32', choices=DTYPES, help='of autocast, unless it is float32')
    parser.add_argument('--sync-bn', action='store_true', help=f'SyncBatchNorm among {PROCESSES} processes')
    parser.add_argument('--fuse', action='store_true', help='with the modules of overlock_mm.training')
    parser.add_argument('--with-cp', action='store_true', help='all blocks are computed again in the backward')
    parser.add_argument('--mode', default='train', choices=MODES)
    parser.add_argument('--by', default='operator', choices=('operator', 'module'), help='of the list')
    parser.add_argument('--json', action='store_true', help='print the counts alone, as JSON')
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        model = build(options.arch, options.with_cp)
    except ValueError as error:
        parser.error(str(error))
    counts, costs = measure(
        model,
        (options.batch, 3, *options.size),
        dtype=options.dtype,
        sync_bn=options.sync_bn,
        fuse=options.fuse,
        training=options.mode == 'train',
        by=options.by,
    )
    if options.json:
        print(json.dumps(counts))
        return 0
    for name, count in counts.items():
        print(f'{name:12}{count:>12,}')
    print(f'\n{options.by:44}{"launches":>10}{"gigabytes":>11}{"gigamacs":>10}')
    for name, cost in sorted(costs.items(), key=lambda item: item[1].bytes, reverse=True):
        print(f'{name:44}{cost.launches:10,}{cost.bytes / 1e9:11.3f}{cost.macs / 1e9:10.1f}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
