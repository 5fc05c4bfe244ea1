"""CUDA kernels on the host, thread by thread: builds and runs the programs of emulation/.

A program runs the launchers of one operator: ``emulation/run_X.cpp`` with ``csrc/cuda/X_launch.cu``.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import pytest
import torch
from torch import Tensor

EMULATION = Path(__file__).parent / 'emulation'
SOURCES = Path(__file__).parents[2] / 'overlock_mm' / 'ops' / 'csrc' / 'cuda'
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of csrc/cuda/dtype.h
# Of scales and scaled sums. Errors in the Frobenius norm: of maps relative to them, and of sums over positions relative to
# the sums of the sizes of their terms, which may cancel.
TOLERANCES_OF_SCALES = {
    torch.float32: (1e-6, 1e-6),
    torch.float64: (1e-15, 1e-14),
    torch.float16: (5e-4, 1e-6),
    torch.bfloat16: (4e-3, 1e-6),
}
H200, T4 = 232448, 65536  # bytes of shared memory that a block may have

#: The program as it is shipped, and one that stops at the first read or write beyond an array.
BUILDS = {
    'plain': ['-O2'],
    'sanitized': ['-g1', '-O1', '-fsanitize=address,undefined', '-fno-sanitize-recover=all'],
}


def build(operator: str, folder: Path, *others: str) -> dict[str, Path]:
    """The programs of an operator, with launchers of others that it uses, by the names of their builds."""
    compiler = shutil.which('g++')
    if compiler is None:
        pytest.skip('there is no g++ to compile the emulation')
    sources = ['-x', 'c++', *(SOURCES / f'{each}_launch.cu' for each in (operator, *others))]
    sources += [EMULATION / 'cuda_emulation.cpp', EMULATION / f'run_{operator}.cpp']
    common = [compiler, '-rdynamic', '-std=c++17', '-Wall', '-Wextra', '-Werror', '-Wno-unknown-pragmas']
    common += [f'-I{EMULATION}', f'-I{SOURCES}']
    builds = {
        name: subprocess.Popen(
            [*common, *flags, *sources, '-o', folder / name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, flags in BUILDS.items()
    }
    for name, process in builds.items():
        message, _ = process.communicate()
        assert process.returncode == 0, f'{name}: {message}'
    return {name: folder / name for name in builds}


class Launch(NamedTuple):
    kernel: str  # mangled
    blocks: int
    threads: int
    shared_bytes: int
    bytes_read: int  # of global memory through __ldg, each once

    @classmethod
    def parse(cls, line: str) -> Launch:
        kernel, *numbers = line.split()
        return cls(kernel, *map(int, numbers))


def pack(*numbers: int) -> bytes:
    return struct.pack(f'{len(numbers)}q', *numbers)


def to_bytes(tensor: Optional[Tensor]) -> bytes:
    """A size and as many bytes, in the order of memory. None has no bytes."""
    if tensor is None:
        return pack(0)
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return pack(len(data)) + data


def blobs_of(file: Path) -> list[bytearray]:
    data, blobs, at = file.read_bytes(), [], 0
    while at < len(data):
        (size,) = struct.unpack_from('q', data, at)
        blobs.append(bytearray(data[at + 8 : at + 8 + size]))
        at += 8 + size
    return blobs


def execute(program: Path, case: bytes, folder: Path) -> list[bytearray]:
    """Run a program: what it has written."""
    (folder / 'case').write_bytes(case)
    environment = {**os.environ, 'ASAN_OPTIONS': 'detect_leaks=0'}
    command = [program, folder / 'case', folder / 'result']
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return blobs_of(folder / 'result')


def run(
    program: Path,
    numbers: Sequence[int],
    arrays: Sequence[Optional[Tensor]],
    folder: Path,
    shared_memory: int = H200,
    reversed_threads: bool = False,
) -> tuple[list[Optional[Tensor]], list[Launch]]:
    """Run a case of numbers and arrays (emulation/case.h).

    Args:
        numbers: what ``run_X.cpp`` says.
        arrays: tensors, dense in their memory format (maps (B, C, H, W) in channels_last are), or None. Outputs are full
            of NaN by convention, so that it shows what is not written.

    Returns:
        The arrays after the launches, and the launches.
    """
    case = pack(shared_memory, reversed_threads, len(numbers), *numbers, len(arrays))
    *blobs, launches = execute(program, case + b''.join(map(to_bytes, arrays)), folder)
    results: list[Optional[Tensor]] = []
    for tensor, blob in zip(arrays, blobs):
        if tensor is None or not blob:
            results.append(tensor)
            continue
        flat = torch.frombuffer(blob, dtype=tensor.dtype)
        if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            batch, channels, height, width = tensor.shape
            results.append(flat.view(batch, height, width, channels).permute(0, 3, 1, 2))
        else:
            results.append(flat.view(tensor.shape))
    return results, [Launch.parse(line) for line in launches.decode().splitlines()]


def nan_like(tensor: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """An output that nothing has been written to."""
    return torch.full_like(tensor, torch.nan, dtype=dtype)


def relative_error(actual: Tensor, expected: Tensor, size: Optional[Tensor] = None) -> float:
    """In the Frobenius norm. NaN must be where it is expected.

    Args:
        actual: result of a program.
        expected: the same in float64.
        size: of sums, whose terms can cancel: the root of the sum of their squares. It replaces the norm of ``expected``.
    """
    assert actual.numel() == expected.numel()
    actual, expected = actual.double().reshape(expected.shape), expected.double()
    assert torch.equal(actual.isnan(), expected.isnan()), 'NaN elsewhere than expected'
    actual, expected = actual.nan_to_num(), expected.nan_to_num()
    size = expected if size is None else size
    return ((actual - expected).norm() / size.norm().clamp(min=1e-300)).item()


def template_arguments(kernel: str) -> list[int]:
    """Integers among the template arguments in a mangled name: they look like Li16E."""
    return [int(number) for number in re.findall(r'Li(\d+)E', kernel)]
