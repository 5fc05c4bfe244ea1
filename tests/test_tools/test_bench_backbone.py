"""The benchmark of the backbone: implementations that are the network, a record that holds what it should."""

from __future__ import annotations

import contextlib
import json
from unittest import mock

import pytest
import torch
from benchmarks import FOLDER, bench_backbone, harness
from conftest import run_script
from peers import PEERS

from overlock_mm.models.overlock import ARCHITECTURES

#: With one block of a kind and few slots, which the published form computes one by one.
SMALLEST = dict(
    channels=(8, 12, 24, 40), depths=(1, 1, 1, 1), sub_depths=(1, 1), num_groups=(2, 4), kernel_sizes=(9, 7, 5, 5)
)
FAST = ('--device', 'cpu', '--arch', 'smallest', '--size', '128x128', '--rounds', '2')
CPU = torch.device('cpu')


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(*arguments)`` on the small network, in a folder of its own: the exit status and the record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ARCHITECTURES, 'smallest', SMALLEST)

    def main(*arguments):
        status = bench_backbone.main([*FAST, *arguments, '--json', 'out.json'])
        return status, json.loads((tmp_path / 'out.json').read_text())

    return main


def settings_for(training):
    return bench_backbone.Settings('smallest', (128, 128), batch=1, dtype='float32', training=training, device=CPU)


def weights_for(settings):
    model = bench_backbone.OverLoCK(settings.arch, out_type='pyramid_with_overview')
    bench_backbone.randomise(model)
    return model


def test_a_run_records_what_it_measured(run, capsys):
    names = [name for name in bench_backbone.IMPLEMENTATIONS if name != 'compiled']
    status, record = run('--batch', '1', '2', '--mode', 'eval', 'train', '--peers', '--implementations', *names)
    assert status == 0
    assert record['not_run'] == 0
    cases = [(case['section'], case['name']) for case in record['cases']]
    assert cases == [
        (f'{mode}, float32', f'smallest, 128x128, batch {batch}') for mode in ('eval', 'train') for batch in (1, 2)
    ]
    for case in record['cases']:
        training, results = case['section'].startswith('train'), case['implementations']
        mode = 'train' if training else 'eval'
        assert list(results) == [name for name in names if mode in bench_backbone.IMPLEMENTATIONS[name]]
        assert case['yardstick'] == ('ours' if training else 'optimized')
        assert results.pop('cuda-graph') == dict(skipped='for a GPU only', failed=False)
        for name, result in results.items():
            assert 0 < result['seconds']['q1'] <= result['seconds']['median'] <= result['seconds']['q3']
            assert result['rounds'] == 2
            assert result['peak_bytes'] > 0
            assert ('kept_bytes' in result) == training
            assert ('ratio' in result) == (name != case['yardstick'])
            assert result['errors']['output'] < 1e-5
            assert ('gradient' in result['errors']) == training
            assert result['errors'].get('gradient', 0) < 1e-4
        if training:
            kept = {name: result['kept_bytes'] for name, result in results.items()}
            assert kept['ours-with-cp'] < kept['ours'] < kept['published']
    assert '### train, float32' in capsys.readouterr().out


def test_the_script_runs_by_itself(tmp_path):
    output = run_script(
        FOLDER / 'bench_backbone.py', '--device', 'cpu', '--arch', 'xt', '--size', '64x64', '--rounds', '1', '--peers',
        '--implementations', 'ours', '--profile', cwd=tmp_path,
    )  # fmt: skip
    assert '| xt, 64x64, batch 1 | ours ' in output
    assert 'overlock_mm::' in output  # operators by name
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_a_wrong_result_is_an_error(run, monkeypatch, capsys, mode):
    class Wrong(bench_backbone.Published):
        def __init__(self, model):
            super().__init__(model)
            model.high_level_proj.bias.data += 1

    monkeypatch.setattr(bench_backbone, 'Published', Wrong)
    # The published form is the yardstick even where it is not measured.
    status, _ = run('--peers', '--implementations', 'ours', '--mode', mode)
    assert status == 1
    error = capsys.readouterr().err
    where = f'smallest, 128x128, batch 1, {mode}, float32, ours'
    assert f'WRONG RESULT: {where}: relative error of the output' in error
    assert (f'WRONG RESULT: {where}: relative error of the gradient' in error) == (mode == 'train')


def test_what_the_memory_would_not_hold_is_left_out(run, monkeypatch, capsys):
    monkeypatch.setattr(harness, 'free_memory', lambda: 1 << 20)
    status, record = run('--peers', '--implementations', 'published', 'ours', '--mode', 'train')
    assert status == 0
    results = record['cases'][0]['implementations']
    assert results['published']['skipped'].startswith('takes about ')
    assert 'errors' not in results['ours']
    assert 'not checked: 1 cases, without expected results: takes about' in capsys.readouterr().out


def test_needed_memory_is_about_what_is_kept(run, monkeypatch):
    monkeypatch.setattr(harness, 'free_memory', lambda: 1 << 40)
    _, record = run('--peers', '--implementations', 'published', '--mode', 'train')
    kept = record['cases'][0]['implementations']['published']['kept_bytes']
    for free, fits in ((2.5 * kept, True), (kept, False)):
        monkeypatch.setattr(harness, 'free_memory', lambda free=free: free)
        if fits:
            bench_backbone.build('published', weights_for(settings_for(True)), settings_for(True))
        else:
            with pytest.raises(harness.Skipped):
                bench_backbone.build('published', weights_for(settings_for(True)), settings_for(True))


