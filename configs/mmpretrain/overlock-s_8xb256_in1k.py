# OverLoCK-S on ImageNet-1K, top-1 84.8 in the release.
_base_ = './overlock-t_8xb256_in1k.py'

model = dict(
    backbone=dict(arch='s', drop_path_rate=0.4),
    head=dict(in_channels=640, overview_channels=512),
)
