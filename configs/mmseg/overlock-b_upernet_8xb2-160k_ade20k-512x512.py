# UPerNet, OverLoCK-B, mIoU 51.7 in the release.
_base_ = './overlock-t_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='b',
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint='overlock_mm://overlock_b_in1k_224.pth'),
    ),
    decode_head=dict(in_channels=[80, 160, 528, 720]),
    auxiliary_head=dict(in_channels=528),
)
