"""What the benchmarks share: clocks, memory, rates of the machine, and the record of a run."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch

import overlock_mm
from overlock_mm.ops import _extension

DTYPES = {name: getattr(torch, name) for name in ('float32', 'float64', 'float16', 'bfloat16')}


class Skipped(Exception):
    """An implementation that does not run here; says why."""


def saved_bytes(function: Callable, inputs: dict[str, Any]) -> int:
    """Bytes of the different storages that a forward keeps for its backward, inputs and output among them."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(**inputs)  # noqa: F841  # while it lives, no storage is freed and its address given again
    return sum(storages.values())


def nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def worst_error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative error; NaN if there is one."""
    errors = [relative_error(*pair) for pair in zip(got, expected)]
    return max(errors, key=lambda error: float('inf') if error != error else error)


def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def measure(call: Callable[[int], Any], calls: int, device: torch.device) -> float:
    """Seconds a call, of ``calls`` in a row; the first argument of ``call`` counts them."""
    if calls > 1:
        call(0)  # a short call would feel the caches as another implementation left them
    synchronize(device)
    if device.type == 'cuda':
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(calls):
            call(i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for i in range(calls):
        call(i)
    return (time.perf_counter() - begin) / calls


def peak_memory(call: Callable[[], Any], device: torch.device) -> Optional[int]:
    """Bytes that a call takes on the GPU at its height, above what is there already."""
    if device.type != 'cuda':
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = call()  # noqa: F841
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def allocated_by(calls: Sequence[Callable[[], Any]], device: torch.device) -> tuple[int, list[int]]:
    """Bytes that calls, one after the other, take at their height, and those that are still taken after each.

    By torch's allocators, above what was there before. What a kernel takes in threads of its own on a CPU is not seen.
    """
    peak, left = 0, []
    if device.type == 'cuda':
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        for call in calls:
            call()
            synchronize(device)
            left.append(torch.cuda.memory_allocated(device) - before)
        return torch.cuda.max_memory_allocated(device) - before, left
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # else the profiler says that it finds no GPU
    total = 0
    for call in calls:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        for event in profile.profiler.kineto_results.events():
            if event.name() == '[memory]':
                total += event.nbytes()
                peak = max(peak, total)
        left.append(total)
    return peak, left


def spread(samples: list[float]) -> dict[str, float]:
    first, median, third = statistics.quantiles(samples, n=4, method='inclusive') if len(samples) > 1 else samples * 3
    return dict(median=median, q1=first, q3=third)


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


def best_rate(amount: float, call: Callable[[], Any], device: torch.device, seconds: float = 0.3) -> float:
    """``amount`` over the shortest of some calls: a ceiling is what the machine can do, undisturbed."""
    call()
    shortest, end = float('inf'), time.perf_counter() + seconds
    while time.perf_counter() < end:
        shortest = min(shortest, measure(lambda i: call(), 3, device))
    return amount / shortest


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty((1 << 30 if device.type == 'cuda' else 1 << 27) // 4, device=device).normal_()
    target = torch.empty_like(source)
    return best_rate(2 * nbytes([source]), lambda: target.copy_(source), device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds a second of a large matrix product."""
    on_gpu = device.type == 'cuda'
    side = 8192 if on_gpu and dtype.itemsize == 2 else 4096 if on_gpu else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return best_rate(side**3, lambda: a @ b, device)


def free_memory() -> Optional[int]:
    """Of the CPU, in bytes, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path('/proc/meminfo').read_text().splitlines():
            if line.startswith('MemAvailable:'):
                return int(line.split()[1]) * 1024
    return None


def describe_machine(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == 'cuda'
    return dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        device=torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        device_type=device.type,
        compute_capability='.'.join(map(str, torch.cuda.get_device_capability(device))) if on_gpu else None,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        allow_tf32=torch.backends.cuda.matmul.allow_tf32,
        python=platform.python_version(),
        overlock_mm=overlock_mm.__version__,
        compiled_operator=_extension.build_info or dict(missing=_extension.missing),
        git_commit=git_commit(),
    )


def set_up_machine(options: argparse.Namespace) -> dict[str, Any]:
    """Do as the options say, and describe the machine.

    Raises:
        ValueError: freed memory cannot be kept.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.keep_freed_memory:
        from overlock_mm.memory import keep_freed_memory  # with its hook, which needs OpenMMLab: operators need torch alone

        if not keep_freed_memory():
            raise ValueError('--keep-freed-memory: the C library is not glibc')
    return dict(describe_machine(options.device), keeps_freed_memory=options.keep_freed_memory)


def cpu_name() -> str:
    """With family and model where the name has no number, and is that of many."""
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
    """Of the checkout that this script is in, with '-dirty' where tracked files differ; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(['git', '-C', here, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    try:
        # A copy that is installed may lie in the checkout of something else.
        if not (Path(git('rev-parse', '--show-toplevel')) / 'overlock_mm' / 'ops').is_dir():
            return None
        return git('rev-parse', 'HEAD') + ('-dirty' if git('status', '--porcelain', '--untracked-files=no') else '')
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(record: dict[str, Any], file: str) -> None:
    """All of it or, if the run ends in the middle, what was there before."""
    temporary = Path(f'{file}.part')
    temporary.write_text(json.dumps(record, indent=1) + '\n')
    os.replace(temporary, file)


def image_size(text: str) -> tuple[int, int]:
    try:
        height, _, width = text.partition('x')
        size = int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be HEIGHTxWIDTH, as 800x1344, got {text!r}') from None
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f'must be HEIGHTxWIDTH with positive numbers, got {text!r}')
    return size


def positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a positive integer, got {text!r}')
    return int(text)


def add_machine_options(group: argparse._ArgumentGroup) -> None:
    """What every benchmark is told of the machine, for :func:`resolve_device` and :func:`set_up_machine`."""
    group.add_argument('--device', type=torch.device, help='cpu or cuda; default: the GPU if there is one')
    group.add_argument('--threads', type=positive_int, metavar='N', help="threads on the CPU; default: torch's")
    group.add_argument('--time-limit', type=float, metavar='SECONDS', help='start no more cases after so many seconds')
    group.add_argument('--bandwidth', type=float, metavar='GB/S', help='of memory, in place of a measured one')
    group.add_argument('--flops', type=float, metavar='TFLOP/S', help='two for a multiply-add, in place of a measured rate')
    group.add_argument(
        '--keep-freed-memory',
        action='store_true',
        help='let the C library give none back to the system: no page faults, whoever came before',
    )


def resolve_device(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.device is None:
        options.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if options.device.type not in ('cpu', 'cuda'):
        parser.error(f'--device must be cpu or cuda, got {options.device}')
    if options.device.type == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no GPU')
