"""Random calls of the public operators, right and wrong ones, against their references in float64.

A call is drawn from the operator's name and the call's number alone, so that each can be made again:

    python tests/test_ops/fuzz.py contmix 1234
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from overlock_mm import ops
from overlock_mm.ops import use_references

WRONG_CALLS = 0.3  # their share
HALF_TYPES = (torch.float16, torch.bfloat16)

# Relative (Frobenius) errors of outputs and gradients. A half type rounds the output of ContMix, which its backward reads.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
TOLERANCES_OF_CONTMIX = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Draw(random.Random):
    """Random numbers, sizes and tensors of one call."""

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self._generator = torch.Generator().manual_seed(self.getrandbits(62))
        self.dtype = self.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])

    def happens(self, probability: float) -> bool:
        return self.random() < probability

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def tensor(self, *shape: int) -> Tensor:
        """Of the call's dtype, in any layout."""
        return lay_out(self, self.normal(*shape).to(self.dtype))

    def parameter(self, *shape: int, scale: float = 1) -> Tensor:
        """As :meth:`tensor`; beside half maps it may be float32."""
        dtype = torch.float32 if self.dtype in HALF_TYPES and self.happens(0.5) else self.dtype
        return lay_out(self, (self.normal(*shape) * scale).to(dtype))

    def optional(self, *shape: int) -> Optional[Tensor]:
        return self.parameter(*shape) if self.happens(0.75) else None

    def batch(self) -> int:
        return self.choice([0, 1, 1, 1, 2, 2, 3])

    def side(self, least: int = 1) -> int:
        """Of a map: mostly small, sometimes as small as can be or of many tiles."""
        return self.choice([least, least + 1, self.randint(least, least + 12), self.randint(least, least + 30)])

    def channels(self) -> int:
        return self.choice([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20, 31, 32, 33, 40, 65, 129])

    def small_enough(self, kernel_sizes: list[int], *sizes: int) -> int:
        """A kernel size for a map of these sizes for which the reference takes milliseconds."""
        positions = 1
        for size in sizes:
            positions *= max(size, 1)
        return self.choice([k for k in kernel_sizes if k * k * positions < 1_000_000] or [1])


