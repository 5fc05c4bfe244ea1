# Mask R-CNN, OverLoCK-T, 3x, as released with the paper: 8 GPUs x 2 images, AdamW, 36 epochs, box AP 49.6. Pipeline (flip,
# multi-scale, crop), optimiser and epochs come from mmdet's Swin config. Warm-up and batch norms are as in 1x.
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'
custom_imports = dict(imports=['overlock_mm'], allow_failed_imports=False)

pretrained = None  # the base sets Swin's weights

model = dict(
    backbone=dict(
        _delete_=True,
        type='overlock_mm.OverLoCK',
        arch='t',
        out_type='pyramid_with_overview',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='overlock_mm://overlock_t_in1k_224.pth'),
    ),
    neck=dict(in_channels=[64, 128, 384, 640]),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]

default_hooks = dict(
    random_state=dict(type='overlock_mm.RandomStateHook'),
    fuse=dict(type='overlock_mm.FuseForTrainingHook'),
)

# Batch norms need statistics of the whole batch: each GPU has only 2 images.
sync_bn = 'torch'
