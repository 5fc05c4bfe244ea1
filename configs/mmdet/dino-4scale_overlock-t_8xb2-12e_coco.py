# DINO with 4 scales, OverLoCK-T, 12 epochs: 8 GPUs x 2 images. Ours: mmdet's DINO with this backbone. As in mmdet, the
# backbone has a tenth of the learning rate.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
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
    neck=dict(in_channels=[128, 384, 640]),
)

default_hooks = dict(
    random_state=dict(type='overlock_mm.RandomStateHook'),
    fuse=dict(type='overlock_mm.FuseForTrainingHook'),
)

sync_bn = 'torch'
