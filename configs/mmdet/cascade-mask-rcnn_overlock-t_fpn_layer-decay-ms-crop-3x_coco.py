# Cascade Mask R-CNN, OverLoCK-T, 3x, with learning rates that fall by 0.8 from layer to layer towards the image (see
# OverLoCK.get_layer_depth). Ours; the rate is the one that UniRepLKNet and MogaNet use for this detector.
_base_ = './cascade-mask-rcnn_overlock-t_fpn_ms-crop-3x_coco.py'

optim_wrapper = dict(
    constructor='overlock_mm.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.8),
)
