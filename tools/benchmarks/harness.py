"""The harness of the benchmarks: options, checks, turns, clocks, memory, records and tables.

A benchmark lists its cases (:class:`Case`) and gives them to :func:`main`. A case has several implementations of the same
computation. For each case the harness

1. checks the results of every implementation against expected ones,
2. measures the memory that each takes,
3. lets them take turns, so that a change of the machine's speed affects all of them, in an order that alternates.

A ratio compares two times of the same round. Times and ratios are medians, with the first and third quartile.

As a script it prints a record again: the summary that docs/benchmarks keeps or, with --full, all rows.

    python tools/benchmarks/harness.py RECORD.json > docs/benchmarks/NAME.md
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

import overlock_mm
from overlock_mm.ops import _library, cuda_choices
from overlock_mm.ops.cuda_kernels import ENVIRONMENT_VARIABLE

DTYPES = {name: getattr(torch, name) for name in ('float32', 'float64', 'float16', 'bfloat16')}
SIZES = ((224, 224), (512, 512), (800, 1344))
MODES = ('forward', 'forward + backward')
#: A measurement repeats a short call until it has lasted this long, in seconds.
LEAST_TIME = 5e-3
#: Without --rounds: at least and at most so many rounds.
MIN_ROUNDS, MAX_ROUNDS = 3, 50
#: A profile has so many kernels.
MOST_KERNELS = 40
#: A record is only resumed where these are the same.
SAME_MACHINE = ('device', 'threads', 'torch', 'git_commit', 'keeps_freed_memory', 'tf32')


class Skipped(Exception):
    """An implementation that does not run here; the message says why."""


@dataclass
class Run:
    """One implementation of a case, ready to run.

    Args:
        steps: what is timed, called one after the other: a forward, and in training a backward and more.
        results: computes the tensors that are checked, by kind, such as 'output' and 'gradient'.
        counts_memory: whether the steps allocate their memory themselves. (A CUDA graph does not.)
    """

    steps: Sequence[Callable[[], Any]]
    results: Callable[[], dict[str, list[Tensor]]]
    counts_memory: bool = True

    def call(self) -> None:
        for step in self.steps:
            step()


@dataclass
class Case:
    """What is measured side by side.

    Args:
        section: the table that it belongs to.
        group: cases of a group share a row of the summary.
        name: tells it from the other cases of its section.
        implementations: their names.
        yardstick: ratios are the times of the others over the time of this one.
        build: makes the :class:`Run` of an implementation, or raises :class:`Skipped`.
        expected: computes the results that all implementations but ``peers`` must have.
        tolerances: largest relative error (of Frobenius norms) of each kind of result; ``baselines`` may have ten times it.
        baselines: implementations that are not this project's code.
        peers: implementations that compute something else.
        work: the least that a call takes: 'bytes', 'multiply-adds DTYPE' and 'exponentials'.
    """

    section: str
    group: str
    name: str
    implementations: Sequence[str]
    yardstick: str
    build: Callable[[str], Run]
    expected: Callable[[], dict[str, list[Tensor]]]
    tolerances: dict[str, float]
    baselines: Sequence[str] = ()
    peers: Sequence[str] = ()
    work: dict[str, float] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------------- options


def image_size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.split('x'))
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be HEIGHTxWIDTH, as 800x1344, got {text!r}') from None
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f'must be HEIGHTxWIDTH with positive numbers, got {text!r}')
    return height, width


def positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a positive integer, got {text!r}')
    return int(text)


def make_parser(description: Optional[str]) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_argument_group('how to measure')
    how.add_argument('--device', type=torch.device, help='cpu or cuda; default: the GPU if there is one')
    how.add_argument('--threads', type=positive_int, metavar='N', help="threads on the CPU; default: torch's")
    how.add_argument('--tf32', action='store_true', help='on a GPU, products and convolutions of float32 in TF32')
    how.add_argument('--keep-freed-memory', action='store_true', help='let the C library keep freed memory: no page faults')
    how.add_argument('--seconds', type=float, default=10, help='for the rounds of a case; default: 10')
    how.add_argument(
        '--rounds', type=positive_int, metavar='N',
        help=f'exactly so many rounds; default: what fits into --seconds, {MIN_ROUNDS} to {MAX_ROUNDS}',
    )  # fmt: skip
    how.add_argument('--time-limit', type=float, metavar='SECONDS', help='start no more cases after this time')
    how.add_argument('--profile', action='store_true', help='also record which kernels take the time: on a CPU, operators')
    output = parser.add_argument_group('output')
    output.add_argument('--json', metavar='FILE', help='write the full record, anew after each case')
    output.add_argument('--resume', action='store_true', help='keep the cases that this file already has')
    return parser


def resolve(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.device is None:
        options.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if options.device.type not in ('cpu', 'cuda'):
        parser.error(f'--device must be cpu or cuda, got {options.device}')
    if options.device.type == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no GPU')
    if options.tf32 and options.device.type != 'cuda':
        parser.error('--tf32 is for a GPU')
    if options.resume and not options.json:
        parser.error('--resume needs --json')


# -------------------------------------------------------------------------------------------------------------- machine


def set_up_machine(options: argparse.Namespace) -> dict[str, Any]:
    """Apply the options, and describe the machine.

    Raises:
        ValueError: freed memory cannot be kept.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.keep_freed_memory:
        from overlock_mm import memory  # needs mmengine; the operators' benchmarks otherwise need torch alone

        if not memory.keep_freed_memory():
            raise ValueError('--keep-freed-memory: the C library is not glibc')
    device = options.device
    on_gpu = device.type == 'cuda'
    if on_gpu:  # PyTorch's defaults differ: TF32 for convolutions, none for products
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    return dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        device=torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        device_type=device.type,
        tf32=options.tf32 if on_gpu else None,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        overlock_mm=overlock_mm.__version__,
        compiled_operators=_library.build_info or dict(missing=_library.missing),
        git_commit=git_commit(),
        keeps_freed_memory=options.keep_freed_memory,
        cuda_kernels=os.environ.get(ENVIRONMENT_VARIABLE, 'measured') if on_gpu else None,
    )


