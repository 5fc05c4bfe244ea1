"""The demo's data are consistent and reproducible, and an untrained network scores near zero on them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import ROOT, run_script

pytest.importorskip('skimage', reason='the demo draws on the photographs of scikit-image')
pytest.importorskip('mmdet', reason='the demo trains with mmdet')

from pycocotools.coco import COCO


def make(root, *arguments):
    return run_script(ROOT / 'tools' / 'demo' / 'make_dataset.py', root, *arguments, cwd=ROOT)


def test_data_are_reproducible_and_made_once(demo_data, tmp_path):
    make(tmp_path / 'again', '--train', '4', '--val', '4')
    files = sorted(path.relative_to(demo_data) for path in demo_data.rglob('*.*'))
    assert len(files) == 10
    for file in files:
        assert (demo_data / file).read_bytes() == (tmp_path / 'again' / file).read_bytes()
    assert 'images are there' in make(tmp_path / 'again', '--train', '4', '--val', '4')


def test_boxes_and_areas_fit_the_masks(demo_data):
    coco = COCO(str(demo_data / 'annotations' / 'instances_train2017.json'))
    assert coco.anns
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        rows, columns = np.nonzero(mask)
        left, top, width, height = annotation['bbox']
        assert (columns.min(), rows.min()) == (left, top)
        assert (columns.max() + 1 - left, rows.max() + 1 - top) == (width, height)
        assert annotation['area'] == mask.sum() > 50


def test_objects_do_not_overlap(demo_data):
    coco = COCO(str(demo_data / 'annotations' / 'instances_train2017.json'))
    for image in coco.imgs:
        masks = [coco.annToMask(annotation) for annotation in coco.imgToAnns[image]]
        assert np.sum(masks, axis=0).max() == 1


def test_untrained_network_scores_near_zero(tmp_path):
    """The demo without its training."""
    import torch
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry.utils import init_default_scope

    config = ROOT / 'configs' / 'mmdet' / 'mask-rcnn_overlock-xt_fpn_demo.py'
    make(tmp_path / 'demo')
    cfg = Config.fromfile(config)
    init_default_scope('mmdet')
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / 'untrained.pth')
    root = f'{tmp_path}/demo/'
    run_script(
        ROOT / 'tools' / 'test.py', config, 'untrained.pth', '--work-dir', 'work',
        '--cfg-options', f'test_dataloader.dataset.data_root={root}',
        f'test_evaluator.ann_file={root}annotations/instances_val2017.json', cwd=tmp_path,
    )  # fmt: skip
    (file,) = (tmp_path / 'work').glob('*/[0-9]*.json')
    metrics = json.loads(file.read_text())
    assert 0 <= metrics['coco/bbox_mAP_50'] < 0.05
    assert 0 <= metrics['coco/segm_mAP_50'] < 0.05
