"""Every CUDA source of the operators, compiled by nvcc, and by the oldest toolkits of the supported range."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, Optional

import pytest

SOURCES = Path(__file__).parents[2] / 'overlock_mm' / 'ops' / 'csrc' / 'cuda'
#: Where `make env` installs the packages of requirements/nvrtc-*.txt.
TOOLKITS = Path(sys.prefix) / 'nvrtc'


class Kernels(NamedTuple):
    """The kernels of a source, by mangled names."""

    number: int
    most_spilled: int  # bytes of memory that a thread may have for registers that it does not get
    may_spill: Optional[str] = None  # a pattern of kernels that may have more


KERNELS = {
    'branch_norms_launch.cu': Kernels(56, most_spilled=0),
    # A word or two that the main loops do not need. In a general variant, a number of channels is 0.
    'contmix_launch.cu': Kernels(30, most_spilled=32, may_spill='Li0E'),
    'depthwise_conv2d_launch.cu': Kernels(59, most_spilled=0),
    'layer_norm_launch.cu': Kernels(26, most_spilled=0),
    'response_norm_launch.cu': Kernels(20, most_spilled=0),
    'scale_and_shift_launch.cu': Kernels(42, most_spilled=0),
    # A few words before and after the walk over a tile, of the gradients alone.
    'scaled_sum_launch.cu': Kernels(18, most_spilled=0),
    'squeeze_excitation_launch.cu': Kernels(30, most_spilled=0),
    'residual_depthwise_norm_launch.cu': Kernels(18, most_spilled=40, may_spill='gradients_kernelIdE'),
}
NAMES = sorted(path.name for path in SOURCES.glob('*.cu'))


def test_all_sources_are_known():
    assert sorted(KERNELS) == NAMES


# ----------------------------------------------------------------------------------------------------------------- nvcc


def find_nvcc() -> Optional[str]:
    home = os.environ.get('CUDA_HOME')
    return shutil.which('nvcc') or (shutil.which('nvcc', path=os.path.join(home, 'bin')) if home else None)


@pytest.mark.skipif(find_nvcc() is None, reason='there is no nvcc')
@pytest.mark.parametrize('name', NAMES)
def test_compiles_with_nvcc(tmp_path, name):
    """For the oldest and the newest supported device that this nvcc knows. Threads do not spill their registers."""
    supported = ('70', '75', '80', '86', '89', '90', '100', '120')
    listed = subprocess.run([find_nvcc(), '--list-gpu-arch'], capture_output=True, text=True, check=True).stdout
    known = [version for version in supported if f'compute_{version}' in listed.split()]
    builds = {
        version: subprocess.Popen(
            [find_nvcc(), '-std=c++17', '-O3', f'-arch=sm_{version}', '-cubin', '-Xptxas=-v', '-Werror=all-warnings']
            + [SOURCES / name, '-o', tmp_path / f'{version}.cubin'],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for version in {known[0], known[-1]}
    }
    entry = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores", re.DOTALL)
    for version, process in builds.items():
        log, _ = process.communicate()
        assert process.returncode == 0, log
        compiled = entry.findall(log)
        assert len(compiled) == KERNELS[name].number
        for kernel, *sizes in compiled:
            if not (KERNELS[name].may_spill and re.search(KERNELS[name].may_spill, kernel)):
                spilled = max(map(int, sizes))
                assert spilled <= KERNELS[name].most_spilled, f'sm_{version}: {kernel} keeps {spilled} bytes in memory'


# ---------------------------------------------------------------------------------------------------------------- NVRTC


@pytest.mark.parametrize('architecture', ['compute_70', 'compute_90'])
@pytest.mark.parametrize('toolkit', ['cu11', 'cu12'])
@pytest.mark.parametrize('name', NAMES)
def test_compiles_with_the_oldest_toolkits(name, toolkit, architecture):
    packages = TOOLKITS / toolkit / 'nvidia'
    if not packages.exists():
        pytest.skip(f'NVRTC of an old toolkit is not in {packages} (make env)')
    command = [sys.executable, Path(__file__).parent / 'nvrtc' / 'compile.py', packages, architecture, SOURCES / name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f'\n{KERNELS[name].number} kernels\n'), done.stdout
