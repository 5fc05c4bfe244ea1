"""The parts of a call of gpu_check.sh, which prepares the environment and has the description.

Parts run one after the other, each for a limited time. Their output goes to CALL.log, results to CALL.md and JSON files.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import harness

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / 'tests'
#: With less time than this, in seconds, no part begins.
LEAST_TIME = 10
DETECTOR = ('--arch', 't', '--size', '800x1344', '--batch', '2')
DTYPES = ('--dtype', 'float32', 'bfloat16')
PEERS = ('--peers', 'convnext-tiny', 'convnext-base', 'swin-tiny')
#: Arguments that make a benchmark small, to try this script.
TINY = ('--arch', 'xt', '--batch', '1', '--dtype', 'float32', '--rounds', '1')
TINY_OF = {
    'bench_backbone.py': ('--size', '64x64'),
    'bench_contmix.py': ('--size', '224x224', '--stage', '4'),
    'bench_depthwise.py': ('--size', '64x64', '--what', 'zoo', '--spacing', '1000'),
}
#: Sections of Nsight Compute, and what a report shows of them: title, section and metric.
COUNTERS = (
    ('time', 'GPU Speed Of Light Throughput', 'Duration'),
    ('SM', 'GPU Speed Of Light Throughput', 'Compute (SM) Throughput'),
    ('L1', 'GPU Speed Of Light Throughput', 'L1/TEX Cache Throughput'),
    ('L2', 'GPU Speed Of Light Throughput', 'L2 Cache Throughput'),
    ('DRAM', 'GPU Speed Of Light Throughput', 'DRAM Throughput'),
    ('issue slots', 'Compute Workload Analysis', 'Issue Slots Busy'),
    ('occupancy', 'Occupancy', 'Achieved Occupancy'),
    ('at most', 'Occupancy', 'Theoretical Occupancy'),
    ('registers', 'Launch Statistics', 'Registers Per Thread'),
    ('shared memory', 'Launch Statistics', 'Dynamic Shared Memory Per Block'),
)
SECTIONS = ('SpeedOfLight', 'ComputeWorkloadAnalysis', 'Occupancy', 'LaunchStats')


@dataclass
class Part:
    """A command.

    Args:
        name: of the part and, if it writes one, of its record.
        seconds: that it may take.
        command: what runs.
        variables: of the environment.
        missing: a program that is not on this machine.
    """

    name: str
    seconds: float
    command: Sequence[str]
    variables: dict[str, str] = field(default_factory=dict)
    missing: Optional[str] = None


class Call:
    """The parts of each call."""

    def __init__(self, out: Path, device: str, tiny: bool) -> None:
        self.out, self.device, self.tiny = out, device, tiny

    def bench(self, name: str, seconds: int, script: str, *arguments: str, kernels: str = 'measured') -> Part:
        """A benchmark, which begins no case after three quarters of its time."""
        limits = (*TINY, *TINY_OF[script]) if self.tiny else ('--time-limit', str(seconds * 3 // 4))
        command = [sys.executable, '-W', 'ignore', str(HERE / script), *arguments, *limits]
        command += ['--device', self.device, '--json', str(self.out / f'{name}.json')]
        return Part(name, seconds, command, {'OVERLOCK_MM_CUDA_KERNELS': kernels})

    def pytest(self, *arguments: str) -> list[str]:
        return [sys.executable, '-W', 'ignore', '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', 'gpu', *arguments]

    def tests(self, seconds: int) -> Part:
        command = self.pytest('--maxfail=20', str(TESTS / 'test_ops'), str(TESTS / 'test_models'))
        return Part('tests', seconds, command, {'OVERLOCK_MM_CUDA_KERNELS': 'ours'})

    def sanitizer(self, tool: str, seconds: int) -> Part:
        """Random calls of all operators. Without caching, every tensor is an allocation: accesses beyond it are seen."""
        program, missing = find('compute-sanitizer')
        command = [program, '--tool', tool, '--error-exitcode', '9', *self.pytest(str(TESTS / 'test_ops' / 'test_fuzz.py'))]
        variables = {'OVERLOCK_MM_CUDA_KERNELS': 'ours', 'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'}
        return Part(tool, seconds, command, variables, missing)

    def counted(self, name: str, seconds: int, script: str, *arguments: str) -> Part:
        """Nsight Compute on a benchmark of ours alone: clocks as they are, kernels until there are many."""
        part = self.bench(name, seconds, script, *DETECTOR, *arguments, '--rounds', '1', kernels='ours')
        program, part.missing = find('ncu')
        sections = [word for section in SECTIONS for word in ('--section', section)]
        names = ['--kernel-name', 'regex:contmix|depthwise|branch|response', '--launch-count', '60']
        output = ['--csv', '--page', 'details', '--log-file', str(self.out / f'{name}.csv')]
        part.command = [program, '--clock-control', 'none', *names, *sections, *output, *part.command]
        return part

    def operators(self) -> list[Part]:
        return [self.tests(250), self.sanitizer('memcheck', 120), self.sanitizer('racecheck', 120)]

    def training(self, name: str, seconds: int, *arguments: str) -> Part:
        return self.bench(name, seconds, 'bench_backbone.py', *DETECTOR, '--mode', 'train', '--seconds', '4', *arguments)

    def depthwise(self, seconds: int, *what: str) -> Part:
        arguments = (*DETECTOR, *DTYPES, '--seconds', '0.5', '--what', *what)
        return self.bench('depthwise', seconds, 'bench_depthwise.py', *arguments, kernels='ours')

    def contmix(self, seconds: int) -> Part:
        arguments = (*DETECTOR, *DTYPES, '--seconds', '0.5', '--implementations', 'ours', 'reference')
        return self.bench('contmix', seconds, 'bench_contmix.py', *arguments)

    def network(self) -> list[Part]:
        ours = ('--implementations', 'ours', 'channels-last', 'ours-with-cp', 'cuda-graph')
        parts = [self.training('network', 220, *ours, *PEERS, *DTYPES, 'float16')]
        if self.device == 'cuda':
            parts.append(self.training('tf32', 80, *ours[:3], *PEERS, '--tf32'))
        if not self.tiny:
            parts.append(self.training('compiled', 200, '--implementations', 'ours', 'compiled', '--peers', *DTYPES))
        return parts

    def kernels(self) -> list[Part]:
        profile = ('--implementations', 'ours', '--peers', '--rounds', '2', '--profile', *DTYPES)
        return [self.depthwise(150, 'zoo', 'dilated'), self.training('profile', 90, *profile), self.contmix(60)]

    def counters(self) -> list[Part]:
        return [
            self.counted('contmix-counters', 150, 'bench_contmix.py', '--implementations', 'ours'),
            self.counted('depthwise-counters', 250, 'bench_depthwise.py', '--what', 'zoo', '--spacing', '100'),
        ]

    def again(self) -> list[Part]:
        network = ('--implementations', 'ours', '--peers', 'convnext-tiny', '--profile', *DTYPES)
        return [
            self.tests(120),
            self.sanitizer('memcheck', 60),
            self.training('network', 90, *network),
            self.depthwise(60, 'zoo'),
            self.contmix(40),
        ]


def find(program: str) -> tuple[str, Optional[str]]:
    """A program of the CUDA toolkit, and its name again if it is missing."""
    folder = Path(os.environ.get('CUDA_HOME', '/usr/local/cuda')) / 'bin'
    found = shutil.which(program) or shutil.which(program, path=str(folder))
    return (found, None) if found else (program, program)


def run(part: Part, log: Path, left: float) -> str:
    """Run a part in the seconds that are left. Returns how it ended; the end of a failed one's output is printed."""
    if part.missing:
        return f'not run: there is no {part.missing}'
    if left < LEAST_TIME:
        return 'FAILED: no time left'
    begin = time.monotonic()
    with open(log, 'a') as output:
        print(f'\n$ {" ".join(part.command)}', file=output, flush=True)
        # A process group of its own, so that nothing of it is left.
        process = subprocess.Popen(
            part.command, stdout=output, stderr=output, env={**os.environ, **part.variables}, preexec_fn=os.setpgrp
        )
        try:
            status = process.wait(min(left, part.seconds))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = process.wait()
    lasted = f'{time.monotonic() - begin:.0f} s'
    if not status:
        return f'ok, {lasted}'
    print(f'{part.name}:', *log.read_text().splitlines()[-12:], sep='\n    ')
    return f'FAILED: stopped after {lasted}' if status == -signal.SIGKILL else f'FAILED with {status}, {lasted}'


