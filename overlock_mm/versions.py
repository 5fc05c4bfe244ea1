"""Checks of required packages: a clear error if one is missing, a warning if its version is untested."""

from __future__ import annotations

import importlib.util
import warnings
from itertools import takewhile
from typing import Optional

#: Module: its name on PyPI and the supported versions, from the first to before the last.
SUPPORTED = {
    'torch': ('torch', '2.1', None),
    'mmengine': ('mmengine', '0.10.0', '0.11.0'),
    'mmdet': ('mmdet', '3.0.0', '3.4.0'),
    'mmseg': ('mmsegmentation', '1.0.0', '1.3.0'),
    'mmpretrain': ('mmpretrain', '1.0.0', '1.3.0'),
    'timm': ('timm', '1.0.3', None),
}

#: Other supported versions of these modules: those of the maintained forks (docs/compatibility.md).
FORKS = {'mmdet': ('3.5.0', '3.6.0'), 'mmseg': ('1.4.0', '1.5.0'), 'mmpretrain': ('1.3.0', '1.4.0')}


def supported_range(module: str) -> str:
    """The requirement for pip, such as 'mmdet>=3.0.0,<3.4.0'."""
    package, first, last = SUPPORTED[module]
    return f'{package}>={first}' + (f',<{last}' if last else '')


def require(module: str, needed_by: str) -> None:
    """Check that a module is installed, and warn if its version is outside the supported range.

    Args:
        module: a key of ``SUPPORTED``.
        needed_by: the part that needs the module, for the error message.

    Raises:
        ImportError: the module is not installed. The message has the pip command.
    """
    if importlib.util.find_spec(module) is None:
        raise ImportError(f'{needed_by} needs {module}, which is not installed: pip install "{supported_range(module)}"')
    version = importlib.import_module(module).__version__
    ranges = (SUPPORTED[module][1:], FORKS.get(module))
    if not any(_is_within(version, *versions) for versions in ranges if versions):
        warnings.warn(f'{module} {version} is outside the supported range, {supported_range(module)}', stacklevel=3)


def _is_within(version: str, first: str, last: Optional[str]) -> bool:
    numbers = version_numbers(version)
    return version_numbers(first) <= numbers and (last is None or numbers < version_numbers(last))


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: '2.11.0+cu130' gives (2, 11, 0), '2.1.0rc1' gives (2, 1)."""
    return tuple(map(int, takewhile(str.isdigit, version.split('+')[0].split('.'))))
