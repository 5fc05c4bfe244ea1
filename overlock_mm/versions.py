"""What this package runs with: clear words where something is missing or of an untried version."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Optional

#: Module, the name to install it by, and the versions this package was written for, [first, last).
SUPPORTED = {
    'torch': ('torch', '2.1', None),
    'mmengine': ('mmengine', '0.10.0', '0.11.0'),
    'mmcv': ('mmcv', '2.0.0', '2.2.0'),
    'mmdet': ('mmdet', '3.0.0', '3.4.0'),
    'mmseg': ('mmsegmentation', '1.0.0', '1.3.0'),
    'mmpretrain': ('mmpretrain', '1.0.0', '1.3.0'),
}

#: Those of the maintained forks, other packages of the same modules, that were tried (docs/compatibility.md).
FORKS = {
    'mmengine': ('onedl-mmengine', '0.10.8', '0.11.0'),
    'mmcv': ('onedl-mmcv', '2.3.0', '2.4.0'),
    'mmdet': ('onedl-mmdetection', '3.5.0', '3.6.0'),
    'mmseg': ('onedl-mmsegmentation', '1.4.0', '1.5.0'),
    'mmpretrain': ('onedl-mmpretrain', '1.3.0', '1.4.0'),
}


def supported_range(module: str) -> str:
    """'mmcv>=2.0.0,<2.2.0' and alike, as pip reads it."""
    package, first, last = SUPPORTED[module]
    return f'{package}>={first}' + (f',<{last}' if last else '')


def require(module: str, needed_by: str) -> None:
    """Make sure that ``module`` can be imported; warn if its version lies outside the tried range.

    Args:
        module: one of ``SUPPORTED``.
        needed_by: what needs it, for the message.

    Raises:
        ImportError: it is not installed; the message names the package and the version.
    """
    if importlib.util.find_spec(module) is None:
        raise ImportError(f'{needed_by} needs {module}, which is not installed: pip install "{supported_range(module)}"')
    version = importlib.import_module(module).__version__
    ranges = [table[module][1:] for table in (SUPPORTED, FORKS) if module in table]
    if not any(_is_within(version, first, last) for first, last in ranges):
        warnings.warn(f'{module} {version} is outside the range tried, {supported_range(module)}', stacklevel=3)


def _is_within(version: str, first: str, last: Optional[str]) -> bool:
    numbers = version_numbers(version)
    return version_numbers(first) <= numbers and (last is None or numbers < version_numbers(last))


def version_numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: (2, 11, 0) of '2.11.0+cu130', (2, 1) of '2.1.0rc1'."""
    numbers = []
    for part in version.split('+')[0].split('.'):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
