"""The benchmarks: baselines that compute the same, work that is counted right, a record that holds what it should."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, relative_error, run_script

from overlock_mm.ops import _extension, contmix_reference

FOLDER = ROOT / 'tools' / 'benchmarks'
TINY = (
    '--device', 'cpu', '--arch', 't', '--stage', '4', '--input', '224x224', '--seconds', '0', '--min-rounds', '2',
    '--bandwidth', '10', '--flops', '0.1', '--exponentials', '1',
)  # fmt: skip
compiled = pytest.mark.skipif(_extension.missing is not None, reason='there is no compiled operator')


@pytest.fixture
def tools(monkeypatch):
    """The modules beside the scripts, as the scripts import them."""
    monkeypatch.syspath_prepend(FOLDER)
    names = ('bench_contmix', 'contmix_report', 'contmix_shapes', 'contmix_small_case', 'published')
    before = {name for name in names if name in sys.modules}
    yield types.SimpleNamespace(**{name: __import__(name) for name in names})
    for name in set(names) - before:
        sys.modules.pop(name, None)


def make_arguments(height, width, kernel_sizes, dtype=torch.float64):
    groups, (ks, kl) = 2, kernel_sizes

    def random(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    return dict(
        value=random(2, 12, height, width),
        query=random(2, 8, height, width),
        key=random(2, 8, 3, 3),
        proj_weight=random(ks**2 + kl**2, 9),
        proj_bias=random(ks**2 + kl**2),
        rpb_small=random(groups, 2 * ks - 1, 2 * ks - 1),
        rpb_large=random(groups, 2 * kl - 1, 2 * kl - 1),
        num_groups=groups,
        small_kernel_size=ks,
        large_kernel_size=kl,
    )


def output_and_gradients(function, arguments):
    tensors = [each for each in arguments.values() if isinstance(each, torch.Tensor)]
    out = function(**arguments)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return [out, *torch.autograd.grad(out, tensors, grad)]


@pytest.mark.parametrize('size, kernel_sizes', [((6, 9), (3, 5)), ((5, 5), (3, 5)), ((13, 14), (5, 13)), ((11, 7), (5, 7))])
def test_the_published_computation_is_the_reference(tools, size, kernel_sizes):
    arguments = make_arguments(*size, kernel_sizes)
    expected = output_and_gradients(contmix_reference, arguments)
    for got, wanted in zip(output_and_gradients(tools.published.contmix_published, arguments), expected):
        assert relative_error(got, wanted) < 1e-13
    for name in ('proj_bias', 'rpb_small', 'rpb_large'):
        without = {**arguments, name: None}
        assert relative_error(tools.published.contmix_published(**without), contmix_reference(**without)) < 1e-13


def test_the_published_computation_keeps_a_half_dtype(tools):
    """And softmaxes in float32; parameters may be float32 beside half maps."""
    arguments = make_arguments(6, 9, (3, 5), torch.float32)
    for name in ('value', 'query', 'key'):
        arguments[name] = arguments[name].detach().bfloat16()
    out = tools.published.contmix_published(**arguments)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, contmix_reference(**arguments)) < 3e-2


def test_natten_gets_its_own_layout(tools, monkeypatch):
    """Weights (B, G, H, W, k*k) and values (B, G, H, W, c), as natten 0.17 has them."""

    def na2d_av(attn, value, kernel_size, dilation):
        assert attn.shape == (*value.shape[:4], kernel_size**2)
        assert value.is_contiguous()
        assert dilation == 1
        return tools.published.shifted_sums(value.permute(0, 1, 4, 2, 3), attn).permute(0, 1, 3, 4, 2)

    functional = types.ModuleType('natten.functional')
    functional.na2d_av = na2d_av
    monkeypatch.setitem(sys.modules, 'natten', types.ModuleType('natten'))
    monkeypatch.setitem(sys.modules, 'natten.functional', functional)
    natten = tools.bench_contmix.implementation('natten', torch.device('cpu'))
    arguments = make_arguments(6, 9, (3, 5))
    assert relative_error(natten(**arguments), contmix_reference(**arguments)) < 1e-13


def test_the_recorded_shapes_are_the_networks(tools):
    shapes = tools.contmix_shapes
    for arch in shapes.VARIANTS:
        assert shapes.recorded_shapes(arch, shapes.INPUTS) == shapes.network_shapes(arch, shapes.INPUTS)
    with pytest.raises(LookupError, match="has no input 64x64 of 't'"):
        shapes.recorded_shapes('t', [(64, 64)])


def test_a_map_too_small_for_the_kernel_is_enlarged(tools):
    """As the network does it: 7 x 4 positions at stride 16 become 22 x 13."""
    stage3, stage4 = tools.contmix_shapes.network_shapes('t', [(100, 60)])
    assert (stage3.height, stage3.width, stage3.blocks) == (22, 13, 12)
    assert (stage4.height, stage4.width, stage4.blocks) == (14, 7, 2)


def test_work_is_counted_right(tools):
    """Against numbers worked out by hand for T, stage 3, 800 x 1344: C 256, G 8, kernels 5 and 13, a map of 50 x 84."""
    shape = tools.contmix_shapes.network_shapes('t', [(800, 1344)])[0]
    assert shape.operator == (256, 128, 8, 5, 13, 7, 50, 84)
    assert shape.slots == 25 + 169
    counted = tools.contmix_shapes.work(shape, batch=1, itemsize=4)
    # 4200 positions x 8 groups x 194 slots = 6 518 400 exponentials, each with 16 + 16 multiply-adds (208 588 800); and
    # W_d into the keys: 194 slots x 49 tokens x 128 channels.
    assert counted['forward'].exponentials == 6_518_400
    assert counted['forward'].multiply_adds == 208_588_800 + 1_216_768
    # value and output 4 300 800 bytes each, query 2 150 400, key 128 x 49 x 4 = 25 088, W_d and its bias 194 x 50 x 4 =
    # 38 800, the position biases 8 x (81 + 625) x 4 = 22 592.
    assert counted['forward'].bytes == 2 * 4_300_800 + 2_150_400 + 25_088 + 38_800 + 22_592
    # The backward: 16 x (3 + 2) multiply-adds a slot, the folding twice; value, output, its gradient, the value's gradient;
    # query and its gradient; the small ones and their gradients; 2 sums a position and group, written and read.
    assert counted['forward_backward'].exponentials == 2 * 6_518_400
    assert counted['forward_backward'].multiply_adds == 209_805_568 + 6_518_400 * 80 + 2 * 1_216_768
    backward = 4 * 4_300_800 + 2 * 2_150_400 + 2 * (25_088 + 38_800 + 22_592) + 2 * (2 * 4200 * 8 * 4)
    assert counted['forward_backward'].bytes == counted['forward'].bytes + backward

    twice = tools.contmix_shapes.work(shape, batch=2, itemsize=2)
    assert twice['forward'].multiply_adds == 2 * counted['forward'].multiply_adds
    # Maps of half the size, twice as many; the parameters stay.
    assert twice['forward'].bytes == counted['forward'].bytes


def test_the_floor_is_the_larger_time(tools):
    ceilings = dict(bytes_per_second=1e3, multiply_adds_per_second={'float32': 1e4}, exponentials_per_second=100.0)
    work = dict(bytes=2000, multiply_adds=5000, exponentials=180)
    floor_of = tools.bench_contmix.floor_of
    # A CPU adds to and exponentiates in the same units, one after the other; a GPU has units for either.
    assert floor_of(work, ceilings, 'float32', 'cpu')['seconds'] == pytest.approx(0.5 + 1.8)
    assert floor_of(work, ceilings, 'float32', 'cuda')['seconds'] == 2.0
    ceilings['exponentials_per_second'] = None
    assert floor_of(work, ceilings, 'float32', 'cpu')['seconds'] == 2.0


def test_saved_bytes_are_those_of_different_storages(tools):
    value = torch.randn(10, requires_grad=True)

    def function(value):
        a = value.exp()  # saves its result
        return (a[:5] * a[5:]).sin()  # saves both parts of it, of one storage, and the product

    assert tools.bench_contmix.saved_bytes(function, dict(value=value)) == (10 + 5) * 4


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """A tiny run, in a folder that has nothing to do with the checkout."""
    folder = tmp_path_factory.mktemp('bench')
    output = run_script(
        FOLDER / 'bench_contmix.py', *TINY, '--dtype', 'float32', 'bfloat16', '--json', 'out.json', '--markdown', 'out.md',
        '--plot', 'out.png', cwd=folder,
    )  # fmt: skip
    return folder, output, json.loads((folder / 'out.json').read_text())


@compiled
def test_a_run_records_what_it_measured(measured):
    folder, output, record = measured
    machine = record['machine']
    assert machine['device_type'] == 'cpu'
    assert machine['torch'] == torch.__version__
    assert {'date', 'device', 'cpu_capability', 'threads', 'git_commit', 'compiled_operator'} <= machine.keys()
    assert record['shapes_from'] == 'network'
    assert record['ceilings']['bytes_per_second'] == 1e10
    assert record['not_run'] == 0
    assert [case['dtype'] for case in record['cases']] == ['float32', 'bfloat16']
    for case in record['cases']:
        assert case['archs'] == ['t']
        assert (case['shape']['channels'], case['shape']['num_groups']) == (512, 16)
        assert (case['shape']['height'], case['shape']['width']) == (7, 7)
        assert case['rounds'] == 2
        results = case['implementations']
        assert list(results) == ['contmix', 'published', 'reference', 'natten']
        for name in ('contmix', 'published', 'reference'):
            for mode in ('forward', 'forward_backward'):
                result = results[name][mode]
                assert 0 < result['q1'] <= result['median'] <= result['q3']
                assert result['calls'] >= 1
                assert result['over_floor'] == pytest.approx(result['median'] / case['floor'][mode]['seconds'])
                assert ('ratio' in result) == (name != 'contmix')
        saved = {name: results[name]['saved_ratio'] for name in ('contmix', 'published', 'reference')}
        assert saved['contmix'] < 2 < saved['reference'] < saved['published']
        assert results['contmix']['error'] < (1e-5 if case['dtype'] == 'float32' else 2e-2)
    assert 't stage 4, 224x224, batch 1, float32' in output
    assert (folder / 'out.md').read_text().count('\n| t stage 4') == 2
    assert (folder / 'out.png').stat().st_size > 10_000
    assert {path.name for path in folder.iterdir()} == {'out.json', 'out.md', 'out.png'}


@compiled
def test_a_record_is_shown_again(measured):
    folder, _, _ = measured
    output = run_script(FOLDER / 'bench_contmix.py', '--report', 'out.json', '--short', cwd=folder)
    rows = [line.split() for line in output.splitlines() if line.startswith('224x224')]
    assert [row[:4] for row in rows] == [['224x224', '4', '1', 'float32'], ['224x224', '4', '1', 'bfloat16']]
    assert 'published over contmix' in output


@compiled
def test_a_wrong_result_is_an_error(tools, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    bench = tools.bench_contmix
    monkeypatch.setattr(bench, 'contmix_published', lambda **arguments: 1.01 * contmix_reference(**arguments))
    monkeypatch.setattr(sys, 'argv', ['bench_contmix.py', *TINY, '--baselines', 'published'])
    assert bench.main() == 1
    message = 'WRONG RESULT: t stage 4, 224x224, batch 1, float32, published: relative error 1.0e-02, more than 1e-03'
    assert message in capsys.readouterr().err


@compiled
def test_what_fails_does_not_keep_others_from_being_measured(tools, monkeypatch, tmp_path, capsys):
    def fail(**arguments):
        raise RuntimeError('no such kernel\nand more')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tools.bench_contmix, 'contmix_published', fail)
    monkeypatch.setattr(sys, 'argv', ['bench_contmix.py', *TINY, '--json', 'out.json', '--baselines', 'published'])
    assert tools.bench_contmix.main() == 0
    results = json.loads((tmp_path / 'out.json').read_text())['cases'][0]['implementations']
    assert results['published'] == dict(skipped='RuntimeError: no such kernel', failed=True)
    assert results['contmix']['forward']['median'] > 0

    own = dict(contmix=dict(skipped='RuntimeError: no such kernel', failed=True))
    case = dict(archs=['t'], shape=dict(stage=4, input=(224, 224)), batch=1, dtype='float32', implementations=own)
    problems = tools.bench_contmix.problems_of(dict(cases=[case]))
    assert problems == ['FAILED: t stage 4, 224x224, batch 1, float32, contmix: RuntimeError: no such kernel']


def test_without_the_compiled_operator_the_run_says_so(tools, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_extension, 'missing', 'it was not built')
    monkeypatch.setattr(sys, 'argv', ['bench_contmix.py', *TINY, '--baselines', 'reference', 'natten'])
    assert tools.bench_contmix.main() == 1
    captured = capsys.readouterr()
    assert 'the compiled operator was not measured: it was not built' in captured.err
    assert 'reference' in captured.out


def test_shapes_that_variants_share_are_measured_once(tools):
    """Stage 3 of XT is that of T."""
    options = tools.bench_contmix.parse_options(['--device', 'cpu', '--input', '512x512', '--batch', '1', '2'])
    cases, source = tools.bench_contmix.chosen_cases(options)
    assert source == 'network'
    assert len(cases) == 2 * (3 + 4)
    assert [archs for shape, _, _, archs in cases if shape.operator == cases[0][0].operator] == [['xt', 't']] * 2
    assert [batch for _, batch, _, _ in cases] == [1] * 7 + [2] * 7


def test_shapes_come_from_the_record_where_the_network_does_not_import(tools, monkeypatch):
    monkeypatch.setitem(sys.modules, 'overlock_mm.models', None)
    shapes, source = tools.contmix_shapes.shapes_of('b', [(224, 224)])
    assert source == 'record'
    assert [dataclasses.astuple(shape)[2:6] for shape in shapes] == [(3, 20, 384, 192), (4, 4, 576, 288)]


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--input', '800'], "must be HEIGHTxWIDTH, as 800x1344, got '800'"),
        (['--batch', '0'], "must be a positive integer, got '0'"),
        (['--device', 'meta'], '--device must be cpu or cuda, got meta'),
        (['--arch', 'huge'], "invalid choice: 'huge'"),
    ],
)
def test_bad_options(tools, capsys, arguments, message):
    with pytest.raises(SystemExit, match='2'):
        tools.bench_contmix.parse_options(arguments)
    assert message in capsys.readouterr().err


@compiled
def test_the_small_case_is_right(tmp_path):
    output = run_script(FOLDER / 'contmix_small_case.py', '--device', 'cpu', cwd=tmp_path)
    assert 'small case on cpu: right' in output


def run_gpu_check(*arguments, cwd, **variables):
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'PYTHON': sys.executable, **variables}
    env.pop('OUT', None)
    command = ['bash', FOLDER / 'gpu_check.sh', *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_gpu_check_is_a_script():
    subprocess.run(['bash', '-n', FOLDER / 'gpu_check.sh'], check=True)
    if shutil.which('shellcheck'):
        subprocess.run(['shellcheck', FOLDER / 'gpu_check.sh'], check=True)


def test_gpu_check_refuses_without_a_gpu(tmp_path):
    done = run_gpu_check(cwd=tmp_path)
    assert done.returncode == 2
    assert 'torch sees no GPU on this machine' in done.stderr
    assert not any(tmp_path.iterdir())
    done = run_gpu_check('--fast', cwd=tmp_path)
    assert done.returncode == 2
    assert 'unknown option --fast' in done.stderr


@compiled
def test_gpu_check_reports_its_parts(tmp_path):
    """On the CPU, and as on a machine that has no mmcv: the operator needs torch only."""
    (tmp_path / 'without' / 'mmcv').mkdir(parents=True)
    (tmp_path / 'without' / 'mmcv' / '__init__.py').write_text("raise ImportError('no mmcv here')")
    arguments = ('--device', 'cpu', '--prebuilt', '--tiny', '--out', 'out')
    done = run_gpu_check(*arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path / 'without'))
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-3:]
    assert [line.split(',')[0].split() for line in last] == [['small_case', 'ok'], ['bench', 'ok'], ['tests', 'ok']]
    record = json.loads((tmp_path / 'out' / 'bench.json').read_text())
    assert record['shapes_from'] == 'record'
    assert record['cases'][0]['implementations']['contmix']['error'] < 1e-5


@compiled
def test_gpu_check_goes_on_after_a_part_that_fails(tmp_path):
    """Here the small case, which this interpreter refuses."""
    interpreter = tmp_path / 'python'
    interpreter.write_text(
        f'#!/bin/sh\ncase "$*" in *contmix_small_case*) echo oh no; exit 3 ;; esac\nexec {sys.executable} "$@"\n'
    )
    interpreter.chmod(0o755)
    arguments = ('--device', 'cpu', '--prebuilt', '--tiny', '--out', 'out')
    done = run_gpu_check(*arguments, cwd=tmp_path, PYTHON=str(interpreter))
    assert done.returncode == 1
    assert '    oh no' in done.stdout
    last = done.stdout.strip().splitlines()[-3:]
    assert last[0].startswith('small_case FAILED with 3')
    assert [line.split(',')[0].split() for line in last[1:]] == [['bench', 'ok'], ['tests', 'ok']]
    assert 'FAILED: see above' in done.stdout


def test_gpu_check_says_what_there_was_no_time_for(tmp_path):
    done = run_gpu_check('--device', 'cpu', '--prebuilt', '--out', 'out', cwd=tmp_path, TOTAL_SECONDS='0')
    assert done.returncode == 1
    last = done.stdout.strip().splitlines()[-3:]
    assert [' '.join(line.split()) for line in last] == [
        f'{part} NOT RUN: no time left' for part in ('small_case', 'bench', 'tests')
    ]