@pytest.mark.parametrize('name', ['compiled', 'channels-last', 'optimized', 'ours-with-cp'])
def test_implementations_are_the_network(monkeypatch, name):
    """They have the given weights and the mode that was asked for, and a step leaves the weights as they are."""
    monkeypatch.setitem(ARCHITECTURES, 'smallest', SMALLEST)
    training = name == 'ours-with-cp'
    settings = settings_for(training)
    weights = weights_for(settings)
    model = bench_backbone.build_model(name, weights, settings)
    assert model.training == training
    if training:
        assert bool(model.checkpointed_stages)
        assert all(torch.equal(tensor, weights.state_dict()[key]) for key, tensor in model.state_dict().items())
    step = bench_backbone.Step(model, settings.image(), settings, model)
    results = step.results()
    expected = bench_backbone.build('published', weights, settings).results()
    assert harness.worst_error(results['output'], expected['output']) < 1e-5
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    for each in step.steps:
        each()
    assert not step.outputs
    assert all(torch.equal(tensor, before[key]) and tensor.grad is None for key, tensor in model.named_parameters())


class GraphOfNothing:
    """A CUDA graph whose replay leaves what the recording wrote."""

    def replay(self):
        pass


@pytest.mark.parametrize('training', [False, True])
def test_a_recorded_step_has_the_results_of_the_network(monkeypatch, training):
    """As if the CPU recorded: a step of the graph has outputs, gradients and an update, and the next one has them again."""
    monkeypatch.setitem(ARCHITECTURES, 'smallest', SMALLEST)
    monkeypatch.setattr(torch.cuda, 'Stream', mock.MagicMock)
    monkeypatch.setattr(torch.cuda, 'current_stream', mock.MagicMock)
    monkeypatch.setattr(torch.cuda, 'stream', contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, 'graph', contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', GraphOfNothing)
    settings = settings_for(training)
    weights = weights_for(settings)
    model = bench_backbone.build_model('ours', weights, settings)
    step = bench_backbone.RecordedStep(model, settings.image(), settings, model)
    expected = bench_backbone.build('published', weights, settings).results()
    for _ in range(2):
        results = step.results()
        assert results.keys() == expected.keys()
        for kind in expected:
            assert harness.worst_error(results[kind], expected[kind]) < 1e-4
    for each in step.steps:
        each()
    assert not step.outputs


def test_tf32_is_stated_and_allows_its_errors():
    options = bench_backbone.make_parser().parse_args(['--dtype', 'float32', 'bfloat16', '--tf32'])
    options.device = torch.device('cuda')
    in_tf32, in_half = bench_backbone.cases_of(options)[::3]
    assert (in_tf32.section, in_half.section) == ('eval, float32 in TF32', 'eval, bfloat16')
    assert in_tf32.tolerances == bench_backbone.TOLERANCES['float16']


@pytest.mark.parametrize('name', PEERS)
def test_peers_have_four_maps(name):
    width = 128 if name == 'convnext-base' else 96
    model = bench_backbone.build_model(name, None, settings_for(False))
    assert not model.training
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, 64, 96))
    assert [tuple(out.shape) for out in outputs] == [
        (1, width, 16, 24), (1, 2 * width, 8, 12), (1, 4 * width, 4, 6), (1, 8 * width, 2, 3)
    ]  # fmt: skip


def test_kept_bytes_are_what_the_backward_reads(monkeypatch):
    """The allocator counts as autograd's own account does, without weights and image, and with unread outputs."""
    monkeypatch.setitem(ARCHITECTURES, 'smallest', SMALLEST)
    settings = settings_for(True)
    model = bench_backbone.build_model('published', weights_for(settings), settings)
    step = bench_backbone.Step(model, settings.image(), settings, model)
    for each in step.steps:
        each()
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.forward()
    not_counted = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers(), step.image)}
    kept = sum(each.untyped_storage().nbytes() for key, each in storages.items() if key not in not_counted)
    kept += sum(out.nbytes for out in step.outputs if out.untyped_storage()._cdata not in storages)
    step.backward()
    assert harness.allocated_by(step.steps, CPU)[1][0] == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--arch', 'huge'], "invalid choice: 'huge'"),
        (['--implementations', 'theirs'], "invalid choice: 'theirs'"),
        (['--peers', 'resnet'], "invalid choice: 'resnet'"),
        (['--dtype', 'float64'], "invalid choice: 'float64'"),
        (
            ['--device', 'cpu', '--mode', 'train', '--peers', '--implementations', 'optimized'],
            'none is for --mode train, got optimized',
        ),
    ],
)
def test_bad_options(capsys, arguments, message):
    with pytest.raises(SystemExit, match='2'):
        bench_backbone.main(arguments)
    assert message in capsys.readouterr().err


def test_the_default_is_inference_at_three_sizes():
    options = bench_backbone.make_parser().parse_args([])
    options.device = CPU
    cases = bench_backbone.cases_of(options)
    assert [case.name for case in cases] == [f't, {size}, batch 1' for size in ('224x224', '512x512', '800x1344')]
    assert {case.section for case in cases} == {'eval, float32'}
    assert cases[0].implementations == [
        'published', 'published-folded', 'ours', 'optimized', *bench_backbone.PEERS
    ]  # fmt: skip
