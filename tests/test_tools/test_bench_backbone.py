"""The benchmark of the backbone: a record that holds what it should, memory and work that are counted right."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest
import torch
from conftest import ROOT, run_script

from overlock_mm import memory
from overlock_mm.models import OverLoCK, convolutions
from overlock_mm.models.overlock import ARCHITECTURES
from overlock_mm.ops import _products
from overlock_mm.versions import version_numbers

FOLDER = ROOT / 'tools' / 'benchmarks'
SCRIPT = FOLDER / 'bench_backbone.py'
FAST = (
    '--device', 'cpu', '--arch-file', 'small.json', '--size', '64x64', '--rounds', '2',
    '--bandwidth', '10', '--flops', '0.1',
)  # fmt: skip
#: With one block of a kind and few slots, which the published form goes through one by one.
SMALLEST = dict(
    channels=(8, 12, 24, 40), depths=(1, 1, 1, 1), sub_depths=(1, 1), num_groups=(2, 4), kernel_sizes=(9, 7, 5, 5)
)
PLAIN_CASE = ('arch', 'out_type', 'size', 'batch', 'dtype', 'cast', 'mode', 'implementations')
NAMES = ('bench_backbone', 'backbone_parts', 'backbone_report', 'measuring', 'published_backbone')


@pytest.fixture
def tools(monkeypatch):
    """The modules beside the script, as it imports them."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    yield types.SimpleNamespace(**{name: __import__(name) for name in NAMES})
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], '__file__', '')):
            del sys.modules[name]


