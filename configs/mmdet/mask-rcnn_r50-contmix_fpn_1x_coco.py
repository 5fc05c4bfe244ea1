# Mask R-CNN, ResNet-50 with ContMix behind the 3x3 convolution of every bottleneck of stages 2 to 4, 1x. An example of the
# plugin, not a published model: mmdet's own config but for the plugin. Stage 1 has none, as it is frozen. The blocks start
# as the identity, so training starts from the pre-trained ResNet's features.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        plugins=[
            dict(
                cfg=dict(type='overlock_mm.ContMixBlock', kernel_size=7),
                stages=(False, True, True, True),
                position='after_conv2',
            ),
        ],
    ),
)
