"""Child registries of mmengine's, found from every OpenMMLab framework.

``type='overlock_mm.OverLoCK'`` builds from mmdet, mmseg and mmpretrain without ``custom_imports``: mmengine imports
``<scope>.registry``, here this module, when it meets an unknown scope.
"""

from .versions import require

require('mmengine', 'overlock_mm.models')

import mmengine.registry as mmengine  # noqa: E402

MODELS = mmengine.Registry('model', parent=mmengine.MODELS, scope='overlock_mm', locations=['overlock_mm.models'])
HOOKS = mmengine.Registry(
    'hook',
    parent=mmengine.HOOKS,
    scope='overlock_mm',
    locations=['overlock_mm.memory', 'overlock_mm.resume', 'overlock_mm.inference', 'overlock_mm.training'],
)
OPTIM_WRAPPER_CONSTRUCTORS = mmengine.Registry(
    'optimizer wrapper constructor',
    parent=mmengine.OPTIM_WRAPPER_CONSTRUCTORS,
    scope='overlock_mm',
    locations=['overlock_mm.layer_decay'],
)
