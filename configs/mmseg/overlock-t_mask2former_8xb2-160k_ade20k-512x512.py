# Mask2Former, OverLoCK-T: 8 GPUs x 2 crops of 512 x 512, 160k iterations. Ours: mmseg's Mask2Former with this
# backbone. As in mmseg, the backbone has a tenth of the learning rate. The pixel decoder and losses come from mmdet.
_base_ = 'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['mmdet.models', 'overlock_mm'], allow_failed_imports=False)

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
)

default_hooks = dict(
    random_state=dict(type='overlock_mm.RandomStateHook'),
    fuse=dict(type='overlock_mm.FuseForTrainingHook'),
)

sync_bn = 'torch'
