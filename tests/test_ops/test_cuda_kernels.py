"""Which kernels run on GPUs. The book of choices runs as a program of its own: it needs no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from emulated import SOURCES

from overlock_mm.ops import cuda_kernels


@pytest.fixture(scope='module')
def follow(tmp_path_factory):
    compiler = shutil.which('g++')
    if compiler is None:
        pytest.skip('there is no g++')
    program = tmp_path_factory.mktemp('choices') / 'choices'
    source = os.path.join(os.path.dirname(__file__), 'choices', 'run_choices.cpp')
    subprocess.run([compiler, '-std=c++17', '-Wall', '-Werror', f'-I{SOURCES}', source, '-o', program], check=True)

    def run(*commands: str) -> list[str]:
        done = subprocess.run([program], input='\n'.join(commands), capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return run


def test_the_faster_one_runs_and_is_measured_once(follow):
    assert follow('choose a 2 3 1', 'choose a 2 3 1', 'choose b 5 4 1', 'choose b 0 9 1') == [
        'ours 8', 'ours 0', 'pytorch 8', 'pytorch 0',
    ]  # fmt: skip


def test_pytorch_runs_where_nothing_may_be_measured_and_the_choice_stays_open(follow):
    assert follow('choose a 2 3 0', 'choose a 2 3 1', 'choose a 2 3 0') == ['pytorch 0', 'ours 8', 'ours 0']


def test_a_setting_forces_one_of_them(follow):
    commands = ['force ours', 'choose a 5 4 1', 'force pytorch', 'choose a 1 4 1', 'force fastest', 'force measured']
    assert follow(*commands, 'choose a 1 4 0', 'choose a 1 4 1') == [
        'ok', 'ours 0', 'ok', 'pytorch 0', 'refused', 'ok', 'pytorch 0', 'ours 8',
    ]  # fmt: skip


def test_choices_are_described(follow):
    assert follow('choose b 2 3 1', 'choose a 2.5 1 1', 'describe')[2:] == ['a\tpytorch\t2.5\t1', 'b\tours\t2\t3']


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"which must be one of \('measured', 'ours', 'pytorch'\), got 'cudnn'"):
        cuda_kernels.set_cuda_kernels('cudnn')


@pytest.mark.skipif(cuda_kernels.has_cuda_kernels(), reason='the binary was built with CUDA')
def test_our_kernels_are_refused_where_there_are_none():
    with pytest.raises(RuntimeError, match='built without CUDA'):
        cuda_kernels.set_cuda_kernels('ours')


@pytest.mark.skipif(not cuda_kernels.has_cuda_kernels(), reason='the binary was built without CUDA')
def test_the_binary_takes_settings_and_has_no_choices_before_a_call():
    for which in cuda_kernels.SETTINGS[::-1]:
        cuda_kernels.set_cuda_kernels(which)
    assert cuda_kernels.cuda_choices() == []


@pytest.mark.parametrize('value, message', [('pytorch', ''), ('fast', 'OVERLOCK_MM_CUDA_KERNELS must be one of')])
def test_the_environment_sets_it(value, message):
    environment = {**os.environ, cuda_kernels.ENVIRONMENT_VARIABLE: value}
    command = [sys.executable, '-W', 'ignore', '-c', 'import overlock_mm.ops']
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, message in done.stderr) == (bool(message), True)
