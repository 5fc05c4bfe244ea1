# UPerNet, OverLoCK-XT. The release has no such config. It follows the config of T.
_base_ = './overlock-t_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='xt',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='overlock_mm://overlock_xt_in1k_224.pth'),
    ),
    decode_head=dict(in_channels=[56, 112, 340, 420]),
    auxiliary_head=dict(in_channels=340),
)
