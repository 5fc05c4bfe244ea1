"""Time and memory of the backbone, beside its published form and beside other backbones.

    python tools/benchmarks/bench_backbone.py                              # T at evaluation, three image sizes
    python tools/benchmarks/bench_backbone.py --mode train --size 512x512 --batch 1 2 4 --plot out.png
    python tools/benchmarks/bench_backbone.py --everything --out DIR       # all that docs/performance.md shows
    python tools/benchmarks/bench_backbone.py --everything --out DIR --resume        # and on, after an interruption

The implementations, all with the same weights:

    published                 the published computation in eager PyTorch (published_backbone.py)
    published-folded          the same with its dilated branches folded, as the released *_reparam checkpoints (eval)
    ours                      the backbone as it is built
    ours-deploy               after switch_to_deploy() (eval)
    ours-channels-last        the backbone and its input in channels_last
    ours-deploy-channels-last both (eval)
    ours-compiled             torch.compile, as one graph, of ours-deploy (eval) or ours (train)
    ours-cuda-graph           ours-deploy, recorded as a CUDA graph and played (eval, on a GPU)
    ours-with-cp              the backbone with with_cp=True: all blocks recomputed in the backward (train)

and peers, which compute something else: ConvNeXt and Swin Transformer of mmpretrain or torchvision, with four outputs.

Eval is a forward without gradients; train a forward, a backward of given gradients of the outputs, and a step of AdamW.
Implementations take turns, so that a change of the machine's speed meets them all; a ratio is of two times of one round.
Numbers are medians, with the first and third quartile. Before its time is taken, what computes the network is checked
against the published form: outputs and, in training, the gradients of all parameters.

saved is what the forward leaves allocated for the backward, outputs included; peak is the height of a whole call above
what was there before it (weights, and in training the optimiser's averages, are there before; gradients are not). Both are
counts of torch's allocators.

--breakdown tells where the time goes: see backbone_parts.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Optional

import backbone_parts
import backbone_report
import torch
import torch.nn as nn
from measuring import (
    Skipped,
    add_machine_options,
    allocated_by,
    copy_rate,
    free_memory,
    image_size,
    is_out_of_memory,
    measure,
    positive_int,
    product_rate,
    resolve_device,
    set_up_machine,
    spread,
    worst_error,
    write_json,
)
from published_backbone import published
from torch import Tensor

from overlock_mm.models import OverLoCK
from overlock_mm.models.overlock import ARCHITECTURES, OUT_TYPES, resolve_architecture

#: Names of implementations, and in which modes they run.
IMPLEMENTATIONS = {
    'published': ('eval', 'train'),
    'published-folded': ('eval',),
    'ours': ('eval', 'train'),
    'ours-deploy': ('eval',),
    'ours-channels-last': ('eval', 'train'),
    'ours-deploy-channels-last': ('eval',),
    'ours-compiled': ('eval', 'train'),
    'ours-cuda-graph': ('eval',),
    'ours-with-cp': ('train',),
}
#: (library, class or function, arguments) of the other backbones.
PEERS = {
    'convnext-tiny': ('mmpretrain', 'ConvNeXt', dict(arch='tiny')),
    'convnext-small': ('mmpretrain', 'ConvNeXt', dict(arch='small')),
    'convnext-base': ('mmpretrain', 'ConvNeXt', dict(arch='base')),
    'swin-tiny': ('mmpretrain', 'SwinTransformer', dict(arch='tiny')),
    'torchvision-convnext-tiny': ('torchvision', 'convnext_tiny', {}),
    'torchvision-swin-tiny': ('torchvision', 'swin_t', {}),
}
DEFAULT_IMPLEMENTATIONS = {
    'eval': ('published', 'published-folded', 'ours', 'ours-deploy'),
    'train': ('published', 'ours', 'ours-with-cp'),
}
DEFAULT_PEERS = ('convnext-tiny', 'convnext-small', 'convnext-base', 'swin-tiny')
SIZES = ((224, 224), (512, 512), (800, 1344))
DTYPES = {name: getattr(torch, name) for name in ('float32', 'bfloat16', 'float16')}
#: Largest relative error (of Frobenius norms) of an output, and of the gradients of all parameters together. Two ways of
#: rounding to half types at every step differ by as much as either is off.
TOLERANCES = {'float32': 1e-3, 'bfloat16': 0.2, 'float16': 0.05}
GRADIENT_TOLERANCES = {'float32': 1e-2, 'bfloat16': 0.5, 'float16': 0.2}
#: A measurement repeats a shorter call until it has lasted this long, in seconds: launches on a GPU vary.
LEAST_TIME = 2e-2


@dataclass(frozen=True)
class Case:
    """What is measured at a time, side by side."""

    arch: str
    out_type: str
    size: tuple[int, int]  #: height and width of the images
    batch: int
    dtype: str
    cast: bool  #: the whole model is of that dtype; else it is autocast's
    mode: str
    implementations: tuple[str, ...]
    breakdown: tuple[str, ...] = ()  #: those of them that are taken apart
    fused_adamw: bool = False  #: a step of AdamW is one kernel, not one after the other for each parameter

    @property
    def key(self) -> tuple:
        """Cases that differ in nothing else are the same."""
        return self.arch, self.out_type, tuple(self.size), self.batch, self.dtype, self.cast, self.mode, self.fused_adamw


# ------------------------------------------------------------------------------------------------------ implementations


@torch.no_grad()
def enliven(model: OverLoCK) -> OverLoCK:
    """Move weights and statistics off the zeros and ones that many start as: each is to matter in the check."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith('running_var'):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point() and (tensor.ndim < 4 or tensor.shape[1:].numel() == 1 or tensor.shape[0] == 1):
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


