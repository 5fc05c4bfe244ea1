"""The benchmark of depth-wise convolutions: shapes that are the network's, work that is counted right, a full record."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, run_script

from overlock_mm.models import OverLoCK
from overlock_mm.models.layers import DepthwiseConv
from overlock_mm.models.overlock import ARCHITECTURE_DEFAULTS, ARCHITECTURES
from overlock_mm.models.reparam import DILATED_BRANCHES
from overlock_mm.ops import _extension

FOLDER = ROOT / 'tools' / 'benchmarks'
SCRIPT = FOLDER / 'bench_depthwise.py'
CEILINGS = ('--bandwidth', '10', '--flops', '0.1')
#: Convolutions of one map, and branches of the smallest.
TINY = (
    '--device', 'cpu', '--threads', '1', '--rounds', '2', '--arch', 't', '--size', '32x32', '--norms-size', '32x32',
    '--sweep-shape', '8x24x22', '--kernels', '3', '15', '--spacing', '1000000', *CEILINGS,
)  # fmt: skip
NAMES = ('bench_contmix', 'bench_depthwise', 'contmix_report', 'measuring')
IMPLEMENTATIONS = ['ours', 'ours-channels-last', 'torch', 'torch-channels-last']
compiled = pytest.mark.skipif(_extension.missing is not None, reason='there is no compiled operator')


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The script as a module, with ``main_with(*arguments)`` in a folder of its own."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(tmp_path)
    before, threads = set(sys.modules), torch.get_num_threads()
    tools = types.SimpleNamespace(**{name: __import__(name) for name in NAMES})

    def main_with(*arguments):
        monkeypatch.setattr(sys, 'argv', ['bench_depthwise.py', *TINY, *arguments])
        return tools.bench_depthwise.main()

    tools.bench_depthwise.main_with = main_with
    yield tools.bench_depthwise
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], '__file__', '')):
            del sys.modules[name]


def read(path):
    return json.loads(path.read_text())


# --------------------------------------------------------------------------------------------------------- what there is


def test_shapes_are_those_of_the_network(bench):
    assert {arch: settings['channels'] for arch, settings in ARCHITECTURES.items()} == bench.CHANNELS
    assert (
        dict(kernel_sizes=bench.KERNEL_SIZES, mlp_ratio=bench.MLP_RATIO, sub_mlp_ratio=bench.SUB_MLP_RATIO)
        == ARCHITECTURE_DEFAULTS
    )
    assert {size: DILATED_BRANCHES[size] for size in bench.KERNEL_SIZES} == bench.BRANCHES
    for arch in bench.CHANNELS:
        with torch.device('meta'):
            network = OverLoCK({**ARCHITECTURES[arch], 'depths': (1, 1, 1, 1), 'sub_depths': (1, 1)}, deploy=True)
        convs = {
            (name.split('.')[0][-1], conv.in_channels, conv.kernel_size[0])
            for name, conv in network.named_modules()
            if isinstance(conv, DepthwiseConv)
        }
        shapes = bench.zoo_shapes(arch, (800, 1344))
        assert {(name.split()[2], channels, k) for name, channels, _, _, k in shapes} == convs
        sides = {name.split()[2]: (height, width) for name, _, height, width, _ in shapes}
        assert sides == {'1': (200, 336), '2': (100, 168), '3': (50, 84), '4': (25, 42)}


def test_each_shape_comes_once_and_spacing_keeps_the_ends(bench):
    options = bench.parse_options(['--device', 'cpu', '--what', 'zoo', '--spacing', '1'])
    every = bench.chosen_cases(options)
    assert len({case.key for case in every}) == len(every)
    # Stages 1 and 2 of T and S are alike.
    assert any({'t stage 1 large, 224x224', 's stage 1 large, 224x224'} <= {*case.names} for case in every)
    options.spacing = 2
    spaced = bench.chosen_cases(options)
    assert len(spaced) < len(every) / 2
    for kernel_size in {case.kernel_size for case in every}:
        sizes = [
            {case.elements for case in cases if (case.kernel_size, case.channels % 16) == (kernel_size, 0)}
            for cases in (every, spaced)
        ]
        assert (min(sizes[1]), max(sizes[1])) == (min(sizes[0]), max(sizes[0]))
        ordered = sorted(sizes[1])
        assert all(2 * small <= large for small, large in zip(ordered[1:], ordered[2:]))


def test_the_default_is_all_that_is_said(bench):
    cases = bench.chosen_cases(bench.parse_options(['--device', 'cpu']))
    assert [case.kernel_size for case in cases if case.kind == 'sweep'] == list(range(3, 32, 2))
    dilated = {(case.kernel_size, case.dilation) for case in cases if case.kind == 'dilated'}
    assert dilated == {(9, 2), (7, 2), (3, 2), (3, 3), (3, 4), (3, 5), (3, 7)}
    assert {case.kernel_size for case in cases if case.kind == 'norms'} == {17, 15, 13, 7}
    assert {case.kernel_size for case in cases if case.kind == 'zoo'} == {17, 15, 13, 7, 3}


def test_work_is_counted_right(bench):
    """Against the convolution of ones with ones, which counts the taps within the map."""
    for case in (bench.Case('zoo', 3, 9, 4, 7), bench.Case('dilated', 3, 9, 4, 3, dilation=3, batch=2)):
        ones = torch.ones(case.batch, case.channels, case.height, case.width)
        kernel = torch.ones(case.channels, 1, case.kernel_size, case.kernel_size)
        counted = bench.work(case)
        taps = bench.torch_conv2d(ones, kernel, None, case.dilation).sum().item()
        assert counted['forward']['multiply_adds'] == taps
        assert counted['forward_backward']['multiply_adds'] == 3 * taps
        weights, maps = kernel.numel() * 4, ones.numel() * 4
        assert counted['forward']['bytes'] == 2 * maps + weights + 3 * 4
        assert counted['forward_backward']['bytes'] == 5 * maps + 3 * weights + 2 * 3 * 4


def test_the_sum_of_branches_is_that_of_modules(bench):
    case = bench.Case('norms', 4, 6, 5, 7)
    inputs, _ = bench.make_inputs(case, torch.device('cpu'))
    expected = 0
    for i, (k, dilation) in enumerate(bench.branches_of(case)):
        weight, norm_weight, norm_bias = inputs[1 + 3 * i : 4 + 3 * i]
        norm = nn.BatchNorm2d(4)
        norm.load_state_dict({**norm.state_dict(), 'weight': norm_weight, 'bias': norm_bias})
        padding = dilation * (k // 2)
        expected = expected + norm(F.conv2d(inputs[0], weight, padding=padding, dilation=dilation, groups=4))
    out = bench.function_of('torch', case, torch.device('cpu'))(*inputs)
    torch.testing.assert_close(out, expected)


# ------------------------------------------------------------------------------------------------------ a run of all of it


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """A tiny run, in a folder that has nothing to do with the checkout."""
    folder = tmp_path_factory.mktemp('bench')
    output = run_script(
        SCRIPT, *TINY, '--output', 'out.json', '--markdown', 'out.md', '--plot', 'out.png', cwd=folder
    )  # fmt: skip
    return folder, output, read(folder / 'out.json')


@compiled
def test_a_run_records_what_it_measured(measured):
    folder, output, record = measured
    machine = record['machine']
    assert (machine['device_type'], machine['threads'], machine['torch']) == ('cpu', 1, torch.__version__)
    assert {'date', 'device', 'cpu_capability', 'git_commit', 'compiled_operator'} <= machine.keys()
    assert record['ceilings'] == dict(bytes_per_second=1e10, multiply_adds_per_second={'float32': 5e10})
    assert (record['settings']['rounds'], record['settings']['device'], record['not_run']) == (2, 'cpu', 0)
    kinds = [case['case']['kind'] for case in record['cases']]
    assert [kinds.count(kind) for kind in ('sweep', 'dilated')] == [2, 7]
    assert {*kinds} == {'zoo', 'sweep', 'dilated', 'norms'}
    for case in record['cases']:
        of_norms = case['case']['kind'] == 'norms'
        assert sorted(case['implementations']) == IMPLEMENTATIONS
        for name, result in case['implementations'].items():
            assert result['error'] <= (1e-3 if of_norms else 1e-4)
            assert ('saved_bytes' in result) == of_norms
            for mode in ('forward', 'forward_backward'):
                assert 0 < result[mode]['q1'] <= result[mode]['median'] <= result[mode]['q3']
                assert (result[mode]['rounds'], 'ratio' in result[mode]) == (2, name.startswith('ours'))
                assert ('over_floor' in result[mode]) == (not of_norms)
        if of_norms:
            kept = [case['implementations'][name]['saved_bytes'] for name in ('ours', 'torch')]
            assert kept[0] < kept[1]
        else:
            assert case['floor']['forward']['seconds'] == max(
                case['work']['forward']['bytes'] / 1e10, case['work']['forward']['multiply_adds'] / 5e10
            )
    assert {path.name for path in folder.iterdir()} == {'out.json', 'out.md', 'out.png'}
    assert (folder / 'out.png').stat().st_size > 10_000


@compiled
def test_the_tables_have_every_case(measured, bench, capsys):
    folder, output, record = measured
    for text in (output, (folder / 'out.md').read_text()):
        for title in ('Shapes of the zoo', 'Kernel sizes on one map', 'Dilated branches', 'branch_norms, beside the sum'):
            assert text.count(title) == 1
        assert '15x15, 8x24x22, float32' in text
        assert '9x9 dilated 2, 8x24x22, float32' in text
        assert 'worst forward: ' in text
        assert 'worst forward + backward: ' in text
        assert f'of {2 * len(record["cases"])} below 0.95x' in text
    assert (folder / 'out.md').read_text().count('\n| 3x3 dilated ') == 5
    assert bench.main_with('--report', str(folder / 'out.json')) == 0
    assert capsys.readouterr().out.strip() in output


@compiled
def test_what_pytorch_does_itself_is_marked(measured):
    """On a map that is not small, a large kernel is ours in either layout; with gradients, all but a contiguous 3x3 are."""
    swept = {
        case['case']['kernel_size']: case['implementations']
        for case in measured[2]['cases']
        if case['case']['kind'] == 'sweep'
    }
    for kernel_size, results in swept.items():
        assert results['ours']['forward_backward']['pytorch'] == (kernel_size == 3)
        assert not results['ours-channels-last']['forward_backward']['pytorch']
    assert not swept[15]['ours']['forward']['pytorch']


def made_up(ratio, pytorch=False, kernel_size=3, layout='ours'):
    """A case of a record, with this ratio in both modes."""
    case = dict(kind='sweep', channels=8, height=24, width=22, kernel_size=kernel_size, dtype='float32')
    mode = dict(median=1e-3, q1=1e-3, q3=1e-3)
    results = {name: dict(error=0.0, forward=mode, forward_backward=mode) for name in IMPLEMENTATIONS}
    of_ours = dict(mode, pytorch=pytorch, ratio=dict(median=ratio, q1=ratio, q3=ratio))
    results[layout] = dict(error=0.0, forward=of_ours, forward_backward=of_ours)
    return dict(case=case, implementations=results)


def test_the_worst_ratios_are_listed(bench):
    cases = [made_up(1.5), made_up(0.9, kernel_size=5, layout='ours-channels-last'), made_up(0.8, True, 7), made_up(0.96)]
    lines = bench.summary(dict(cases=cases))
    same, other = (
        '0.8x [0.8x-0.8x] =: 7x7, 8x24x22, float32, contiguous',
        '0.9x [0.9x-0.9x]: 5x5, 8x24x22, float32, channels_last',
    )
    assert lines[:5] == [
        f'worst forward: {same}',
        f'worst forward where ours is chosen: {other}',
        'forward: 2 of 4 below 0.95x:',
        f'    {same}',
        f'    {other}',
    ]
    assert lines[5] == f'worst forward + backward: {same}'
    assert bench.summary(dict(cases=[made_up(1.5)]))[1] == 'forward: 0 of 1 below 0.95x'


def test_curves_are_of_one_map(bench):
    cases = [made_up(1.0, kernel_size=k) for k in (7, 3, 5)]
    cases.append(made_up(1.0, kernel_size=9))
    cases[-1]['case']['channels'] = 16
    for case in cases:
        case['floor'] = dict(forward=dict(seconds=2e-3))
    found = bench.curves(dict(cases=cases), 'forward')
    assert found['torch'] == [(3, 1.0), (5, 1.0), (7, 1.0)]
    assert found['floor'] == [(3, 2.0), (5, 2.0), (7, 2.0)]


# ------------------------------------------------------------------------------------------------- going on, and refusing


def test_a_run_goes_on_where_another_ended(bench, monkeypatch, tmp_path):
    ran = []
    run_case = bench.run_case
    monkeypatch.setattr(bench, 'run_case', lambda case, options: ran.append(case) or run_case(case, options))
    arguments = ('--what', 'sweep', '--output', 'out.json')
    assert bench.main_with(*arguments, '--kernels', '3') == 0
    before = read(tmp_path / 'out.json')['cases']
    assert bench.main_with(*arguments, '--kernels', '5', '3', '--resume') == 0
    record = read(tmp_path / 'out.json')
    assert [case.kernel_size for case in ran] == [3, 5]
    assert [case['case']['kernel_size'] for case in record['cases']] == [3, 5]
    assert record['cases'][0] == before[0]
    # What is not asked for stays in the file, another dtype is another case.
    assert bench.main_with(*arguments, '--kernels', '7', '--dtype', 'float64', '--resume') == 0
    cases = [case['case'] for case in read(tmp_path / 'out.json')['cases']]
    assert [(case['kernel_size'], case['dtype']) for case in cases] == [(7, 'float64'), (3, 'float32'), (5, 'float32')]
    assert {*read(tmp_path / 'out.json')['ceilings']['multiply_adds_per_second']} == {'float32', 'float64'}


def test_the_record_of_another_machine_is_refused(bench, tmp_path, capsys):
    arguments = ('--what', 'sweep', '--kernels', '3', '--output', 'out.json')
    assert bench.main_with(*arguments) == 0
    record = read(tmp_path / 'out.json')
    record['machine']['device'] = 'an abacus'
    (tmp_path / 'out.json').write_text(json.dumps(record))
    assert bench.main_with(*arguments, '--resume') == 2
    assert 'out.json has device an abacus, and this is' in capsys.readouterr().err
    assert read(tmp_path / 'out.json') == record


def test_cases_beyond_the_time_limit_are_counted(bench, tmp_path, capsys):
    assert bench.main_with('--what', 'sweep', '--output', 'out.json', '--time-limit', '1e-9') == 0
    assert read(tmp_path / 'out.json')['not_run'] == 2
    assert '2 cases were not run: the time limit was reached' in capsys.readouterr().out


def test_a_wrong_result_is_an_error(bench, monkeypatch, capsys):
    conv = bench.depthwise_conv2d
    monkeypatch.setattr(bench, 'depthwise_conv2d', lambda *arguments: 1.01 * conv(*arguments))
    assert bench.main_with('--what', 'sweep', '--kernels', '3') == 1
    err = capsys.readouterr().err
    assert 'WRONG RESULT: 3x3, 8x24x22, float32, ours: relative error 1.0e-02, more than 1e-04' in err
    assert 'WRONG RESULT: 3x3, 8x24x22, float32, ours-channels-last' in err


def test_what_fails_does_not_keep_others_from_being_measured(bench, monkeypatch, tmp_path, capsys):
    def fail(*arguments):
        raise RuntimeError('no such kernel\nand more')

    monkeypatch.setattr(bench, 'depthwise_conv2d', fail)
    assert bench.main_with('--what', 'sweep', '--kernels', '3', '--output', 'out.json') == 1
    assert 'FAILED: 3x3, 8x24x22, float32, ours: RuntimeError: no such kernel' in capsys.readouterr().err
    results = read(tmp_path / 'out.json')['cases'][0]['implementations']
    assert results['ours'] == dict(skipped='RuntimeError: no such kernel', failed=True)
    assert results['torch']['forward']['median'] > 0


def test_without_the_compiled_operator_norms_are_skipped(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, 'has_depthwise', lambda x: False)
    assert bench.main_with('--what', 'norms', '--output', 'out.json') == 0
    results = read(tmp_path / 'out.json')['cases'][0]['implementations']
    assert results['ours'] == dict(skipped='no compiled branch_norms for cpu')
    assert results['torch']['forward']['median'] > 0
    out = capsys.readouterr().out
    assert 'not measured: ours, in 3 cases: no compiled branch_norms for cpu' in out


def test_results_without_a_yardstick_are_said_to_be_unchecked(bench, monkeypatch, tmp_path, capsys):
    def fail(*arguments):
        raise RuntimeError('no such kernel')

    monkeypatch.setattr(bench, 'torch_conv2d', fail)
    assert bench.main_with('--what', 'sweep', '--kernels', '3', '--output', 'out.json') == 0
    assert read(tmp_path / 'out.json')['cases'][0]['implementations']['ours']['error'] is None
    assert '2 results were not checked: PyTorch has none for the contiguous map' in capsys.readouterr().out


def test_half_types_are_checked_in_float32(bench, tmp_path):
    assert bench.main_with('--what', 'sweep', '--dtype', 'bfloat16', '--output', 'out.json') == 0
    for case in read(tmp_path / 'out.json')['cases']:
        assert 0 < case['implementations']['torch']['error'] < 2e-2


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--kernels', '4'], "must be a positive odd integer, got '4'"),
        (['--size', '800'], "must be HEIGHTxWIDTH, as 800x1344, got '800'"),
        (['--sweep-shape', '64x128'], "must be CHANNELSxHEIGHTxWIDTH, as 64x128x128, got '64x128'"),
        (['--sweep-shape', '0x8x8'], "must be CHANNELSxHEIGHTxWIDTH with positive numbers, got '0x8x8'"),
        (['--rounds', '0'], "must be a positive integer, got '0'"),
        (['--dtype', 'int8'], "invalid choice: 'int8'"),
        (['--what', 'all'], "invalid choice: 'all'"),
        (['--device', 'meta'], '--device must be cpu or cuda, got meta'),
        (['--spacing', '0.5'], '--spacing must be at least 1, got 0.5'),
        (['--resume'], '--resume needs --output'),
        (['--plot', 'out.png', '--what', 'zoo'], '--plot needs --what sweep'),
    ],
)
def test_bad_options(bench, capsys, arguments, message):
    with pytest.raises(SystemExit, match='2'):
        bench.parse_options(arguments)
    assert message in capsys.readouterr().err


def test_a_record_without_a_sweep_is_not_plotted(bench, tmp_path, capsys):
    assert bench.main_with('--what', 'sweep', '--kernels', '3', '--output', 'out.json') == 0
    record = read(tmp_path / 'out.json')
    (tmp_path / 'out.json').write_text(json.dumps({**record, 'cases': []}))
    assert bench.main_with('--report', 'out.json', '--plot', 'out.png') == 2
    assert 'there is nothing to plot: the record has no sweep' in capsys.readouterr().err
    assert not (tmp_path / 'out.png').exists()