@pytest.fixture
def bench(tools, monkeypatch, tmp_path):
    """The script, with its ``main`` on the small network: ``bench.main_with(*arguments)`` in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'small.json').write_text(json.dumps(SMALLEST))

    def main_with(*arguments):
        monkeypatch.setattr(sys, 'argv', ['bench_backbone.py', *FAST, *arguments])
        return tools.bench_backbone.main()

    tools.bench_backbone.main_with = main_with
    return tools.bench_backbone


def read(path):
    return json.loads(path.read_text())


# ----------------------------------------------------------------------------------------------------- a run of all of it


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """A run in a folder that has nothing to do with the checkout."""
    folder = tmp_path_factory.mktemp('bench')
    (folder / 'small.json').write_text(json.dumps(SMALLEST))
    output = run_script(
        SCRIPT, *FAST, '--batch', '1', '2', '--mode', 'eval', 'train', '--peers', '--breakdown',
        '--implementations', 'published', 'published-folded', 'ours', 'ours-deploy', 'ours-channels-last', 'ours-with-cp',
        'ours-cuda-graph', '--out', 'out', cwd=folder,
    )  # fmt: skip
    return folder, output, read(folder / 'out' / 'record.json')


def test_a_run_records_what_it_measured(measured):
    folder, output, record = measured
    machine = record['machine']
    assert (machine['device_type'], machine['torch']) == ('cpu', torch.__version__)
    assert {'date', 'device', 'threads', 'git_commit'} <= machine.keys()
    assert record['ceilings'] == dict(bytes_per_second=1e10, multiply_adds_per_second={'float32': 5e10})
    assert record['not_run'] == 0
    keys = [(case['mode'], case['batch'], case['size']) for case in record['cases']]
    assert keys == [(mode, batch, [64, 64]) for mode in ('eval', 'train') for batch in (1, 2)]
    for case in record['cases']:
        training, results = case['mode'] == 'train', case['implementations']
        assert (case['arch'], case['dtype'], case['cast'], case['rounds']) == ('small', 'float32', False, 2)
        own = ['ours', 'ours-channels-last', 'ours-with-cp'] if training else ['ours', 'ours-deploy', 'ours-channels-last']
        assert list(results) == [
            'published',
            *([] if training else ['published-folded']),
            *own,
            *([] if training else ['ours-cuda-graph']),
        ]
        assert case['yardstick'] == ('ours' if training else 'ours-deploy')
        if not training:
            assert results.pop('ours-cuda-graph') == dict(skipped='for a GPU only')
        for name, result in results.items():
            assert 0 < result['q1'] <= result['median'] <= result['q3']
            assert len(result['samples']) == 2
            assert result['images_per_second'] == pytest.approx(case['batch'] / result['median'])
            assert result['peak_bytes'] > 0
            assert ('saved_bytes' in result) == training
            assert ('speedup' in result) == ('error' in result) == (name != 'published')
            assert ('over_ours' in result) == (name != case['yardstick'])
            if name != 'published':
                assert result['error'] < 1e-5
            if training and name != 'published':
                assert result['gradient_error'] < 1e-4
        folded = {name: result['parameters'] for name, result in results.items()}
        if training:
            saved = {name: result['saved_bytes'] for name, result in results.items()}
            assert saved['ours-with-cp'] < saved['ours'] < saved['published']
        else:
            assert folded['published-folded'] == folded['ours-deploy'] < folded['ours'] == folded['published']


def test_a_run_takes_apart_what_it_measured(measured, tools):
    _, _, record = measured
    parts = tools.backbone_parts.PARTS
    for case in record['cases']:
        expected = set(parts) - (set() if case['mode'] == 'train' else {'optimizer'})
        assert case['work'].keys() == case['floor'].keys() == expected
        for part, work in case['work'].items():
            assert case['floor'][part] == pytest.approx(max(work['bytes'] / 1e10, work['multiply_adds'] / 5e10))
        for name, result in case['implementations'].items():
            if 'skipped' not in result:
                assert result['parts'].keys() <= expected, name
                assert all(result['parts'][part] > 0 for part in expected - {'norms and elementwise'}), name
    text = tools.backbone_report.as_text(record)
    assert 'Parts of small pyramid_with_overview, 64x64, batch 2, float32, train' in text


def test_a_run_is_shown(measured, tools):
    folder, output, record = measured
    assert {path.name for path in (folder / 'out').iterdir()} == {'record.json', 'tables.md', 'curves_float32.png'}
    assert {path.name for path in folder.iterdir()} == {'out', 'small.json'}
    assert (folder / 'out' / 'curves_float32.png').stat().st_size > 20_000
    tables = (folder / 'out' / 'tables.md').read_text()
    assert tables.count('\n### ') == 2 + 4  # modes, and cases taken apart
    assert tables.count('\n| small pyramid_with_overview, ') == 4
    row = next(line for line in tables.splitlines() if '| ours-deploy |' in line)
    ours = record['cases'][0]['implementations']['ours-deploy']
    assert tools.backbone_report.with_spread(ours) in row
    assert f'{tools.backbone_report.number(ours["images_per_second"])} |' in row
    assert re.search('ours-cuda-graph +for a GPU only', output)


def test_a_record_is_shown_again(measured, tmp_path):
    folder, output, _ = measured
    shown = run_script(SCRIPT, '--report', folder / 'out' / 'record.json', '--plot', 'again.png', cwd=tmp_path)
    assert shown.strip().splitlines()[0] in output
    assert 'eval, float32' in shown
    assert (tmp_path / 'again.png').stat().st_size > 20_000


def test_curves_are_of_one_variant_and_precision(tools):
    def case(size, batch=1, arch='t', dtype='float32'):
        return dict(arch=arch, out_type='pyramid', size=size, batch=batch, dtype=dtype, cast=False, mode='eval')

    cases = [case([64, 64]), case([32, 64]), case([64, 64], 4), case([64, 64], arch='b'), case([32, 64], dtype='bfloat16')]
    (title, axis, by_size), (_, other_axis, by_batch) = tools.backbone_report.curves(dict(cases=cases))
    assert (title, axis, by_size) == ('OverLoCK-T, float32, batch 1', 'pixels', cases[:2])
    assert (other_axis, by_batch) == ('batch', [cases[0], cases[2]])
    (row,) = tools.backbone_report.curves(dict(cases=cases), 'bfloat16')
    assert row == ('OverLoCK-T, bfloat16 autocast, batch 1', 'pixels', cases[4:])


# ------------------------------------------------------------------------------------------------- interruption, mistakes


def test_a_run_goes_on_where_it_was_interrupted(bench, monkeypatch, tmp_path, capsys):
    arguments = ('--peers', '--implementations', 'published', 'ours', '--json', 'out.json', '--mode', 'eval')
    run_case, calls = bench.run_case, []

    def killed_at_second(case, options):
        calls.append(case.size)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_case(case, options)

    monkeypatch.setattr(bench, 'run_case', killed_at_second)
    with pytest.raises(KeyboardInterrupt):
        bench.main_with(*arguments, '--size', '64x64', '64x96')
    first = read(tmp_path / 'out.json')['cases']
    assert [case['size'] for case in first] == [[64, 64]]

    assert bench.main_with(*arguments, '--size', '64x64', '64x96', '--resume') == 0
    cases = read(tmp_path / 'out.json')['cases']
    assert calls == [(64, 64), (64, 96), (64, 96)]
    assert cases[0] == first[0]
    assert [case['size'] for case in cases] == [[64, 64], [64, 96]]

    # What was not asked for again stays; what is asked for with another implementation is measured again.
    calls.append(None)
    assert bench.main_with(*arguments, '--size', '64x64', '--resume', '--implementations', 'published', 'ours-deploy') == 0
    assert calls[4:] == [(64, 64)]
    after = read(tmp_path / 'out.json')['cases']
    assert [(case['size'], list(case['implementations'])) for case in after] == [
        ([64, 64], ['published', 'ours-deploy']), ([64, 96], ['published', 'ours'])
    ]  # fmt: skip
    assert after[1] == cases[1]

    record = read(tmp_path / 'out.json')
    record['machine']['device'] = 'another one'
    (tmp_path / 'out.json').write_text(json.dumps(record))
    assert bench.main_with(*arguments, '--resume') == 2
    assert 'out.json has device another one, and this is' in capsys.readouterr().err
    assert read(tmp_path / 'out.json') == record


def test_no_more_cases_than_there_is_time_for(bench, tmp_path, capsys):
    arguments = ('--peers', '--implementations', 'ours', '--json', 'out.json', '--time-limit', '1e-9')
    assert bench.main_with(*arguments) == 0
    assert read(tmp_path / 'out.json')['not_run'] == 1
    assert '1 cases were not run' in capsys.readouterr().out


@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_a_wrong_result_is_an_error(bench, monkeypatch, capsys, mode):
    published = bench.published

    def wrong(model, folded=False):
        model = published(model, folded)
        model.high_level_proj.bias.data += 1
        return model

    monkeypatch.setattr(bench, 'published', wrong)
    # Also where the published form itself is not measured.
    assert bench.main_with('--peers', '--implementations', 'ours', '--mode', mode) == 1
    error = capsys.readouterr().err
    where = f'small pyramid_with_overview, 64x64, batch 1, float32, {mode}, ours'
    assert f'WRONG RESULT: {where}: relative error' in error
    assert (f'WRONG RESULT: {where}: relative gradient error' in error) == (mode == 'train')


def test_what_fails_does_not_keep_others_from_being_measured(bench, monkeypatch, tmp_path, capsys):
    build = bench.build

    def fail(name, *arguments):
        if name == 'ours':
            raise RuntimeError('no such kernel\nand more')
        return build(name, *arguments)

    monkeypatch.setattr(bench, 'build', fail)
    assert bench.main_with('--peers', '--implementations', 'published', 'ours', 'ours-deploy', '--json', 'out.json') == 1
    results = read(tmp_path / 'out.json')['cases'][0]['implementations']
    assert results['ours'] == dict(skipped='RuntimeError: no such kernel', failed=True)
    assert results['ours-deploy']['median'] > 0
    assert 'FAILED: small pyramid_with_overview, 64x64, batch 1, float32, eval, ours: Runt' in capsys.readouterr().err


def test_what_the_memory_would_not_hold_is_left_out(bench, monkeypatch, tmp_path, capsys):
    needed = bench.needed_memory

    monkeypatch.setattr(bench, 'needed_memory', lambda model, *others: 2**40 if 'Plain' in type(model).__name__ else None)
    arguments = ('--peers', '--implementations', 'published', 'ours', '--mode', 'train', '--json', 'out.json')
    assert bench.main_with(*arguments) == 0
    results = read(tmp_path / 'out.json')['cases'][0]['implementations']
    assert results['published'] == dict(skipped='takes about 1331.2 GiB')
    assert results['ours']['error'] is None
    assert 'were not checked' in capsys.readouterr().out

    monkeypatch.setattr(bench, 'needed_memory', needed)
    assert bench.main_with(*arguments) == 0
    saved = read(tmp_path / 'out.json')['cases'][0]['implementations']['published']['saved_bytes']
    options = bench.parse_options([*FAST])
    model = bench.published(OverLoCK(options.architectures['small'], out_type='pyramid_with_overview'))
    # With weights and image, without what no backward reads.
    assert needed(model.train(), torch.empty(1, 3, 64, 64), 4) == pytest.approx(saved, rel=0.5)


@pytest.mark.parametrize('name', ['ours-compiled', 'ours-deploy-channels-last', 'ours-with-cp'])
def test_implementations_are_the_network(bench, name):
    """With the weights of all, in the mode asked for."""
    mode = 'train' if name == 'ours-with-cp' else 'eval'
    options = bench.parse_options([*FAST, '--mode', mode, '--implementations', name, '--peers'])
    (case,) = bench.chosen_cases(options)
    weights = bench.enliven(OverLoCK(options.architectures['small'], out_type=case.out_type))
    model = bench.build(name, case, weights, options.architectures['small'], torch.device('cpu'))
    assert model.training == (mode == 'train')
    assert model.deploy == (mode == 'eval')
    assert bool(model.recomputed_stages) == (name == 'ours-with-cp')
    assert all(
        torch.equal(tensor, weights.state_dict()[key])
        for key, tensor in model.state_dict().items()
        if 'lk_origin' not in key
    )
    image = torch.randn(1, 3, 64, 64)
    runner = bench.Runner('ours' if name == 'ours-compiled' else name, case, model, image, torch.device('cpu'))
    assert runner.image.is_contiguous(memory_format=torch.channels_last) == ('channels-last' in name)
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    runner.call()
    assert not runner.outputs
    assert all(torch.equal(tensor, before[key]) and tensor.grad is None for key, tensor in model.named_parameters())


@pytest.mark.parametrize('name', ['convnext-tiny', 'swin-tiny', 'torchvision-convnext-tiny', 'torchvision-swin-tiny'])
def test_peers_have_four_maps(bench, name):
    pytest.importorskip(bench.PEERS[name][0])
    model = bench.build_peer(name)
    model.eval()
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, 64, 96))
    assert [tuple(out.shape) for out in outputs] == [
        (1, 96, 16, 24), (1, 192, 8, 12), (1, 384, 4, 6), (1, 768, 2, 3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--size', '800'], "must be HEIGHTxWIDTH, as 800x1344, got '800'"),
        (['--batch', '0'], "must be a positive integer, got '0'"),
        (['--device', 'meta'], '--device must be cpu or cuda, got meta'),
        (['--arch', 'huge'], "invalid choice: 'huge'"),
        (['--implementations', 'theirs'], "invalid choice: 'theirs'"),
        (['--peers', 'resnet'], "invalid choice: 'resnet'"),
        (['--dtype', 'float64'], "invalid choice: 'float64'"),
        (['--dtype', 'float32', '--cast'], '--cast is for --dtype bfloat16 or float16'),
        (['--mode', 'train', '--peers', '--implementations', 'ours-deploy'], 'none is for --mode train, got ours-deploy'),
        (['--everything'], '--everything needs --out'),
        (['--resume'], '--resume needs --json or --out'),
        (['--arch-file', 'none.json'], 'none.json: '),
        (['--arch-file', 'odd.json'], 'odd.json: arch has unknown settings'),
    ],
)
def test_bad_options(bench, capsys, tmp_path, arguments, message):
    (tmp_path / 'odd.json').write_text('{"depth": 3}')
    with pytest.raises(SystemExit, match='2'):
        bench.parse_options(arguments)
    assert message in capsys.readouterr().err


def test_without_arguments(bench):
    options = bench.parse_options([])
    cases = bench.chosen_cases(options)
    assert [(case.arch, case.size, case.mode, case.batch, case.dtype) for case in cases] == [
        ('t', size, 'eval', 1, 'float32') for size in ((224, 224), (512, 512), (800, 1344))
    ]
    assert cases[0].implementations == (
        'published', 'published-folded', 'ours', 'ours-deploy',
        'convnext-tiny', 'convnext-small', 'convnext-base', 'swin-tiny',
    )  # fmt: skip


@pytest.mark.parametrize('on_gpu', [False, True])
def test_everything(bench, on_gpu):
    cases = bench.everything(on_gpu)
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        own = [name for name in case.implementations if name not in bench.PEERS]
        assert own[0] == 'published'
        assert all(case.mode in bench.IMPLEMENTATIONS[name] for name in own)
        assert set(case.breakdown) <= set(own)
        assert ('ours-cuda-graph' in own) == (on_gpu and case.mode == 'eval')
    assert {case.arch for case in cases} == set(ARCHITECTURES)
    for mode in ('eval', 'train'):
        of_mode = [case for case in cases if case.mode == mode and case.arch == 't' and case.dtype == 'float32']
        assert len({case.size for case in of_mode if case.batch == 1}) > 5
        assert len({case.batch for case in of_mode if case.size == (224, 224)}) > 3
        assert sum(bool(case.breakdown) for case in of_mode) == 2


# --------------------------------------------------------------------------------------------------------- what is counted


def test_allocated_bytes(tools):
    kept = []

    def first():
        torch.empty(3 << 20, dtype=torch.uint8)
        kept.append(torch.empty(1 << 20, dtype=torch.uint8))

    def second():
        kept.append(torch.empty(1 << 20, dtype=torch.uint8))
        torch.empty(4 << 20, dtype=torch.uint8)
        kept.clear()

    assert tools.measuring.allocated_by([first, second], torch.device('cpu')) == (6 << 20, [1 << 20, 0])


def test_the_saved_bytes_are_what_the_backward_reads(bench, tools):
    """Counted by the allocator as by autograd's own account, but for weights and image, and unread outputs."""
    options = bench.parse_options([*FAST, '--mode', 'train', '--implementations', 'published', '--peers'])
    (case,) = bench.chosen_cases(options)
    weights = OverLoCK(options.architectures['small'], out_type=case.out_type)
    model = bench.build('published', case, weights, None, torch.device('cpu'))
    runner = bench.Runner('published', case, model, torch.randn(1, 3, 64, 64), torch.device('cpu'))
    runner.call()
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        runner.forward()
    not_counted = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers(), runner.image)}
    saved = sum(each.untyped_storage().nbytes() for key, each in storages.items() if key not in not_counted)
    saved += sum(out.nbytes for out in runner.outputs if out.untyped_storage()._cdata not in storages)
    runner.backward()
    assert runner.memory()['saved_bytes'] == pytest.approx(saved, rel=0.05)