def lay_out(draw: Draw, x: Tensor) -> Tensor:
    """The same numbers in another layout, or, if expanded, some of them."""
    if draw.happens(0.3) or x.ndim == 0:
        return x
    layouts = [strided, unaligned, expanded, negated]
    if x.ndim > 1:
        layouts += [transposed, sliced]
    if x.ndim == 4:
        layouts += [channels_last, channels_last, lambda x: sliced(channels_last(x))]
    return draw.choice(layouts)(x)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def sliced(x: Tensor) -> Tensor:
    """Of the second dimension."""
    format = torch.channels_last if x.ndim == 4 and not x.is_contiguous() else torch.contiguous_format
    whole = torch.cat([x, x, x], dim=1).contiguous(memory_format=format)
    return whole[:, x.shape[1] : 2 * x.shape[1]]


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def unaligned(x: Tensor) -> Tensor:
    """Not at a multiple of a vector's bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def expanded(x: Tensor) -> Tensor:
    """Every number of the first dimension is the same in memory."""
    return x[:1].expand_as(x)


def negated(x: Tensor) -> Tensor:
    """With a sign that is not in memory."""
    return torch.complex(x, -x).conj().imag if x.dtype in (torch.float32, torch.float64) else x


# ---------------------------------------------------------------------------------------------------------------------
# The operators


@dataclass
class Operator:
    """A public operator, and how to call it.

    Args:
        function: the public operator.
        draw: arguments that it takes.
        spoil: changes the arguments to wrong ones and returns the names of those that the error may name.
        tolerances: of relative errors.
        like_torch: whether PyTorch's operators say how exact a result can be in a dtype.
        terms: of exact arguments, results and the gradient of the output, norms of the terms of which sums are made that
            nearly cancel: each may be rounded.
        layout: of the output. By default, that of x.
    """

    function: Callable
    draw: Callable[[Draw], dict[str, Any]]
    spoil: Callable[[Draw, dict[str, Any]], list[str]]
    tolerances: dict[torch.dtype, float]
    like_torch: bool = False
    terms: Callable[[dict, dict, Tensor], dict[str, float]] = lambda arguments, results, grad_output: {}
    layout: Optional[torch.memory_format] = None


def draw_contmix(draw: Draw) -> dict[str, Any]:
    small, large = draw.choice([1, 3, 5, 7]), draw.choice([1, 3, 5, 7, 9, 13, 15])
    batch, height, width = draw.batch(), draw.side(max(small, large)), draw.side(max(small, large))
    groups, per_group, tokens = draw.randint(1, 3), draw.choice([1, 2, 8, 16, 19]), (draw.randint(1, 3), draw.randint(1, 3))
    channels = 2 * groups * draw.choice([1, 3, 8, 10, 14, 16, 17, 33])
    slots, keys = small**2 + large**2, tokens[0] * tokens[1]
    # Logits for which a softmax has more than one slot of weight, for a kernel of any size.
    scale = draw.choice([1.0, 0.25, 3])
    return dict(
        value=draw.tensor(batch, channels, height, width),
        query=draw.tensor(batch, groups * per_group, height, width),
        key=draw.tensor(batch, groups * per_group, *tokens),
        proj_weight=draw.parameter(slots, keys, scale=1 / (scale * (per_group * keys) ** 0.5)),
        proj_bias=draw.optional(slots),
        rpb_small=draw.optional(groups, 2 * small - 1, 2 * small - 1),
        rpb_large=draw.optional(groups, 2 * large - 1, 2 * large - 1),
        num_groups=groups,
        small_kernel_size=small,
        large_kernel_size=large,
        scale=scale,
    )


def spoil_contmix(draw: Draw, arguments: dict[str, Any]) -> list[str]:
    name = draw.choice([name for name, value in arguments.items() if value is not None])
    value = arguments[name]
    if name == 'scale':
        arguments[name] = draw.choice([None, str(value), [value], arguments['key']])
        return [name]
    if isinstance(value, int):
        sizes = [0, -1, -(2**63), 2**62, 2**63, 2**70, True, float(value), str(value), None, [value]]
        sizes.append(max(arguments['value'].shape[1], 2) if name == 'num_groups' else draw.choice([value + 1, value + 200]))
        arguments[name] = draw.choice(sizes)
        return [name, 'value']
    if name == 'value':
        arguments[name] = wrong_input(draw, value)
        return ['value', 'query']
    optional = name in ('proj_bias', 'rpb_small', 'rpb_large')
    fixed = [2, 3, 0] if name == 'query' else [0, 1] if name in ('key', 'proj_weight') else range(value.ndim)
    same_dtype = name in ('query', 'key')
    arguments[name] = wrong_tensor(draw, value, arguments['value'].dtype, fixed, optional, same_dtype)
    return [name, 'proj_weight'] if name == 'key' else [name]


def draw_map(draw: Draw) -> Tensor:
    return draw.tensor(draw.batch(), draw.channels(), draw.side(), draw.side())


def draw_depthwise(draw: Draw) -> dict[str, Any]:
    x = draw_map(draw)
    k = draw.small_enough([1, *range(3, 33, 2)], *x.shape)
    return dict(x=x, **kernel_and_bias(draw, x, k), dilation=draw.choice([1, 1, 2, 3, 4, 40, 2**31 - 1]))


def kernel_and_bias(draw: Draw, x: Tensor, k: int) -> dict[str, Optional[Tensor]]:
    channels = x.shape[1]
    return dict(weight=draw.parameter(channels, 1, k, k, scale=1 / k), bias=draw.optional(channels))


def draw_residual(draw: Draw) -> dict[str, Any]:
    x = draw_map(draw)
    return dict(x=x, **kernel_and_bias(draw, x, draw.small_enough([1, 3, 3, 3, 5, 7, 13], *x.shape)))


def draw_gelu(draw: Draw) -> dict[str, Any]:
    shape = [draw.choice([0, 1, 2, 3, 17, 40]) for _ in range(draw.randint(0, 5))]
    return dict(x=draw.choice([draw_map(draw), draw.tensor(*shape)]))


def spoil_gelu(draw: Draw, arguments: dict[str, Any]) -> list[str]:
    x = arguments['x']
    arguments['x'] = draw.choice([None, 1.0, 'x', x.tolist(), object(), wrong_dtype(draw, x)])
    return ['x']


def draw_response_norm(draw: Draw) -> dict[str, Any]:
    x = draw_map(draw)
    return dict(x=x, gamma=draw.parameter(x.shape[1]), beta=draw.parameter(x.shape[1]), eps=draw.choice([1e-6, 1e-3, 1]))


def draw_layer_norm(draw: Draw) -> dict[str, Any]:
    x = draw_map(draw)
    return dict(x=x, weight=draw.parameter(x.shape[1]), bias=draw.parameter(x.shape[1]), eps=draw.choice([1e-6, 1e-3, 1]))


def draw_residual_norm(draw: Draw) -> dict[str, Any]:
    norm = draw_response_norm(draw)
    x = norm.pop('x')
    inplace = draw.happens(0.3)
    if inplace and 0 in x.stride():
        x = x.clone()  # PyTorch refuses to write to an expanded tensor
    return dict(x=x, **kernel_and_bias(draw, x, 3), **norm, inplace=inplace)


def draw_gelu_norm(draw: Draw) -> dict[str, Any]:
    norm = draw_response_norm(draw)
    x = norm.pop('x')
    return dict(x=x, **kernel_and_bias(draw, x, 3), **norm)


def draw_branches(draw: Draw) -> dict[str, Any]:
    # Over a few values a norm's gradient is a small difference of large numbers, which needs the digits of float64.
    least = 2 if draw.dtype == torch.float64 else 8
    x = draw.tensor(max(draw.batch(), 1), draw.channels(), draw.side(least), draw.side(least + 1))
    largest = draw.small_enough([1, 3, 5, 7, 9, 13, 17], *x.shape, 4)
    kernel_sizes, dilations = [largest], [1]
    for _ in range(draw.randint(0, 7) if draw.happens(0.2) else draw.randint(0, 3)):
        k = draw.choice([k for k in (1, 3, 5, 7, 9) if k <= largest])
        kernel_sizes.append(k)
        dilations.append(draw.randint(1, (largest - 1) // (k - 1)) if k > 1 else draw.choice([1, 2, 2**31 - 1]))
    channels = x.shape[1]
    return dict(
        x=x,
        weights=[draw.parameter(channels, 1, k, k, scale=1 / k) for k in kernel_sizes],
        norm_weights=[draw.parameter(channels) for _ in dilations],
        norm_biases=[draw.parameter(channels) for _ in dilations],
        dilations=dilations,
        eps=draw.choice([1e-5, 1e-3]),
    )


def draw_given_branches(draw: Draw) -> dict[str, Any]:
    arguments = draw_branches(draw)
    x, branches = arguments['x'], len(arguments['weights'])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, variance = (draw.normal(branches, x.shape[1]).to(dtype) for _ in range(2))
    return dict(arguments, mean=mean, variance=variance.square() + 0.1)


def terms_of_branches(arguments: dict, results: dict, grad_output: Tensor) -> dict[str, float]:
    """Of the gradients of kernels: a norm takes out what scales a kernel, of a single tap all but eps leaves."""
    terms = {}
    products = arguments['x'].norm(dim=(2, 3)).norm(dim=0) * grad_output.norm(dim=(2, 3)).norm(dim=0)  # (C)
    for i, (weight, norm_weight) in enumerate(zip(arguments['weights'], arguments['norm_weights'])):
        scale = norm_weight / (results['output 2'][i] + arguments['eps']).sqrt()
        terms[f'gradient of weights[{i}]'] = (scale * products).norm().item() * weight.shape[-1]
    return terms


def spoil_depthwise(draw: Draw, arguments: dict[str, Any], few_values: bool = False) -> list[str]:
    """For all operators of a map x with parameters. For some, few values for each channel are wrong."""
    name = draw.choice([name for name, value in arguments.items() if value is not None])
    value = arguments[name]
    if isinstance(value, Tensor):
        if name == 'x':
            arguments[name] = wrong_input(draw, value)
            if few_values and draw.happens(0.2):
                arguments[name] = draw.choice([value[:0], value[:1, :, :1, :1]])
            return ['x', *(other for other in arguments if other in ('weight', 'weights', 'gamma'))]
        arguments[name] = wrong_tensor(draw, value, arguments['x'].dtype, range(value.ndim), optional=name == 'bias')
    elif name in ('eps', 'inplace'):
        arguments[name] = draw.choice([None, 'wrong', [value], object(), 1j if name == 'eps' else 1])
    elif name == 'dilation':
        arguments[name] = draw.choice(WRONG_DILATIONS)
    else:
        arguments[name] = wrong_list(draw, name, value, arguments['x'].dtype)
    return [name, 'weights'] if name == 'dilations' else [name]


WRONG_DILATIONS = [0, -1, -(2**63), 2**31, 2**62, 2**63, 2**70, True, 1.5, '1', None, [1]]


def wrong_list(draw: Draw, name: str, values: list, dtype: torch.dtype) -> Any:
    """For an argument of branch norms."""
    at = draw.randrange(len(values))
    choice = draw.choice(['shorter', 'longer', 'no list', 'element', 'element'])
    if choice == 'shorter':
        return values[:-1]
    if choice == 'longer':
        return values * 9
    if choice == 'no list':
        return draw.choice([None, 1, 1.5, object()])
    if name == 'dilations':
        # The first branch may have none. For the others, the first one's reach decides.
        element = draw.choice([*WRONG_DILATIONS, 2] if at == 0 else WRONG_DILATIONS)
    else:
        element = wrong_tensor(draw, values[at], dtype, range(values[at].ndim), optional=False)
    return [*values[:at], element, *values[at + 1 :]]


def wrong_input(draw: Draw, x: Tensor) -> Any:
    """For the first argument, which the others are compared with."""
    channels = torch.cat([x, x[:, :1]], dim=1)
    choices = [None, 1.0, 'x', x.tolist(), object(), wrong_dtype(draw, x), *other_ranks(x), channels]
    return draw.choice(choices)


def wrong_tensor(draw: Draw, x: Tensor, dtype: torch.dtype, fixed: Any, optional: bool, same_dtype: bool = False) -> Any:
    """For a tensor beside an input of the dtype.

    Args:
        fixed: its dimensions whose size is given by other arguments.
        same_dtype: whether it must have this dtype also beside half types.
    """
    kind = draw.choice(['type', 'dtype', 'floating dtype', 'rank', 'size', 'size', 'device'])
    if kind == 'type':
        return draw.choice([1.0, 'x', x.tolist(), object(), *([] if optional else [None])])
    if kind == 'dtype':
        return wrong_dtype(draw, x)
    if kind == 'floating dtype':
        others = {torch.float16, torch.bfloat16, torch.float32, torch.float64} - {dtype}
        if dtype in HALF_TYPES and not same_dtype:
            others -= {torch.float32}
        return x.to(draw.choice(sorted(others, key=str)))
    if kind == 'rank':
        return draw.choice(other_ranks(x))
    if kind == 'device':
        return x.to('meta')
    axis = draw.choice(list(fixed))
    smaller = x.narrow(axis, 0, x.shape[axis] - 1) if x.shape[axis] else x
    larger = torch.cat([x, x.new_zeros([1 if i == axis else n for i, n in enumerate(x.shape)])], dim=axis)
    return draw.choice([smaller, larger]) if x.shape[axis] else larger


def wrong_dtype(draw: Draw, x: Tensor) -> Tensor:
    dtypes = [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64]
    return x.to(draw.choice(dtypes))


def other_ranks(x: Tensor) -> list[Tensor]:
    return [x[None], x.sum(), x.select(0, 0) if x.shape[0] else x[..., None]]


def draw_conv2d(draw: Draw) -> dict[str, Any]:
    if draw.dtype == torch.bfloat16:
        # Half types are PyTorch's convolution. Its gradients in bfloat16 are wrong for some strides and dilations (2.11).
        draw.dtype = torch.float32
    k, groups = draw.choice([1, 1, 1, 3, 3, 5]), draw.choice([1, 1, 1, 2])
    # Weights of which some are large for the map.
    height, width = draw.choice([(1, 1), (draw.randint(1, 3), draw.randint(1, 3)), (draw.side(), draw.side())])
    inputs, outputs = (groups * draw.choice([1, 3, 8, 17, 32, 48]) for _ in range(2))
    arguments = dict(
        x=draw.tensor(draw.batch(), inputs, height, width),
        weight=lay_out(draw, (draw.normal(outputs, inputs // groups, k, k) / k).to(draw.dtype)),
        bias=lay_out(draw, draw.normal(outputs).to(draw.dtype)) if draw.happens(0.7) else None,
        groups=groups,
    )
    stride = draw.choice([(1, 1), (1, 1), (2, 2), (1, 2), [2, 1], 1, 2, (2**40, 1)])
    dilation = draw.choice([(1, 1), (1, 1), (1, 1), (2, 2), 1, 2])
    reach = (k - 1) * max(dilation if isinstance(dilation, int) else dilation[0], 1)
    paddings = [padding for padding in (0, k // 2, k // 2, k // 2, k) if 2 * padding + min(height, width) > reach]
    padding = draw.choice(paddings or [reach])
    arguments.update(
        stride=stride, dilation=dilation, padding=draw.choice([padding, (padding, padding), (padding, padding)])
    )
    if stride in (1, (1, 1)) and draw.happens(0.1):
        arguments['padding'] = 'same'
    for name, default in dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1).items():
        if arguments[name] == default and draw.happens(0.5):
            del arguments[name]
    return arguments


def spoil_conv2d(draw: Draw, arguments: dict[str, Any]) -> list[str]:
    name = draw.choice([name for name, value in arguments.items() if value is not None])
    value = arguments[name]
    if isinstance(value, Tensor):
        arguments[name] = wrong_tensor(draw, value, value.dtype, range(min(value.ndim, 2)), optional=name == 'bias')
    else:
        wrong = [0, -1, (0, 1), (1, 0), (0, 0), (1, -1), (1, 1, 1), (), 1.5, (1.5, 1), 'wrong', 7, 2**63]
        arguments[name] = draw.choice(wrong)
    return []


OPERATORS = {
    'contmix': Operator(ops.contmix, draw_contmix, spoil_contmix, TOLERANCES_OF_CONTMIX),
    'conv2d': Operator(ops.conv2d, draw_conv2d, spoil_conv2d, TOLERANCES, like_torch=True),
    'depthwise_conv2d': Operator(ops.depthwise_conv2d, draw_depthwise, spoil_depthwise, TOLERANCES),
    'residual_depthwise_conv2d': Operator(ops.residual_depthwise_conv2d, draw_residual, spoil_depthwise, TOLERANCES),
    'gelu': Operator(ops.gelu, draw_gelu, spoil_gelu, TOLERANCES),
    'global_response_norm': Operator(ops.global_response_norm, draw_response_norm, spoil_depthwise, TOLERANCES),
    'layer_norm': Operator(
        ops.layer_norm, draw_layer_norm, spoil_depthwise, TOLERANCES, like_torch=True, layout=torch.channels_last
    ),
    'residual_depthwise_norm': Operator(ops.residual_depthwise_norm, draw_residual_norm, spoil_depthwise, TOLERANCES),
    'gelu_residual_depthwise_norm': Operator(ops.gelu_residual_depthwise_norm, draw_gelu_norm, spoil_depthwise, TOLERANCES),
    'branch_norms': Operator(
        ops.branch_norms, draw_branches, partial(spoil_depthwise, few_values=True), TOLERANCES, True, terms_of_branches
    ),
    'branch_norms_given': Operator(ops.branch_norms_given, draw_given_branches, spoil_depthwise, TOLERANCES, True),
    'sync_branch_norms': Operator(
        ops.sync_branch_norms, draw_branches, spoil_depthwise, TOLERANCES, True, terms_of_branches
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def call(name: str, number: int, device: str = 'cpu') -> None:
    """Make a call of the operator and check what it does, on a device if the call is a right one.

    Raises:
        AssertionError: the operator does something else than its contract says.
    """
    operator, draw = OPERATORS[name], Draw(f'{name} {number}')
    arguments = operator.draw(draw)
    with threads(draw.choice([1, 1, 2, 3])), process_group() if name.startswith('sync') else contextlib.nullcontext():
        if not draw.happens(WRONG_CALLS):
            check_results(operator, draw, arguments, device)
            return
        names = operator.spoil(draw, arguments)
        if draw.happens(0.5) and arguments.get('inplace') is not True:
            arguments = replace_leaves(arguments, lambda _, x: x.detach().requires_grad_(x.is_floating_point()))
        if name == 'conv2d':
            check_as_pytorch(arguments)
        else:
            check_error(operator, arguments, names)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_error(operator: Operator, arguments: dict[str, Any], names: list[str]) -> None:
    """By the compiled operator and by the reference."""
    for context in (contextlib.nullcontext(), use_references()):
        with context:
            try:
                out = operator.function(**arguments)
            except (TypeError, ValueError) as error:
                assert re.search(rf'\b({"|".join(names)})\b', str(error)), f'the error does not name {names}: {error}'
            else:
                raise AssertionError(f'a wrong call returned {describe(out)}; wrong is one of {names}')


def check_as_pytorch(arguments: dict[str, Any]) -> None:
    """What PyTorch's operator refuses raises the same error."""

    def outcome(function: Callable) -> Any:
        try:
            return function(**arguments).shape
        except Exception as error:
            return type(error)

    expected = outcome(lambda x, weight, **others: F.conv2d(x, weight, **others))
    if isinstance(expected, type):
        got = outcome(ops.conv2d)
        assert got is expected, f'{got} is not what PyTorch does: {expected}'


