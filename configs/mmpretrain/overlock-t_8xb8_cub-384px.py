# Fine-tuning: OverLoCK-T from ImageNet-1K to the 200 birds of CUB-200-2011, at 384 x 384, 8 GPUs x 8 images, 100 epochs. An
# example, not a released recipe. Data and schedule are those of mmpretrain for this data set.
_base_ = [
    'mmpretrain::_base_/datasets/cub_bs8_384.py',
    'mmpretrain::_base_/schedules/cub_bs64.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['overlock_mm'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='overlock_mm.OverLoCK',
        arch='t',
        drop_path_rate=0.15,
        init_cfg=dict(type='Pretrained', checkpoint='overlock_mm://overlock_t_in1k_224.pth'),
    ),
    # Only training from scratch needs the auxiliary head.
    head=dict(type='overlock_mm.OverLoCKHead', num_classes=200, in_channels=640),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)

default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=3, save_best='auto'),
    random_state=dict(type='overlock_mm.RandomStateHook'),
    fuse=dict(type='overlock_mm.FuseForTrainingHook'),
)