def test_work_is_counted_right(tools, small_arch):
    """Against numbers worked out by hand, of the folded large convolutions on an image of 64 x 64."""
    counted = tools.backbone_parts.count_work(small_arch, 'pyramid', (1, 3, 64, 64), training=False)
    # Channels, side of the map, kernel: of blocks1..4, and of two in each of sub_blocks3 and sub_blocks4.
    layers = [(8, 16, 9), (12, 8, 7), (24, 4, 7), (40, 2, 5), *[(24, 4, 7)] * 2, *[(40, 2, 5)] * 2]
    large = counted['large depth-wise convolutions']
    assert large['multiply_adds'] == sum(c * s * s * k * k for c, s, k in layers)
    assert large['bytes'] == 4 * sum(2 * c * s * s + c * (k * k + 1) for c, s, k in layers)

    trained = tools.backbone_parts.count_work(small_arch, 'pyramid', (1, 3, 64, 64), training=True)
    branches = {9: 25 + 49 + 25 + 9 + 9, 7: 25 + 9 + 9 + 9, 5: 9 + 9}  # their taps, beside the large kernel's
    large = trained['large depth-wise convolutions']
    assert large['multiply_adds'] == 3 * sum(c * s * s * (k * k + branches[k]) for c, s, k in layers)
    weights = sum(p.numel() for p in OverLoCK(small_arch, out_type='pyramid').parameters())
    assert trained['optimizer'] == dict(multiply_adds=0, bytes=7 * 4 * weights)

    half = tools.backbone_parts.count_work(small_arch, 'pyramid', (2, 3, 64, 64), training=False, itemsize=2)
    for part in counted:
        assert half[part]['multiply_adds'] == 2 * counted[part]['multiply_adds']
        assert half[part]['bytes'] == pytest.approx(counted[part]['bytes'])  # the weights' remain


