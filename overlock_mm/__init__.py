"""OverLoCK (CVPR 2025) for OpenMMLab: backbone, classification head and the ContMix operator.

overlock_mm.ops needs torch only. The backbone also needs mmengine.
"""

import importlib
import importlib.util

from .checkpoints.release import get_checkpoint, register_models
from .config_path import get_config_path, list_configs
from .versions import require

__version__ = '0.1.0'
__all__ = ['__version__', 'get_checkpoint', 'get_config_path', 'list_configs', 'register_models']

require('torch', 'overlock_mm')
if importlib.util.find_spec('mmengine') is not None:
    from .checkpoints.files import register_scheme
    from .checkpoints.safe_globals import allow_mmengine_checkpoints
    from .config_path import allow_config_scopes

    allow_mmengine_checkpoints()
    register_scheme()
    allow_config_scopes()


def __getattr__(name: str):
    """Folders and hooks, imported when they are first asked for."""
    if name in ('checkpoints', 'inference', 'layer_decay', 'memory', 'models', 'ops', 'resume', 'training'):
        return importlib.import_module(f'.{name}', __name__)
    if name in ('FuseForTrainingHook', 'OptimizeForInferenceHook', 'KeepFreedMemoryHook', 'RandomStateHook'):
        return importlib.import_module('.registry', __name__).HOOKS.get(name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
