"""Time and memory of the compiled ContMix operator, beside what it replaces and what the machine allows.

Shapes are those of the network: ContMix of stages 3 and 4 of each variant, at the image sizes given. The implementations:

    contmix     the compiled operator, torch.ops.overlock_mm.contmix
    published   the unfused computation of the published code in eager PyTorch, aggregated slot by slot
    reference   overlock_mm.ops.contmix_reference, which stands in where there is no compiled operator
    compiled    torch.compile of the reference (--compile-reference)
    natten      the published computation with natten's na2d_av (natten 0.17.5 or older)
    floor       the larger of two times: bytes that must move over the bandwidth of a large copy, and operations that must
                be done over the rate of a large matrix product in the same dtype (and of torch.exp, on a CPU)

saved counts the bytes kept for the backward, over those of inputs and output; over floor, the time over the floor's, of the
forward and of forward with backward; peak, on a GPU, the memory that forward with backward takes at its height.

Every implementation is checked against the reference, output and gradients, before its time is taken. They take turns, so
that a change of the machine's speed meets them all; a ratio is one round's other time over the operator's. Numbers are
medians, with the first and third quartile.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import contmix_report
import torch
from contmix_shapes import VARIANTS, Shape, shapes_of, work
from measuring import (
    DTYPES,
    Skipped,
    add_machine_options,
    best_rate,
    copy_rate,
    free_memory,
    image_size,
    is_out_of_memory,
    measure,
    nbytes,
    peak_memory,
    positive_int,
    product_rate,
    resolve_device,
    saved_bytes,
    set_up_machine,
    spread,
    worst_error,
    write_json,
)
from published import contmix_natten, contmix_published

from overlock_mm.ops import _extension, contmix_reference

#: Largest relative error (of Frobenius norms) of an output or a gradient. Others than the operator may have ten times it:
#: the published computation adds up in half types.
TOLERANCES = {'float32': 1e-4, 'float64': 1e-10, 'float16': 4e-3, 'bfloat16': 2e-2}
MEMORY_FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
MODES = contmix_report.MODES
BASELINES = ['published', 'reference', 'natten']
#: A measurement repeats a shorter call until it has lasted this long, in seconds.
LEAST_TIME = 1e-3


# ---------------------------------------------------------------------------------------------------- what is measured


def make_inputs(
    shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, memory_format: torch.memory_format, seed: int = 0
) -> dict[str, Any]:
    """Random arguments of the operator, which want gradients. Parameters are float32 beside half inputs, as in training."""
    generator = torch.Generator(device).manual_seed(seed)
    of_parameters = torch.promote_types(dtype, torch.float32)

    def random(*sizes: int, scale: float = 1.0, dtype: torch.dtype = of_parameters) -> torch.Tensor:
        tensor = (torch.randn(sizes, generator=generator, device=device) * scale).to(dtype)
        if tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=memory_format)
        return tensor.requires_grad_()

    ks, kl, tokens = shape.small_kernel_size, shape.large_kernel_size, shape.context_size
    # Logits of standard deviation about 1: kernels neither flat nor a single slot.
    query_scale = (shape.query_channels // shape.num_groups) ** -0.5
    return dict(
        value=random(batch, shape.channels, shape.height, shape.width, dtype=dtype),
        query=random(batch, shape.query_channels, shape.height, shape.width, scale=query_scale, dtype=dtype),
        key=random(batch, shape.query_channels, tokens, tokens, dtype=dtype),
        proj_weight=random(shape.slots, tokens**2, scale=1 / tokens),
        proj_bias=random(shape.slots, scale=0.1),
        rpb_small=random(shape.num_groups, 2 * ks - 1, 2 * ks - 1, scale=0.1),
        rpb_large=random(shape.num_groups, 2 * kl - 1, 2 * kl - 1, scale=0.1),
        num_groups=shape.num_groups,
        small_kernel_size=ks,
        large_kernel_size=kl,
    )


def tensors_of(inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [each for each in inputs.values() if isinstance(each, torch.Tensor)]


def implementation(name: str, device: torch.device) -> Callable[..., torch.Tensor]:
    """The function of that name.

    Raises:
        Skipped: it is not there.
    """
    if name == 'contmix':
        if _extension.missing:
            raise Skipped(_extension.missing)
        if device.type == 'cuda' and not _extension.build_info['cuda']:
            raise Skipped('overlock_mm was built without CUDA')
        return torch.ops.overlock_mm.contmix
    if name == 'natten':
        try:
            from natten.functional import na2d_av  # noqa: F401
        except ImportError:
            try:
                raise Skipped(f'natten {importlib.metadata.version("natten")} has no na2d_av') from None
            except importlib.metadata.PackageNotFoundError:
                raise Skipped('natten is not installed') from None
        return contmix_natten
    if name == 'compiled':
        # Compiled for one shape at a time: nothing of the last one is to count towards the limit of recompilations.
        torch._dynamo.reset()
        return torch.compile(contmix_reference, dynamic=False)
    return {'published': contmix_published, 'reference': contmix_reference}[name]


def run_forward(function: Callable, inputs: dict[str, Any], grad: torch.Tensor) -> Any:
    with torch.no_grad():
        return function(**inputs)


def run_forward_backward(function: Callable, inputs: dict[str, Any], grad: torch.Tensor) -> Any:
    return torch.autograd.grad(function(**inputs), tensors_of(inputs), grad)


RUN = {'forward': run_forward, 'forward_backward': run_forward_backward}


def needed_memory(name: str, shape: Shape, batch: int, itemsize: int) -> int:
    """About how many bytes a baseline keeps: a CPU that runs out of memory ends the process and not the call."""
    positions = batch * shape.height * shape.width
    kernels = 6 * positions * shape.num_groups * shape.slots * itemsize
    if name == 'published':
        return kernels + positions * shape.channels // 2 * shape.slots * itemsize
    if name in ('reference', 'compiled'):
        sides = shape.small_kernel_size + shape.large_kernel_size
        return kernels + 2 * positions * shape.num_groups * shape.width * sides * max(4, itemsize)
    return kernels


def check_memory(name: str, shape: Shape, batch: int, itemsize: int, device: torch.device) -> None:
    """Raise Skipped if the CPU's memory would not do. (A GPU that runs out of memory raises an error.)"""
    memory, needed = free_memory(), needed_memory(name, shape, batch, itemsize)
    if device.type == 'cpu' and memory is not None and needed > 0.7 * memory:
        raise Skipped(f'takes about {needed / 2**30:.1f} GiB')


