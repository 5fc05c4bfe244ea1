"""Registries for all of OpenMMLab: children of mmengine's, which mmdet's, mmseg's and mmpretrain's fall back to.

``type='overlock_mm.OverLoCK'`` builds from any of them without custom_imports: a scope that is not known yet is imported
as ``<scope>.registry``, this module.
"""

from .versions import require

for _module in ('mmengine', 'mmcv'):
    require(_module, 'overlock_mm.models')

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
