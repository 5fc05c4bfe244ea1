# Cascade Mask R-CNN, OverLoCK-B, 3x. Ours: see the config of T.
_base_ = './cascade-mask-rcnn_overlock-t_fpn_ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='b',
        drop_path_rate=0.6,
        init_cfg=dict(checkpoint='overlock_mm://overlock_b_in1k_224.pth'),
    ),
    neck=dict(in_channels=[80, 160, 528, 720]),
)
