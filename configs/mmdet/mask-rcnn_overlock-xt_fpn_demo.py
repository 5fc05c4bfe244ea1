# The demo (make demo): the config of XT with other data, classes, image size, schedule, and numbers of proposals and
# samples, for small pictures and minutes on two CPU cores. It trains from scratch, without pre-trained weights. For this,
# FPN and the mask head have group norms. The optimiser and its learning rate are those of the recipe. Pictures have
# 256 x 256 pixels, and the network sees 128 x 128. As with COCO, boxes and masks are predicted for the picture.
_base_ = './mask-rcnn_overlock-xt_fpn_1x_coco.py'

data_root = 'data/demo/'
metainfo = dict(
    classes=('ball', 'sign', 'star', 'lifebuoy'),
    palette=[(60, 140, 255), (255, 60, 60), (255, 200, 0), (60, 200, 100)],
)
image_size = (128, 128)
num_classes = 4
norm_cfg = dict(type='GN', num_groups=32)

model = dict(
    backbone=dict(init_cfg=None),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(num_classes=num_classes), mask_head=dict(num_classes=num_classes, norm_cfg=norm_cfg)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=64),
        rcnn=dict(sampler=dict(num=32)),
    ),
    # Objects of a class hardly overlap here. Boxes that overlap by 0.3 to 0.5 are of the same object.
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=64), rcnn=dict(max_per_img=20, nms=dict(iou_threshold=0.3))),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

max_epochs = 4
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, begin=0, end=max_epochs, eta_min=0),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=1, max_keep_ckpts=2))
custom_hooks = [dict(type='overlock_mm.KeepFreedMemoryHook')]  # for training on a CPU
randomness = dict(seed=0)
