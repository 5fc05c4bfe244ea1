# RetinaNet, OverLoCK-T, 1x: 8 GPUs x 2 images. Ours: mmdet's RetinaNet with the optimiser of our Mask R-CNN, at half its
# learning rate, as a dense head wants it.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['overlock_mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='overlock_mm.OverLoCK',
        arch='t',
        out_type='pyramid_with_overview',
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='overlock_mm://overlock_t_in1k_224.pth'),
    ),
    neck=dict(in_channels=[128, 384, 640], start_level=0),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}),
)

default_hooks = dict(
    random_state=dict(type='overlock_mm.RandomStateHook'),
    fuse=dict(type='overlock_mm.FuseForTrainingHook'),
)

sync_bn = 'torch'
