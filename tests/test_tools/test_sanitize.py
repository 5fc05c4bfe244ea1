"""tools/sanitize.py: what it records, and how it goes on."""

from __future__ import annotations

import fcntl
import os
import signal

import pytest
from conftest import ROOT, import_file

#: In place of the random calls: number 3 ends the process, 5 is a finding.
CALLS = """
import argparse, os
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument('operator')
parser.add_argument('numbers', type=int, nargs=2)
parser.add_argument('--at', type=Path)
options = parser.parse_args()
for number in range(*options.numbers):
    options.at.write_text(str(number))
    with open('made', 'a') as file:
        print(number, os.environ['ATEN_CPU_CAPABILITY'], file=file)
    if number == 3:
        os.write(2, b'heap-buffer-overflow')
        os.abort()
    if number == 5:
        print(f'{options.operator} 5\\nwrong', flush=True)
options.at.write_text(str(options.numbers[1]))
"""


@pytest.fixture
def sanitize(tmp_path, monkeypatch):
    module = import_file(ROOT / 'tools' / 'sanitize.py')
    monkeypatch.setattr(module, 'TESTS', tmp_path)
    return module


def test_calls_go_on_after_one_that_ends_the_process(sanitize, tmp_path):
    (tmp_path / 'fuzz.py').write_text(CALLS)
    calls = sanitize.Calls('baseline', 'contmix', 'plain', 2, 8)
    calls.run(tmp_path, sanitize.environment(tmp_path))
    assert (tmp_path / 'made').read_text().splitlines() == [f'{number} default' for number in range(2, 8)]
    assert calls.done(tmp_path) == 6
    first, second = calls.findings(tmp_path)
    assert 'contmix 3' in first
    assert 'heap-buffer-overflow' in first
    assert second.endswith('contmix 5\nwrong\n')
    calls.run(tmp_path, sanitize.environment(tmp_path))
    assert len((tmp_path / 'made').read_text().splitlines()) == 6


def test_an_interrupted_run_resumes_at_its_call(sanitize, tmp_path):
    (tmp_path / 'fuzz.py').write_text(CALLS)
    calls = sanitize.Calls('baseline', 'contmix', 'plain', 0, 8)
    (tmp_path / f'{calls.name}.at').write_text('6')
    calls.run(tmp_path, sanitize.environment(tmp_path))
    assert (tmp_path / 'made').read_text() == '6 default\n7 default\n'


def test_the_best_instruction_set_has_no_limit(sanitize):
    assert sanitize.limited_to('avx2', {'ATEN_CPU_CAPABILITY': 'default', 'A': '1'}) == {
        'ATEN_CPU_CAPABILITY': 'avx2',
        'A': '1',
    }
    assert sanitize.limited_to('avx512_bf16', {'ATEN_CPU_CAPABILITY': 'default', 'A': '1'}) == {'A': '1'}


def test_failed_tests_are_findings(sanitize, tmp_path):
    path = tmp_path / 'test_something.py'
    path.write_text(
        'import os\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): os.environ["ATEN_CPU_CAPABILITY"]'
    )
    part = sanitize.TestFile('avx2', path.name)
    part.run(tmp_path, sanitize.environment(tmp_path))
    assert part.done(tmp_path) == 2
    (finding,) = part.findings(tmp_path)
    assert 'test_b' in finding
    path.write_text('def test_a(): pass')
    part.run(tmp_path, sanitize.environment(tmp_path))  # done already
    assert part.done(tmp_path) == 2


def test_tests_that_end_the_process_are_findings(sanitize, tmp_path):
    (tmp_path / 'test_something.py').write_text('import os\ndef test_a(): os.abort()')
    part = sanitize.TestFile('avx2', 'test_something.py')
    part.run(tmp_path, sanitize.environment(tmp_path))
    (finding,) = part.findings(tmp_path)
    assert 'pytest ended with' in finding


def test_every_number_is_called_once(sanitize, monkeypatch):
    monkeypatch.setattr(sanitize, 'operators', lambda environment: ['contmix', 'conv2d'])
    parts = list(sanitize.calls_of_operators(['baseline', 'avx2', 'avx512'], 1000, 0.1, {}))
    for operator in ('contmix', 'conv2d'):
        numbers = [number for part in parts if part.operator == operator for number in range(part.first, part.end)]
        assert sorted(numbers) == list(range(1000))
    sanitized = [part for part in parts if part.build == 'sanitized']
    assert [part.instruction_set for part in sanitized] == ['baseline', 'avx2', 'avx512'] * 2
    assert all(part.end - part.first == 33 for part in sanitized)


def test_a_change_of_the_sources_changes_the_fingerprint(sanitize, tmp_path):
    (tmp_path / 'fuzz.py').write_text('a')
    first = sanitize.fingerprint()
    assert sanitize.fingerprint() == first
    (tmp_path / 'fuzz.py').write_text('b')
    assert sanitize.fingerprint() != first


def test_a_build_waits_for_compilers_that_an_interrupted_one_left(sanitize, tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize, 'ROOT', tmp_path)
    leave = "import subprocess; print(subprocess.Popen(['sleep', '60'], stderr=subprocess.DEVNULL).pid, flush=True)"
    (tmp_path / 'setup.py').write_text(leave)
    sanitize.build(tmp_path / 'build')
    with open(tmp_path / 'build' / 'log', 'r+') as log:
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.kill(int(log.read()), signal.SIGKILL)
        fcntl.flock(log, fcntl.LOCK_EX)
