"""The benchmark of ContMix: a baseline that computes the same, the network's shapes, work that is counted right."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from benchmarks import FOLDER, bench_contmix, published, variants
from conftest import relative_error, run_script

from overlock_mm.models import OverLoCK, blocks
from overlock_mm.models.overlock import ARCHITECTURE_DEFAULTS, ARCHITECTURES
from overlock_mm.models.reparam import DILATED_BRANCHES
from overlock_mm.ops import _library, contmix_reference

TINY = ('--device', 'cpu', '--arch', 't', '--stage', '4', '--size', '224x224', '--rounds', '2')
compiled = pytest.mark.skipif(_library.missing is not None, reason='there is no compiled operator')


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


# -------------------------------------------------------------------------------------------- the published computation


@pytest.mark.parametrize('size, kernel_sizes', [((6, 9), (3, 5)), ((5, 5), (3, 5)), ((13, 14), (5, 13)), ((11, 7), (5, 7))])
def test_the_published_computation_is_the_reference(size, kernel_sizes):
    arguments = make_arguments(*size, kernel_sizes)
    expected = output_and_gradients(contmix_reference, arguments)
    for got, wanted in zip(output_and_gradients(published.contmix_published, arguments), expected):
        assert relative_error(got, wanted) < 1e-13
    for name in ('proj_bias', 'rpb_small', 'rpb_large'):
        without = {**arguments, name: None}
        assert relative_error(published.contmix_published(**without), contmix_reference(**without)) < 1e-13


def test_the_published_computation_keeps_a_half_dtype():
    """Softmaxes are computed in float32; parameters may be float32 beside half maps."""
    arguments = make_arguments(6, 9, (3, 5), torch.float32)
    for name in ('value', 'query', 'key'):
        arguments[name] = arguments[name].detach().bfloat16()
    out = published.contmix_published(**arguments)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, contmix_reference(**arguments)) < 3e-2


def test_natten_gets_its_own_layout(monkeypatch):
    """Weights (B, G, H, W, k*k) and values (B, G, H, W, c), as natten 0.17 has them."""

    def na2d_av(attn, value, kernel_size, dilation):
        assert attn.shape == (*value.shape[:4], kernel_size**2)
        assert value.is_contiguous()
        assert dilation == 1
        return published.shifted_sums(value.permute(0, 1, 4, 2, 3), attn).permute(0, 1, 3, 4, 2)

    functional = types.ModuleType('natten.functional')
    functional.na2d_av = na2d_av
    monkeypatch.setitem(sys.modules, 'natten', types.ModuleType('natten'))
    monkeypatch.setitem(sys.modules, 'natten.functional', functional)
    natten = bench_contmix.function_of('natten', torch.device('cpu'))
    arguments = make_arguments(6, 9, (3, 5))
    assert relative_error(natten(**arguments), contmix_reference(**arguments)) < 1e-13


def test_natten_is_skipped_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'natten', None)
    with pytest.raises(bench_contmix.Skipped, match='natten'):
        bench_contmix.function_of('natten', torch.device('cpu'))


# --------------------------------------------------------------------------------------------------------------- shapes


def test_the_numbers_of_the_variants_are_the_networks():
    assert set(ARCHITECTURES) == {*variants.VARIANTS}
    assert {arch: settings['channels'] for arch, settings in ARCHITECTURES.items()} == variants.CHANNELS
    assert {arch: settings['num_groups'] for arch, settings in ARCHITECTURES.items()} == variants.NUM_GROUPS
    assert (
        dict(kernel_sizes=variants.KERNEL_SIZES, mlp_ratio=variants.MLP_RATIO, sub_mlp_ratio=variants.SUB_MLP_RATIO)
        == ARCHITECTURE_DEFAULTS
    )
    assert {size: DILATED_BRANCHES[size] for size in variants.KERNEL_SIZES} == variants.BRANCHES


@pytest.mark.parametrize('arch', ['xt', 't', 's', 'b'])
@pytest.mark.parametrize('image', [(224, 224), (800, 1344)])
def test_shapes_are_what_the_network_gives_the_operator(monkeypatch, arch, image):
    calls = []

    def record(value, query, key, *parameters, scale, **sizes):
        calls.append((tuple(value.shape), query.shape[1], tuple(key.shape[2:]), sizes, scale))
        return torch.empty_like(value)

    monkeypatch.setattr(blocks, 'contmix', record)
    # All blocks of a stage are alike: one of each will do.
    network = OverLoCK({**ARCHITECTURES[arch], 'depths': (1, 1, 1, 1), 'sub_depths': (1, 1)}).eval().to('meta')
    with torch.no_grad():
        network(torch.empty(1, 3, *image, device='meta'))
    assert len(calls) == 2
    for stage, call in zip((3, 4), calls):
        shape = bench_contmix.shape_of(arch, stage, image)
        sizes = dict(num_groups=shape.num_groups, small_kernel_size=5, large_kernel_size=shape.kernel_size)
        scale = (shape.channels // shape.num_groups) ** -0.5
        assert call == ((1, shape.channels, shape.height, shape.width), shape.query_channels, (7, 7), sizes, scale)


def test_a_map_too_small_for_the_kernel_is_refused(capsys):
    with pytest.raises(SystemExit, match='2'):
        bench_contmix.main([*TINY, '--size', '96x224'])
    assert '--size: the kernel 7 of stage 4 needs a larger map than 3x7' in capsys.readouterr().err


def test_work_is_counted_right():
    """Against numbers worked out by hand for T, stage 3, 800 x 1344: C 256, G 8, kernels 5 and 13, a map of 50 x 84."""
    shape = bench_contmix.shape_of('t', 3, (800, 1344))
    assert shape == bench_contmix.Shape(256, 8, 13, 50, 84, query_channels=128)
    assert shape.slots == 25 + 169
    forward = bench_contmix.work(shape, 1, 'float32', backward=False)
    # 4200 positions x 8 groups x 194 slots = 6 518 400 exponentials, each with 16 + 16 multiply-adds (208 588 800); and
    # W_d into the keys: 194 slots x 49 tokens x 128 channels.
    assert forward['exponentials'] == 6_518_400
    assert forward['multiply-adds float32'] == 208_588_800 + 1_216_768
    # value and output 4 300 800 bytes each, query 2 150 400, key 128 x 49 x 4 = 25 088, W_d and its bias 194 x 50 x 4 =
    # 38 800, the position biases 8 x (81 + 625) x 4 = 22 592.
    assert forward['bytes'] == 2 * 4_300_800 + 2_150_400 + 25_088 + 38_800 + 22_592
    # The backward: 16 x (3 + 2) multiply-adds a slot, the folding twice; value, output, its gradient, the value's gradient;
    # query and its gradient; the small ones and their gradients; 2 sums a position and group, written and read.
    both = bench_contmix.work(shape, 1, 'float32', backward=True)
    assert both['exponentials'] == 2 * 6_518_400
    assert both['multiply-adds float32'] == 209_805_568 + 6_518_400 * 80 + 2 * 1_216_768
    backward = 4 * 4_300_800 + 2 * 2_150_400 + 2 * (25_088 + 38_800 + 22_592) + 2 * (2 * 4200 * 8 * 4)
    assert both['bytes'] == forward['bytes'] + backward

    twice = bench_contmix.work(shape, 2, 'bfloat16', backward=False)
    assert twice['multiply-adds bfloat16'] == 2 * forward['multiply-adds float32']
    # Twice as many maps of half the size; the parameters stay.
    assert twice['bytes'] == forward['bytes']


def test_shapes_that_variants_share_are_measured_once():
    """Stage 3 of XT is that of T."""
    options = bench_contmix.make_parser().parse_args(['--size', '512x512', '--batch', '1', '2'])
    options.device = torch.device('cpu')
    cases = bench_contmix.cases_of(options)
    names = [case.name for case in cases]
    assert len(names) == 2 * (3 + 4) * 2  # batches, shapes of both stages, forward and backward
    assert [name for name in names if name.startswith('xt,t stage 3')] == [
        f'xt,t stage 3, 512x512, batch {batch}' for batch in (1, 1, 2, 2)
    ]
    assert ['batch 1' in name for name in names] == [True] * 14 + [False] * 14
    assert len({(case.section, case.name) for case in cases}) == len(cases)


# ---------------------------------------------------------------------------------------------------------------- a run


@compiled
def test_a_run_records_what_it_measured(tmp_path):
    """In a folder that has nothing to do with the checkout."""
    arguments = (*TINY, '--dtype', 'float32', 'bfloat16', '--implementations', 'ours', 'published', 'reference', 'natten')
    output = run_script(FOLDER / 'bench_contmix.py', *arguments, '--json', 'out.json', cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['out.json']
    record = json.loads((tmp_path / 'out.json').read_text())
    assert record['ceilings'].keys() == {'bytes', 'exponentials', 'multiply-adds bfloat16', 'multiply-adds float32'}
    sections = [case['section'] for case in record['cases']]
    assert sections == [
        f'{mode}, {dtype}' for dtype in ('float32', 'bfloat16') for mode in ('forward', 'forward + backward')
    ]
    inputs_and_output = (2 * 512 + 256) * 49 * 4  # value, output and query
    for case in record['cases']:
        assert case['name'] == 't stage 4, 224x224, batch 1'
        results, training = case['implementations'], 'backward' in case['section']
        assert list(results) == ['ours', 'published', 'reference', 'natten']
        assert results.pop('natten')['failed'] is False
        for name, result in results.items():
            assert result['rounds'] == 2
            assert result['errors'].keys() == ({'output', 'gradient'} if training else {'output'})
            assert ('kept_bytes' in result) == training
            assert ('ratio' in result) == (name != 'ours')
        assert max(results['ours']['errors'].values()) < (1e-5 if 'float32' in case['section'] else 2e-2)
        if training and 'float32' in case['section']:
            kept = {name: result['kept_bytes'] for name, result in results.items()}
            assert kept['ours'] < inputs_and_output < kept['reference'] < kept['published']
    assert '| t stage 4, 224x224, batch 1 | ours ' in output


@compiled
def test_small_shapes_are_checked_and_not_timed(capsys):
    assert bench_contmix.main(['--check', '--device', 'cpu']) == 0
    output = capsys.readouterr().out
    assert output.count('| checked |') == 2 * 3  # shapes and dtypes
    assert 'The machine reaches' not in output


@compiled
def test_a_wrong_small_shape_is_an_error(monkeypatch, capsys):
    function_of = bench_contmix.function_of
    monkeypatch.setattr(
        bench_contmix, 'function_of', lambda *arguments: lambda *a, **b: 1.01 * function_of(*arguments)(*a, **b)
    )
    assert bench_contmix.main(['--check', '--device', 'cpu']) == 1
    error = capsys.readouterr().err
    assert 'WRONG RESULT: 30x9x8, 3 groups, kernels 5 and 7, forward + backward, float32, ours: relative error' in error


def test_without_the_compiled_operator_the_run_says_so(monkeypatch, capsys):
    monkeypatch.setattr(_library, 'missing', 'it was not built')
    assert bench_contmix.main([*TINY, '--implementations', 'ours', 'reference']) == 1
    captured = capsys.readouterr()
    assert 'ours was not measured: it was not built' in captured.err
    assert '| reference ' in captured.out


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--size', '800'], "must be HEIGHTxWIDTH, as 800x1344, got '800'"),
        (['--size', '0x9'], "must be HEIGHTxWIDTH with positive numbers, got '0x9'"),
        (['--batch', '0'], "must be a positive integer, got '0'"),
        (['--arch', 'huge'], "invalid choice: 'huge'"),
    ],
)
def test_bad_options(capsys, arguments, message):
    with pytest.raises(SystemExit, match='2'):
        bench_contmix.main(arguments)
    assert message in capsys.readouterr().err
