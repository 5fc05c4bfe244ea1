# Mask R-CNN, ResNet-50 with ContMix after the 3x3 convolution of every bottleneck of stages 2 to 4, 1x. An example of the
# plugin, not a published model: mmdet's config with the plugin. Stage 1 is frozen and has no plugin. The blocks start as
# the identity, so training starts from the features of the pre-trained ResNet.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['overlock_mm'], allow_failed_imports=False)

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

default_hooks = dict(random_state=dict(type='overlock_mm.RandomStateHook'))
