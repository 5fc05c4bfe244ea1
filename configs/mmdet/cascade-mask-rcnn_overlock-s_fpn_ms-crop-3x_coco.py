# Cascade Mask R-CNN, OverLoCK-S, 3x. Ours: see the config of T.
_base_ = './cascade-mask-rcnn_overlock-t_fpn_ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='s',
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint='overlock_mm://overlock_s_in1k_224.pth'),
    ),
    neck=dict(in_channels=[64, 128, 448, 640]),
)
