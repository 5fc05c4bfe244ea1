"""The shell scripts that start training and testing: their usage, and the commands that they run."""

from __future__ import annotations

import os
import subprocess

import pytest
from conftest import ROOT

USAGES = dict(
    dist_train='tools/dist_train.sh CONFIG GPUS',
    dist_test='tools/dist_test.sh CONFIG CHECKPOINT GPUS',
    slurm_train='tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR',
)


def run(name, *arguments, **variables):
    command = ['bash', ROOT / 'tools' / f'{name}.sh', *arguments]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)


@pytest.mark.parametrize('name', USAGES)
@pytest.mark.parametrize('option', ['-h', '--help'])
def test_help_prints_the_usage(name, option):
    done = run(name, option)
    assert (done.returncode, done.stderr) == (0, '')
    assert USAGES[name] in done.stdout
    assert not done.stdout.startswith('#')


@pytest.mark.parametrize('name', USAGES)
def test_too_few_arguments_are_an_error(name):
    done = run(name, 'one')
    assert (done.returncode, done.stdout) == (2, '')
    assert USAGES[name] in done.stderr


def test_distributed_scripts_start_torchrun(tmp_path):
    echo = tmp_path / 'echo'
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    for name, arguments in (('dist_train', ['config.py']), ('dist_test', ['config.py', 'epoch.pth'])):
        words = run(name, *arguments, '4', '--amp', PYTHON=str(echo), NNODES='2', NODE_RANK='1', PORT='5').stdout.split()
        script = str(ROOT / 'tools' / f'{name.removeprefix("dist_")}.py')
        assert words[:2] == ['-m', 'torch.distributed.run']
        for word in ('--nnodes=2', '--node_rank=1', '--nproc_per_node=4', '--master_addr=127.0.0.1', '--master_port=5'):
            assert word in words
        assert words[words.index(script) + 1 :] == [*arguments, '--launcher', 'pytorch', '--amp']


def test_the_slurm_script_asks_for_gpus_and_trains(tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    variables = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', GPUS='4', SRUN_ARGS='--time=1 --mem=2', PYTHON='py')
    words = run('slurm_train', 'gpu', 'job', 'config.py', 'work', '--amp', **variables).stdout.split()
    for word in ('--ntasks=4', '--ntasks-per-node=4', '--gres=gpu:4', '--time=1', '--mem=2', '--job-name=job'):
        assert word in words
    assert words[words.index('py') :] == [
        'py', '-u', str(ROOT / 'tools' / 'train.py'), 'config.py', '--work-dir', 'work', '--launcher', 'slurm', '--amp',
    ]  # fmt: skip
