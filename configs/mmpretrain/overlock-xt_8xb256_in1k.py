# OverLoCK-XT on ImageNet-1K, top-1 82.7 in the release.
_base_ = './overlock-t_8xb256_in1k.py'

model = dict(
    backbone=dict(arch='xt', drop_path_rate=0.1),
    head=dict(in_channels=420, overview_channels=336),
)

# Center crop of 224 x 224 from an image with a short side of 224 / 0.925.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=242, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
