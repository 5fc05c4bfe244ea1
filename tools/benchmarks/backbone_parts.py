"""Where the backbone's time goes: the parts of the network, what each has to do, and how long it takes.

The work is counted from the layers, whatever an implementation makes of them: each layer reads its input and its weights
once and writes its output once; its backward reads the input and the output's gradient and writes the input's and the
weights' gradients. So an implementation that joins layers can be faster than the floor of 'norms and elementwise', all of
which can be joined to something else.

The time is that of operators, one after the other. An operator belongs to the part whose weights it is given, or the first
of several in :data:`PARTS`; one without weights (an activation, a sum, a copy) to the norms and elementwise operations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import published_backbone
import torch
import torch.nn as nn
from contmix_shapes import Shape
from contmix_shapes import work as contmix_work
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from overlock_mm.models import convolutions
from overlock_mm.models.blocks import BasicBlock, DynamicBlock
from overlock_mm.models.layers import GlobalResponseNorm, LayerScale, SqueezeExcitation
from overlock_mm.models.overlock import OverLoCK
from overlock_mm.models.reparam import DILATED_BRANCHES, DilatedReparamConv
from overlock_mm.ops import _products
from overlock_mm.ops._packed import PackedConv2d

CONTMIX, LARGE, SMALL, POINTWISE = 'ContMix', 'large depth-wise convolutions', 'depth-wise 3x3', '1x1 convolutions'
STEM, ELEMENTWISE, OPTIMIZER = 'stem and downsampling', 'norms and elementwise', 'optimizer'
PARTS = (CONTMIX, LARGE, SMALL, POINTWISE, STEM, ELEMENTWISE, OPTIMIZER)


# ----------------------------------------------------------------------------------------------------------------- work


def count_work(
    arch: Any, out_type: str, image: tuple[int, ...], training: bool, itemsize: int = 4, weight_itemsize: int = 4
) -> dict[str, dict[str, int]]:
    """Multiply-adds, and bytes that must move, of each part.

    Args:
        arch, out_type: as OverLoCK takes them.
        image: (B, C, H, W).
        training: forward, backward and a step of AdamW; else the forward of the folded network.
        itemsize: bytes of a number of a map.
        weight_itemsize: of a weight.
    """
    with torch.device('meta'):
        model = OverLoCK(arch, in_channels=image[1], out_type=out_type)
    model = published_backbone.published(model, folded=not training).train(training)
    counts = {part: dict(multiply_adds=0, bytes=0) for part in PARTS}

    def add(part: str, forward: tuple[int, float], backward: tuple[int, float]) -> None:
        for multiply_adds, moved in (forward, backward) if training else (forward,):
            counts[part]['multiply_adds'] += multiply_adds
            counts[part]['bytes'] += round(moved)

    def layer(part: str, module: nn.Module, inputs: Tensor, out: Tensor, multiply_adds: int = 0) -> None:
        x, y = inputs.numel() * itemsize, out.numel() * itemsize
        weights = sum(p.numel() for p in module.parameters()) * weight_itemsize
        add(part, (multiply_adds, x + y + weights), (2 * multiply_adds, 2 * x + y + 2 * weights))

    def sums(maps: int) -> None:
        """Sums of two maps: the gradient of each is the sum's own."""
        add(ELEMENTWISE, (0, 3 * maps * itemsize), (0, 0))

    def hook(name: str, module: nn.Module) -> Optional[Callable]:
        stem = name.startswith('patch_embed')
        if isinstance(module, DilatedReparamConv):
            taps = module.kernel_size**2
            if not module.deploy:
                taps += sum(k**2 for k, _ in DILATED_BRANCHES[module.kernel_size])
            return lambda m, args, out: layer(LARGE, m, args[0], out, out.numel() * taps)
        if isinstance(module, nn.Conv2d):
            part = STEM if stem else POINTWISE if module.groups == 1 else SMALL
            taps = module.weight[0].numel()
            return lambda m, args, out: layer(part, m, args[0], out, out.numel() * taps)
        elementwise = (nn.LayerNorm, nn.BatchNorm2d, nn.GELU, nn.SiLU, GlobalResponseNorm, LayerScale, SqueezeExcitation)
        if isinstance(module, elementwise):
            return lambda m, args, out: layer(STEM if stem else ELEMENTWISE, m, args[0], out)
        if isinstance(module, BasicBlock):
            return lambda m, args, out: sums(out.numel())
        if isinstance(module, DynamicBlock):
            return dynamic
        return None

    def dynamic(block: DynamicBlock, args: tuple[Tensor, ...], out: Any) -> None:
        x, h, _ = args
        if block.mix_context:
            sums(h.numel())
        both = x.numel() + h.numel()
        add(ELEMENTWISE, (0, 2 * both * itemsize), (0, 2 * both * itemsize))  # [x, h] in one
        sums(x.numel())  # the local position encoding
        add(ELEMENTWISE, (0, 3 * x.numel() * itemsize), (0, 5 * x.numel() * itemsize))  # the gate
        sums(2 * both)  # two shortcuts
        height, width = published_backbone.size_of_mixing(block.kernel_size, *x.shape[2:])
        shape = Shape(
            'any', tuple(image[2:]), 0, 1, block.channels, block.channels // 2, block.num_groups, block.small_kernel_size,
            block.kernel_size, block.context_size, height, width,
        )  # fmt: skip
        work = contmix_work(shape, len(x), itemsize, weight_itemsize)['forward_backward' if training else 'forward']
        counts[CONTMIX]['multiply_adds'] += work.multiply_adds
        counts[CONTMIX]['bytes'] += work.bytes

    def visit(name: str, module: nn.Module) -> None:
        found = hook(name, module)
        if found:
            module.register_forward_hook(found)
        if not isinstance(module, (DilatedReparamConv, SqueezeExcitation)):  # one layer each
            for child, submodule in module.named_children():
                visit(f'{name}.{child}'.lstrip('.'), submodule)

    visit('', model)
    with torch.no_grad():
        model(torch.empty(image, device='meta'))
    if training:
        # Reads a weight, its gradient and two averages, and writes all but the gradient.
        counts[OPTIMIZER]['bytes'] = 7 * weight_itemsize * sum(p.numel() for p in model.parameters())
    return {part: each for part, each in counts.items() if each['bytes']}


