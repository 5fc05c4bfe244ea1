# Cascade Mask R-CNN, OverLoCK-T, 3x, in mixed precision (float16 on a GPU, with loss scaling).
_base_ = './cascade-mask-rcnn_overlock-t_fpn_ms-crop-3x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