def cpu_name() -> str:
    """The model's name, with family and model number where the name itself has no number."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            name, _, value = line.partition(':')
            found.setdefault(name.strip(), value.strip())
    if 'model name' not in found:
        return platform.processor() or platform.machine()
    if any(character.isdigit() for character in found['model name']):
        return found['model name']
    return f'{found["model name"]} (family {found.get("cpu family")}, model {found.get("model")})'


def git_commit() -> Optional[str]:
    """Commit of this checkout, with '-dirty' where tracked files differ; None outside of a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(['git', '-C', here, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    try:
        # An installed copy may lie in the checkout of another project.
        if not (Path(git('rev-parse', '--show-toplevel')) / 'overlock_mm' / 'ops').is_dir():
            return None
        return git('rev-parse', 'HEAD') + ('-dirty' if git('status', '--porcelain', '--untracked-files=no') else '')
    except (OSError, subprocess.CalledProcessError):
        return None


def best_rate(amount: float, call: Callable[[], Any], device: torch.device, seconds: float = 0.3) -> float:
    """``amount`` over the shortest of several calls: what the undisturbed machine can do."""
    shortest, end = float('inf'), time.perf_counter() + seconds
    while time.perf_counter() < end:
        shortest = min(shortest, measure(call, 3, device))
    return amount / shortest


def measure_ceilings(kinds: set[str], device: torch.device) -> dict[str, float]:
    """Bytes a second of a large copy, and multiply-adds and exponentials a second, for the given kinds of work."""
    on_gpu = device.type == 'cuda'
    ceilings = {}
    for kind in sorted(kinds):
        what, _, dtype_name = kind.partition(' ')
        if what == 'bytes':
            source = torch.empty((1 << 30 if on_gpu else 1 << 27) // 4, device=device).normal_()
            target = torch.empty_like(source)
            ceilings[kind] = best_rate(2 * source.nbytes, lambda s=source, t=target: t.copy_(s), device)
        elif what == 'multiply-adds':
            # The kernels of a CPU compute half types in float32.
            dtype = DTYPES[dtype_name] if on_gpu or dtype_name == 'float64' else torch.float32
            side = 4096 if on_gpu else 1536
            a = torch.randn(side, side, device=device).to(dtype)
            ceilings[kind] = best_rate(side**3, lambda a=a: a @ a, device)
        elif not on_gpu:  # a GPU computes exponentials in units of their own, beside the multiply-adds
            numbers = torch.randn(1 << 18)  # as many as stay in the caches
            ceilings[kind] = best_rate(len(numbers), numbers.exp, device)
    return ceilings


def higher(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """The higher of two measurements of each ceiling: other users can only make a machine slower than it is."""
    return {kind: max(first.get(kind, 0.0), second.get(kind, 0.0)) for kind in {**first, **second}}


def floor_of(work: dict[str, float], ceilings: dict[str, float]) -> Optional[float]:
    """Seconds that a case takes at least: its bytes at the rate of a copy, or its arithmetic. None if that is not known."""
    times = {kind: amount / ceilings[kind] for kind, amount in work.items() if ceilings.get(kind)}
    moving = times.pop('bytes', 0.0)
    return max(moving, sum(times.values())) or None


# ---------------------------------------------------------------------------------------------------- clocks and memory


def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def measure(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds a call, of ``calls`` in a row."""
    if calls > 1:
        call()  # a short call depends on what the implementation before it left in the caches
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / calls


def allocated_by(steps: Sequence[Callable[[], Any]], device: torch.device) -> tuple[int, list[int]]:
    """Bytes that steps, one after the other, allocate at their peak, and the bytes that are still allocated after each.

    Counted by torch's allocators, above what was allocated before. On a CPU, memory that a kernel takes in threads of its
    own is not counted.
    """
    peak, left = 0, []
    if device.type == 'cuda':
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        for step in steps:
            step()
            synchronize(device)
            left.append(torch.cuda.memory_allocated(device) - before)
        return torch.cuda.max_memory_allocated(device) - before, left
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # otherwise the profiler says that it finds no GPU
    total = 0
    for step in steps:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
        for event in profile.profiler.kineto_results.events():
            if event.name() == '[memory]':
                total += event.nbytes()
                peak = max(peak, total)
        left.append(total)
    return peak, left


def require_memory(forward: Callable[[], Any], device: torch.device) -> None:
    """Raise Skipped if a CPU has not the memory for what a forward keeps: the system would end the process.

    A GPU that runs out of memory raises an error, so nothing is asked there.

    Args:
        forward: the computation on the meta device, which takes no memory.
        device: where it is to run.
    """
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    free = free_memory()
    if device.type != 'cpu' or free is None:
        return
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()  # noqa: F841  # alive, so that its storages are not freed before they are counted
    needed = 1.3 * sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    if needed > 0.8 * free:
        raise Skipped(f'takes about {needed / 2**30:.1f} GiB')


def free_memory() -> Optional[int]:
    """Free memory of the CPU in bytes, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path('/proc/meminfo').read_text().splitlines():
            if line.startswith('MemAvailable:'):
                return int(line.split()[1]) * 1024
    return None


# ------------------------------------------------------------------------------------------------------------- one case


class Operator:
    """Calls of a function of tensors, all of which get gradients: a forward or, with ``backward``, both."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], backward: bool) -> None:
        self.function, self.inputs, self.with_backward = function, inputs, backward
        self.out: Optional[Tensor] = None
        self.grad: Optional[Tensor] = None

    def run(self) -> Run:
        return Run([self.forward, self.backward] if self.with_backward else [self.infer], self.results)

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.function(*self.inputs)

    def forward(self) -> None:
        self.out = self.function(*self.inputs)

    def backward(self) -> list[Tensor]:
        out, self.out = self.out, None
        if self.grad is None:
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            self.grad = torch.empty_like(out).copy_(grad)  # in the layout of the output
        return list(torch.autograd.grad(out, self.inputs, self.grad))

    def results(self) -> dict[str, list[Tensor]]:
        if not self.with_backward:
            return dict(output=[self.infer()])
        self.forward()
        return dict(output=[self.out.detach()], gradient=self.backward())


def relative_error(got: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((got.to(expected) - expected).norm() / expected.norm()).item()


def worst_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error; NaN if there is one, and infinity if there are more or fewer tensors."""
    if len(got) != len(expected):
        return float('inf')
    errors = [relative_error(*pair) for pair in zip(got, expected)]
    return max(errors, key=lambda error: float('inf') if error != error else error)


def spread(samples: Sequence[float]) -> dict[str, float]:
    first, median, third = statistics.quantiles(samples, n=4, method='inclusive') if len(samples) > 1 else [*samples] * 3
    return dict(median=median, q1=first, q3=third)


def reason_of(error: Exception) -> str:
    if isinstance(error, Skipped):
        return str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error):
        return 'out of memory'
    return f'{type(error).__name__}: {error}'.splitlines()[0][:200]


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def prepare(
    case: Case, name: str, expected: Optional[dict[str, list[Tensor]]], device: torch.device
) -> tuple[Run, int, dict[str, Any]]:
    """A warm run, how many calls of it a measurement needs, and its errors and memory."""
    run = case.build(name)
    got, result = run.results(), {}
    if expected and name not in case.peers:
        factor = 10 if name in case.baselines else 1
        result['errors'] = {kind: worst_error(got[kind], each) for kind, each in expected.items()}
        result['tolerances'] = {kind: factor * case.tolerances[kind] for kind in expected}
    del got
    calls = max(1, round(LEAST_TIME / measure(run.call, 1, device)))
    if run.counts_memory:
        result['peak_bytes'], left = allocated_by(run.steps, device)
        if len(run.steps) > 1:
            result['kept_bytes'] = left[0]
    return run, calls, result


def measure_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Check and measure all implementations, which take turns."""
    device, results, runs, calls = options.device, {}, {}, {}
    record = dict(section=case.section, group=case.group, name=case.name, yardstick=case.yardstick, work=case.work)
    record['implementations'] = results
    expected = None
    try:
        if set(case.implementations) - set(case.peers):
            expected = case.expected()
    except Exception as error:  # the implementations are measured all the same, and the report says so
        record['unchecked'] = reason_of(error)
    for name in case.implementations:
        try:
            runs[name], calls[name], results[name] = prepare(case, name, expected, device)
        except Exception as error:  # whatever goes wrong with one, the others are measured
            failed = not isinstance(error, Skipped) and name not in case.baselines
            results[name] = dict(skipped=reason_of(error), failed=failed)
    del expected

    samples = take_turns(runs, calls, options)
    for name, times in samples.items():
        results[name].update(seconds=spread(times), rounds=len(times))
        if case.yardstick in samples and name != case.yardstick:
            results[name]['ratio'] = spread([theirs / ours for theirs, ours in zip(times, samples[case.yardstick])])
        if options.profile:
            results[name]['kernels'] = kernels_of(runs[name], device)
    return record


def take_turns(runs: dict[str, Run], calls: dict[str, int], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a call, of each implementation in each round."""
    order, samples = list(runs), {name: [] for name in runs}
    if options.rounds == 0 or not order:
        return {}
    begin = time.perf_counter()
    with no_garbage_collection():
        for index in range(options.rounds or MAX_ROUNDS):
            if not options.rounds and index >= MIN_ROUNDS and time.perf_counter() - begin > options.seconds:
                break
            # Another one begins each round, and every second round runs backwards: none always comes after the same.
            first = index % len(order)
            for name in (order[first:] + order[:first])[:: -1 if index % 2 else 1]:
                samples[name].append(measure(runs[name].call, calls[name], options.device))
    return samples


def kernels_of(run: Run, device: torch.device) -> list[dict[str, Any]]:
    """Name, calls and seconds of the kernels of a call, or of PyTorch's operators on a CPU: those that take the most."""
    with torch.profiler.profile() as profile:
        run.call()
        synchronize(device)
    events = profile.key_averages()
    if device.type == 'cuda':
        events = [each for each in events if each.device_type == torch.autograd.DeviceType.CUDA]
    times = [(each.self_device_time_total if device.type == 'cuda' else each.self_cpu_time_total, each) for each in events]
    times.sort(key=lambda pair: pair[0], reverse=True)
    return [dict(name=each.key, calls=each.count, seconds=time / 1e6) for time, each in times[:MOST_KERNELS]]


# ------------------------------------------------------------------------------------------------------------- all cases


def resumed(options: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    """The record in the JSON file, or an empty one.

    Raises:
        ValueError: the record is of another machine or of other code.
    """
    if not options.resume or not Path(options.json).exists():
        return dict(cases=[], ceilings={})
    record = json.loads(Path(options.json).read_text())
    for name in SAME_MACHINE:
        before = record['machine'].get(name)
        if before != machine[name]:
            raise ValueError(f'{options.json} has {name} {before}, and this is {machine[name]}')
    return record


def key_of(case: dict[str, Any]) -> tuple[str, str]:
    return case['section'], case['name']


def write_json(record: dict[str, Any], file: str) -> None:
    """Replace the file at once: an interrupted run leaves the last complete record."""
    temporary = Path(f'{file}.part')
    temporary.write_text(json.dumps(record, indent=1) + '\n')
    os.replace(temporary, file)


def run_cases(
    cases: list[Case], options: argparse.Namespace, machine: dict[str, Any], before: dict[str, Any]
) -> dict[str, Any]:
    """Measure the cases that ``before`` lacks; keep all that it has."""
    settings = {name: str(value) if name == 'device' else value for name, value in vars(options).items()}
    done = {key_of(case): case for case in before['cases']}
    kinds = {kind for case in cases for kind in case.work} if options.rounds != 0 else set()
    record = dict(machine=machine, settings=settings, cases=before['cases'], not_run=0)
    record['ceilings'] = higher(before['ceilings'], measure_ceilings(kinds, options.device))
    begin = time.perf_counter()
    for index, case in enumerate(cases, 1):
        key = case.section, case.name
        if key in done and set(case.implementations) <= done[key]['implementations'].keys():
            continue
        if options.time_limit and time.perf_counter() - begin > options.time_limit:
            record['not_run'] += 1
            continue
        done[key] = measure_case(case, options)
        record['cases'] = list(done.values())
        gc.collect()
        if options.device.type == 'cuda':
            torch.cuda.empty_cache()
        print(f'[{index}/{len(cases)}] {case.name}, {case.section}', file=sys.stderr, flush=True)
        if options.json:
            write_json(record, options.json)
    # Other users of the machine may have come or gone since the first measurement.
    record['ceilings'] = higher(record['ceilings'], measure_ceilings(kinds, options.device))
    record['choices'] = [choice._asdict() for choice in cuda_choices()]
    if options.json:
        write_json(record, options.json)
    return record


def main(parser: argparse.ArgumentParser, cases_of: Callable[[argparse.Namespace], list[Case]], arguments=None) -> int:
    """Run a benchmark: 0 if all is well, 1 if a result is wrong or an implementation failed.

    Args:
        parser: from :func:`make_parser`, with the benchmark's own options.
        cases_of: the cases that the options ask for. It raises ValueError if they do not fit.
        arguments: of the command line.
    """
    options = parser.parse_args(arguments)
    resolve(parser, options)
    try:
        machine = set_up_machine(options)
        cases, before = cases_of(options), resumed(options, machine)
    except ValueError as error:
        parser.error(str(error))
    record = run_cases(cases, options, machine, before)
    print(full_report(record))
    problems = problems_of(record)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


# -------------------------------------------------------------------------------------------------------------- reports


def problems_of(record: dict[str, Any]) -> list[str]:
    """Wrong results and failures of this project's code."""
    lines = []
    for case in record['cases']:
        for name, result in case['implementations'].items():
            where = f'{case["name"]}, {case["section"]}, {name}'
            for kind, error in result.get('errors', {}).items():
                limit = result['tolerances'][kind]
                if not error <= limit:  # NaN is wrong too
                    lines.append(f'WRONG RESULT: {where}: relative error of the {kind} {error:.1e}, more than {limit:.0e}')
            if result.get('failed'):
                lines.append(f'FAILED: {where}: {result["skipped"]}')
    yardsticks = [case['implementations'].get(case['yardstick'], {}) for case in record['cases']]
    reasons = {each['skipped'] for each in yardsticks if 'skipped' in each}
    if len(reasons) == 1 and all('skipped' in each for each in yardsticks):
        lines.append(f'{record["cases"][0]["yardstick"]} was not measured: {reasons.pop()}')
    return lines


def remarks_of(record: dict[str, Any]) -> list[str]:
    """What a reader of the tables must know besides."""
    results = [(name, result) for case in record['cases'] for name, result in case['implementations'].items()]
    skipped = Counter((name, result['skipped']) for name, result in results if 'skipped' in result)
    lines = [f'not measured: {name}, in {count} cases: {reason}' for (name, reason), count in skipped.items()]
    unchecked = Counter(case['unchecked'] for case in record['cases'] if 'unchecked' in case)
    lines += [f'not checked: {count} cases, without expected results: {reason}' for reason, count in unchecked.items()]
    choices = Counter(choice['chosen'] for choice in record.get('choices', []))
    if choices:
        lines.append(f'by measurement, ours ran in {choices["ours"]} of {choices.total()} kinds of calls')
    if record['not_run']:
        lines.append(f'{record["not_run"]} cases were not run: the time limit was reached')
    return lines


def heading(record: dict[str, Any]) -> str:
    machine = record['machine']
    where = [machine['device']]
    if machine['device_type'] == 'cpu':
        where.append(f'{machine["threads"]} threads, {machine["cpu_capability"]}')
    if machine['device_type'] == 'cuda':
        where.append(f'{"TF32" if machine["tf32"] else "no TF32"}, kernels: {machine["cuda_kernels"]}')
    if machine.get('keeps_freed_memory'):
        where.append('freed memory kept')
    commit, _, dirty = (machine['git_commit'] or 'unknown').partition('-')
    where.append(f'torch {machine["torch"]}, {machine["date"][:10]}, commit {commit[:12]}{dirty and "-" + dirty}')
    rates = [f'{rate / 1e9:.3g} G {kind} a second' for kind, rate in record['ceilings'].items()]
    return '; '.join(where) + (f'\n\nThe machine reaches {", ".join(rates)}.' if rates else '')


def number(value: float) -> str:
    """With three digits, or all those of a large one."""
    return f'{value:.0f}' if value >= 100 else f'{value:.3g}'


def with_spread(result: dict[str, float], scale: float = 1.0, unit: str = '') -> str:
    median, first, third = (number(result[key] * scale) for key in ('median', 'q1', 'q3'))
    return f'{median}{unit} [{first}-{third}]'


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned for reading as text, without empty columns. The first row is its head."""
    rows = list(zip(*(column for column in zip(*rows) if any(column[1:]))))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |' for row in rows]
    lines.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
    return '\n'.join(lines)


def report(record: dict[str, Any], rows_of: Callable[[list[dict[str, Any]], dict[str, Any]], list[list[str]]]) -> str:
    sections: dict[str, list[dict[str, Any]]] = {}
    for case in record['cases']:
        sections.setdefault(case['section'], []).append(case)
    tables = [f'### {title}\n\n{markdown(rows_of(cases, record))}' for title, cases in sections.items()]
    remarks = '\n'.join(f'- {line}' for line in remarks_of(record))
    return '\n\n'.join(filter(None, [heading(record), *tables, remarks]))


def full_report(record: dict[str, Any]) -> str:
    """A row for every case and implementation, and for every kernel of those that were profiled."""
    profiles = [
        f'### {case["name"]}, {case["section"]}, {name}\n\n{markdown(kernel_rows(result["kernels"]))}'
        for case in record['cases']
        for name, result in case['implementations'].items()
        if 'kernels' in result
    ]
    return '\n\n'.join([report(record, full_rows), *profiles])


def kernel_rows(kernels: list[dict[str, Any]]) -> list[list[str]]:
    rows = [[each['name'][:120], str(each['calls']), number(each['seconds'] * 1e3)] for each in kernels]
    return [['kernel', 'calls', 'ms'], *rows]


def full_rows(cases: list[dict[str, Any]], record: dict[str, Any]) -> list[list[str]]:
    rows = [['case', 'implementation', 'ms', f'over {cases[0]["yardstick"]}', 'kept MiB', 'peak MiB', 'over floor']]
    for case in cases:
        floor = floor_of(case['work'], record['ceilings'])
        for name, result in case['implementations'].items():
            seconds = result.get('seconds')
            rows.append([
                case['name'],
                name,
                with_spread(seconds, 1e3) if seconds else result.get('skipped', 'checked'),
                with_spread(result['ratio'], unit='x') if 'ratio' in result else '',
                *(number(result[key] / 2**20) if key in result else '' for key in ('kept_bytes', 'peak_bytes')),
                f'{number(seconds["median"] / floor)}x' if seconds and floor else '',
            ])  # fmt: skip
    return rows


#: How to read a summary.
LEGEND = (
    '"A / it" is a ratio of times: median [quartiles] over the rounds of one case, or over several cases with the lowest '
    'of them. "kept" is the ratio of the bytes that a forward keeps for its backward.'
)


def summary(record: dict[str, Any]) -> str:
    """A row for every group of cases, for docs/benchmarks."""
    return f'{report(record, summary_rows)}\n\n{LEGEND}'


def summary_rows(cases: list[dict[str, Any]], record: dict[str, Any]) -> list[list[str]]:
    yardstick = cases[0]['yardstick']
    names = list(dict.fromkeys(name for case in cases for name in case['implementations'] if name != yardstick))
    training = any('kept_bytes' in case['implementations'].get(yardstick, {}) for case in cases)
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault(case['group'], []).append(case['implementations'])
    rows = [['case', f'{yardstick}: ms', *(['kept MiB'] if training else []), *(f'{name} / it' for name in names)]]
    for group, members in groups.items():
        ours = [each[yardstick] for each in members if 'seconds' in each.get(yardstick, {})]
        times = [each['seconds'] for each in ours]
        row = [group if len(members) == 1 else f'{group} ({len(members)} cases)']
        row.append(with_spread(times[0], 1e3) if len(times) == 1 else range_of([each['median'] * 1e3 for each in times]))
        if training:
            row.append(range_of([each['kept_bytes'] / 2**20 for each in ours if 'kept_bytes' in each]))
        rows.append(row + [ratio_cell(name, yardstick, members) for name in names])
    return rows


def range_of(values: list[float]) -> str:
    return '-'.join(dict.fromkeys((number(min(values)), number(max(values))))) if values else ''


def ratio_cell(name: str, yardstick: str, members: list[dict[str, Any]]) -> str:
    found = [each for each in members if 'ratio' in each.get(name, {})]
    if not found:
        return ''
    ratios = [each[name]['ratio'] for each in found]
    medians = [each['median'] for each in ratios]
    cell = with_spread(ratios[0] if len(ratios) == 1 else spread(medians), unit='x')
    if len(ratios) > 1:
        cell += f', lowest {number(min(medians))}x'
    kept = [each[name]['kept_bytes'] / each[yardstick]['kept_bytes'] for each in found if each[name].get('kept_bytes')]
    return cell + (f'; kept {number(statistics.median(kept))}x' if kept else '')


def show_records() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('records', nargs='+', metavar='RECORD', help='JSON files that benchmarks wrote')
    parser.add_argument('--full', action='store_true', help='a row for every case and implementation')
    options = parser.parse_args()
    records = [json.loads(Path(file).read_text()) for file in options.records]
    print('\n\n'.join((full_report if options.full else summary)(record) for record in records))
    return 0


if __name__ == '__main__':
    sys.exit(show_records())
