# Cascade Mask R-CNN, OverLoCK-T, 3x: 8 GPUs x 2 images. Ours: the paper reports this detector without a config. The box
# heads (4 convolutions, 1 linear layer, SyncBN, GIoU) and the pipeline come from mmdet's ConvNeXt config. Optimiser and
# schedule come from our Mask R-CNN 3x.
_base_ = 'mmdet::convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py'
custom_imports = dict(imports=['overlock_mm'], allow_failed_imports=False)

checkpoint_file = None  # the base sets it for its ConvNeXt

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

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            'norm': dict(decay_mult=0.0),
            'absolute_pos_embed': dict(decay_mult=0.0),
            'relative_position_bias_table': dict(decay_mult=0.0),
        }
    ),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]

default_hooks = dict(
    random_state=dict(type='overlock_mm.RandomStateHook'),
    fuse=dict(type='overlock_mm.FuseForTrainingHook'),
)

sync_bn = 'torch'
