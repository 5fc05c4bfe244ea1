"""The vectors of the CPU kernels, cpu/simd.h, against plain scalar code: a C++ program for each instruction set."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parent / 'simd' / 'check_simd.cpp'
KERNELS = Path(__file__).parents[2] / 'overlock_mm' / 'ops' / 'csrc' / 'cpu'

AVX512 = ['-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl', '-mavx2', '-mfma']
# As the kernels_*.cpp files and setup.py set them.
INSTRUCTION_SETS = {
    'baseline': (16, []),
    'avx2': (32, ['-mavx2', '-mfma']),
    'avx512': (64, AVX512),
    'avx512_bf16': (64, [*AVX512, '-mavx512bf16', '-DOVERLOCK_MM_BFLOAT16']),
}
OPTIMISATION = ['-O3', '-ffp-contract=fast']


@pytest.mark.parametrize('name', INSTRUCTION_SETS)
def test_simd(name, tmp_path):
    compiler = shutil.which('g++')
    if compiler is None:
        pytest.skip('there is no g++ to compile the program')
    capability = torch.backends.cpu.get_cpu_capability()
    if name != 'baseline' and not capability.lower().startswith(('avx512', name)):
        pytest.skip(f'this processor has no {name}, its capability is {capability}')
    if name == 'avx512_bf16' and not getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)():
        pytest.skip('this processor has no instructions for bfloat16')
    vector_bytes, flags = INSTRUCTION_SETS[name]
    program = tmp_path / name
    command = [compiler, '-std=c++17', '-Wall', '-Wextra', '-Wno-psabi', '-Wno-unused-function', *OPTIMISATION, *flags]
    command += [f'-DOVERLOCK_MM_NAMESPACE={name}', f'-DOVERLOCK_MM_VECTOR_BYTES={vector_bytes}', f'-I{KERNELS}']
    built = subprocess.run([*command, SOURCE, '-o', program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, '0 failures\n')