def test_the_work_of_all_parts_is_the_networks(tools):
    """The multiply-adds that the release reports, with a head of half a million more: 5.5 G for T."""
    counted = tools.backbone_parts.count_work('t', 'features', (1, 3, 224, 224), training=False)
    assert sum(each['multiply_adds'] for each in counted.values()) == pytest.approx(5.5e9, rel=0.02)


@pytest.mark.parametrize('training', [False, True])
def test_operators_belong_to_parts(tools, small_arch, monkeypatch, training):
    """Here an operator takes a second, and so many are counted of each part."""
    monkeypatch.setattr(tools.backbone_parts.Clock, 'since', lambda clock, begin: 1.0)
    published = tools.published_backbone.published
    image = torch.randn(1, 3, 64, 64)

    def operators(model):
        outputs = []

        def backward():
            if training:
                torch.autograd.backward(outputs[0], [torch.ones_like(out) for out in outputs[0]])

        def forward():
            with torch.set_grad_enabled(training):
                outputs.append(model.train(training)(image))

        return tools.backbone_parts.time_parts(model, forward, backward, lambda: torch.zeros(1), torch.device('cpu'))

    plain = operators(published(OverLoCK(small_arch, out_type='pyramid')))
    # The large convolution of a block and its branches, each with its batch norm: 6 with kernel 9, 5 with 7, 3 with 5.
    convolutions = 6 + 5 + 5 + 3 + 2 * 5 + 2 * 3
    # Forward and backward, and in training a batch norm counts its batches.
    assert plain['large depth-wise convolutions'] == convolutions * (2 + 1 + 2 if training else 2)
    assert plain['optimizer'] == 1
    # Slots of both kernels, each at least sliced, padded, multiplied and added.
    assert plain['ContMix'] > 4 * (2 * (25 + 49) + 2 * (25 + 25)) * (2 if training else 1)
    ours = operators(OverLoCK(small_arch, out_type='pyramid'))
    assert ours['ContMix'] < plain['ContMix'] / 10
    if not training:
        folded = operators(published(OverLoCK(small_arch, out_type='pyramid'), folded=True))
        assert folded['large depth-wise convolutions'] == 8
        for part in ('ContMix', 'depth-wise 3x3', '1x1 convolutions', 'stem and downsampling'):
            assert folded[part] == plain[part]


