"""The harness of the benchmarks: checks, turns, memory, records that resume, tables."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from benchmarks import FOLDER, harness
from conftest import run_script

from overlock_mm import memory

CPU = torch.device('cpu')
TENSOR = torch.arange(4.0)


def make_case(name='case', functions=None, expected=lambda: dict(output=[TENSOR]), **settings):
    """A case of functions that return a tensor; 'ours' and 'theirs' are right."""
    functions = functions or dict(ours=lambda: TENSOR.clone(), theirs=lambda: TENSOR.clone())

    def build(name):
        return harness.Run([functions[name]], lambda: dict(output=[functions[name]()]))

    defaults = dict(section='forward', group='group', tolerances=dict(output=1e-3), baselines=['theirs'], yardstick='ours')
    return harness.Case(
        name=name, implementations=list(functions), build=build, expected=expected, **{**defaults, **settings}
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(cases, *arguments)`` in a folder of its own: the exit status, and the record where one was written."""
    monkeypatch.chdir(tmp_path)

    def main(cases, *arguments):
        if '--json' not in arguments:
            arguments = (*arguments, '--json', 'out.json')
        status = harness.main(
            harness.make_parser(''), lambda options: cases, ['--device', 'cpu', '--rounds', '2', *arguments]
        )
        return status, json.loads((tmp_path / 'out.json').read_text())

    return main


# ----------------------------------------------------------------------------------------------------- a run and its record


def test_a_run_records_what_it_measured(run, capsys):
    status, record = run([make_case(work={'bytes': 1e6})])
    assert status == 0
    machine = record['machine']
    assert (machine['device_type'], machine['torch']) == ('cpu', torch.__version__)
    assert {'date', 'device', 'cpu_capability', 'threads', 'git_commit', 'compiled_operators'} <= machine.keys()
    assert (record['settings']['rounds'], record['settings']['device'], record['not_run']) == (2, 'cpu', 0)
    assert record['ceilings'].keys() == {'bytes'}
    (case,) = record['cases']
    assert (case['section'], case['name'], case['yardstick']) == ('forward', 'case', 'ours')
    for name, result in case['implementations'].items():
        assert 0 < result['seconds']['q1'] <= result['seconds']['median'] <= result['seconds']['q3']
        assert result['rounds'] == 2
        assert result['errors'] == dict(output=0.0)
        assert ('ratio' in result) == (name == 'theirs')
    assert case['implementations']['ours']['tolerances'] == dict(output=1e-3)
    assert case['implementations']['theirs']['tolerances'] == dict(output=1e-2)
    assert '| case | theirs ' in capsys.readouterr().out


def test_the_first_of_a_round_changes_and_so_does_the_order():
    order = []
    runs = {name: harness.Run([lambda name=name: order.append(name)], dict) for name in 'abc'}
    samples = harness.take_turns(runs, dict.fromkeys(runs, 1), argparse.Namespace(rounds=4, seconds=0, device=CPU))
    assert ''.join(order) == 'abcacbcabcba'
    assert [len(each) for each in samples.values()] == [4, 4, 4]


def test_rounds_fill_the_given_time():
    runs = dict(a=harness.Run([lambda: None], dict))
    for seconds, rounds in ((0, harness.MIN_ROUNDS), (60, harness.MAX_ROUNDS)):
        samples = harness.take_turns(runs, dict(a=1), argparse.Namespace(rounds=None, seconds=seconds, device=CPU))
        assert len(samples['a']) == rounds


def test_an_interrupted_run_resumes(run, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([make_case('first'), make_case('second', dict(ours=interrupt))])
    first = json.loads((tmp_path / 'out.json').read_text())
    assert [case['name'] for case in first['cases']] == ['first']

    # A case that was measured is not measured again.
    status, record = run([make_case('first', dict(ours=interrupt, theirs=interrupt)), make_case('second')], '--resume')
    assert status == 0
    assert [case['name'] for case in record['cases']] == ['first', 'second']
    assert record['cases'][0] == first['cases'][0]

    # With another implementation it is measured again. The other cases of the record stay.
    status, after = run([make_case('first', dict(ours=lambda: TENSOR, others=lambda: TENSOR))], '--resume')
    assert [list(case['implementations']) for case in after['cases']] == [['ours', 'others'], ['ours', 'theirs']]
    assert after['cases'][1] == record['cases'][1]


@pytest.mark.parametrize('name', ['device', 'threads', 'torch', 'git_commit', 'keeps_freed_memory'])
def test_the_record_of_another_machine_is_refused(run, tmp_path, capsys, name):
    _, record = run([make_case()])
    record['machine'][name] = 'another one'
    (tmp_path / 'out.json').write_text(json.dumps(record))
    with pytest.raises(SystemExit, match='2'):
        run([make_case()], '--resume')
    assert f'out.json has {name} another one, and this is' in capsys.readouterr().err
    assert json.loads((tmp_path / 'out.json').read_text()) == record


def test_cases_beyond_the_time_limit_are_counted(run, capsys):
    status, record = run([make_case('first'), make_case('second')], '--time-limit', '1e-9')
    assert (status, record['not_run'], record['cases']) == (0, 2, [])
    assert '2 cases were not run: the time limit was reached' in capsys.readouterr().out


@pytest.mark.parametrize('can', [True, False])
def test_keeping_freed_memory(run, monkeypatch, capsys, can):
    """It happens before anything is measured, and the record says so."""
    kept = []
    monkeypatch.setattr(memory, 'keep_freed_memory', lambda: kept.append(1) or can)
    if not can:
        with pytest.raises(SystemExit, match='2'):
            run([make_case()], '--keep-freed-memory')
        assert 'not glibc' in capsys.readouterr().err
        return
    status, record = run([make_case()], '--keep-freed-memory')
    assert (status, len(kept), record['machine']['keeps_freed_memory']) == (0, 1, True)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--rounds', '0'], "must be a positive integer, got '0'"),
        (['--device', 'meta'], '--device must be cpu or cuda, got meta'),
        (['--resume'], '--resume needs --json'),
    ],
)
def test_bad_options(capsys, arguments, message):
    with pytest.raises(SystemExit, match='2'):
        harness.main(harness.make_parser(''), lambda options: [], arguments)
    assert message in capsys.readouterr().err