class _Stages(nn.Module):
    """The four maps of one of torchvision's classifiers, whose ``features`` end a stage with every second module."""

    def __init__(self, features: nn.Sequential, channels_last: bool) -> None:
        super().__init__()
        self.features = features
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for i, module in enumerate(self.features):
            x = module(x)
            if i % 2:
                outputs.append(x.permute(0, 3, 1, 2) if self.channels_last else x)
        return tuple(outputs)


def build_peer(name: str) -> nn.Module:
    """Another backbone, with four outputs.

    Raises:
        Skipped: its library is not installed.
    """
    library, function, settings = PEERS[name]
    try:
        if library == 'torchvision':
            import torchvision

            model = getattr(torchvision.models, function)()
            return _Stages(model.features, channels_last=function.startswith('swin'))
        import mmpretrain.models
    except ImportError as error:
        raise Skipped(f'{library} is not installed ({error})') from None
    extra = dict(gap_before_final_norm=False) if function == 'ConvNeXt' else dict(pad_small_map=True)
    return getattr(mmpretrain.models, function)(out_indices=(0, 1, 2, 3), **extra, **settings)


def build(name: str, case: Case, weights: OverLoCK, arch: Any, device: torch.device) -> nn.Module:
    """The implementation of that name, with those weights, in the case's mode and dtype.

    Raises:
        Skipped: it does not run in this mode, on this device, or with what is installed.
    """
    if name in PEERS:
        model = build_peer(name)
    else:
        modes = IMPLEMENTATIONS[name]
        if case.mode not in modes:
            raise Skipped(f'for {modes[0]} only')
        if name == 'ours-cuda-graph' and device.type != 'cuda':
            raise Skipped('for a GPU only')
        if name.startswith('published'):
            model = published(weights, folded=name == 'published-folded')
        else:
            model = OverLoCK(arch, out_type=case.out_type, with_cp=name == 'ours-with-cp')
            model.load_state_dict(weights.state_dict())
    model.train(case.mode == 'train')
    if 'deploy' in name or (case.mode == 'eval' and name in ('ours-compiled', 'ours-cuda-graph')):
        model.switch_to_deploy()
    if 'channels-last' in name:
        model.to(memory_format=torch.channels_last)
    return model.to(device, DTYPES[case.dtype] if case.cast else None)