# ----------------------------------------------------------------------------------------------------------------- time


def part_of_weight(name: str, shape: torch.Size) -> str:
    """The part that a weight is of, by its name in the network and its shape."""
    if name.startswith('patch_embed'):
        return STEM
    if '.rpb' in name or '.weight_proj' in name:
        return CONTMIX
    if '.lk_origin' in name or '.dil_' in name or '.origin_bn' in name:
        return LARGE
    if len(shape) == 4 and shape[1] == 1 and shape[2] > 1:
        return SMALL if shape[2] == 3 else LARGE
    if len(shape) == 4 and shape[1] > 1:
        return POINTWISE
    return ELEMENTWISE


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and whatever else of tensors the modules keep, as folded weights."""
    for prefix, module in model.named_modules():
        kept = convolutions._kept.get(module)  # what was folded or packed is kept apart from the modules
        folded = {} if kept is None else {'folded': kept[2]}
        if isinstance(folded.get('folded'), PackedConv2d):
            folded = {'packed': folded['folded']._weight}
        for name, value in {**vars(module), **module._parameters, **module._buffers, **folded}.items():
            for tensor in tree_flatten(value)[0]:
                if isinstance(tensor, Tensor):
                    yield f'{prefix}.{name}', tensor


def address(tensor: Tensor) -> int:
    """What tensors that share memory have in common. Packed ones show nobody their memory, and are not shared."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage()._cdata


