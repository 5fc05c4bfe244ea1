# Cascade Mask R-CNN, OverLoCK-XT, 3x. Ours: see the config of T.
_base_ = './cascade-mask-rcnn_overlock-t_fpn_ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='xt',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='overlock_mm://overlock_xt_in1k_224.pth'),
    ),
    neck=dict(in_channels=[56, 112, 340, 420]),
)
