"""Whether overlock_mm.ops.depthwise_conv2d is ever slower than PyTorch's convolution, and how far both are from the floor.

    python tools/benchmarks/bench_depthwise.py --output depthwise.json --markdown depthwise.md --plot depthwise.png
    python tools/benchmarks/bench_depthwise.py --output depthwise.json --resume    # and on, after an interruption

What is measured (--what):

    zoo      the depth-wise shapes of the variants: large kernels of stages 1 to 4, the 3x3 of the blocks, of their MLPs and
             of the fusion. Of shapes with the same kernel, those that differ enough in size (--spacing; 1: every shape)
    sweep    kernels 3, 5, ..., 31 on one map (--kernels, --sweep-shape)
    dilated  the dilated branches that run beside the large kernels, on that map
    norms    branch_norms, beside the sum of the branches through a batch norm each (F.conv2d and F.batch_norm with the
             statistics of the batch, as nn.BatchNorm2d computes it in training)

Implementations, each of them forward without gradients, and forward with backward (the gradients of all arguments):

    ours, ours-channels-last     the operator as it is called, on a contiguous map and on one in channels_last
    torch, torch-channels-last   F.conv2d on the same maps
    floor                        the larger of two times: bytes that must move over the bandwidth of a large copy, and
                                 multiply-adds that must be done (of taps within the map) over the rate of a large matrix
                                 product

'torch / ours' compares the same layout of the map: below 1x, ours is slower. '=' stands where depthwise_conv2d itself
chooses PyTorch's operator, as it always does on a GPU: there the table compares layouts. kept counts the bytes of the
storages that the forward keeps for the backward, arguments and output among them.

All results are checked against PyTorch's on the contiguous map, output and gradients, before times are taken. The
implementations take turns, so that a change of the machine's speed meets them all; a ratio is one round's other time over
ours. Numbers are medians, with the first and third quartile. What is slow takes fewer rounds (--seconds).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from bench_contmix import MEMORY_FORMATS, TOLERANCES, higher
from contmix_report import Table, as_markdown, as_text, machine_line, number, times, with_spread
from measuring import (
    DTYPES,
    Skipped,
    add_machine_options,
    copy_rate,
    image_size,
    is_out_of_memory,
    measure,
    positive_int,
    product_rate,
    resolve_device,
    saved_bytes,
    set_up_machine,
    spread,
    synchronize,
    worst_error,
    write_json,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from overlock_mm.ops import branch_norms, depthwise_conv2d, has_depthwise

WHAT = ('zoo', 'sweep', 'dilated', 'norms')
MODES = ('forward', 'forward_backward')
IMPLEMENTATIONS = ('ours', 'ours-channels-last', 'torch', 'torch-channels-last')
#: Ours, and PyTorch's on a map of the same layout.
PAIRS = {'ours': 'torch', 'ours-channels-last': 'torch-channels-last'}
#: What the network is made of: needs neither mmengine nor mmcv, unlike the network.
CHANNELS = {'xt': (56, 112, 256, 336), 't': (64, 128, 256, 512), 's': (64, 128, 320, 512), 'b': (80, 160, 384, 576)}
KERNEL_SIZES = (17, 15, 13, 7)
MLP_RATIO, SUB_MLP_RATIO = 4, 3
#: (kernel size, dilation) of the branches beside the large kernels.
BRANCHES = {
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
}
#: A ratio below this is listed.
LIMIT = 0.95
#: A measurement repeats a shorter call until it has lasted this long, in seconds.
LEAST_TIME = 2e-3


# ---------------------------------------------------------------------------------------------------- what is measured


@dataclass
class Case:
    """A convolution, or a sum of branches, of maps (batch, channels, height, width)."""

    kind: str
    channels: int
    height: int
    width: int
    kernel_size: int
    dilation: int = 1
    batch: int = 1
    dtype: str = 'float32'
    names: list[str] = field(default_factory=list)  #: where in the zoo

    @property
    def key(self) -> tuple:
        """Cases that differ in nothing else are the same."""
        return self.kind, self.channels, self.height, self.width, self.kernel_size, self.dilation, self.batch, self.dtype

    @property
    def elements(self) -> int:
        return self.batch * self.channels * self.height * self.width

    @property
    def label(self) -> str:
        dilation = f' dilated {self.dilation}' if self.dilation > 1 else ''
        batch = f'{self.batch}x' if self.batch > 1 else ''
        where = f' ({self.names[0]}{", ..." if len(self.names) > 1 else ""})' if self.names else ''
        size = f'{self.kernel_size}x{self.kernel_size}{dilation}'
        return f'{size}, {batch}{self.channels}x{self.height}x{self.width}, {self.dtype}{where}'


def case_of(recorded: dict[str, Any]) -> Case:
    return Case(**recorded['case'])


def zoo_shapes(arch: str, size: tuple[int, int]) -> list[tuple[str, int, int, int, int]]:
    """What is there, channels, height, width and kernel size of the depth-wise convolutions at one image size."""
    channels, shapes = CHANNELS[arch], []
    context = channels[3] // 4
    for stage, (count, kernel_size) in enumerate(zip(channels, KERNEL_SIZES), 1):
        height, width = (-(-side // 2 ** (stage + 1)) for side in size)
        parts = [('large', count, kernel_size), ('block', count, 3), ('mlp', MLP_RATIO * count, 3)]
        if stage >= 3:
            parts += [('fusion', count + context, 3), ('sub mlp', SUB_MLP_RATIO * count, 3)]
        for name, number_of_channels, k in parts:
            shapes.append((f'{arch} stage {stage} {name}, {size[0]}x{size[1]}', number_of_channels, height, width, k))
    return shapes


def zoo_cases(kind: str, sizes: list[tuple[int, int]], options: argparse.Namespace) -> list[Case]:
    """Convolutions of the network, or with kind 'norms' its large kernels; each shape once."""
    found: dict[tuple, Case] = {}
    for size in sizes:
        for arch in options.arch:
            for name, channels, height, width, kernel_size in zoo_shapes(arch, size):
                if kind == 'norms' and (kernel_size not in BRANCHES or options.batch * height * width == 1):
                    continue  # one position has no statistics
                case = Case(kind, channels, height, width, kernel_size, batch=options.batch, dtype=options.dtype)
                found.setdefault(case.key, case).names.append(name)
    return sorted(found.values(), key=lambda case: (-case.kernel_size, case.elements, case.key))


def spaced(cases: list[Case], spacing: float) -> list[Case]:
    """The largest and the smallest of each kernel size, and between them those that are ``spacing`` times another's size.

    Channels that do not fill vectors are apart from those that do.
    """
    if spacing <= 1:
        return cases
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.kernel_size, case.channels % 16 == 0), []).append(case)
    chosen = set()
    for group in groups.values():
        last = math.inf
        for case in sorted(group, key=lambda case: -case.elements):
            if case.elements * spacing <= last or case is min(group, key=lambda case: case.elements):
                chosen.add(case.key)
                last = case.elements
    return [case for case in cases if case.key in chosen]


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    cases = []
    channels, height, width = options.sweep_shape
    common = dict(batch=options.batch, dtype=options.dtype)
    if 'zoo' in options.what:
        cases += spaced(zoo_cases('zoo', options.size, options), options.spacing)
    if 'sweep' in options.what:
        cases += [Case('sweep', channels, height, width, k, **common) for k in sorted({*options.kernels})]
    if 'dilated' in options.what:
        dilated = {branch for branches in BRANCHES.values() for branch in branches if branch[1] > 1}
        cases += [Case('dilated', channels, height, width, k, d, **common) for k, d in sorted(dilated, reverse=True)]
    if 'norms' in options.what:
        cases += spaced(zoo_cases('norms', options.norms_size, options), options.spacing)
    return cases


# ----------------------------------------------------------------------------------------------------- implementations


def torch_conv2d(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])


def torch_branches(x: Tensor, branches: tuple, parameters: tuple[Tensor, ...]) -> Tensor:
    """The sum of the branches, each through a batch norm of its own, one after the other."""
    out: Any = 0
    for i, (_, dilation) in enumerate(branches):
        weight, norm_weight, norm_bias = parameters[3 * i : 3 * i + 3]
        y = torch_conv2d(x, weight, None, dilation)
        out = out + F.batch_norm(y, None, None, norm_weight, norm_bias, training=True)
    return out


def our_branches(x: Tensor, branches: tuple, parameters: tuple[Tensor, ...]) -> Tensor:
    weights, norm_weights, norm_biases = parameters[::3], parameters[1::3], parameters[2::3]
    return branch_norms(x, weights, norm_weights, norm_biases, [dilation for _, dilation in branches])[0]


def branches_of(case: Case) -> tuple[tuple[int, int], ...]:
    return ((case.kernel_size, 1), *BRANCHES[case.kernel_size])


def function_of(name: str, case: Case, device: torch.device) -> Callable[..., Tensor]:
    """A function of the tensors that :func:`make_inputs` makes.

    Raises:
        Skipped: it is not there.
    """
    ours = name in PAIRS
    if case.kind == 'norms':
        branches = branches_of(case)
        if ours and not has_depthwise(torch.empty(0, device=device)):
            raise Skipped(f'no compiled branch_norms for {device.type}')
        sum_of = our_branches if ours else torch_branches
        return lambda x, *parameters: sum_of(x, branches, parameters)
    conv2d = depthwise_conv2d if ours else torch_conv2d
    return lambda x, weight, bias: conv2d(x, weight, bias, case.dilation)


def make_inputs(case: Case, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Random arguments, the map first, and a gradient of the output; norms' parameters are float32 beside half maps."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[case.dtype]

    def random(*shape: int, dtype: torch.dtype = dtype, mean: float = 0.0, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale + mean).to(dtype)

    shape = (case.batch, case.channels, case.height, case.width)
    inputs = [random(*shape)]
    if case.kind == 'norms':
        of_norms = torch.promote_types(dtype, torch.float32)
        for k, _ in branches_of(case):
            inputs.append(random(case.channels, 1, k, k, scale=1 / k))
            inputs.append(random(case.channels, dtype=of_norms, mean=1.0, scale=0.1))
            inputs.append(random(case.channels, dtype=of_norms))
    else:
        k = case.kernel_size
        inputs += [random(case.channels, 1, k, k, scale=1 / k), random(case.channels)]
    return inputs, random(*shape)


def laid_out(name: str, inputs: list[Tensor], grad: Tensor) -> tuple[list[Tensor], Tensor]:
    """The map and the gradient in the layout of an implementation; arguments want gradients."""
    memory_format = MEMORY_FORMATS['channels_last' if name.endswith('channels-last') else 'contiguous']
    inputs = [inputs[0].contiguous(memory_format=memory_format), *inputs[1:]]
    return [each.detach().requires_grad_() for each in inputs], grad.contiguous(memory_format=memory_format)


def run_forward(function: Callable, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [function(*inputs)]


def run_forward_backward(function: Callable, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(function(*inputs), inputs, grad))


RUN = {'forward': run_forward, 'forward_backward': run_forward_backward}


class _Namespaces(TorchDispatchMode):
    """Which libraries' operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def is_pytorchs(run: Callable, function: Callable, inputs: list[Tensor]) -> bool:
    """Whether an implementation of ours chooses PyTorch's operator."""
    with _Namespaces() as namespaces, torch.set_grad_enabled(run is run_forward_backward):
        function(*inputs)
    return 'overlock_mm' not in namespaces.seen


