# Mask R-CNN, OverLoCK-S, 3x, box AP 51.0 in the release.
_base_ = './mask-rcnn_overlock-t_fpn_ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='s',
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint='overlock_mm://overlock_s_in1k_224.pth'),
    ),
    neck=dict(in_channels=[64, 128, 448, 640]),
)