class Clock(TorchDispatchMode):
    """Times operators, and adds up their seconds by parts in :attr:`seconds`."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        #: While it is set, all is of this part.
        self.scope: Optional[str] = None
        self.parts: dict[int, str] = {}
        self.alive: list[Tensor] = []  # for their addresses not to be given again
        for name, tensor in weights_of(model):
            self.note(tensor, part_of_weight(name, tensor.shape))

    def note(self, tensor: Tensor, part: str) -> None:
        self.parts[address(tensor)] = part
        self.alive.append(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        begin = self.now()
        out = function(*args, **(kwargs or {}))
        seconds = self.since(begin)
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        known = [self.parts[address(each)] for each in tensors if address(each) in self.parts]
        part = min(known, key=PARTS.index, default=ELEMENTWISE)
        if function.namespace == 'overlock_mm' and 'contmix' in function.__name__:
            part = CONTMIX
        elif not known and 'conv' in function.__name__:
            # A weight made before the clock was, and kept where it was not found.
            part = part_of_weight('', tensors[-1 if 'backward' in function.__name__ else 1].shape)
        elif not known and function.namespace == 'mkldnn':
            part = POINTWISE  # the gradient of a weight as a product of two maps
        if known and len(known) == len(tensors):
            # What is made of weights alone, as by autocast, stands for them.
            for each in tree_flatten(out)[0]:
                if isinstance(each, Tensor) and address(each) not in self.parts:
                    self.note(each, part)
        self.seconds[self.scope or part] += seconds
        return out

    def now(self) -> Any:
        if self.device.type != 'cuda':
            return time.perf_counter()
        torch.cuda.synchronize(self.device)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def since(self, begin: Any) -> float:
        if self.device.type != 'cuda':
            return time.perf_counter() - begin
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class _Mark(torch.autograd.Function):
    """Tells a clock where the flow of data passes: forward a scope begins, backward another."""

    @staticmethod
    def forward(ctx, clock: Clock, forward_scope: Optional[str], backward_scope: Optional[str], *tensors: Tensor):
        ctx.clock, ctx.scope = clock, backward_scope
        clock.scope = forward_scope
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        ctx.clock.scope = ctx.scope
        return (None, None, None, *gradients)


@contextmanager
def marked_contmix(clock: Clock) -> Iterator[None]:
    """The published ContMix, many operators without weights of their own, counts as ContMix, forward and backward."""
    unmarked = published_backbone.contmix_published

    def marked(*tensors: Tensor, **sizes: int) -> Tensor:
        tensors = _Mark.apply(clock, CONTMIX, None, *tensors)
        return _Mark.apply(clock, None, CONTMIX, unmarked(*tensors, **sizes))[0]

    published_backbone.contmix_published = marked
    try:
        yield
    finally:
        published_backbone.contmix_published = unmarked


@contextmanager
def products_all_the_same() -> Iterator[None]:
    """Convolutions become products also under a clock, which is a dispatch mode: it is to time what runs without it."""
    number_of_modes, _products._number_of_modes = _products._number_of_modes, lambda: 0
    try:
        yield
    finally:
        _products._number_of_modes = number_of_modes


def time_parts(
    model: nn.Module,
    forward: Callable[[], Any],
    backward: Callable[[], Any],
    update: Callable[[], Any],
    device: torch.device,
) -> dict[str, float]:
    """Seconds of each part, of one call of each."""
    clock = Clock(model, device)
    with marked_contmix(clock), products_all_the_same(), clock:
        forward()
        backward()
        clock.scope = OPTIMIZER
        update()
    return {part: seconds for part, seconds in clock.seconds.items() if seconds}


def floor_of(work: dict[str, int], ceilings: dict[str, float]) -> float:
    """Seconds below which an implementation of this part on its own does not get."""
    return max(
        work['bytes'] / ceilings['bytes_per_second'],
        work['multiply_adds'] / ceilings['multiply_adds_per_second'] if work['multiply_adds'] else -math.inf,
    )