def counter_table(text: str) -> str:
    """The launches of an ncu CSV, those of one kernel and size once."""
    lines = text.splitlines()
    first = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[tuple[str, str], str]] = {}
    titles: dict[str, tuple[str, str]] = {}
    for row in csv.DictReader(lines[first:]):
        launches.setdefault(row['ID'], {})[row['Section Name'], row['Metric Name']] = row['Metric Value']
        unit = '' if row['Metric Unit'] in ('', 'register/thread') else f' {row["Metric Unit"]}'
        launches[row['ID']][row['Section Name'], row['Metric Name']] += unit
        titles[row['ID']] = row['Kernel Name'], f'{row["Grid Size"]} x {row["Block Size"]}'
    rows: dict[tuple[str, str], list[str]] = {}
    for each, metrics in launches.items():
        rows.setdefault(titles[each], [metrics.get(key[1:], '') for key in COUNTERS])
    body = [[name[:120], size, *metrics] for (name, size), metrics in rows.items()]
    return harness.markdown([['kernel', 'blocks x threads', *(title for title, *_ in COUNTERS)], *body])


def results_of(part: Part, out: Path) -> str:
    """The tables of what a part recorded."""
    record, counters = out / f'{part.name}.json', out / f'{part.name}.csv'
    if counters.exists():
        return counter_table(counters.read_text())
    return harness.full_report(json.loads(record.read_text())) if record.exists() else ''


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('call', choices=('operators', 'network', 'kernels', 'counters', 'again'))
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--device', choices=('cuda', 'cpu'), required=True)
    parser.add_argument('--tiny', action='store_true')
    parser.add_argument('--seconds', type=float, required=True, help='for all parts')
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    report, log = (options.out / f'{options.call}.{kind}' for kind in ('md', 'log'))
    parts = getattr(Call(options.out, options.device, options.tiny), options.call)()
    ends = []
    for part in parts:
        for kind in ('json', 'csv'):
            (options.out / f'{part.name}.{kind}').unlink(missing_ok=True)
        if options.tiny:
            part.seconds = math.inf
        ends.append(run(part, log, deadline - time.monotonic()))
        summary = [f'{each.name:20}{end}' for each, end in zip(parts, ends)]
        results = {each.name: results_of(each, options.out) for each in parts[: len(ends)]}
        tables = [f'## {name}\n\n{text}' for name, text in results.items() if text]
        report.write_text('\n\n'.join(['\n'.join(['```', *summary, '```']), *tables]) + '\n')
    print(report.read_text())
    # Once more: the last lines are the ones that are read.
    print(*summary, sep='\n')
    return int(any(end.startswith('FAILED') for end in ends))


if __name__ == '__main__':
    sys.exit(main())
