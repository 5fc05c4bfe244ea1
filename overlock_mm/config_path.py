"""Paths of the shipped configs."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from pathlib import Path


def config_root() -> Path:
    """Return the folder of the configs: .mim/configs in a wheel, as mim expects it, or configs/ in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / '.mim' / 'configs'
    return installed if installed.is_dir() else package.parent / 'configs'


def list_configs() -> list[str]:
    """Return the sorted names of the shipped configs, such as 'mmdet/mask-rcnn_overlock-t_fpn_1x_coco.py'."""
    root = config_root()
    return sorted(path.relative_to(root).as_posix() for path in root.rglob('*.py'))


def get_config_path(name: str) -> str:
    """Return the absolute path of a shipped config.

    A config can inherit from it: ``_base_ = [__import__('overlock_mm').get_config_path('mmdet/...')]``.

    Args:
        name: a name from :func:`list_configs`. The '.py' is optional.

    Raises:
        TypeError: ``name`` is not a str.
        FileNotFoundError: there is no such config. The message has the nearest names.
    """
    if not isinstance(name, str):
        raise TypeError(f'name must be a str, got {name!r}')
    known = list_configs()
    wanted = name if name.endswith('.py') else f'{name}.py'
    if wanted not in known:
        nearest = nearest_names(wanted, known) or 'none, overlock_mm.list_configs() has all names'
        raise FileNotFoundError(f'no config {name!r} in {config_root()}; nearest: {nearest}')
    return str(config_root() / wanted)


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Return up to three similar known names for a message, or ''."""
    return ', '.join(difflib.get_close_matches(name, list(known), n=3, cutoff=0.3))


def allow_config_scopes() -> None:
    """Let mmengine find configs by ``overlock_mm::...``, and by ``mmseg::...`` with a fork of mmsegmentation.

    mmengine has a fixed list of packages, and looks for their configs in <package>/.mim. Only a wheel has this folder, so
    ``_base_ = 'overlock_mm::mmdet/....py'`` needs a wheel; :func:`get_config_path` works with every install.

    For ``mmseg::...`` mmengine asks for a package named mmsegmentation. The fork has another name.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    MODULE2PACKAGE.setdefault('overlock_mm', 'overlock_mm')
    if importlib.util.find_spec('mmseg') is not None and not _is_installed(MODULE2PACKAGE['mmseg']):
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
