# UPerNet, OverLoCK-S, mIoU 51.3 in the release.
_base_ = './overlock-t_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='s',
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint='overlock_mm://overlock_s_in1k_224.pth'),
    ),
    decode_head=dict(in_channels=[64, 128, 448, 640]),
    auxiliary_head=dict(in_channels=448),
)
