"""tools/export_detector.py: detectors with tensors of fixed sizes, and their ONNX files, find what mmdet finds."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from conftest import ROOT, import_file

pytest.importorskip('mmdet', reason='its detectors')
sys.path.insert(0, str(ROOT / 'tools'))

import export_detector  # noqa: E402

BACKBONE = """
_base_ = 'mmdet::_base_/models/{base}.py'
default_scope = 'mmdet'
ARCH = dict(
    channels=(8, 16, 24, 32), depths=(1, 1, 1, 1), sub_depths=(1, 1), num_groups=(2, 2), kernel_sizes=(5, 5, 5, 5))
backbone = dict(_delete_=True, type='overlock_mm.OverLoCK', arch=ARCH, out_type='pyramid', out_indices=(0, 1))
neck = dict(in_channels=[8, 16], out_channels=8, num_outs=2, start_level=0)
anchors = dict(scales=[4], strides=[4, 8])
coder = dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.1, 0.1])
box_head = dict(in_channels=8, fc_out_channels=16, num_classes=3, bbox_coder=coder)
rois = dict(out_channels=8, featmap_strides=[4, 8], finest_scale=16)
rpn_head = dict(in_channels=8, feat_channels=8, anchor_generator=anchors, bbox_coder=coder)
test_cfg = dict(rpn=dict(nms_pre=100, max_per_img=60), rcnn=dict(score_thr=0.3, max_per_img=40))
"""
MODELS = {
    'retinanet_r50_fpn': """
model = dict(
    backbone=backbone, neck=neck,
    bbox_head=dict(
        num_classes=3, in_channels=8, stacked_convs=1, feat_channels=8,
        anchor_generator=dict(octave_base_scale=2, strides=[4, 8])),
    test_cfg=dict(nms_pre=100, max_per_img=40))
""",
    'mask-rcnn_r50_fpn': """
model = dict(
    backbone=backbone, neck=neck, rpn_head=rpn_head,
    roi_head=dict(
        bbox_roi_extractor=rois, mask_roi_extractor=rois, bbox_head=box_head,
        mask_head=dict(num_convs=1, in_channels=8, conv_out_channels=8, num_classes=3)),
    test_cfg=test_cfg)
""",
    'cascade-mask-rcnn_r50_fpn': """
box_head.update(type='Shared2FCBBoxHead', roi_feat_size=7, reg_class_agnostic=True)
model = dict(
    backbone=backbone, neck=neck, rpn_head=rpn_head,
    roi_head=dict(
        bbox_roi_extractor=rois, mask_roi_extractor=rois, bbox_head=[box_head, box_head, box_head],
        mask_head=dict(num_convs=1, in_channels=8, conv_out_channels=8, num_classes=3)),
    test_cfg=test_cfg)
