"""Child registries of mmengine's, found from every OpenMMLab framework.

``type='overlock_mm.OverLoCK'`` builds from mmdet, mmseg and mmpretrain without ``custom_imports``: mmengine imports
``<scope>.registry``, here this module, when it meets an unknown scope.
"""

from .versions import require

require('mmengine', 'overlock_mm.models')

from mmengine.registry import HOOKS as MMENGINE_HOOKS  # noqa: E402
from mmengine.registry import MODELS as MMENGINE_MODELS  # noqa: E402
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS  # noqa: E402
from mmengine.registry import Registry  # noqa: E402

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='overlock_mm', locations=['overlock_mm.models'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='overlock_mm', locations=['overlock_mm.memory', 'overlock_mm.inference'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='overlock_mm',
    locations=['overlock_mm.layer_decay'],
)
