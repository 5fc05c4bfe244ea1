"""tools/export.py: whole models run outside PyTorch, at other sizes and batches, with the results of their framework."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, import_file, relative_error

from overlock_mm.models import OverLoCK
from overlock_mm.ops import _library

sys.path.insert(0, str(ROOT / 'tools'))  # for the modules beside the tool

needs_exporters = pytest.mark.skipif(
    not hasattr(torch.compiler, '_is_exporting_flag'), reason='torch < 2.7 does not say that it exports'
)
BACKBONE = """
ARCH = dict(
    channels=(8, 16, 24, 32), depths=(1, 1, 1, 1), sub_depths=(1, 1), num_groups=(2, 2), kernel_sizes=(5, 5, 5, 5))
"""
CONFIGS = dict(
    segmentor="""
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder', backbone=dict(type='overlock_mm.OverLoCK', arch=ARCH, out_type='pyramid'),
    decode_head=dict(
        type='UPerHead', in_channels=[8, 16, 32, 40], in_index=[0, 1, 2, 3], channels=8, num_classes=5,
        pool_scales=(1, 3), norm_cfg=dict(type='SyncBN')),
    test_cfg=dict(mode='whole'))
data_preprocessor = dict(
    type='SegDataPreProcessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
""",
    classifier="""
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier', backbone=dict(type='overlock_mm.OverLoCK', arch=ARCH, out_indices=(2,)),
    head=dict(type='overlock_mm.OverLoCKHead', num_classes=7, in_channels=32))
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
""",
    detector="""
