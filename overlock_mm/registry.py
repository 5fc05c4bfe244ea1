"""One registry for all of OpenMMLab: a child of mmengine's, which mmdet's, mmseg's and mmpretrain's fall back to.

``type='overlock_mm.OverLoCK'`` builds from any of them without custom_imports: a scope that is not known yet is imported
as ``<scope>.registry``, this module.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='overlock_mm', locations=['overlock_mm.models'])
