# OverLoCK-S with its dilated branches folded, for testing and inference: the same function with fewer
# operations. It loads folded and unfolded checkpoints.
_base_ = './overlock-s_8xb256_in1k.py'

model = dict(backbone=dict(deploy=True))