def test_products_stay_products_under_the_clock(tools, monkeypatch):
    if not _products.has_products():
        pytest.skip('this PyTorch has no products of oneDNN')
    monkeypatch.setattr(_products, 'WEIGHTS_PER_POSITION', 0)
    products, product = [], convolutions.conv2d_as_product
    monkeypatch.setattr(convolutions, 'conv2d_as_product', lambda *args: products.append(1) or product(*args))
    model, outputs = convolutions.ConvSequential(torch.nn.Conv2d(4, 8, 1)), []
    parts = tools.backbone_parts.time_parts(
        model,
        lambda: outputs.append(model(torch.randn(1, 4, 3, 3))),
        lambda: outputs.pop().sum().backward(),
        lambda: None,
        torch.device('cpu'),
    )
    assert len(products) == 1
    assert parts['1x1 convolutions'] > 0
    assert _products._number_of_modes() == 0


@pytest.mark.skipif(version_numbers(torch.__version__)[:2] < (2, 4), reason='AdamW is fused on the CPU from torch 2.4 on')
def test_fused_adamw(bench, tmp_path, capsys):
    """A case of its own, named in the tables; an older record knows nothing of it, and its cases are those without."""
    options = ('--mode', 'train', '--implementations', 'ours', '--peers', '--json', 'record.json')
    assert bench.main_with(*options, '--fused-adamw') == 0
    assert '\ntrain, fused AdamW, float32\n' in capsys.readouterr().out
    (case,) = read(tmp_path / 'record.json')['cases']
    assert case['fused_adamw'] is True
    del case['fused_adamw']
    plain, fused = bench.Case(**{name: case[name] for name in PLAIN_CASE}), bench.key_of({**case, 'fused_adamw': True})
    assert bench.key_of(case) == plain.key != fused
    for chosen in (False, True):
        runner_case = bench.Case(**{name: case[name] for name in PLAIN_CASE}, fused_adamw=chosen)
        runner = bench.Runner('ours', runner_case, torch.nn.Conv2d(3, 4, 1), torch.randn(1, 3, 8, 8), torch.device('cpu'))
        assert bool(runner.optimizer.defaults['fused']) == chosen


@pytest.mark.parametrize('can', [True, False])
def test_keeping_freed_memory(bench, monkeypatch, tmp_path, capsys, can):
    """It is done before anything is measured, the record tells, and a record without it is nothing to go on with."""
    kept = []
    monkeypatch.setattr(memory, 'keep_freed_memory', lambda: kept.append(1) or can)
    options = ('--implementations', 'ours-deploy', '--peers', '--json', 'record.json')
    if not can:
        assert bench.main_with(*options, '--keep-freed-memory') == 2
        assert 'not glibc' in capsys.readouterr().err
        return
    assert bench.main_with(*options, '--keep-freed-memory') == 0
    assert (len(kept), read(tmp_path / 'record.json')['machine']['keeps_freed_memory']) == (1, True)
    assert bench.main_with(*options, '--resume') == 2
    assert 'keeps_freed_memory True, and this is False' in capsys.readouterr().err
    assert len(kept) == 1
