"""OverLoCK (CVPR 2025) for OpenMMLab: backbone, classification head and the ContMix operator."""

from .versions import require

for _module in ('torch', 'mmengine', 'mmcv'):
    require(_module, 'overlock_mm')

from .config_path import get_config_path, list_configs  # noqa: E402
from .safe_globals import allow_mmengine_checkpoints  # noqa: E402

__version__ = '0.1.0'
__all__ = ['__version__', 'get_config_path', 'list_configs']

allow_mmengine_checkpoints()