def test_options_that_do_not_fit_the_cases(capsys):
    def no_cases(options):
        raise ValueError('--size: too small')

    with pytest.raises(SystemExit, match='2'):
        harness.main(harness.make_parser(''), no_cases, ['--device', 'cpu'])
    assert '--size: too small' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- wrong results, failures


@pytest.mark.parametrize('value', [1.01, float('nan')])
def test_a_wrong_result_is_an_error(run, capsys, value):
    status, record = run([make_case(functions=dict(ours=lambda: TENSOR * value, theirs=lambda: TENSOR * 1.009))])
    assert status == 1
    error = capsys.readouterr().err
    assert f'WRONG RESULT: case, forward, ours: relative error of the output {abs(value - 1):.1e}, more than 1e-03' in error
    assert 'theirs' not in error  # a baseline may have ten times the error


def test_results_that_are_missing_are_wrong():
    assert harness.worst_error([TENSOR], [TENSOR, TENSOR]) == float('inf')


def test_peers_are_not_checked(run):
    status, record = run([make_case(functions=dict(ours=lambda: TENSOR, peer=lambda: 2 * TENSOR), peers=['peer'])])
    assert status == 0
    assert 'errors' not in record['cases'][0]['implementations']['peer']


@pytest.mark.parametrize('name, status', [('ours', 1), ('theirs', 0)])
def test_other_implementations_are_measured_beside_one_that_fails(run, capsys, name, status):
    def fail():
        raise RuntimeError('no such kernel\nand more')

    other = dict(ours='theirs', theirs='ours')[name]
    got, record = run([make_case(functions={name: fail, other: lambda: TENSOR})])
    results = record['cases'][0]['implementations']
    assert got == status
    assert results[name] == dict(skipped='RuntimeError: no such kernel', failed=name == 'ours')
    assert results[other]['seconds']['median'] > 0
    failed = 'FAILED: case, forward, ours: RuntimeError: no such kernel'
    assert (failed in capsys.readouterr().err) == (name == 'ours')


def test_a_benchmark_without_its_yardstick_fails(run, capsys):
    def skip():
        raise harness.Skipped('it was not built')

    status, _ = run([make_case(functions=dict(ours=skip, theirs=lambda: TENSOR))])
    captured = capsys.readouterr()
    assert status == 1
    assert 'ours was not measured: it was not built' in captured.err
    assert 'not measured: ours, in 1 cases: it was not built' in captured.out


def test_results_without_expected_ones_are_reported_as_unchecked(run, capsys):
    def fail():
        raise RuntimeError('no such kernel')

    status, record = run([make_case(expected=fail)])
    assert status == 0
    assert 'errors' not in record['cases'][0]['implementations']['ours']
    assert 'not checked: 1 cases, without expected results: RuntimeError: no such kernel' in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- memory and arithmetic


def test_allocated_bytes():
    kept = []

    def first():
        torch.empty(3 << 20, dtype=torch.uint8)
        kept.append(torch.empty(1 << 20, dtype=torch.uint8))

    def second():
        kept.append(torch.empty(1 << 20, dtype=torch.uint8))
        torch.empty(4 << 20, dtype=torch.uint8)
        kept.clear()

    assert harness.allocated_by([first, second], CPU) == (6 << 20, [1 << 20, 0])


def test_kept_bytes_are_those_of_the_forward(run):
    """The output, and the storages that autograd holds, each once; not the inputs."""
    value = torch.randn(10).requires_grad_()

    def function(value):
        a = value.exp()  # keeps its result
        return (a[:5] * a[5:]).sin()  # keeps both halves of it, of one storage, and the product

    case = make_case(expected=harness.Operator(function, [value], True).results)
    case.build = lambda name: harness.Operator(function, [value], True).run()
    case.tolerances = dict(output=0.0, gradient=0.0)
    status, record = run([case])
    assert status == 0
    assert record['cases'][0]['implementations']['ours']['kept_bytes'] == (10 + 5 + 5) * 4


