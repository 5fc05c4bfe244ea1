# UPerNet, OverLoCK-T, as released with the paper: 8 GPUs x 2 crops of 512 x 512, AdamW, 160k iterations, mIoU 50.3.
# Optimiser, schedule, heads and training pipeline come from mmseg's Swin config.
_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['overlock_mm'], allow_failed_imports=False)

checkpoint_file = backbone_norm_cfg = optimizer = None  # the base sets these for Swin; it does not use its optimizer

model = dict(
    backbone=dict(
        _delete_=True,
        type='overlock_mm.OverLoCK',
        arch='t',
        out_type='pyramid',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='overlock_mm://overlock_t_in1k_224.pth'),
    ),
    decode_head=dict(in_channels=[64, 128, 384, 640]),
    auxiliary_head=dict(in_channels=384),
)

# Test images have sizes that 32, the largest stride, divides.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32, interpolation='bilinear'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(val_interval=8000)
default_hooks = dict(
    checkpoint=dict(interval=8000, save_best='mIoU', max_keep_ckpts=2),
    random_state=dict(type='overlock_mm.RandomStateHook'),
    fuse=dict(type='overlock_mm.FuseForTrainingHook'),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)

# Batch norms need statistics of the whole batch: each GPU has only 2 images.
sync_bn = 'torch'
