# Mask R-CNN, OverLoCK-S, 1x, box AP 49.4 in the release.
_base_ = './mask-rcnn_overlock-t_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='s',
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint='overlock_mm://overlock_s_in1k_224.pth'),
    ),
    neck=dict(in_channels=[64, 128, 448, 640]),
)