default_scope = 'mmdet'
model = dict(
    type='RetinaNet', backbone=dict(type='overlock_mm.OverLoCK', arch=ARCH, out_type='pyramid_with_overview'),
    neck=dict(type='FPN', in_channels=[8, 16, 32, 40], out_channels=8, num_outs=5),
    bbox_head=dict(
        type='RetinaHead', num_classes=3, in_channels=8, stacked_convs=1, feat_channels=8,
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3, ratios=[1.0], strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder')))
""",
)  # fmt: skip
SCOPES = dict(segmentor='mmseg', classifier='mmpretrain', detector='mmdet')
SMALLEST = 129  # of the free sizes: a map of 5 x 5 at stride 32


@pytest.fixture(scope='module')
def export():
    return import_file(ROOT / 'tools' / 'export.py')


@pytest.fixture(scope='module')
def make(export, tmp_path_factory):
    """Make a model, of which every weight counts, with its config and its checkpoint."""

    def make(kind: str) -> SimpleNamespace:
        pytest.importorskip(SCOPES[kind], reason='its model')
        folder = tmp_path_factory.mktemp(kind)
        config, checkpoint = folder / 'config.py', folder / 'checkpoint.pth'
        config.write_text(BACKBONE + CONFIGS[kind])
        torch.manual_seed(0)
        model = export.build_model(export.load_config(str(config)))
        for name, tensor in model.state_dict().items():
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor += 0.1 * torch.randn_like(tensor)
        torch.save(dict(state_dict=model.state_dict()), checkpoint)
        return SimpleNamespace(kind=kind, folder=folder, config=config, checkpoint=checkpoint, model=model.eval())

    return make


def run_tool(export, *arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['export.py', *map(str, arguments)])
        export.main()


@pytest.fixture(scope='module', params=['segmentor', 'classifier'])
def exported(export, make, request):
    """A whole model, and its export to ONNX with free sizes."""
    for module in export.TARGETS['onnx'].modules:
        pytest.importorskip(module, reason='the extra "deploy" is not installed')
    made = make(request.param)
    made.onnx = made.folder / 'model.onnx'
    run_tool(export, made.config, made.checkpoint, '--to', 'onnx', '--size', '160x192', '--dynamic', '--out', made.onnx)
    return made


#: Neither the batch nor the size of the export, nor multiples of 32.
SHAPES = [(1, 3, SMALLEST, 203), (2, 3, 190, 145)]


def assert_labels_agree(labels: torch.Tensor, expected: torch.Tensor) -> None:
    """mmseg's own measure, with its labels as the truth. Rounding can change the label of a pixel between two classes."""
    from mmseg.evaluation import IoUMetric

    assert len(expected.unique()) > 1
    areas = IoUMetric.intersect_and_union(labels, expected, num_classes=5, ignore_index=255)
    ious = IoUMetric.total_area_to_metrics(*areas)['IoU']
    assert np.nanmean(ious) > 0.999  # nan: a class that neither has


@torch.no_grad()
def assert_the_framework_gives(made: SimpleNamespace, images: torch.Tensor, logits: np.ndarray) -> None:
    """Compare logits with the predictions of mmseg or mmpretrain."""
    logits = torch.from_numpy(logits)
    samples = made.model.predict(images)
    if made.kind == 'segmentor':
        expected = torch.stack([sample.seg_logits.data for sample in samples])
        assert expected.shape == (len(images), 5, *images.shape[2:])
        assert_labels_agree(logits.argmax(dim=1), torch.cat([sample.pred_sem_seg.data for sample in samples]))
    else:
        expected = torch.stack([sample.pred_score for sample in samples])
        logits = logits.softmax(dim=1)
    assert relative_error(logits, expected) < 1e-5


@needs_exporters
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_whole_models_in_onnxruntime(exported, shape):
    import onnxruntime

    session = onnxruntime.InferenceSession(exported.onnx, providers=['CPUExecutionProvider'])
    images = torch.randn(shape)
    (logits,) = session.run(['output0'], {'images': images.numpy()})
    assert_the_framework_gives(exported, images, logits)


@needs_exporters
def test_onnxruntime_refuses_smaller_images(exported):
    """Their maps would be enlarged, which is not in the graph. Its windows leave the map, and an index is too large."""
    import onnxruntime

    height = SMALLEST - 1 if exported.kind == 'segmentor' else 64  # the classifier has no stage 4, only stride 16
    session = onnxruntime.InferenceSession(exported.onnx, providers=['CPUExecutionProvider'])
    with pytest.raises(Exception, match='indices element out of data bounds'):
        session.run(None, {'images': torch.randn(1, 3, height, 203).numpy()})


@needs_exporters
def test_whole_models_in_openvino(export, exported):
    openvino = pytest.importorskip('openvino', reason='the extra "deploy" is not installed')
    file = exported.folder / 'model.xml'
    export.onnx_to_openvino(exported.onnx, file, SMALLEST)
    model = openvino.Core().compile_model(file, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for shape in SHAPES:
        images = torch.randn(shape)
        assert_the_framework_gives(exported, images, model(images.numpy())['output0'])
    with pytest.raises(RuntimeError, match='incompatible'):
        model(torch.randn(1, 3, SMALLEST - 1, 203).numpy())


@needs_exporters
@torch.no_grad()
def test_the_backbone_of_a_detector_in_openvino(export, make):
    """Of a fixed size, on which maps are smaller than kernels."""
    openvino = pytest.importorskip('openvino', reason='the extra "deploy" is not installed')
    made = make('detector')
    arguments = made.config, made.checkpoint, '--to', 'openvino', '--size', '100x70'
    file = made.folder / 'model.xml'
    with pytest.raises(
        SystemExit, match='RetinaNet cannot be exported as a whole .*nms in test_cfg.*--backbone-only exports its backbone'
    ):
        run_tool(export, *arguments, '--out', file)
    assert not file.exists()

    run_tool(export, *arguments, '--out', file, '--backbone-only')
    images = torch.randn(1, 3, 100, 70)
    model = openvino.Core().compile_model(file, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    outputs = list(model(images.numpy()).values())
    assert len(outputs) == 4
    for out, expected in zip(outputs, made.model.backbone(images)):
        assert relative_error(torch.from_numpy(out), expected) < 1e-5


@needs_exporters
@torch.no_grad()
def test_the_compiled_operators_run_in_cpp(export, make, monkeypatch):
    """tools/run_aoti.cpp runs a package that keeps the operators, without Python, at another size than the exported one."""
    if _library.missing:
        pytest.skip(_library.missing)
    if shutil.which('g++') is None:
        pytest.skip('needs g++')
    made = make('detector')
    package, image, program = made.folder / 'model.pt2', made.folder / 'image.bin', made.folder / 'run_aoti'
    quickly = {'aot_inductor.compile_wrapper_opt_level': 'O0', 'aot_inductor.precompile_headers': False}
    graph = []

    def write(exported, out):
        graph.extend(str(node.target) for node in exported.graph.nodes)
        with torch._inductor.config.patch(quickly):
            return target.write(exported, out)

    target = export.TARGETS['aoti']
    monkeypatch.setitem(export.TARGETS, 'aoti', target._replace(write=write))
    arguments = (
        made.config,
        made.checkpoint,
        '--to',
        'aoti',
        '--size',
        '160x192',
        '--dynamic',
        '--backbone-only',
        '--keep-operators',
    )
    run_tool(export, *arguments, '--out', package)
    assert graph.count('overlock_mm.contmix.default') == 2  # of the blocks that mix context
    assert 'overlock_mm.depthwise_conv2d.default' in graph

    images = torch.randn(1, 3, 145, 203)
    images.numpy().tofile(image)
    libraries = Path(torch.__file__).parent
    subprocess.run(
        ['g++', '-std=c++17', '-O0', ROOT / 'tools' / 'run_aoti.cpp', '-o', program]
        + [f'-I{libraries}/include', f'-L{libraries}/lib', '-ltorch', '-ltorch_cpu', '-lc10', '-ldl'],
        check=True,
    )
    (operators,) = Path(_library.__file__).parent.glob('_C*.so')
    environment = {**os.environ, 'LD_LIBRARY_PATH': f'{libraries}/lib'}
    command = [program, operators, package, '145', '203', image]
    subprocess.run(command, check=True, cwd=made.folder, env=environment, capture_output=True)
    for i, expected in enumerate(made.model.backbone(images)):
        out = torch.from_numpy(np.fromfile(made.folder / f'output{i}.bin', dtype=np.float32))
        assert relative_error(out, expected.flatten()) < 1e-5


def test_other_heads_are_refused(export, make):
    model = make('segmentor').model
    model.decode_head = torch.nn.Identity()
    with pytest.raises(ValueError, match='EncoderDecoder cannot be exported as a whole. --backbone-only'):
        export.part_to_export(model, backbone_only=False)
    assert export.part_to_export(model, backbone_only=True) is model.backbone


@needs_exporters
def test_a_file_with_other_results_is_an_error(export, make, monkeypatch, capsys):
    made = make('classifier')
    target = export.TARGETS['torch-export']

    def write(program, out):
        run = target.write(program, out)
        return lambda images: [1.001 * each for each in run(images)]

    monkeypatch.setitem(export.TARGETS, 'torch-export', target._replace(write=write))
    file = made.folder / 'model.pt2'
    with pytest.raises(SystemExit, match='the error must be below'):
        run_tool(export, made.config, made.checkpoint, '--to', 'torch-export', '--size', '64x64', '--out', file)
    error = re.search(r'1x3x64x64: relative error (\S+), \d', capsys.readouterr().out).group(1)
    assert float(error) == pytest.approx(1e-3, abs=1e-5)


@needs_exporters
@pytest.mark.parametrize(
    'change, message',
    [
        (('--size', '128x256', '--dynamic'), f'--size must be at least {SMALLEST}x{SMALLEST} with --dynamic, got 128x256'),
        (('--size', '128'), '--size must be HxW, such as 512x1024, got 128'),
        (('--size', '64x64', '--to', 'openvino'), '--out must end in .xml for --to openvino'),
        (
            ('--size', '64x64', '--to', 'onnx', '--out', 'model.onnx', '--keep-operators'),
            'is for torch-export and aoti, got',
        ),
        (('--size', '64x64', '--picture', __file__), '--picture must be an image'),
        (('--size', '64x64', '--cfg-options', 'model.head.num_classes=9'), 'size mismatch for head'),
    ],
    ids=['small', 'size', 'suffix', 'operators', 'picture', 'checkpoint'],
)
def test_bad_arguments(export, make, change, message, capsys):
    made = make('classifier')
    file = made.folder / 'model.pt2'
    with pytest.raises(SystemExit) as error:
        run_tool(export, made.config, made.checkpoint, '--to', 'torch-export', '--out', file, *change)
    assert message in f'{error.value}{capsys.readouterr().err}'
    assert not file.exists()


def test_missing_packages_are_named(export, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit):
        run_tool(export, 'config', 'checkpoint', '--to', 'onnx', '--size', '64x64', '--out', 'model.onnx')
    assert 'overlock_mm[deploy]: pip install onnx onnxscript onnxruntime' in capsys.readouterr().err


def test_the_smallest_size(export):
    assert export.smallest_side(OverLoCK('xt')) == 193
    depths = dict(depths=(1, 1, 1, 1), sub_depths=(1, 1))
    arch = dict(channels=(8, 8, 8, 8), num_groups=(2, 2), kernel_sizes=(5, 5, 13, 5), **depths)
    assert export.smallest_side(OverLoCK(arch)) == 16 * 12 + 1