# ------------------------------------------------------------------------------------------------------------ ceilings


def measure_ceilings(options: argparse.Namespace) -> dict[str, Any]:
    """What the machine can do: bytes a second, multiply-adds a second of each dtype, exponentials a second.

    Those that the options give are not measured.
    """
    device = options.device
    on_gpu = device.type == 'cuda'
    ceilings: dict[str, Any] = {}
    if options.bandwidth is None:
        ceilings['bytes_per_second'] = copy_rate(device)
    else:
        ceilings['bytes_per_second'] = options.bandwidth * 1e9
    ceilings['multiply_adds_per_second'] = {}
    for name in options.dtype:
        if options.flops is None:
            # A CPU's kernels compute half types in float32.
            dtype = DTYPES[name] if on_gpu or name == 'float64' else torch.float32
            rate = product_rate(device, dtype)
        else:
            rate = options.flops * 1e12 / 2
        ceilings['multiply_adds_per_second'][name] = rate
    if options.exponentials is not None:
        ceilings['exponentials_per_second'] = options.exponentials * 1e9
    elif on_gpu:
        # The special function units of sm_70 to sm_120 give 16 results a clock and multiprocessor.
        properties = torch.cuda.get_device_properties(device)
        clock = getattr(properties, 'clock_rate', None)
        rate = 16 * properties.multi_processor_count * clock * 1e3 if clock else None
        ceilings['exponentials_per_second'] = rate
    else:
        # By torch.exp, of as many numbers as stay in the caches. A less exact exponential can be faster.
        numbers = torch.randn(1 << 18)
        out = torch.empty_like(numbers)
        ceilings['exponentials_per_second'] = best_rate(len(numbers), lambda: torch.exp(numbers, out=out), device)
    return ceilings