def test_an_implementation_that_needs_too_much_memory_is_skipped(monkeypatch):
    value = torch.empty(1 << 20, device='meta').requires_grad_()
    monkeypatch.setattr(harness, 'free_memory', lambda: 16 << 20)
    harness.require_memory(lambda: value.exp(), CPU)
    with pytest.raises(harness.Skipped, match='takes about 0.0 GiB'):
        harness.require_memory(lambda: value.exp().exp().exp().exp().exp(), CPU)


def test_the_floor_is_the_larger_time():
    ceilings = {'bytes': 1e3, 'multiply-adds float32': 1e4, 'exponentials': 100.0}
    work = {'bytes': 2000, 'multiply-adds float32': 5000, 'exponentials': 180}
    assert harness.floor_of(work, ceilings) == pytest.approx(0.5 + 1.8)  # one after the other, in the same units
    assert harness.floor_of({**work, 'exponentials': 0}, ceilings) == 2.0
    assert harness.floor_of(work, {**ceilings, 'exponentials': 0}) == 2.0  # a GPU's are not measured
    assert harness.floor_of({}, ceilings) is None


def test_of_two_measured_ceilings_the_higher_counts():
    assert harness.higher(dict(a=1.0, b=5.0), dict(b=4.0, c=2.0)) == dict(a=1.0, b=5.0, c=2.0)


def test_ceilings_are_measured_for_the_work_there_is():
    kinds = {'bytes', 'multiply-adds bfloat16', 'exponentials'}
    assert harness.measure_ceilings(kinds, CPU).keys() == kinds
    assert all(rate > 1e6 for rate in harness.measure_ceilings(kinds, CPU).values())


# --------------------------------------------------------------------------------------------------------------- tables


def result(milliseconds, ratio=None, kept=None):
    spread = dict(median=milliseconds / 1e3, q1=milliseconds / 1e3, q3=milliseconds / 1e3)
    made = dict(seconds=spread, peak_bytes=1 << 20)
    if ratio is not None:
        made['ratio'] = dict(median=ratio, q1=ratio - 0.5, q3=ratio + 0.5)
    if kept is not None:
        made['kept_bytes'] = kept
    return made


@pytest.fixture
def record():
    machine = dict(
        device='abacus', device_type='cpu', threads=1, cpu_capability='beads', torch='2', date='2026-01-02T03:04:05',
        git_commit='0123456789abcdef-dirty',
    )  # fmt: skip

    def case(group, name, ours, theirs, section='train'):
        implementations = dict(ours=ours, theirs=theirs)
        return dict(section=section, group=group, name=name, yardstick='ours', work={}, implementations=implementations)

    cases = [
        case('small', 'a', result(1, kept=100), result(3, 3.0, kept=500)),
        case('large', 'b', result(2, kept=100), result(3, 1.5, kept=200)),
        case('large', 'c', result(4, kept=300), result(2, 0.5, kept=1200)),
        case('small', 'a', result(7), dict(skipped='not here'), 'eval'),
    ]
    return dict(machine=machine, cases=cases, ceilings={'bytes': 2e9}, not_run=0)


def test_the_summary_has_a_row_for_every_group(record):
    lines = [' '.join(line.split()) for line in harness.summary(record).splitlines()]
    assert lines[0] == 'abacus; 1 threads, beads; torch 2, 2026-01-02, commit 0123456789ab-dirty'
    assert lines[2] == 'The machine reaches 2 G bytes a second.'
    assert '| case | ours: ms | kept MiB | theirs / it |' in lines
    assert '| small | 1 [1-1] | 9.54e-05 | 3x [2.5-3.5]; kept 5x |' in lines
    # Quartiles over the cases of a group, and the lowest of them.
    assert '| large (2 cases) | 2-4 | 9.54e-05-0.000286 | 1x [0.75-1.25], lowest 0.5x; kept 3x |' in lines
    assert '| small | 7 [7-7] |' in lines
    assert lines[-3] == '- not measured: theirs, in 1 cases: not here'
    assert lines[-1] == harness.LEGEND


def test_the_full_table_has_a_row_for_every_implementation(record):
    lines = [' '.join(line.split()) for line in harness.full_report(record).splitlines()]
    assert '| b | theirs | 3 [3-3] | 1.5x [1-2] | 0.000191 | 1 |' in lines
    assert '| a | theirs | not here | |' in lines
    assert sum(line.startswith(('| a', '| b', '| c |')) for line in lines) == 8


def test_a_record_is_shown_by_the_script(record, tmp_path):
    (tmp_path / 'record.json').write_text(json.dumps(record))
    assert run_script(FOLDER / 'harness.py', 'record.json', cwd=tmp_path) == harness.summary(record) + '\n'
    assert run_script(FOLDER / 'harness.py', 'record.json', '--full', cwd=tmp_path) == harness.full_report(record) + '\n'
