# Mask R-CNN, OverLoCK-T, 1x, in mixed precision (float16 on a GPU, with loss scaling). Ours: the release trains in float32.
_base_ = './mask-rcnn_overlock-t_fpn_1x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
