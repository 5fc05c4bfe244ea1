"""The script that builds, tests and measures on a machine with a GPU, tried without one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from benchmarks import FOLDER, bench_backbone, bench_contmix, bench_depthwise, gpu_check
from conftest import ROOT

from overlock_mm.ops import _library

compiled = pytest.mark.skipif(_library.missing is not None, reason='there is no compiled operator')
CALLS = ('operators', 'network', 'kernels', 'counters', 'again')
BENCHMARKS = {
    'bench_backbone.py': bench_backbone,
    'bench_contmix.py': bench_contmix,
    'bench_depthwise.py': bench_depthwise,
}

#: As ncu writes it: a message, and a row for each metric of each launch.
COUNTERS = """\
==PROF== Connected to process 1
"ID","Kernel Name","Block Size","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"
"0","forward(Params)","(128, 1, 1)","(96, 1, 1)","GPU Speed Of Light Throughput","Duration","us","42.5"
"0","forward(Params)","(128, 1, 1)","(96, 1, 1)","Launch Statistics","Registers Per Thread","register/thread","80"
"1","backward(Params)","(64, 1, 1)","(12, 1, 1)","GPU Speed Of Light Throughput","Duration","ms","1.25"
"1","backward(Params)","(64, 1, 1)","(12, 1, 1)","Occupancy","Achieved Occupancy","%","48.1"
"2","forward(Params)","(128, 1, 1)","(96, 1, 1)","GPU Speed Of Light Throughput","Duration","us","41"
"""


def run_gpu_check(*arguments, cwd, **variables):
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'PYTHON': sys.executable, **variables}
    env.pop('OUT', None)
    command = ['bash', FOLDER / 'gpu_check.sh', *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def rows_of(table):
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()]


def test_it_is_a_script():
    subprocess.run(['bash', '-n', FOLDER / 'gpu_check.sh'], check=True)
    if shutil.which('shellcheck'):
        subprocess.run(['shellcheck', FOLDER / 'gpu_check.sh'], check=True)


def test_help(tmp_path):
    done = run_gpu_check('--help', cwd=tmp_path)
    assert done.returncode == 0
    assert all(f'\n  {call} ' in done.stdout for call in CALLS)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['operators'], 'torch sees no GPU on this machine'),
        (['operators', '--fast'], 'unknown argument --fast'),
        (['operators', 'network'], 'one call at a time, got operators and network'),
        (['operators', '--device', 'tpu'], '--device must be cuda or cpu, got tpu'),
        (['operators', '--out'], '--out needs a value'),
        ([], 'which call?'),
    ],
)
def test_it_refuses_what_it_cannot_do(tmp_path, arguments, message):
    done = run_gpu_check(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('tiny', [False, True], ids=['real', 'tiny'])
@pytest.mark.parametrize('call', CALLS)
def test_calls_ask_for_cases_that_there_are(tmp_path, call, tiny):
    """Benchmarks take their arguments, with names of kernels that can be set, and parts have names of their own."""
    parts = getattr(gpu_check.Call(tmp_path, 'cuda', tiny), call)()
    assert len({part.name for part in parts}) == len(parts)
    assert sum(part.seconds for part in parts) <= 560
    for part in parts:
        command = list(map(str, part.command))
        scripts = [index for index, word in enumerate(command) if os.path.basename(word) in BENCHMARKS]
        for index in scripts:
            module = BENCHMARKS[os.path.basename(command[index])]
            options = module.make_parser().parse_args(command[index + 1 :])
            assert options.device == torch.device('cuda')
            assert module.cases_of(options)
            assert part.variables['OVERLOCK_MM_CUDA_KERNELS'] in ('ours', 'measured')
        assert scripts or 'pytest' in command


@compiled
def test_a_call_without_openmmlab(tmp_path):
    """The tests that need a GPU are found, and skipped."""
    (tmp_path / 'sitecustomize.py').write_text(
        'import sys\nsys.modules.update(dict.fromkeys(("mmcv", "mmdet", "mmseg", "mmpretrain")))\n'
    )
    arguments = ('operators', '--device', 'cpu', '--prebuilt', '--tiny', '--out', 'out')
    done = run_gpu_check(*arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[-3:]] == ['tests', 'memcheck', 'racecheck']
    assert re.search(r'^\d\d+ skipped, \d+ deselected', (tmp_path / 'out' / 'operators.log').read_text(), re.MULTILINE)


def test_wheels_are_unpacked(tmp_path):
    """Beside a copy of the package, which is the one that is imported."""
    (tmp_path / 'wheels').mkdir()
    (tmp_path / 'probe.py').write_text('')
    subprocess.run([sys.executable, '-m', 'zipfile', '-c', 'wheels/a.whl', 'probe.py'], cwd=tmp_path, check=True)
    interpreter = tmp_path / 'python'
    seen = 'import probe, overlock_mm; print(probe.__file__, overlock_mm.__file__)'
    interpreter.write_text(
        f'#!/bin/sh\ncase "$*" in *gpu_check.py*) exec {sys.executable} -c "{seen}" ;; esac\nexec {sys.executable} "$@"\n'
    )
    interpreter.chmod(0o755)
    arguments = ('network', '--device', 'cpu', '--prebuilt', '--wheels', 'wheels', '--out', 'out')
    done = run_gpu_check(*arguments, cwd=tmp_path, PYTHON=str(interpreter))
    assert done.returncode == 0, done.stderr
    probe, package = done.stdout.split()
    assert probe.endswith('/site/probe.py')
    assert package.endswith('/source/overlock_mm/__init__.py')
    assert not package.startswith(str(ROOT))


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """``parts(commands, *arguments)`` runs the script on parts of its own: the exit status."""

    def main(parts, *arguments):
        monkeypatch.setattr(gpu_check.Call, 'again', lambda self: parts)
        monkeypatch.setattr(sys, 'argv', ['gpu_check.py', 'again', '--out', str(tmp_path), '--device', 'cpu', *arguments])
        return gpu_check.main()

    return main


def python(name, code, seconds=60, missing=None):
    return gpu_check.Part(name, seconds, [sys.executable, '-c', code], {'SETTING': 'on'}, missing)


def test_parts_that_fail_are_reported_and_the_next_ones_run(parts, tmp_path, capsys):
    commands = [
        python('slow', 'import time; print("begins", flush=True); time.sleep(600)', seconds=1),
        python('wrong', 'raise SystemExit("oh no")'),
        python('absent', '', missing='ncu'),
        python('right', 'import os; print(os.environ["SETTING"])'),
    ]
    assert parts(commands, '--seconds', '100') == 1
    output = capsys.readouterr().out
    ends = [line.split(maxsplit=1) for line in output.strip().splitlines()[-4:]]
    assert [name for name, _ in ends] == ['slow', 'wrong', 'absent', 'right']
    assert ends[0][1].startswith('FAILED: stopped after')
    assert ends[1][1].startswith('FAILED with 1')
    assert ends[2][1] == 'not run: there is no ncu'
    assert ends[3][1].startswith('ok')
    assert '    oh no' in output
    assert '\non\n' in (tmp_path / 'again.log').read_text()


def test_without_time_left_no_part_begins(parts, capsys):
    assert parts([python('late', '')], '--seconds', '5') == 1
    assert capsys.readouterr().out.strip().endswith('FAILED: no time left')


def test_counters_of_a_kernel_and_size_come_once(parts, tmp_path, capsys):
    code = f'import pathlib; pathlib.Path({str(tmp_path)!r}, "counted.csv").write_text({COUNTERS!r})'
    assert parts([python('counted', code)], '--seconds', '100') == 0
    table = (tmp_path / 'again.md').read_text().split('## counted\n\n')[1].strip()
    head, _, *rows = rows_of(table)
    assert head == ['kernel', 'blocks x threads', 'time', 'occupancy', 'registers']
    assert rows == [
        ['forward(Params)', '(96, 1, 1) x (128, 1, 1)', '42.5 us', '', '80'],
        ['backward(Params)', '(12, 1, 1) x (64, 1, 1)', '1.25 ms', '48.1 %', ''],
    ]
