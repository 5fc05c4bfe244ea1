"""Each framework's inferencer with a shipped config, a local checkpoint and a picture."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from conftest import run_script
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.registry.utils import init_default_scope

import overlock_mm


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / 'picture.png'
    cv2.imwrite(str(file), np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    return str(file)


def save_checkpoint(config: str, file, **meta) -> str:
    """Save the untrained weights of a config's model in the form of a training checkpoint."""
    cfg = Config.fromfile(overlock_mm.get_config_path(config))
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    torch.save(dict(meta=dict(dataset_meta=meta), state_dict=MODELS.build(cfg.model).state_dict()), file)
    return str(file)


def test_detection_by_name(picture, tmp_path):
    apis = pytest.importorskip('mmdet.apis', reason='its inferencer')
    name = 'mask-rcnn_overlock-xt_fpn_1x_coco'
    weights = save_checkpoint(f'mmdet/{name}', tmp_path / 'a.pth', classes=tuple(map(str, range(80))))
    overlock_mm.register_models()
    inferencer = apis.DetInferencer(name, weights, device='cpu', show_progress=False)
    assert inferencer.model.dataset_meta['classes'][79] == '79'
    found = inferencer(picture, out_dir=str(tmp_path / 'out'), no_save_pred=False, pred_score_thr=0.0)
    (prediction,) = found['predictions']
    assert len(prediction['bboxes']) == len(prediction['scores']) == len(prediction['masks'])
    assert (tmp_path / 'out' / 'vis' / 'picture.png').is_file()
    assert (tmp_path / 'out' / 'preds' / 'picture.json').is_file()


def test_segmentation_by_path(picture, tmp_path):
    apis = pytest.importorskip('mmseg.apis', reason='its inferencer')
    name = 'overlock-xt_upernet_8xb2-160k_ade20k-512x512'
    meta = dict(classes=tuple(map(str, range(150))), palette=[[i, i, i] for i in range(150)])
    weights = save_checkpoint(f'mmseg/{name}', tmp_path / 'a.pth', **meta)
    inferencer = apis.MMSegInferencer(overlock_mm.get_config_path(f'mmseg/{name}'), weights, device='cpu')
    found = inferencer(picture, out_dir=str(tmp_path / 'out'))
    assert found['predictions'].shape == (48, 64)
    assert 0 <= found['predictions'].min() <= found['predictions'].max() < 150
    assert list((tmp_path / 'out' / 'vis').glob('*.png'))


@pytest.mark.parametrize('by_name', [False, True], ids=['by path', 'by name'])
def test_classification(picture, tmp_path, by_name):
    """The folded model with an unfolded checkpoint."""
    mmpretrain = pytest.importorskip('mmpretrain', reason='its inferencer')
    weights = save_checkpoint('mmpretrain/overlock-xt_8xb256_in1k', tmp_path / 'a.pth')
    overlock_mm.register_models()
    name = 'overlock-xt_deploy_in1k'
    model = name if by_name else overlock_mm.get_config_path(f'mmpretrain/{name}')
    inferencer = mmpretrain.ImageClassificationInferencer(model, pretrained=weights)
    (found,) = inferencer(picture)
    assert found['pred_scores'].shape == (1000,)
    assert found['pred_class'] == inferencer.classes[found['pred_label']]
    assert inferencer.model.backbone.deploy
    unfolded = mmpretrain.ImageClassificationInferencer(
        overlock_mm.get_config_path('mmpretrain/overlock-xt_8xb256_in1k'), pretrained=weights
    )
    np.testing.assert_allclose(unfolded(picture)[0]['pred_scores'], found['pred_scores'], rtol=1e-4)


def test_detection_by_function(picture, tmp_path):
    """init_detector and inference_detector with paths of the config and the checkpoint."""
    apis = pytest.importorskip('mmdet.apis', reason='its functions')
    config = overlock_mm.get_config_path('mmdet/mask-rcnn_overlock-xt_fpn_demo')
    weights = save_checkpoint('mmdet/mask-rcnn_overlock-xt_fpn_demo', tmp_path / 'a.pth', classes=('a', 'b', 'c', 'd'))
    model = apis.init_detector(config, weights, device='cpu')
    assert model.dataset_meta['classes'] == ('a', 'b', 'c', 'd')
    result = apis.inference_detector(model, picture)
    assert result.pred_instances.bboxes.shape[1] == 4
    assert result.pred_instances.masks.shape[1:] == (48, 64)


@pytest.mark.parametrize('name', ['mmdet/mask-rcnn_overlock-xt_fpn_demo', 'mmdet/mask-rcnn_r50-contmix_fpn_1x_coco'])
def test_dumped_config_and_checkpoint_of_a_run(tmp_path, name):
    """In a process that does not import this package by itself. A run saves its message hub too."""
    pytest.importorskip('mmdet.apis', reason='its inferencer')
    cfg = Config.fromfile(overlock_mm.get_config_path(name))
    cfg.model.backbone.init_cfg = None
    cfg.dump(tmp_path / 'dumped.py')
    init_default_scope('mmdet')
    history = HistoryBuffer()
    history.update(1.0)
    meta = dict(dataset_meta=dict(classes=list(np.unique(['ball', 'sign']))))
    weights = MODELS.build(cfg.model).state_dict()
    torch.save(
        dict(meta=meta, state_dict=weights, message_hub=dict(log_scalars=dict(loss=history))), tmp_path / 'epoch_1.pth'
    )
    (tmp_path / 'infer.py').write_text(
        'import sys\n'
        'from mmdet.apis import DetInferencer\n'
        'assert "overlock_mm" not in sys.modules\n'
        'inferencer = DetInferencer("dumped.py", "epoch_1.pth", device="cpu")\n'
        'print(inferencer.model.dataset_meta["classes"])\n'
    )
    assert "['ball', 'sign']" in run_script('infer.py', cwd=tmp_path)