class Runner:
    """One implementation: its calls, and what they leave behind."""

    def __init__(self, name: str, case: Case, model: nn.Module, image: Tensor, device: torch.device) -> None:
        self.model = model
        self.function: Callable = model
        self.training = case.mode == 'train'
        self.autocast = contextlib.nullcontext
        if not case.cast and case.dtype != 'float32':
            self.autocast = lambda: torch.autocast(device.type, DTYPES[case.dtype])
        layout = torch.channels_last if 'channels-last' in name else torch.contiguous_format
        self.image = image.contiguous(memory_format=layout)
        self.outputs: tuple[Tensor, ...] = ()
        self.cotangents: list[Tensor] = []
        if self.training:
            # A rate of 0 does all the work of a step and leaves the weights as they are.
            parameters = [p for p in model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=case.fused_adamw or None)
        if name == 'ours-compiled':
            # For one shape at a time: nothing of the last one is to count towards the limit of recompilations.
            torch._dynamo.reset()
            self.function = torch.compile(model, fullgraph=True, dynamic=False)
        if name == 'ours-cuda-graph':
            self.record_graph()

    def record_graph(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.forward()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.forward()
        outputs = self.outputs

        def play(image: Tensor) -> tuple[Tensor, ...]:
            self.graph.replay()
            return outputs

        self.function, self.autocast = play, contextlib.nullcontext

    def forward(self) -> None:
        with torch.set_grad_enabled(self.training), self.autocast():
            self.outputs = tuple(self.function(self.image))

    def backward(self) -> None:
        """Of fixed random gradients of the outputs; then no graph is left."""
        if self.training:
            if not self.cotangents:
                generator = torch.Generator().manual_seed(1)
                self.cotangents = [torch.randn(out.shape, generator=generator).to(out) for out in self.outputs]
            torch.autograd.backward(self.outputs, self.cotangents)
        self.outputs = ()

    def update(self) -> None:
        if self.training:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def call(self, i: int = 0) -> None:
        self.forward()
        self.backward()
        self.update()

    def results(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs and, in training, the gradients of the parameters."""
        self.forward()
        outputs = [out.detach().clone() for out in self.outputs]
        self.backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.update()
        return outputs, gradients

    def memory(self) -> dict[str, int]:
        if not self.training:
            return dict(peak_bytes=allocated_by([self.forward, self.backward], self.image.device)[0])
        peak, left = allocated_by([self.forward, self.backward, self.update], self.image.device)
        return dict(peak_bytes=peak, saved_bytes=left[0])


def gradient_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all gradients as one vector. Infinite if others have one."""
    if got.keys() != expected.keys():
        return float('inf')
    difference = sum(float((got[name].double() - each.double()).square().sum()) for name, each in expected.items())
    return (difference / sum(float(each.double().square().sum()) for each in expected.values())) ** 0.5


def needed_memory(model: nn.Module, image: Tensor, itemsize: int) -> Optional[int]:
    """About how many bytes a forward keeps for its backward, found out without memory; None where that does not work."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    try:
        model = copy.deepcopy(model).float().to('meta')
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.empty(image.shape, device='meta'))
    except Exception:  # whatever an operator has against it
        return None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) * itemsize // 4


def check_memory(name: str, model: nn.Module, case: Case, image: Tensor) -> None:
    """Raise Skipped if the CPU's memory would not do: to run out of it ends the process. (A GPU raises an error.)

    What is ours takes less than the published form, and not all of it is known before.
    """
    if image.device.type != 'cpu' or case.mode != 'train' or name.startswith('ours'):
        return
    free, needed = free_memory(), needed_memory(model, image, DTYPES[case.dtype].itemsize)
    if free is not None and needed is not None and 1.3 * needed > 0.8 * free:
        raise Skipped(f'takes about {1.3 * needed / 2**30:.1f} GiB')


# ----------------------------------------------------------------------------------------------------------- one case


def reason_of(error: Exception) -> str:
    first_line = f'{type(error).__name__}: {error}'.splitlines()[0]
    return 'out of memory' if is_out_of_memory(error) else first_line[:200]


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def prepare(
    name: str, case: Case, weights: OverLoCK, image: Tensor, options: argparse.Namespace, expected: dict[str, Any]
) -> tuple[Runner, dict[str, Any], float]:
    """A warm runner, what is known of it before its time (that it is right, and its memory), and about its time.

    ``expected`` holds the results of the published form; its own are put in.
    """
    begin = time.perf_counter()
    model = build(name, case, weights, options.architectures[case.arch], options.device)
    check_memory(name, model, case, image)
    runner = Runner(name, case, model, image, options.device)
    result: dict[str, Any] = dict(parameters=sum(p.numel() for p in model.parameters()))
    outputs, gradients = runner.results()
    if name == 'published':
        expected.update(outputs=outputs, gradients=gradients)
    elif name not in PEERS:
        result['error'] = worst_error(outputs, expected['outputs']) if expected else None
        if case.mode == 'train':
            result['gradient_error'] = gradient_error(gradients, expected['gradients']) if expected else None
    del outputs, gradients
    result['first_seconds'] = time.perf_counter() - begin
    seconds = measure(runner.call, 1, options.device)
    if name != 'ours-cuda-graph':  # a graph has memory of its own, taken when it was recorded
        result.update(runner.memory())
    return runner, result, seconds


def run_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Check and measure all implementations, in turns."""
    torch.manual_seed(0)
    weights = enliven(OverLoCK(options.architectures[case.arch], out_type=case.out_type))
    image = torch.randn(case.batch, 3, *case.size, device=options.device, dtype=DTYPES[case.dtype] if case.cast else None)
    # The published form comes first: it is the yardstick of the others' results.
    names = sorted(case.implementations, key=lambda name: name != 'published')
    results: dict[str, Any] = {}
    runners: dict[str, Runner] = {}
    counts: dict[str, int] = {}
    expected: dict[str, Any] = {}
    if 'published' not in names and any(name not in PEERS for name in names):
        try:
            prepare('published', case, weights, image, options, expected)
        except Skipped:
            pass
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    for name in names:
        try:
            runners[name], results[name], seconds = prepare(name, case, weights, image, options, expected)
            counts[name] = max(1, round(LEAST_TIME / max(seconds, 1e-7)))
        except Skipped as reason:
            results[name] = dict(skipped=str(reason))
        except Exception as error:  # whatever goes wrong with one, the others are measured
            runners.pop(name, None)
            results[name] = dict(skipped=reason_of(error), failed=True)
    expected.clear()

    samples = take_turns(runners, counts, options)
    for name in case.breakdown:
        if name in runners:
            results[name]['parts'] = median_parts(runners[name], options)

    ours = next((name for name in ('ours-deploy', 'ours') if name in samples), None)
    for name, times in samples.items():
        result = results[name]
        result.update(spread(times), samples=times, calls=counts[name])
        result['images_per_second'] = case.batch / result['median']
        if 'published' in samples and name != 'published':
            result['speedup'] = spread([a / b for a, b in zip(samples['published'], times)])
        if ours and name != ours:
            result['over_ours'] = spread([a / b for a, b in zip(times, samples[ours])])
    record = dict(asdict(case), rounds=max(map(len, samples.values()), default=0), yardstick=ours)
    record['implementations'] = {name: results[name] for name in case.implementations}
    if case.breakdown:
        itemsize = DTYPES[case.dtype].itemsize
        record['work'] = backbone_parts.count_work(
            options.architectures[case.arch], case.out_type, tuple(image.shape), case.mode == 'train', itemsize,
            itemsize if case.cast else 4,
        )  # fmt: skip
    return record


def take_turns(runners: dict[str, Runner], counts: dict[str, int], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a call, of each runner in each round."""
    samples: dict[str, list[float]] = {name: [] for name in runners}
    order = list(runners)
    begin = time.perf_counter()
    for rounds in range(options.max_rounds if order else 0):
        if rounds >= options.min_rounds and time.perf_counter() - begin > options.seconds:
            break
        # A different one first each time: none always comes after the same.
        first = rounds % len(order)
        with no_garbage_collection():
            for name in order[first:] + order[:first]:
                samples[name].append(measure(runners[name].call, counts[name], options.device))
    return samples


def median_parts(runner: Runner, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of each part of the network: medians of a few calls."""
    taken = []
    for _ in range(options.min_rounds):
        with no_garbage_collection():
            taken.append(
                backbone_parts.time_parts(runner.model, runner.forward, runner.backward, runner.update, options.device)
            )
    return {part: statistics.median(each.get(part, 0.0) for each in taken) for part in taken[0]}


# ------------------------------------------------------------------------------------------------------ the whole run


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    if options.everything:
        return everything(options.device.type == 'cuda')
    cases = []
    for arch, mode, dtype, batch, size in itertools.product(
        options.arch, options.mode, options.dtype, options.batch, options.size
    ):
        names = options.implementations or DEFAULT_IMPLEMENTATIONS[mode]
        names = (*(name for name in names if mode in IMPLEMENTATIONS[name]), *options.peers)
        breakdown = tuple(name for name in names if can_be_taken_apart(name)) if options.breakdown else ()
        fused = options.fused_adamw and mode == 'train'
        cases.append(Case(arch, options.out_type, size, batch, dtype, options.cast, mode, names, breakdown, fused))
    return cases


def can_be_taken_apart(name: str) -> bool:
    """What runs as one graph has no operators to time."""
    return name not in PEERS and name not in ('ours-compiled', 'ours-cuda-graph')


def everything(on_gpu: bool) -> list[Case]:
    """What docs/performance.md shows. First what matters most: a run may be cut off."""
    evaluated = ('published', 'published-folded', 'ours', 'ours-deploy', 'ours-deploy-channels-last')
    trained = ('published', 'ours', 'ours-channels-last', 'ours-with-cp')
    if on_gpu:
        evaluated += ('ours-compiled', 'ours-cuda-graph')
        trained += ('ours-compiled',)
    names = {'eval': evaluated, 'train': trained}
    small, large = SIZES[0], SIZES[-1]
    between = ((320, 320), (416, 416), (640, 640))
    halves = ('bfloat16', 'float16') if on_gpu else ('bfloat16',)
    batches = (2, 4, 8, 16, 32, 64, 128) if on_gpu else (2, 4, 8)

    def case(mode: str, size: tuple[int, int], batch: int = 1, dtype: str = 'float32', arch: str = 't', **settings) -> Case:
        settings = {'implementations': (*names[mode], *DEFAULT_PEERS), **settings}
        return Case(arch, 'pyramid_with_overview', size, batch, dtype, False, mode, **settings)

    cases = []
    for mode in names:
        own = tuple(name for name in ('published', 'ours', 'ours-deploy') if mode in IMPLEMENTATIONS[name])
        cases += [case(mode, size, breakdown=own if size in (small, large) else ()) for size in SIZES]
    cases += [case(mode, size) for mode in names for size in between]
    cases += [case(mode, small, batch) for mode in names for batch in batches]
    cases += [case(mode, size, dtype=dtype) for dtype in halves for mode in names for size in SIZES]
    if on_gpu:
        cases += [case(mode, small, batch, 'bfloat16') for mode in names for batch in batches]
        cases += [case(mode, large, 2, dtype) for dtype in ('float32', 'bfloat16') for mode in names]
    for arch in ('xt', 's', 'b'):
        cases += [case(mode, SIZES[1], arch=arch, implementations=names[mode]) for mode in names]
    return cases


def key_of(recorded: dict[str, Any]) -> tuple:
    """:attr:`Case.key` of a case in a record."""
    # What a Case has not always had is not in older records.
    return Case(**{field.name: recorded[field.name] for field in fields(Case) if field.name in recorded}).key


def measured_before(record: dict[str, Any], case: Case) -> Optional[dict[str, Any]]:
    """The case of a record, if it has all that is asked for."""
    for each in record['cases']:
        has_all = {*case.implementations} <= each['implementations'].keys() and {*case.breakdown} <= {*each['breakdown']}
        if has_all and key_of(each) == case.key:
            return each
    return None


def resumed(options: argparse.Namespace, machine: dict[str, Any]) -> Optional[dict[str, Any]]:
    """The record in the JSON file.

    Raises:
        ValueError: it is of another machine, or of other code: that is nothing to go on with.
    """
    if not options.resume or not Path(options.json).exists():
        return None
    record = json.loads(Path(options.json).read_text())
    for name in ('device', 'threads', 'torch', 'git_commit', 'keeps_freed_memory'):
        if record['machine'].get(name) != machine[name]:
            raise ValueError(f'{options.json} has {name} {record["machine"].get(name)}, and this is {machine[name]}')
    return record


def measure_ceilings(options: argparse.Namespace, dtypes: Sequence[str]) -> dict[str, Any]:
    """What the machine can do: bytes a second, and multiply-adds a second with numbers of each dtype."""
    rates = {name: product_rate(options.device, DTYPES[name]) for name in dtypes}
    if options.flops is not None:
        rates = dict.fromkeys(dtypes, options.flops * 1e12 / 2)
    elif options.device.type == 'cpu' and 'float32' not in rates:
        # Half types may be computed in float32 there.
        single = product_rate(options.device, torch.float32)
        rates = {name: max(rate, single) for name, rate in rates.items()}
    bandwidth = copy_rate(options.device) if options.bandwidth is None else options.bandwidth * 1e9
    return dict(bytes_per_second=bandwidth, multiply_adds_per_second=rates)


def higher(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The higher one of each ceiling, of two measurements; those of a dtype may be in one only."""
    rates = dict(first['multiply_adds_per_second'])
    for name, rate in second['multiply_adds_per_second'].items():
        rates[name] = max(rate, rates.get(name, rate))
    bandwidth = max(first['bytes_per_second'], second['bytes_per_second'])
    return dict(bytes_per_second=bandwidth, multiply_adds_per_second=rates)


def set_floors(record: dict[str, Any]) -> None:
    """Of the parts of the cases that are taken apart, and how far above them the implementations are."""
    for case in record['cases']:
        if 'work' not in case:
            continue
        rates = dict(record['ceilings'])
        rates['multiply_adds_per_second'] = rates['multiply_adds_per_second'][case['dtype']]
        case['floor'] = {part: backbone_parts.floor_of(work, rates) for part, work in case['work'].items()}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases. The JSON file, if one is asked for, is written anew after each.

    Raises:
        ValueError: the record to go on with does not fit, or freed memory cannot be kept.
    """
    cases, machine = chosen_cases(options), set_up_machine(options)
    before = resumed(options, machine)
    record = dict(machine=machine, settings=settings_of(options), ceilings=None, cases=[], not_run=0)
    kept = [measured_before(before, case) if before else None for case in cases]
    # What the file has besides, as of another size, stays in it.
    others = [each for each in before['cases'] if key_of(each) not in {case.key for case in cases}] if before else []
    record['cases'] = [*filter(None, kept), *others]
    dtypes = list(dict.fromkeys(case.dtype for case in cases if case.breakdown))
    if dtypes:
        record['ceilings'] = measure_ceilings(options, dtypes)
    if before and before['ceilings']:
        record['ceilings'] = higher(before['ceilings'], record['ceilings'] or before['ceilings'])
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
        gc.collect()
        if options.device.type == 'cuda':
            torch.cuda.empty_cache()
        print(f'[{index + 1}/{len(cases)}] {backbone_report.label(kept[index])}', file=sys.stderr, flush=True)
        if options.json:
            write_json(record, options.json)
    if dtypes:
        # Again: who else uses the machine may have come or gone. It can only be slower than it is.
        record['ceilings'] = higher(record['ceilings'], measure_ceilings(options, dtypes))
    set_floors(record)
    if options.json:
        write_json(record, options.json)
    return record


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    where = ('json', 'markdown', 'plot', 'report', 'out', 'resume')  # results go and come: no setting
    return {name: str(value) if name == 'device' else value for name, value in vars(options).items() if name not in where}


def problems_of(record: dict[str, Any]) -> list[str]:
    """Results that are off, and failures, as lines to print."""
    lines = []
    for case in record['cases']:
        for name, result in case['implementations'].items():
            where = f'{backbone_report.label(case)}, {name}'
            limits = (('error', TOLERANCES), ('gradient_error', GRADIENT_TOLERANCES))
            for key, tolerance in ((key, tolerances[case['dtype']]) for key, tolerances in limits):
                error = result.get(key)
                # NaN is no result either.
                if error is not None and not error <= tolerance:
                    words = key.replace('_', ' ')
                    lines.append(f'WRONG RESULT: {where}: relative {words} {error:.1e}, more than {tolerance:.0e}')
            if result.get('failed'):
                lines.append(f'FAILED: {where}: {result["skipped"]}')
    return lines


def arch_file(text: str) -> tuple[str, dict[str, Any]]:
    try:
        settings = json.loads(Path(text).read_text())
        resolve_architecture({name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f'{text}: {error}') from None
    return Path(text).stem, {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}


def parse_options(arguments: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group('what to measure (in the order given)')
    what.add_argument('--arch', nargs='+', default=['t'], choices=ARCHITECTURES, help='variants; default: t')
    what.add_argument(
        '--arch-file', type=arch_file, metavar='FILE', help='another architecture: a JSON object as OverLoCK takes it'
    )
    what.add_argument('--out-type', default='pyramid_with_overview', choices=OUT_TYPES, help='default: %(default)s')
    what.add_argument(
        '--size', nargs='+', type=image_size, default=list(SIZES), metavar='HxW',
        help='of the images; default: 224x224 512x512 800x1344',
    )  # fmt: skip
    what.add_argument('--batch', nargs='+', type=positive_int, default=[1], metavar='N', help='images; default: 1')
    what.add_argument('--dtype', nargs='+', default=['float32'], choices=DTYPES, help="autocast's; default: float32")
    what.add_argument('--cast', action='store_true', help='no autocast: the whole model is of that dtype')
    what.add_argument('--mode', nargs='+', default=['eval'], choices=DEFAULT_IMPLEMENTATIONS, help='default: eval')
    what.add_argument(
        '--implementations', nargs='+', choices=IMPLEMENTATIONS, metavar='NAME',
        help='see above; default: published, ours and, in eval, published-folded, ours-deploy, in train ours-with-cp',
    )  # fmt: skip
    what.add_argument(
        '--peers', nargs='*', default=list(DEFAULT_PEERS), choices=PEERS, metavar='NAME',
        help=f'of {", ".join(PEERS)}; default: {", ".join(DEFAULT_PEERS)}; none if no name follows',
    )  # fmt: skip
    what.add_argument('--fused-adamw', action='store_true', help='AdamW(fused=True), on the CPU from torch 2.4 on')
    what.add_argument('--breakdown', action='store_true', help='where the time goes')
    what.add_argument('--everything', action='store_true', help='a plan of its own, in place of the above; an hour or two')

    how = parser.add_argument_group('how to measure')
    add_machine_options(how)
    how.add_argument('--seconds', type=float, default=20, help='for the rounds of a case; default: 20')
    how.add_argument('--min-rounds', type=positive_int, default=3, metavar='N', help='however long they take; default: 3')
    how.add_argument('--max-rounds', type=positive_int, default=50, metavar='N', help='default: 50')
    how.add_argument('--rounds', type=positive_int, metavar='N', help='that many, whatever time they take')

    output = parser.add_argument_group('output')
    output.add_argument('--json', metavar='FILE', help='the full record')
    output.add_argument('--resume', action='store_true', help='keep the cases that the JSON file has already')
    output.add_argument('--markdown', metavar='FILE', help='the tables as markdown')
    output.add_argument('--plot', metavar='FILE', help='curves of time and memory (needs matplotlib)')
    output.add_argument('--out', metavar='DIR', help='all of these: record.json, tables.md, curves_<dtype>.png')
    output.add_argument('--report', metavar='FILE', help='measure nothing: show the record in this JSON file')
    options = parser.parse_args(arguments)

    resolve_device(parser, options)
    if options.cast and 'float32' in options.dtype:
        parser.error('--cast is for --dtype bfloat16 or float16')
    for mode in options.mode:
        if not options.peers and not any(mode in IMPLEMENTATIONS[name] for name in options.implementations or ['ours']):
            parser.error(f'--implementations: none is for --mode {mode}, got {", ".join(options.implementations)}')
    if options.everything and not options.out:
        parser.error('--everything needs --out')
    if options.rounds:
        options.min_rounds = options.max_rounds = options.rounds
    options.architectures = {name: name for name in ARCHITECTURES}
    if options.arch_file:
        name, settings = options.arch_file
        options.architectures[name] = settings
        options.arch = [name]
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        options.json = options.json or str(Path(options.out, 'record.json'))
        options.markdown = options.markdown or str(Path(options.out, 'tables.md'))
    if options.resume and not options.json:
        parser.error('--resume needs --json or --out')
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
    print(backbone_report.as_text(record))
    if options.markdown:
        Path(options.markdown).write_text(backbone_report.as_markdown(record))
    if options.plot:
        backbone_report.plot(record, options.plot)
    if options.out:
        for dtype in dict.fromkeys(case['dtype'] for case in record['cases']):
            backbone_report.plot(record, str(Path(options.out, f'curves_{dtype}.png')), dtype)
    if record['not_run']:
        print(f'{record["not_run"]} cases were not run: the time limit was reached')
    unchecked = sum(
        result.get('error', 0) is None for case in record['cases'] for result in case['implementations'].values()
    )
    if unchecked:
        print(f'{unchecked} results were not checked: there is not the memory for the published form')
    problems = problems_of(record)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
