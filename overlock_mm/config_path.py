"""Where the shipped configs are."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from pathlib import Path


def config_root() -> Path:
    """configs/ of an installed wheel (in the package, as .mim, where mim looks for it) or of a checkout (beside it)."""
    package = Path(__file__).resolve().parent
    installed = package / '.mim' / 'configs'
    return installed if installed.is_dir() else package.parent / 'configs'


def list_configs() -> list[str]:
    """Names of the shipped configs, such as 'mmdet/mask-rcnn_overlock-t_fpn_1x_coco.py', sorted."""
    root = config_root()
    return sorted(path.relative_to(root).as_posix() for path in root.rglob('*.py'))


def get_config_path(name: str) -> str:
    """Absolute path of a shipped config.

    Use it to inherit one: ``_base_ = [__import__('overlock_mm').get_config_path('mmdet/...')]``.

    Args:
        name: as in :func:`list_configs`; '.py' may be left out.

    Raises:
        TypeError: ``name`` is no str.
        FileNotFoundError: there is no such config; the message has the nearest names.
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
    """Up to three of the known names that are like this one, for a message; '' if none is."""
    return ', '.join(difflib.get_close_matches(name, list(known), n=3, cutoff=0.3))


def allow_config_scopes() -> None:
    """Let mmengine find more configs by the names of their packages.

    ``_base_ = 'overlock_mm::mmdet/....py'`` is read where this package is installed from a wheel: mmengine knows a fixed
    list of packages, and looks for their configs in <package>/.mim, where an editable install and a checkout have none.
    :func:`get_config_path` finds configs in every case.

    ``mmseg::...`` is read where mmseg comes from a fork with another name than mmsegmentation, which mmengine asks for.
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
