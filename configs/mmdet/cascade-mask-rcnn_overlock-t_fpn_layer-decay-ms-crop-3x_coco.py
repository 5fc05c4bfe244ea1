# Cascade Mask R-CNN, OverLoCK-T, 3x, with layer-wise learning rate decay of 0.8 (see OverLoCK.get_layer_depth). Ours:
# UniRepLKNet and MogaNet use this rate for this detector.
_base_ = './cascade-mask-rcnn_overlock-t_fpn_ms-crop-3x_coco.py'

optim_wrapper = dict(
    constructor='overlock_mm.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.8),
)
