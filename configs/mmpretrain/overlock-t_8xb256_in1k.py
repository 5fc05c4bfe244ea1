# OverLoCK-T on ImageNet-1K, as released with the paper: 8 GPUs x 256 images, AdamW, 300 epochs, top-1 84.2.
#
# RandAugment m9 mstd0.5 inc1, random erasing and the crops come from mmpretrain's Swin data set. The options of the release
# also have a colour jitter of 0.4. It trains with timm, which ignores this option with RandAugment, so it is left out here.
# Norms, biases and other vectors have no weight decay, as in timm.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['overlock_mm'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    # Plain features: the last map, and the overview for the auxiliary head.
    backbone=dict(type='overlock_mm.OverLoCK', arch='t', out_indices=(4, 3), drop_path_rate=0.15),
    head=dict(
        type='overlock_mm.OverLoCKHead',
        num_classes=1000,
        in_channels=640,
        overview_channels=512,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original', loss_weight=1.0),
        aux_loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original', loss_weight=0.4),
        topk=(1, 5),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)

# Center crop of 224 x 224 from an image with a short side of 224 / 0.95.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=235, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=256)
val_dataloader = dict(batch_size=256, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# The learning rate is 1e-3 for each 1024 images in a batch.
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6 / 2e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5, end=300),
]
auto_scale_lr = dict(base_batch_size=2048)

# As in timm, running statistics are averaged too: averaged weights need averaged statistics.
custom_hooks = [dict(type='EMAHook', momentum=1e-4, update_buffers=True, priority='ABOVE_NORMAL')]
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=3, save_best='auto'),
    random_state=dict(type='overlock_mm.RandomStateHook'),
    fuse=dict(type='overlock_mm.FuseForTrainingHook'),
)

sync_bn = 'torch'
