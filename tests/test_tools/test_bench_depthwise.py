"""The benchmark of depth-wise operators: shapes that are the network's, work that is counted right, a record."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks import FOLDER, bench_depthwise, harness
from conftest import run_script

from overlock_mm.models import OverLoCK
from overlock_mm.models.layers import DepthwiseConv
from overlock_mm.models.overlock import ARCHITECTURES

TINY = ('--device', 'cpu', '--threads', '1', '--rounds', '2', '--arch', 't', '--size', '64x64', '--spacing', '1000000')
CPU = torch.device('cpu')


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(*arguments)`` in a folder of its own, on a small map: the exit status and the record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_depthwise, 'SWEEP_SHAPE', (8, 24, 22))
    monkeypatch.setattr(bench_depthwise, 'SWEEP_KERNELS', (3, 15))
    threads = torch.get_num_threads()

    def main(*arguments):
        status = bench_depthwise.main([*TINY, *arguments, '--json', 'out.json'])
        return status, json.loads((tmp_path / 'out.json').read_text())

    yield main
    torch.set_num_threads(threads)


def shapes_for(*arguments):
    return bench_depthwise.chosen_shapes(bench_depthwise.make_parser().parse_args(arguments))


# --------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize('arch', ['xt', 't', 's', 'b'])
def test_shapes_are_those_of_the_network(arch):
    with torch.device('meta'):
        network = OverLoCK({**ARCHITECTURES[arch], 'depths': (1, 1, 1, 1), 'sub_depths': (1, 1)}, deploy=True)
    convs = {
        (int(name.split('.')[0][-1]), conv.in_channels, conv.kernel_size[0])
        for name, conv in network.named_modules()
        if isinstance(conv, DepthwiseConv)
    }
    sides = {(200, 336): 1, (100, 168): 2, (50, 84): 3, (25, 42): 4}
    shapes = bench_depthwise.zoo_shapes('zoo', arch, (800, 1344))
    assert {(sides[shape.height, shape.width], shape.channels, shape.kernel_size) for shape in shapes} == convs


def test_each_shape_comes_once_and_spacing_keeps_the_ends():
    every, spaced = shapes_for('--what', 'zoo', '--spacing', '1'), shapes_for('--what', 'zoo')
    assert len(set(every)) == len(every)
    assert len(spaced) < len(every) / 2
    for kernel_size in {shape.kernel_size for shape in every}:
        sizes = [
            {shape.elements for shape in shapes if (shape.kernel_size, shape.channels % 16) == (kernel_size, 0)}
            for shapes in (every, spaced)
        ]
        assert (min(sizes[1]), max(sizes[1])) == (min(sizes[0]), max(sizes[0]))
        ordered = sorted(sizes[1])
        assert all(2 * small <= large for small, large in zip(ordered[1:], ordered[2:]))


def test_the_defaults_are_what_the_description_says():
    shapes = shapes_for()
    assert [shape.kernel_size for shape in shapes if shape.kind == 'sweep'] == list(range(3, 32, 2))
    dilated = {(shape.kernel_size, shape.dilation) for shape in shapes if shape.kind == 'dilated'}
    assert dilated == {(9, 2), (7, 2), (3, 2), (3, 3), (3, 4), (3, 5), (3, 7)}
    assert {shape.kernel_size for shape in shapes if shape.kind == 'norms'} == {17, 15, 13, 7}
    assert max(shape.height for shape in shapes if shape.kind == 'norms') == 128
    assert {shape.kernel_size for shape in shapes if shape.kind == 'zoo'} == {17, 15, 13, 7, 3}


def test_work_is_counted_right():
    """Against the convolution of ones with ones, which counts the taps within the map."""
    for shape, batch in (
        (bench_depthwise.Shape('zoo', 3, 9, 4, 7), 1),
        (bench_depthwise.Shape('dilated', 3, 9, 4, 3, 3), 2),
    ):
        ones = torch.ones(batch, shape.channels, shape.height, shape.width)
        kernel = torch.ones(shape.channels, 1, shape.kernel_size, shape.kernel_size)
        taps = bench_depthwise.torch_conv2d(ones, kernel, None, shape.dilation).sum().item()
        forward, both = (bench_depthwise.work(shape, batch, 'float32', backward) for backward in (False, True))
        assert forward['multiply-adds float32'] == taps
        assert both['multiply-adds float32'] == 3 * taps
        weights, maps = kernel.numel() * 4, ones.numel() * 4
        assert forward['bytes'] == 2 * maps + weights + 3 * 4
        assert both['bytes'] == 5 * maps + 3 * weights + 2 * 3 * 4


def test_the_sum_of_branches_is_that_of_modules():
    shape = bench_depthwise.Shape('norms', 4, 6, 5, 7)
    inputs = bench_depthwise.make_inputs(shape, 1, torch.float32)
    expected = 0
    for i, (k, dilation) in enumerate(bench_depthwise.branches_of(shape)):
        weight, norm_weight, norm_bias = inputs[1 + 3 * i : 4 + 3 * i]
        norm = nn.BatchNorm2d(4)
        norm.load_state_dict({**norm.state_dict(), 'weight': norm_weight, 'bias': norm_bias})
        padding = dilation * (k // 2)
        expected = expected + norm(F.conv2d(inputs[0], weight, padding=padding, dilation=dilation, groups=4))
    for name in ('ours', 'torch'):
        torch.testing.assert_close(bench_depthwise.function_of(name, shape)(*inputs), expected)


# ---------------------------------------------------------------------------------------------------------------- a run


def test_a_run_records_what_it_measured(run, capsys):
    status, record = run()
    assert status == 0
    assert record['machine']['threads'] == 1
    assert record['ceilings'].keys() == {'bytes', 'multiply-adds float32'}
    kinds = [case['name'].split()[0] for case in record['cases']]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == dict(zoo=4 * 6, sweep=4 * 2, dilated=4 * 7, norms=4 * 4)
    for case in record['cases']:
        training, of_norms = 'backward' in case['section'], case['name'].startswith('norms')
        results = case['implementations']
        assert list(results) == ['ours', 'torch']
        assert 'ratio' in results['torch']
        assert bool(case['work']) == (not of_norms)
        for result in results.values():
            assert max(result['errors'].values()) <= (1e-3 if of_norms else 1e-4)
            assert result['rounds'] == 2
            assert ('kept_bytes' in result) == training
        if training and of_norms:
            assert results['ours']['kept_bytes'] < results['torch']['kept_bytes']
    assert {'sweep 15x15, 8x24x22, contiguous', 'dilated 9x9 dilated 2, 8x24x22, channels_last'} <= {
        case['name'] for case in record['cases']
    }
    summary = harness.summary(record)
    # 3x3 has two shapes of the network; sweep 3x3 and 15x15; the dilated ones are one group.
    assert summary.count('\n| zoo ') == summary.count('\n| sweep ') + 6 * 2 + 2 * 2 - 4 * 2 + 2 * 2
    assert '| dilated, contiguous ' in summary


def test_the_script_runs_by_itself(tmp_path):
    output = run_script(FOLDER / 'bench_depthwise.py', *TINY, '--what', 'zoo', '--rounds', '1', cwd=tmp_path)
    assert '| zoo 17x17, 64x16x16, contiguous ' in output
    assert not any(tmp_path.iterdir())


def test_a_wrong_result_is_an_error(run, monkeypatch, capsys):
    conv = bench_depthwise.depthwise_conv2d
    monkeypatch.setattr(bench_depthwise, 'depthwise_conv2d', lambda *arguments: 1.01 * conv(*arguments))
    status, _ = run('--what', 'sweep')
    assert status == 1
    error = capsys.readouterr().err
    for layout in ('contiguous', 'channels_last'):
        where = f'sweep 3x3, 8x24x22, {layout}, forward, float32, ours'
        assert f'WRONG RESULT: {where}: relative error of the output 1.0e-02, more than 1e-04' in error


def test_half_types_are_checked_in_float32(run):
    status, record = run('--what', 'sweep', '--dtype', 'bfloat16')
    assert status == 0
    for case in record['cases']:
        assert 0 < case['implementations']['torch']['errors']['output'] < 2e-2


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--size', '800'], "must be HEIGHTxWIDTH, as 800x1344, got '800'"),
        (['--dtype', 'int8'], "invalid choice: 'int8'"),
        (['--what', 'all'], "invalid choice: 'all'"),
        (['--device', 'cpu', '--spacing', '0.5'], '--spacing must be at least 1, got 0.5'),
    ],
)
def test_bad_options(capsys, arguments, message):
    with pytest.raises(SystemExit, match='2'):
        bench_depthwise.main(arguments)
    assert message in capsys.readouterr().err