def leaves_of(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, by name, also those in lists."""
    for name, value in arguments.items():
        for i, each in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(each, Tensor):
                yield (f'{name}[{i}]' if isinstance(value, list) else name), each


def replace_leaves(arguments: dict[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    changed = iter([change(name, tensor) for name, tensor in leaves_of(arguments)])

    def replaced(value: Any) -> Any:
        return next(changed) if isinstance(value, Tensor) else value

    return {
        name: [replaced(each) for each in value] if isinstance(value, list) else replaced(value)
        for name, value in arguments.items()
    }


def results(function: Callable, arguments: dict[str, Any], wanted: list[str], grad_output: Optional[Tensor]) -> dict:
    """Outputs, and gradients of the wanted tensors, by name."""
    leaves = replace_leaves(arguments, lambda name, x: x.detach().requires_grad_(name in wanted))
    out = function(**leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    found = {f'output {i}' if i else 'output': each.detach() for i, each in enumerate(outputs)}
    if wanted:
        inputs = [leaf for name, leaf in leaves_of(leaves) if name in wanted]
        grads = torch.autograd.grad(outputs[0], inputs, grad_output.to(outputs[0].dtype))
        found.update(zip((f'gradient of {name}' for name, _ in leaves_of(leaves) if name in wanted), grads))
    return found


def move(x: Tensor, device: str) -> Tensor:
    """To a device, with its layout: Tensor.to gives a part of a larger tensor dense strides."""
    if x.device.type == device:
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
    moved = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    return torch._neg_view(moved) if x.is_neg() else moved


def check_results(operator: Operator, draw: Draw, arguments: dict[str, Any], device: str = 'cpu') -> None:
    names = [name for name, _ in leaves_of(arguments)]
    inplace = arguments.get('inplace', False)
    wanted = [] if inplace or draw.happens(0.4) else draw.sample(names, draw.randint(1, len(names)))
    exact = replace_leaves(arguments, lambda name, x: x.detach().double())
    exact.update(dict(inplace=False) if inplace else {})
    with use_references():
        shape = operator.function(**exact)
        shape = (shape[0] if isinstance(shape, tuple) else shape).shape
    grad_output = draw.tensor(*shape)
    with use_references():
        expected = results(operator.function, exact, wanted, grad_output.double())

    mode = contextlib.nullcontext() if wanted else draw.choice([torch.no_grad, torch.inference_mode])()
    before = {name: x.clone() for name, x in leaves_of(arguments)}
    with mode:
        there = replace_leaves(arguments, lambda _, x: move(x, device))
        got = {name: x.cpu() for name, x in results(operator.function, there, wanted, move(grad_output, device)).items()}
    for name, x in leaves_of(there):
        x = x.cpu()
        assert (name == 'x' and inplace) or torch.equal(x, before[name]), f'{name} was changed'

    tolerance = operator.tolerances[draw.dtype]
    least = 0.5 * grad_output.double().norm().item()
    errors = {name: distance(got[name], each, least) for name, each in expected.items()}
    limits = dict.fromkeys(errors, tolerance)
    if any(error > tolerance for error in errors.values()):
        # Numbers that cancel: as exact as these inputs allow in this dtype.
        epsilon = torch.finfo(draw.dtype).eps
        with use_references():
            rounded = replace_leaves(exact, lambda _, x: x * (1 + epsilon * draw.normal(*x.shape)))
            others = [results(operator.function, rounded, wanted, grad_output.double())]
            if operator.like_torch:
                others.append(results(operator.function, arguments, wanted, grad_output))
        terms = operator.terms(exact, expected, grad_output.double())
        for name, each in expected.items():
            limits[name] = max(tolerance, 4 * max(distance(other[name], each, least) for other in others))
            limits[name] = max(limits[name], epsilon * terms.get(name, 0) / max(each.norm().item(), least))
    check_kinds(operator, draw.dtype, arguments, got)
    for name, error in errors.items():
        assert error <= limits[name], f'{name} has a relative error of {error:.2g}, more than {limits[name]:.2g}'


def distance(got: Tensor, expected: Tensor, least: float) -> float:
    """The norm of the difference, divided by the norm of the expected tensor, or by ``least`` if that is larger."""
    assert got.shape == expected.shape, f'{tuple(got.shape)} is not {tuple(expected.shape)}'
    scale = max(expected.norm().item(), least)
    difference = (got.double() - expected).norm().item()
    return difference / scale if scale else difference


def check_kinds(operator: Operator, dtype: torch.dtype, arguments: dict[str, Any], got: dict[str, Tensor]) -> None:
    """Outputs have the dtype and the layout of the input, gradients the dtype of their tensor."""
    x, out = next(leaves_of(arguments))[1], got['output']
    assert out.dtype == dtype, out.dtype
    for name, tensor in leaves_of(arguments):
        gradient = got.get(f'gradient of {name}')
        assert gradient is None or gradient.dtype == tensor.dtype, (name, gradient.dtype)
    if operator.function is not ops.conv2d and 'inplace' not in arguments:
        for format in [operator.layout] if operator.layout else (torch.contiguous_format, torch.channels_last):
            if operator.layout or x.is_contiguous(memory_format=format):
                assert out.is_contiguous(memory_format=format), (x.stride(), out.stride())
                break


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        shape = f'{str(value.dtype).removeprefix("torch.")}{tuple(value.shape)}, strides {value.stride()}'
        return shape if value.device.type == 'cpu' else f'{shape}, {value.device}'
    if isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) for each in value):
        return f'[{"; ".join(map(describe, value))}]'
    return f'{value!r:.200}'


def run(
    name: str, first: int, end: int, at_call: Optional[Callable] = None, device: str = 'cpu'
) -> Iterator[tuple[int, str]]:
    """The calls from `first` on, before `end`: numbers and tracebacks of those that go wrong."""
    for number in range(first, end):
        if at_call:
            at_call(number)
        try:
            call(name, number, device)
        except Exception:
            yield number, traceback.format_exc(limit=-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('operator', choices=OPERATORS)
    parser.add_argument('number', type=int, help='of the call, or of the first one')
    parser.add_argument('end', type=int, nargs='?', help='number after the last call (default: one call)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--at', type=Path, help='a file for the number of the call that runs, where a later run goes on')
    options = parser.parse_args()
    first, end = options.number, options.number + 1 if options.end is None else options.end
    at_call = None
    if options.at:
        file = os.open(options.at, os.O_RDWR | os.O_CREAT)
        fcntl.flock(file, fcntl.LOCK_EX)  # an interrupted run may have left a process that still makes these calls
        first = max(first, int(os.read(file, 20) or first))
        at_call = partial(write_number, file)
    found = False
    torch.backends.cudnn.allow_tf32 = False
    for number, message in run(options.operator, first, end, at_call, options.device):
        found = True
        print(f'{options.operator} {number}\n{message}', flush=True)
    if at_call:
        at_call(end)
    sys.exit(found)


def write_number(file: int, number: int) -> None:
    os.pwrite(file, f'{number:<20}'.encode(), 0)


if __name__ == '__main__':
    main()
