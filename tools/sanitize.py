"""The operators under AddressSanitizer and UBSan, and random calls of them: ``make sanitize``.

It needs GCC, and pytest and hypothesis (requirements/dev.txt). For every instruction set of this processor:

- the tests of the operators, with CPU kernels that were built with the sanitizers, in a folder of their own;
- random calls of every public operator, right and wrong ones (tests/test_ops/fuzz.py): a tenth of them with these kernels,
  the others with the installed ones;

and once the tests of the CUDA kernels, which an emulation runs on the host, with the sanitizers.

An interrupted run resumes where it stopped. A change of the sources starts a new one. It prints a line with all counts, and
exits with 1 if there are findings.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / 'tests' / 'test_ops'
#: Values of ATEN_CPU_CAPABILITY, None for none, by the names of the kernels that run with them.
INSTRUCTION_SETS = {'baseline': 'default', 'avx2': 'avx2', 'avx512': 'avx512', 'avx512_bf16': None}
EMULATION = 'test_cuda_*.py'  # they build programs of their own with sanitizers
#: Tests that the sanitizers say nothing about: of a program without them, and of nvcc; calls that are made here anyway.
LEFT_OUT = ('test_simd.py', 'test_fuzz.py')
LEFT_OUT_OF_EMULATION = 'not compiles_for_devices'
SANITIZERS = '-fsanitize=address,undefined'
# Python's own flags may have -fwrapv, with which UBSan knows no overflow.
FLAGS = f'-O1 -g1 {SANITIZERS} -fno-sanitize-recover=all -fno-omit-frame-pointer -fno-wrapv'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'sanitize')
    parser.add_argument('--calls', type=int, default=100_000, help='of each operator (default: %(default)s)')
    parser.add_argument('--sanitized', type=float, default=0.1, help='their share with sanitizers (default: %(default)s)')
    parser.add_argument('--instruction-sets', nargs='+', choices=INSTRUCTION_SETS, help='default: all of this processor')
    parser.add_argument('--without-tests', action='store_true', help='random calls alone')
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('terminated'))  # so that children end too

    work_dir = options.work_dir.resolve()
    package = build(work_dir / 'build')
    results = work_dir / f'results-{fingerprint()}'
    results.mkdir(parents=True, exist_ok=True)
    environments = {'sanitized': sanitized_environment(package), 'plain': environment(ROOT)}
    instruction_sets = options.instruction_sets or known_instruction_sets(environments['sanitized'])

    parts: list = []
    if not options.without_tests:
        parts += test_files(instruction_sets)
    parts += calls_of_operators(instruction_sets, options.calls, options.sanitized, environments['plain'])
    for part in parts:
        print(f'{part.name}: ', end='', flush=True)
        part.run(results, environments[part.build])
        print(f'{part.done(results)} done, {len(part.findings(results))} findings', flush=True)

    findings = [finding for part in parts for finding in part.findings(results)]
    for finding in findings[:20]:
        print(f'\n{finding}')
    tests = sum(part.done(results) for part in parts if isinstance(part, TestFile))
    counts = dict.fromkeys(environments, 0)
    for part in parts:
        counts[part.build] += part.done(results) if isinstance(part, Calls) else 0
    print(
        f'sanitize: {", ".join(instruction_sets)}: {tests} tests, {counts["sanitized"]} calls with sanitizers, '
        f'{counts["plain"]} without, {len(findings)} findings' + (f' ({results})' if findings else '')
    )
    return bool(findings)


# ---------------------------------------------------------------------------------------------------------------------
# Builds


def build(folder: Path) -> Path:
    """The package with sanitized CPU kernels: the folder to import it from. Only changed sources are compiled again."""
    package = folder / 'package'
    flags = dict(FORCE_CUDA='0', CXXFLAGS=FLAGS, LDFLAGS=SANITIZERS)
    command = [sys.executable, 'setup.py', '-q', 'build', '--build-base', folder, '--build-lib', package]
    print('building with sanitizers, some ten minutes of one core the first time', flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'log', 'a') as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # wait for compilers that an interrupted run has left: they have it too
        log.truncate(0)
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **flags}, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f'the build failed: {folder / "log"}')
    return package


def fingerprint() -> str:
    """Of all files that the results depend on."""
    digest = hashlib.sha256()
    for folder in (ROOT / 'overlock_mm', TESTS):
        for path in sorted(folder.rglob('*')):
            if path.suffix in ('.py', '.h', '.cpp', '.cu', '.cuh'):
                digest.update(f'{path.relative_to(folder)}\n'.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def environment(package: Path) -> dict[str, str]:
    # Tests and calls run on several threads, of which there may be more than cores: none is to wait actively.
    return {**os.environ, 'PYTHONPATH': str(package), 'CUDA_VISIBLE_DEVICES': '', 'OMP_WAIT_POLICY': 'passive'}


def sanitized_environment(package: Path) -> dict[str, str]:
    """With the sanitizer's library loaded first, and the C++ library, whose functions for exceptions it looks for."""
    libraries = [
        subprocess.run(['g++', f'-print-file-name={name}'], capture_output=True, text=True, check=True).stdout.strip()
        for name in ('libasan.so', 'libstdc++.so.6')
    ]
    return {
        **environment(package),
        'LD_PRELOAD': ' '.join(libraries),
        'ASAN_OPTIONS': 'detect_leaks=0',  # Python and torch keep much to the end
        'UBSAN_OPTIONS': 'print_stacktrace=1',
    }


