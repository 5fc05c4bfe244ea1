# UPerNet, OverLoCK-T, in mixed precision (float16 on a GPU, with loss scaling). Ours: the release trains in float32.
_base_ = './overlock-t_upernet_8xb2-160k_ade20k-512x512.py'

optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