""",
}  # fmt: skip
TWO_STAGES = 'mask-rcnn_r50_fpn'


def missing_exporter() -> str:
    """Why a test of files is skipped, or ''."""
    if not hasattr(torch.compiler, '_is_exporting_flag'):
        return 'torch < 2.7 does not say that it exports'
    packages = ('onnx', 'onnxscript', 'onnxruntime', 'openvino')
    return '' if all(map(importlib.util.find_spec, packages)) else 'the extra "deploy" is not installed'


needs_exporters = pytest.mark.skipif(bool(missing_exporter()), reason=missing_exporter() or 'unused')


@pytest.fixture(scope='module')
def export():
    return import_file(ROOT / 'tools' / 'export.py')


@pytest.fixture
def make(export, tmp_path):
    """Write a config and a checkpoint of a small detector with many detections, and build it."""

    def make(name: str, **options):
        config, checkpoint = tmp_path / 'config.py', tmp_path / 'checkpoint.pth'
        config.write_text(BACKBONE.format(base=name) + MODELS[name])
        model = export.build_model(export.load_config(str(config), options))
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not key.endswith('running_var'):
                tensor += (0.5 if 'mask_head' in key else 0.05) * torch.randn_like(tensor)  # masks with holes
        torch.save(dict(state_dict=model.state_dict()), checkpoint)
        return model, config, checkpoint

    return make


def assert_mmdet_finds_the_same(outputs, model, images, rounding=False) -> None:
    outputs = list(outputs)
    if len(outputs) == 4:
        assert outputs[3].sum() > 500 * len(images)
    agreement = export_detector.compare(outputs, model, images)
    assert agreement.of_mmdet == agreement.of_graph == agreement.both >= 20 * len(images)
    assert agreement.box < (1e-2 if rounding else 1e-5)
    assert agreement.score < (1e-4 if rounding else 1e-6)
    assert agreement.mask < (1e-2 if rounding else 1e-5)


@torch.no_grad()
@pytest.mark.parametrize('name', MODELS)
def test_the_detections_are_those_of_mmdet(make, name):
    model, *_ = make(name)
    outputs = export_detector.Detector(model)(images := torch.randn(2, 3, 96, 131))
    assert list(outputs) == ['boxes', 'scores', 'labels', 'masks'][: 3 if 'retina' in name else 4]
    assert outputs['boxes'].shape == (2, 40, 4)
    assert (outputs['scores'].diff() <= 0).all()
    assert_mmdet_finds_the_same(outputs.values(), model, images)


@torch.no_grad()
def test_without_detections(make):
    """Where mmdet gives empty results, all scores are 0."""
    model, *_ = make(TWO_STAGES, **{'model.test_cfg.rcnn.score_thr': 1.1})
    outputs = export_detector.Detector(model)(images := torch.randn(1, 3, 64, 64))
    assert not outputs['scores'].any()
    assert len(export_detector.predict(model, images)[0]) == 0
    assert export_detector.compare(list(outputs.values()), model, images)[:3] == (0, 0, 0)


@torch.no_grad()
@needs_exporters
@pytest.mark.parametrize('name', MODELS)
def test_files_in_onnxruntime_and_openvino(export, make, tmp_path, monkeypatch, name):
    """At another size and another batch than those of the export, with the operators of ONNX alone.

    The cascade has a fixed size, which takes half of the time.
    """
    import onnx
    import onnxruntime

    model, config, checkpoint = make(name)
    file = tmp_path / 'model.onnx'
    is_dynamic = name != 'cascade-mask-rcnn_r50_fpn'
    size = ['--size', '160x192', '--dynamic'] if is_dynamic else ['--size', '145x203']
    arguments = [config, checkpoint, '--to', 'onnx', *size, '--out', file]
    monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, arguments)])
    export.main()

    graph = onnx.load(file).graph
    operators = {'NonMaxSuppression'} if 'retina' in name else {'NonMaxSuppression', 'RoiAlign'}
    assert operators <= {node.op_type for node in graph.node}
    assert {node.domain for node in graph.node} == {''}
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    images = torch.randn(3 if is_dynamic else 1, 3, 145, 203)
    outputs = session.run(None, {'images': images.numpy()})
    assert_mmdet_finds_the_same(map(torch.from_numpy, outputs), model, images, rounding=True)

    run = export.onnx_to_openvino(file, tmp_path / 'model.xml', smallest=129 if is_dynamic else None)
    assert_mmdet_finds_the_same(run(images), model, images, rounding=True)


@needs_exporters
def test_empty_boxes_in_openvino(export, make, tmp_path):
    """A stage of a cascade can give boxes at the edge of the image, without an area. Their features are zeros."""
    extractor = make(TWO_STAGES)[0].roi_head.bbox_roi_extractor
    maps = [torch.rand(1, 8, side, side) + 1 for side in (16, 8)]
    boxes = [[0, 4, 30, 30, 64], [0, 5, 64, 9, 64], [0, 64, 10, 64, 60], [0, 64, 64, 64, 64]]
    rois = torch.tensor(boxes, dtype=torch.float32)

    class Pool(torch.nn.Module):
        def forward(self, rois):
            return export_detector.pool(extractor, maps, rois)

    run = export.to_openvino(torch.export.export(Pool(), (rois,)), tmp_path / 'model.xml')
    (found,) = run(rois)
    expected = extractor(maps, rois)
    assert expected.flatten(1).any(dim=1).tolist() == [True, False, False, False]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'model.test_cfg.rcnn.nms.type': 'soft_nms'}, "nms in test_cfg of roi_head must have type 'nms'"),
        ({'model.test_cfg.rpn.nms_pre': 0}, 'nms_pre in test_cfg of rpn_head must be above 0, got 0'),
        ({'model.roi_head.bbox_roi_extractor.roi_layer.pool_mode': 'max'}, "pool_mode of RoIAlign must be 'avg'"),
        ({'model.rpn_head.bbox_coder.type': 'LegacyDeltaXYWHBBoxCoder'}, 'bbox_coder must be DeltaXYWHBBoxCoder, got Leg'),
    ],
    ids=['nms', 'number', 'pooling', 'coder'],
)
def test_other_detectors_are_refused(export, make, change, message):
    model, *_ = make(TWO_STAGES, **change)
    with pytest.raises(ValueError, match=f'MaskRCNN cannot be exported as a whole .{message}'):
        export.part_to_export(model, backbone_only=False)
    assert export.part_to_export(model, backbone_only=True) is model.backbone


def test_heads_of_other_classes_are_refused(make):
    model, *_ = make(TWO_STAGES)
    model.roi_head.__class__ = type('DoubleHeadRoIHead', (type(model.roi_head),), {})
    with pytest.raises(ValueError, match='roi_head must be StandardRoIHead or CascadeRoIHead, got DoubleHeadRoIHead'):
        export_detector.Detector(model)
    del model.rpn_head
    with pytest.raises(ValueError, match='rpn_head must be one of'):
        export_detector.Detector(model)
    with pytest.raises(ValueError, match='the model must be SingleStageDetector or TwoStageDetector, got Linear'):
        export_detector.Detector(torch.nn.Linear(1, 1))
