"""The script that builds, tests and measures on a machine with a GPU, tried without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from benchmarks import FOLDER

from overlock_mm.ops import _library

compiled = pytest.mark.skipif(_library.missing is not None, reason='there is no compiled operator')


def run_gpu_check(*arguments, cwd, **variables):
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'PYTHON': sys.executable, **variables}
    env.pop('OUT', None)
    command = ['bash', FOLDER / 'gpu_check.sh', *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_it_is_a_script():
    subprocess.run(['bash', '-n', FOLDER / 'gpu_check.sh'], check=True)
    if shutil.which('shellcheck'):
        subprocess.run(['shellcheck', FOLDER / 'gpu_check.sh'], check=True)


def test_help(tmp_path):
    done = run_gpu_check('--help', cwd=tmp_path)
    assert done.returncode == 0
    assert 'bash tools/benchmarks/gpu_check.sh [--out DIR]' in done.stdout


def test_it_refuses_to_run_without_a_gpu(tmp_path):
    done = run_gpu_check(cwd=tmp_path)
    assert done.returncode == 2
    assert 'torch sees no GPU on this machine' in done.stderr
    assert not any(tmp_path.iterdir())
    done = run_gpu_check('--fast', cwd=tmp_path)
    assert done.returncode == 2
    assert 'unknown option --fast' in done.stderr


@compiled
def test_it_reports_its_parts(tmp_path):
    """On the CPU, and as on a machine without OpenMMLab: the operator needs torch alone."""
    (tmp_path / 'without').mkdir()
    (tmp_path / 'without' / 'sitecustomize.py').write_text('import sys\nsys.modules.update(mmengine=None, mmcv=None)\n')
    arguments = ('--device', 'cpu', '--prebuilt', '--tiny', '--out', 'out')
    done = run_gpu_check(*arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path / 'without'))
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-3:]
    assert [line.split(',')[0].split() for line in last] == [['small_case', 'ok'], ['bench', 'ok'], ['tests', 'ok']]
    record = json.loads((tmp_path / 'out' / 'bench.json').read_text())
    assert record['cases'][0]['implementations']['ours']['errors']['output'] < 1e-5
    assert '| stage 4, 224x224, batch 1 ' in done.stdout


@compiled
def test_it_continues_after_a_part_that_fails(tmp_path):
    """Here the small case, which this interpreter refuses."""
    interpreter = tmp_path / 'python'
    interpreter.write_text(f'#!/bin/sh\ncase "$*" in *--check*) echo oh no; exit 3 ;; esac\nexec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    arguments = ('--device', 'cpu', '--prebuilt', '--tiny', '--out', 'out')
    done = run_gpu_check(*arguments, cwd=tmp_path, PYTHON=str(interpreter))
    assert done.returncode == 1
    assert '    oh no' in done.stdout
    last = done.stdout.strip().splitlines()[-3:]
    assert last[0].startswith('small_case FAILED with 3')
    assert [line.split(',')[0].split() for line in last[1:]] == [['bench', 'ok'], ['tests', 'ok']]
    assert 'FAILED: see above' in done.stdout


def test_it_reports_parts_without_time_left(tmp_path):
    done = run_gpu_check('--device', 'cpu', '--prebuilt', '--out', 'out', cwd=tmp_path, TOTAL_SECONDS='0')
    assert done.returncode == 1
    last = done.stdout.strip().splitlines()[-4:]
    assert [' '.join(line.split()) for line in last] == [
        f'{part} NOT RUN: no time left' for part in ('small_case', 'bench', 'compiled', 'tests')
    ]