# ------------------------------------------------------------------------------------------------------------ ceilings


def taps_in_map(side: int, kernel_size: int, dilation: int) -> int:
    """Of a row of positions and a row of a kernel, the pairs that meet within the map."""
    return sum(max(0, side - abs(offset) * dilation) for offset in range(-(kernel_size // 2), kernel_size // 2 + 1))


def work(case: Case) -> dict[str, dict[str, int]]:
    """The least that a convolution takes: taps within the map, each operand read once and each result written once."""
    itemsize = DTYPES[case.dtype].itemsize
    taps = math.prod(taps_in_map(side, case.kernel_size, case.dilation) for side in (case.height, case.width))
    multiply_adds = case.batch * case.channels * taps
    maps, parameters = case.elements * itemsize, case.channels * (case.kernel_size**2 + 1) * itemsize
    forward = dict(multiply_adds=multiply_adds, bytes=2 * maps + parameters)
    # The backward reads the map, the gradient and the kernel, and writes the gradients of map, kernel and bias.
    weights = case.channels * case.kernel_size**2 * itemsize
    backward = dict(multiply_adds=2 * multiply_adds, bytes=3 * maps + weights + parameters)
    return dict(forward=forward, forward_backward={key: forward[key] + backward[key] for key in forward})


def measure_ceilings(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes and multiply-adds a second. Those that the options give are not measured."""
    device, dtype = options.device, DTYPES[options.dtype]
    if device.type == 'cpu' and dtype.itemsize == 2:
        dtype = torch.float32  # in which the kernels compute
    rate = product_rate(device, dtype) if options.flops is None else options.flops * 1e12 / 2
    bandwidth = copy_rate(device) if options.bandwidth is None else options.bandwidth * 1e9
    return dict(bytes_per_second=bandwidth, multiply_adds_per_second={options.dtype: rate})


def set_floors(record: dict[str, Any]) -> None:
    """Of the convolutions by the record's ceilings, and how far above them the implementations are."""
    ceilings = record['ceilings']
    for case in record['cases']:
        rate = ceilings['multiply_adds_per_second'].get(case['case']['dtype'])
        if 'work' not in case or rate is None:
            continue
        case['floor'] = {}
        for mode, amount in case['work'].items():
            parts = dict(bytes=amount['bytes'] / ceilings['bytes_per_second'], multiply_adds=amount['multiply_adds'] / rate)
            case['floor'][mode] = dict(seconds=max(parts.values()), **parts)
            for result in case['implementations'].values():
                if mode in result:
                    result[mode]['over_floor'] = result[mode]['median'] / case['floor'][mode]['seconds']


# ----------------------------------------------------------------------------------------------------------- one case


def run_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Check and measure all implementations at one shape, in turns."""
    device = options.device
    inputs, grad = make_inputs(case, device)
    exact = torch.promote_types(DTYPES[case.dtype], torch.float32)
    results: dict[str, Any] = {name: {} for name in IMPLEMENTATIONS}
    calls: dict[tuple[str, str], Callable[[int], Any]] = {}
    counts: dict[tuple[str, str], int] = {}
    # One copy for each layout: where a map lies in memory makes up to a quarter of a small kernel's time.
    owned: dict[str, tuple[list[Tensor], Tensor]] = {}
    expected: Optional[list[Tensor]] = None
    if exact != DTYPES[case.dtype]:
        # The yardstick of the results: the same numbers in float32, where half types round on the way.
        raised, raised_grad = laid_out('torch', [each.to(exact) for each in inputs], grad.to(exact))
        function = function_of('torch', case, device)
        expected = [each for run in RUN.values() for each in run(function, raised, raised_grad)]
        del raised, raised_grad
    for name in ('torch', *(name for name in IMPLEMENTATIONS if name != 'torch')):
        result = results[name]
        try:
            function = function_of(name, case, device)
            layout = PAIRS.get(name, name)
            if layout not in owned:
                owned[layout] = laid_out(layout, inputs, grad)
            own = owned[layout]
            got = []
            for mode, run in RUN.items():

                def call(i: int, run=run, function=function, own=own) -> Any:
                    return run(function, *own)

                begin = time.perf_counter()
                got += call(0)
                synchronize(device)
                seconds = time.perf_counter() - begin
                if seconds < 0.05:  # not that of a first call
                    seconds = measure(call, 1, device)
                calls[name, mode] = call
                counts[name, mode] = max(1, round(LEAST_TIME / max(seconds, 1e-7)))
                result[mode] = {}
                if name in PAIRS and case.kind != 'norms':
                    result[mode]['pytorch'] = is_pytorchs(run, function, own[0])
            if expected is None and name == 'torch':
                expected = got
            result['error'] = worst_error(got, expected) if expected else None
            del got
            if case.kind == 'norms':
                result['saved_bytes'] = saved_bytes(lambda function=function, own=own: function(*own[0]), {})
        except Exception as error:  # whatever goes wrong with one, the others are measured
            for mode in MODES:
                calls.pop((name, mode), None)
            results[name] = dict(skipped=f'{error}')
            if not isinstance(error, Skipped):
                reason = f'{type(error).__name__}: {error}'.splitlines()[0]
                results[name] = dict(skipped='out of memory' if is_out_of_memory(error) else reason, failed=True)
    del expected

    samples = take_turns(calls, counts, options)
    for (name, mode), taken in samples.items():
        results[name][mode].update(spread(list(taken.values())), calls=counts[name, mode], rounds=len(taken))
    for ours, theirs in PAIRS.items():
        for mode in MODES:
            if (ours, mode) in samples and (theirs, mode) in samples:
                both = samples[ours, mode].keys() & samples[theirs, mode].keys()
                ratios = [samples[theirs, mode][i] / samples[ours, mode][i] for i in sorted(both)]
                results[ours][mode]['ratio'] = spread(ratios)
    recorded = dict(case=asdict(case), implementations=results)
    if case.kind != 'norms':
        recorded['work'] = work(case)
    return recorded


def take_turns(
    calls: dict[tuple[str, str], Callable[[int], Any]], counts: dict[tuple[str, str], int], options: argparse.Namespace
) -> dict[tuple[str, str], dict[int, float]]:
    """Seconds of each call by rounds. One that has taken its seconds takes part in no more of them, but in the first."""
    samples: dict[tuple[str, str], dict[int, float]] = {each: {} for each in calls}
    order = list(calls)
    gc.collect()
    gc.disable()
    try:
        for i in range(options.rounds):
            # A different one first each time: none always comes after the same.
            first = i % len(order) if order else 0
            for each in order[first:] + order[:first]:
                if i == 0 or sum(samples[each].values()) * counts[each] < options.seconds:
                    samples[each][i] = measure(calls[each], counts[each], options.device)
    finally:
        gc.enable()
    return samples


# ------------------------------------------------------------------------------------------------------ the whole run


def resumed(options: argparse.Namespace, machine: dict[str, Any]) -> Optional[dict[str, Any]]:
    """The record in the JSON file.

    Raises:
        ValueError: it is of another machine, or of other code: that is nothing to go on with.
    """
    if not options.resume or not Path(options.output).exists():
        return None
    record = json.loads(Path(options.output).read_text())
    for name in ('device', 'threads', 'torch', 'git_commit', 'keeps_freed_memory'):
        if record['machine'].get(name) != machine[name]:
            raise ValueError(f'{options.output} has {name} {record["machine"].get(name)}, and this is {machine[name]}')
    return record


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases. The JSON file, if one is asked for, is written anew after each.

    Raises:
        ValueError: the record to go on with does not fit, or freed memory cannot be kept.
    """
    cases, machine = chosen_cases(options), set_up_machine(options)
    before = resumed(options, machine)
    where = ('output', 'markdown', 'plot', 'report', 'resume')  # results go and come: no setting
    settings = {key: str(value) if key == 'device' else value for key, value in vars(options).items() if key not in where}
    record = dict(machine=machine, settings=settings, ceilings=measure_ceilings(options), cases=[], not_run=0)
    if before:
        rates = 'multiply_adds_per_second'
        for each, other in ((before['ceilings'], record['ceilings']), (record['ceilings'], before['ceilings'])):
            each[rates] = {**other[rates], **each[rates]}
        record['ceilings'] = higher(before['ceilings'], record['ceilings'])
    measured = {case_of(each).key: each for each in before['cases']} if before else {}
    kept = [measured.pop(case.key, None) for case in cases]
    # What the file has besides, as of another size, stays in it.
    others = list(measured.values())
    begin = time.perf_counter()
    for index, case in enumerate(cases):
        if kept[index]:
            continue
        if options.time_limit and time.perf_counter() - begin > options.time_limit:
            record['not_run'] += 1
            continue
        kept[index] = run_case(case, options)
        record['cases'] = [*filter(None, kept), *others]
        set_floors(record)
        print(f'[{index + 1}/{len(cases)}] {case.kind}: {case.label}', file=sys.stderr, flush=True)
        if options.output:
            write_json(record, options.output)
    record['cases'] = [*filter(None, kept), *others]
    # Again: who else uses the machine may have come or gone. It can only be slower than it is.
    again = measure_ceilings(options)
    again['multiply_adds_per_second'] = {
        **record['ceilings']['multiply_adds_per_second'], **again['multiply_adds_per_second']
    }  # fmt: skip
    record['ceilings'] = higher(record['ceilings'], again)
    record['seconds'] = time.perf_counter() - begin
    set_floors(record)
    if options.output:
        write_json(record, options.output)
    return record


def problems_of(record: dict[str, Any]) -> list[str]:
    """Results that are off, and failures of ours, as lines to print."""
    lines = []
    for case in record['cases']:
        # The gradients of a kernel before a norm are small differences of large sums.
        factor = 10 if case['case']['kind'] == 'norms' else 1
        for name, result in case['implementations'].items():
            where = f'{case_of(case).label}, {name}'
            tolerance = TOLERANCES[case['case']['dtype']] * factor * (1 if name in PAIRS else 10)
            error = result.get('error')
            # NaN is no result either.
            if error is not None and not error <= tolerance:
                lines.append(f'WRONG RESULT: {where}: relative error {error:.1e}, more than {tolerance:.0e}')
            if name in PAIRS and result.get('failed'):
                lines.append(f'FAILED: {where}: {result["skipped"]}')
    return lines


# --------------------------------------------------------------------------------------------------------------- report


def heading(record: dict[str, Any]) -> str:
    ceilings = record['ceilings']
    rates = [f'{ceilings["bytes_per_second"] / 1e9:.3g} GB/s']
    rates += [f'{rate * 2 / 1e12:.3g} TFLOP/s {name}' for name, rate in ceilings['multiply_adds_per_second'].items()]
    return f'{machine_line(record)}\nceilings: {", ".join(rates)}'


def table_of(kind: str, cases: list[dict[str, Any]]) -> Table:
    """A row for every case and layout of the map."""
    table = [['case', 'map']]
    for words in ('fwd', 'fwd+bwd'):
        table[0] += [f'{words}: ours ms', 'torch ms', 'torch / ours']
    table[0].append('kept MiB: ours / torch' if kind == 'norms' else 'over floor')
    for case in cases:
        name_of_case = case_of(case).label
        for ours, theirs in PAIRS.items():
            results = [case['implementations'][name] for name in (ours, theirs)]
            row = [name_of_case, 'channels_last' if ours.endswith('channels-last') else 'contiguous']
            name_of_case = ''
            for mode in MODES:
                row += [with_spread(each[mode]) if mode in each else '-' for each in results]
                row.append(show_ratio(results[0][mode]) if 'ratio' in results[0].get(mode, {}) else '')
            if kind == 'norms':
                kept = [each.get('saved_bytes') for each in results]
                row.append(' / '.join('-' if count is None else number(count / 2**20) for count in kept))
            else:
                over = [results[0].get(mode, {}).get('over_floor') for mode in MODES]
                row.append(' '.join('-' if each is None else times(each) for each in over))
            table.append(row)
    return table


def show_ratio(result: dict[str, Any]) -> str:
    return with_spread(result['ratio'], times) + (' =' if result.get('pytorch') else '')


def sections(record: dict[str, Any]) -> list[tuple[str, Table]]:
    titles = dict(
        zoo='Shapes of the zoo',
        sweep='Kernel sizes on one map',
        dilated='Dilated branches',
        norms='branch_norms, beside the sum of branches through batch norms',
    )
    groups = {kind: [case for case in record['cases'] if case['case']['kind'] == kind] for kind in titles}
    return [(titles[kind], table_of(kind, cases)) for kind, cases in groups.items() if cases]


def ratios_of(record: dict[str, Any], mode: str) -> list[tuple[float, str, bool]]:
    """Of all cases and layouts: the time of PyTorch's over that of ours, what it is of, and whether both are PyTorch's."""
    found = []
    for case in record['cases']:
        for name in PAIRS:
            result = case['implementations'][name].get(mode, {})
            if 'ratio' in result:
                layout = 'channels_last' if name.endswith('channels-last') else 'contiguous'
                norms = 'branch_norms ' if case['case']['kind'] == 'norms' else ''
                where = f'{show_ratio(result)}: {norms}{case_of(case).label}, {layout}'
                found.append((result['ratio']['median'], where, bool(result.get('pytorch'))))
    return sorted(found)


def summary(record: dict[str, Any]) -> list[str]:
    """The worst ratios, and all that are below the limit, as lines to print."""
    lines = []
    for mode, words in zip(MODES, ('forward', 'forward + backward')):
        ratios = ratios_of(record, mode)
        if not ratios:
            continue
        lines.append(f'worst {words}: {ratios[0][1]}')
        chosen = [each for each in ratios if not each[2]]
        if chosen and ratios[0][2]:
            lines.append(f'worst {words} where ours is chosen: {chosen[0][1]}')
        below = [each for each in ratios if each[0] < LIMIT]
        lines.append(f'{words}: {len(below)} of {len(ratios)} below {LIMIT}x{":" if below else ""}')
        lines += [f'    {where}' for _, where, _ in below]
    reasons = Counter(
        (name, result['skipped'])
        for case in record['cases']
        for name, result in case['implementations'].items()
        if 'skipped' in result
    )
    lines += [f'not measured: {name}, in {count} cases: {reason}' for (name, reason), count in reasons.items()]
    unchecked = sum(
        result.get('error', 0) is None for case in record['cases'] for result in case['implementations'].values()
    )
    if unchecked:
        lines.append(f'{unchecked} results were not checked: PyTorch has none for the contiguous map')
    return lines


def report_as_text(record: dict[str, Any]) -> str:
    blocks = [heading(record), *(f'{title}\n{as_text(table)}' for title, table in sections(record))]
    return '\n\n'.join([*blocks, '\n'.join(summary(record))])


def report_as_markdown(record: dict[str, Any]) -> str:
    blocks = [heading(record).replace('\n', '\n\n')]
    blocks += [f'### {title}\n\n{as_markdown(table)}' for title, table in sections(record)]
    blocks += ['\n'.join(line.replace('    ', '  - ') if line[0] == ' ' else f'- {line}' for line in summary(record))]
    return '\n\n'.join(blocks) + '\n'


STYLES = {
    'ours': dict(color='tab:red', linewidth=2, marker='o'),
    'ours-channels-last': dict(color='tab:orange', linewidth=2, marker='^'),
    'torch': dict(color='tab:blue', linestyle='--', marker='s'),
    'torch-channels-last': dict(color='navy', linestyle='--', marker='v'),
}


def curves(record: dict[str, Any], mode: str) -> dict[str, list[tuple[int, float]]]:
    """Milliseconds over the kernel size, of the implementations and the floor; of the sweep on the first map."""
    cases = [case for case in record['cases'] if case['case']['kind'] == 'sweep']
    cases = [case for case in cases if same_but_kernel(case, cases[0])]
    cases.sort(key=lambda case: case['case']['kernel_size'])
    found = {}
    for name in STYLES:
        results = [(case['case']['kernel_size'], case['implementations'][name].get(mode)) for case in cases]
        found[name] = [(size, result['median'] * 1e3) for size, result in results if result]
    found['floor'] = [
        (case['case']['kernel_size'], case['floor'][mode]['seconds'] * 1e3) for case in cases if 'floor' in case
    ]
    return {name: points for name, points in found.items() if points}


def same_but_kernel(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return {**first['case'], 'kernel_size': 0} == {**second['case'], 'kernel_size': 0}


def plot(record: dict[str, Any], file: str) -> None:
    """Time over kernel size, a panel for each mode.

    Raises:
        ValueError: the record has no sweep.
    """
    swept = [case_of(case) for case in record['cases'] if case['case']['kind'] == 'sweep']
    if not swept:
        raise ValueError('there is nothing to plot: the record has no sweep')
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    for axis, mode, words in zip(axes, MODES, ('forward', 'forward and backward')):
        for name, points in curves(record, mode).items():
            style = STYLES.get(name, dict(color='black', linestyle=':'))
            label = {'torch': 'torch NCHW', 'torch-channels-last': 'torch channels_last'}.get(name, name)
            axis.plot(*zip(*points), label=label, markersize=4, **style)
        axis.set(yscale='log', title=words, xlabel='kernel size', ylabel='ms')
        axis.grid(alpha=0.3, which='both')
    axes[0].legend()
    shape, device = swept[0], record['machine']['device']
    figure.suptitle(
        f'Depth-wise convolution of {shape.channels} x {shape.height} x {shape.width}, {shape.dtype}, on {device}'
    )
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


# -------------------------------------------------------------------------------------------------------- command line


def map_shape(text: str) -> tuple[int, int, int]:
    try:
        channels, height, width = map(int, text.split('x'))
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be CHANNELSxHEIGHTxWIDTH, as 64x128x128, got {text!r}') from None
    if min(channels, height, width) < 1:
        raise argparse.ArgumentTypeError(f'must be CHANNELSxHEIGHTxWIDTH with positive numbers, got {text!r}')
    return channels, height, width


def odd_int(text: str) -> int:
    if not text.isdigit() or int(text) % 2 == 0:
        raise argparse.ArgumentTypeError(f'must be a positive odd integer, got {text!r}')
    return int(text)


def parse_options(arguments: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group('what to measure')
    what.add_argument('--what', nargs='+', default=list(WHAT), choices=WHAT, help='see above; default: all')
    what.add_argument('--arch', nargs='+', default=list(CHANNELS), choices=CHANNELS, help='variants; default: all')
    what.add_argument(
        '--size', nargs='+', type=image_size, default=[(224, 224), (512, 512), (800, 1344)], metavar='HxW',
        help='of the images, for zoo; default: 224x224 512x512 800x1344',
    )  # fmt: skip
    what.add_argument(
        '--norms-size', nargs='+', type=image_size, default=[(224, 224), (512, 512)], metavar='HxW',
        help='the same for norms; default: 224x224 512x512',
    )  # fmt: skip
    what.add_argument(
        '--spacing', type=float, default=2, metavar='FACTOR',
        help='measure shapes of one kernel that are so many times smaller than the next larger one; 1: all; default: 2',
    )  # fmt: skip
    what.add_argument('--sweep-shape', type=map_shape, default=(64, 128, 128), metavar='CxHxW', help='default: 64x128x128')
    what.add_argument(
        '--kernels', nargs='+', type=odd_int, default=list(range(3, 32, 2)), metavar='K',
        help='of the sweep; default: 3 5 ... 31',
    )  # fmt: skip
    what.add_argument('--batch', type=positive_int, default=1, metavar='N', help='default: 1')
    what.add_argument('--dtype', default='float32', choices=DTYPES, help='default: float32')

    how = parser.add_argument_group('how to measure')
    add_machine_options(how)
    how.add_argument('--rounds', type=positive_int, default=7, metavar='N', help='at most; default: 7')
    how.add_argument(
        '--seconds', type=float, default=0.5,
        help='an implementation that has taken so many takes part in no more rounds; default: 0.5',
    )  # fmt: skip

    output = parser.add_argument_group('output')
    output.add_argument('--output', metavar='FILE', help='the full record, as JSON')
    output.add_argument('--resume', action='store_true', help='keep the cases that this file has already')
    output.add_argument('--markdown', metavar='FILE', help='the tables as markdown')
    output.add_argument('--plot', metavar='FILE', help='time over kernel size (needs matplotlib)')
    output.add_argument('--report', metavar='FILE', help='measure nothing: show the record in this JSON file')
    options = parser.parse_args(arguments)

    resolve_device(parser, options)
    if options.spacing < 1:
        parser.error(f'--spacing must be at least 1, got {options.spacing:g}')
    if options.resume and not options.output:
        parser.error('--resume needs --output')
    if options.plot and not options.report and 'sweep' not in options.what:
        parser.error('--plot needs --what sweep')
    return options


def main() -> int:
    options = parse_options()
    if options.report:
        record = json.loads(Path(options.report).read_text())
    else:
        try:
            record = run(options)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    print(report_as_text(record))
    if options.markdown:
        Path(options.markdown).write_text(report_as_markdown(record))
    if options.plot:
        try:
            plot(record, options.plot)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    if record['not_run']:
        print(f'{record["not_run"]} cases were not run: the time limit was reached')
    problems = problems_of(record)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