def higher(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The higher one of each ceiling, of two measurements: a machine can only be slower than it is."""
    rates = 'multiply_adds_per_second'
    best = {key: max(first[key], second[key]) if first[key] else first[key] for key in first if key != rates}
    return {**best, rates: {name: max(first[rates][name], second[rates][name]) for name in first[rates]}}


def floor_of(work_of_mode: dict[str, int], ceilings: dict[str, Any], dtype: str, device_type: str) -> dict[str, float]:
    """Seconds below which no implementation gets, and what sets them."""
    moving = work_of_mode['bytes'] / ceilings['bytes_per_second']
    adding = work_of_mode['multiply_adds'] / ceilings['multiply_adds_per_second'][dtype]
    rate = ceilings['exponentials_per_second']
    exponentials = work_of_mode['exponentials'] / rate if rate else 0.0
    # A GPU has units of their own for exponentials; a CPU does them in those of the multiply-adds.
    computing = max(adding, exponentials) if device_type == 'cuda' else adding + exponentials
    return dict(seconds=max(moving, computing), bytes=moving, multiply_adds=adding, exponentials=exponentials)


def set_floors(record: dict[str, Any]) -> None:
    """Set the floors by the record's ceilings, and how far above them the implementations are."""
    for case in record['cases']:
        device_type = record['machine']['device_type']
        case['floor'] = {
            mode: floor_of(case['work'][mode], record['ceilings'], case['dtype'], device_type) for mode in MODES
        }
        for result in case['implementations'].values():
            for mode in MODES:
                if 'median' in result.get(mode, {}):
                    result[mode]['over_floor'] = result[mode]['median'] / case['floor'][mode]['seconds']


# ----------------------------------------------------------------------------------------------------------- one case


def input_set_count(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many sets of inputs pass a GPU's L2 cache twice over (32 at most). On a CPU one: there the layer before leaves
    its output in the caches too."""
    if device.type != 'cuda':
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), 'L2_cache_size', 64 << 20)
    forward = work(shape, batch, dtype.itemsize)['forward']
    return max(1, min(32, -(-2 * cache // forward.bytes)))


def expected_results(
    inputs: dict[str, Any], grad: torch.Tensor, shape: Shape, batch: int, itemsize: int
) -> Optional[list[torch.Tensor]]:
    """Output and gradients of the reference, or None where there is not the memory for it."""
    try:
        check_memory('reference', shape, batch, max(4, itemsize), grad.device)
        out = run_forward(contmix_reference, inputs, grad)
        return [out, *run_forward_backward(contmix_reference, inputs, grad)]
    except Skipped:
        return None
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise


def run_case(shape: Shape, batch: int, dtype_name: str, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Check and measure all implementations at one shape, in turns."""
    device, dtype = options.device, DTYPES[dtype_name]
    memory_format = MEMORY_FORMATS[options.memory_format]
    counted = work(shape, batch, dtype.itemsize, max(4, dtype.itemsize))
    number = options.input_sets or input_set_count(shape, batch, dtype, device)
    sets = []
    for seed in range(number):
        inputs = make_inputs(shape, batch, dtype, device, memory_format, seed)
        sets.append((inputs, torch.randn_like(inputs['value'].detach())))
    own_bytes = nbytes(tensors_of(sets[0][0])) + nbytes([sets[0][1]])

    # The yardstick of the results: the same numbers in float32, where half types round on the way.
    exact = torch.promote_types(dtype, torch.float32)
    raised = {
        key: each.detach().to(exact).requires_grad_() if isinstance(each, torch.Tensor) else each
        for key, each in sets[0][0].items()
    }
    expected = expected_results(raised, sets[0][1].to(exact), shape, batch, dtype.itemsize)
    del raised

    results: dict[str, Any] = {}
    calls: dict[tuple[str, str], Callable[[int], Any]] = {}
    counts: dict[tuple[str, str], int] = {}
    for name in names:
        result = results[name] = {}
        try:
            function = implementation(name, device)
            if name != 'contmix':
                check_memory(name, shape, batch, dtype.itemsize, device)
            inputs, grad = sets[0]
            got = [run_forward(function, inputs, grad), *run_forward_backward(function, inputs, grad)]
            result['error'] = worst_error(got, expected) if expected else None
            del got
            result['saved_bytes'] = saved_bytes(function, inputs)
            result['saved_ratio'] = result['saved_bytes'] / own_bytes
            for mode, run in RUN.items():

                def call(i: int, run=run, function=function) -> Any:
                    return run(function, *sets[i % number])

                result[mode] = dict(peak_bytes=peak_memory(lambda call=call: call(0), device))
                calls[name, mode] = call
                counts[name, mode] = max(1, round(LEAST_TIME / max(measure(call, 1, device), 1e-7)))
        except Skipped as reason:
            results[name] = dict(skipped=str(reason))
        except Exception as error:  # whatever goes wrong with one, the others are measured
            reason = 'out of memory' if is_out_of_memory(error) else f'{type(error).__name__}: {error}'.splitlines()[0]
            results[name] = dict(skipped=reason, failed=True)
        if 'skipped' in results[name]:
            for mode in MODES:
                calls.pop((name, mode), None)
    del expected

    samples: dict[tuple[str, str], list[float]] = {each: [] for each in calls}
    order = list(calls)
    begin = time.perf_counter()
    rounds = 0
    gc.collect()
    gc.disable()
    try:
        while order and rounds < options.max_rounds:
            if rounds >= options.min_rounds and time.perf_counter() - begin > options.seconds:
                break
            # A different one first each time: none always comes after the same.
            first = rounds % len(order)
            for each in order[first:] + order[:first]:
                samples[each].append(measure(calls[each], counts[each], device))
            rounds += 1
    finally:
        gc.enable()

    case = dict(
        archs=[shape.arch],
        shape=asdict(shape),
        batch=batch,
        dtype=dtype_name,
        memory_format=options.memory_format,
        input_sets=number,
        rounds=rounds,
        own_bytes=own_bytes,
        work={mode: asdict(counted[mode]) for mode in MODES},
        implementations=results,
    )
    for (name, mode), times in samples.items():
        result = results[name][mode]
        result.update(spread(times), calls=counts[name, mode])
        if name != 'contmix' and ('contmix', mode) in samples:
            result['ratio'] = spread([theirs / ours for theirs, ours in zip(times, samples['contmix', mode])])
    return case


# ------------------------------------------------------------------------------------------------------ the whole run


def chosen_cases(options: argparse.Namespace) -> tuple[list[tuple[Shape, int, str, list[str]]], str]:
    """All cases, variants and stages in turn for each input size, batch and dtype: a time limit cuts off the last of these.

    A shape that several variants have comes once.
    """
    cases, places, sources = [], {}, set()
    shapes = []
    for arch in options.arch:
        of_arch, source = shapes_of(arch, options.input)
        shapes += [shape for shape in of_arch if shape.stage in options.stage]
        sources.add(source)
    for size, batch, dtype in itertools.product(options.input, options.batch, options.dtype):
        for shape in shapes:
            if shape.input != size:
                continue
            key = (shape.operator, size, batch, dtype)
            if key in places:
                places[key].append(shape.arch)
            else:
                places[key] = [shape.arch]
                cases.append((shape, batch, dtype, places[key]))
    return cases, '+'.join(sorted(sources))


def problems_of(record: dict[str, Any]) -> list[str]:
    """Results that are off, and failures of the operator, as lines to print."""
    lines = []
    for case in record['cases']:
        for name, result in case['implementations'].items():
            tolerance = TOLERANCES[case['dtype']] * (1 if name == 'contmix' else 10)
            where = f'{contmix_report.label(case)}, {name}'
            error = result.get('error')
            # NaN is no result either.
            if error is not None and not error <= tolerance:
                lines.append(f'WRONG RESULT: {where}: relative error {error:.1e}, more than {tolerance:.0e}')
            if name == 'contmix' and result.get('failed'):
                lines.append(f'FAILED: {where}: {result["skipped"]}')
    return lines


def floor_is_too_high(case: dict[str, Any]) -> bool:
    ours = case['implementations']['contmix']
    return any(ours.get(mode, {}).get('over_floor', 1) < 1 for mode in MODES)


def run(options: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    """Measure all cases. The JSON file, if one is asked for, is written anew after each.

    Raises:
        LookupError: shapes are asked for that only the network knows, which does not import.
    """
    cases, source = chosen_cases(options)
    record = dict(
        machine=machine,
        settings={
            key: str(value) if key == 'device' else value
            for key, value in vars(options).items()
            if key not in ('json', 'markdown', 'plot', 'report', 'short')  # where results go is no setting
        },
        shapes_from=source,
        ceilings=measure_ceilings(options),
        cases=[],
        not_run=0,
    )
    begin = time.perf_counter()
    for index, (shape, batch, dtype, archs) in enumerate(cases):
        if options.time_limit and time.perf_counter() - begin > options.time_limit:
            record['not_run'] = len(cases) - index
            break
        names = ['contmix', *options.baselines]
        if sum(case[2] == dtype for case in cases[:index]) < options.compile_reference:
            names.append('compiled')
        case = run_case(shape, batch, dtype, names, options)
        case['archs'] = archs
        record['cases'].append(case)
        set_floors(record)
        print(f'[{index + 1}/{len(cases)}] {contmix_report.label(case)}', file=sys.stderr, flush=True)
        if options.json:
            write_json(record, options.json)
    # Again: who else uses the machine may have come or gone.
    record['ceilings'] = higher(record['ceilings'], measure_ceilings(options))
    set_floors(record)
    if options.json:
        write_json(record, options.json)
    return record


def parse_options(arguments: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group('what to measure (in the order given)')
    what.add_argument('--arch', nargs='+', default=list(VARIANTS), choices=VARIANTS, help='variants; default: all')
    what.add_argument('--stage', nargs='+', type=int, default=[3, 4], choices=[3, 4], help='default: 3 4')
    what.add_argument(
        '--input', nargs='+', type=image_size, default=[(224, 224), (512, 512), (800, 1344)], metavar='HxW',
        help='image sizes; default: 224x224 512x512 800x1344',
    )  # fmt: skip
    what.add_argument('--batch', nargs='+', type=positive_int, default=[1], metavar='N', help='images; default: 1')
    what.add_argument('--dtype', nargs='+', default=['float32'], choices=DTYPES, help='default: float32')
    what.add_argument('--memory-format', default='contiguous', choices=MEMORY_FORMATS, help='of the maps')
    what.add_argument(
        '--baselines', nargs='*', default=BASELINES, choices=BASELINES,
        help='default: all three',
    )  # fmt: skip
    what.add_argument(
        '--compile-reference', nargs='?', type=positive_int, const=sys.maxsize, default=0, metavar='N',
        help='measure torch.compile of the reference too, in the first N cases of each dtype (all, if N is left out); '
        'compiling takes up to a minute a case',
    )  # fmt: skip

    how = parser.add_argument_group('how to measure')
    add_machine_options(how)
    how.add_argument('--seconds', type=float, default=10, help='for the rounds of a case; default: 10')
    how.add_argument('--min-rounds', type=positive_int, default=5, metavar='N', help='however long they take; default: 5')
    how.add_argument('--max-rounds', type=positive_int, default=50, metavar='N', help='default: 50')
    how.add_argument(
        '--input-sets', type=positive_int, metavar='N',
        help='different inputs to go through; default: on a GPU as many as its L2 cache does not hold, on a CPU one',
    )  # fmt: skip
    how.add_argument('--exponentials', type=float, metavar='1E9/S', help='in place of a measured rate')

    output = parser.add_argument_group('output')
    output.add_argument('--json', metavar='FILE', help='the full record')
    output.add_argument('--markdown', metavar='FILE', help='the table as markdown')
    output.add_argument('--plot', metavar='FILE', help='a picture (needs matplotlib)')
    output.add_argument('--report', metavar='FILE', help='measure nothing: show the record in this JSON file')
    output.add_argument(
        '--short', action='store_true', help='a table of one line for each input, stage, batch and dtype over all variants'
    )
    options = parser.parse_args(arguments)
    resolve_device(parser, options)
    return options


def main() -> int:
    options = parse_options()
    if options.report:
        record = json.loads(Path(options.report).read_text())
    else:
        try:
            machine = set_up_machine(options)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        try:
            record = run(options, machine)
        except LookupError as error:
            print(error, file=sys.stderr)
            return 2
    table = contmix_report.short_table(record) if options.short else contmix_report.full_table(record)
    print(contmix_report.heading(record))
    print(contmix_report.as_text(table))
    if options.markdown:
        markdown = contmix_report.as_markdown(table)
        Path(options.markdown).write_text(f'{contmix_report.heading(record)}\n\n{markdown}\n')
    if options.plot:
        contmix_report.plot(record, options.plot)
    problems = problems_of(record)
    if any(floor_is_too_high(case) for case in record['cases']):
        print('some times are below the floor: the machine was busier when its ceilings were measured')
    unchecked = sum(case['implementations']['contmix'].get('error', 0) is None for case in record['cases'])
    if unchecked:
        print(f'{unchecked} cases were not checked: there is not the memory for the reference')
    if record['not_run']:
        print(f'{record["not_run"]} cases were not run: the time limit was reached')
    for problem in problems:
        print(problem, file=sys.stderr)
    if not any('median' in case['implementations']['contmix'].get('forward', {}) for case in record['cases']):
        reason = record['cases'][0]['implementations']['contmix'].get('skipped') if record['cases'] else 'no case was run'
        print(f'the compiled operator was not measured: {reason}', file=sys.stderr)
        return 1
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
