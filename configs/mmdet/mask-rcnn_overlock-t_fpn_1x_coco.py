# Mask R-CNN, OverLoCK-T, 1x, as released with the paper: 8 GPUs x 2 images, AdamW, 12 epochs, box AP 48.3.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['overlock_mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='overlock_mm.OverLoCK',
        arch='t',
        out_type='pyramid_with_overview',
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='overlock_mm://overlock_t_in1k_224.pth',
        ),
    ),
    neck=dict(in_channels=[64, 128, 384, 640]),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            'norm': dict(decay_mult=0.0),
            'absolute_pos_embed': dict(decay_mult=0.0),
            'relative_position_bias_table': dict(decay_mult=0.0),
        }
    ),
)

default_hooks = dict(
    random_state=dict(type='overlock_mm.RandomStateHook'),
    fuse=dict(type='overlock_mm.FuseForTrainingHook'),
)

# Batch norms need statistics of the whole batch: each GPU has only 2 images.
sync_bn = 'torch'