def known_instruction_sets(environment: dict[str, str]) -> list[str]:
    code = 'from overlock_mm.ops import _library; print(_library.build_info["cpu"])'
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], cwd='/', env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit('the package with sanitizers does not load')
    names = list(INSTRUCTION_SETS)
    return names[: names.index(done.stdout.strip()) + 1]


def limited_to(instruction_set: str, environment: dict[str, str]) -> dict[str, str]:
    capability = INSTRUCTION_SETS[instruction_set]
    others = {name: value for name, value in environment.items() if name != 'ATEN_CPU_CAPABILITY'}
    return others if capability is None else {**others, 'ATEN_CPU_CAPABILITY': capability}


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a run. Each records in a file of its name how far it is, and what it found in another.


class TestFile(NamedTuple):
    """A file of tests."""

    instruction_set: str
    file: str
    build: str = 'sanitized'
    chosen: str = ''

    @property
    def name(self) -> str:
        return f'{Path(self.file).stem} {self.instruction_set}'

    def run(self, results: Path, environment: dict[str, str]) -> None:
        record = results / f'{self.name}.json'
        if record.exists():
            return
        command = [sys.executable, '-W', 'ignore', '-m', 'pytest', '-q', '-rfE', '-p', 'no:cacheprovider']
        command += [TESTS / self.file, '-k', self.chosen]
        variables = limited_to(self.instruction_set, environment)
        # Not in the checkout, whose package Python would import.
        done = subprocess.run(
            command, cwd=results, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        (results / f'{self.name}.log').write_text(done.stdout)
        passed = re.search(r'(\d+) passed', done.stdout)
        findings = re.findall(r'^(?:FAILED|ERROR) .*', done.stdout, re.MULTILINE)
        if done.returncode and not findings:
            findings = [f'pytest ended with {done.returncode}:\n{done.stdout[-4000:]}']
        record.write_text(json.dumps(dict(done=int(passed.group(1)) if passed else 0, findings=findings)))

    def done(self, results: Path) -> int:
        return self._record(results)['done']

    def findings(self, results: Path) -> list[str]:
        return [f'{self.name}: {finding}' for finding in self._record(results)['findings']]

    def _record(self, results: Path) -> dict:
        return json.loads((results / f'{self.name}.json').read_text())


class Calls(NamedTuple):
    """Random calls of an operator: those with the numbers [first, end)."""

    instruction_set: str
    operator: str
    build: str
    first: int
    end: int

    @property
    def name(self) -> str:
        return f'{self.operator} {self.instruction_set} {self.build} {self.first}-{self.end}'

    def run(self, results: Path, environment: dict[str, str]) -> None:
        at, found = results / f'{self.name}.at', results / f'{self.name}.found'
        variables = limited_to(self.instruction_set, environment)
        while (number := self._next(results)) < self.end:
            with open(found, 'a') as out:
                command = [sys.executable, '-W', 'ignore', TESTS / 'fuzz.py', self.operator, str(number), str(self.end)]
                done = subprocess.run(
                    [*command, '--at', at], cwd=results, env=variables, stdout=out, stderr=subprocess.PIPE, text=True
                )
                number = self._next(results)
                if number < self.end:  # it ended within this call
                    out.write(f'{self.operator} {number}\nended with {done.returncode}\n{done.stderr[:4000]}\n')
                    at.write_text(str(number + 1))

    def done(self, results: Path) -> int:
        return self._next(results) - self.first

    def findings(self, results: Path) -> list[str]:
        found = results / f'{self.name}.found'
        heads = rf'^(?={self.operator} \d+$)'
        texts = re.split(heads, found.read_text(), flags=re.MULTILINE)[1:] if found.exists() else []
        return [f'{self.name}: {text}' for text in texts]

    def _next(self, results: Path) -> int:
        at = results / f'{self.name}.at'
        return int(at.read_text() or self.first) if at.exists() else self.first


def test_files(instruction_sets: list[str]) -> Iterator[TestFile]:
    for path in sorted(TESTS.glob(EMULATION)):
        yield TestFile(instruction_sets[-1], path.name, 'plain', LEFT_OUT_OF_EMULATION)
    for instruction_set in instruction_sets:
        for path in sorted(TESTS.glob('test_*.py')):
            if path.name not in LEFT_OUT and not path.match(EMULATION):
                yield TestFile(instruction_set, path.name)


def operators(environment: dict[str, str]) -> list[str]:
    command = [sys.executable, '-W', 'ignore', '-c', 'import fuzz; print(*fuzz.OPERATORS)']
    return subprocess.run(command, cwd=TESTS, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


def calls_of_operators(
    instruction_sets: list[str], calls: int, sanitized: float, environment: dict[str, str]
) -> Iterator[Calls]:
    """All numbers below `calls`, shared out between the instruction sets; with sanitizers first."""
    names = operators(environment)
    shares = []
    for i, instruction_set in enumerate(instruction_sets):
        first, end = (round(calls * j / len(instruction_sets)) for j in (i, i + 1))
        middle = first + round(sanitized * (end - first))
        shares.append((instruction_set, first, middle, end))
    for operator in names:
        for instruction_set, first, middle, _ in shares:
            yield Calls(instruction_set, operator, 'sanitized', first, middle)
    for operator in names:
        for instruction_set, _, middle, end in shares:
            yield Calls(instruction_set, operator, 'plain', middle, end)


if __name__ == '__main__':
    sys.exit(main())
