"""Keeping freed memory in the process, for training on a CPU."""

from __future__ import annotations

import ctypes
import platform

from mmengine.hooks import Hook
from mmengine.runner import Runner

from .registry import HOOKS

# Options of mallopt(3), and values that keep glibc from returning memory to the system.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_KEEP_MEMORY = {_M_TRIM_THRESHOLD: -1, _M_MMAP_MAX: 0}


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory in the process. The setting cannot be undone.

    glibc returns large freed blocks to the system. The next map of that size then causes page faults, which can take longer
    than the computation. Without them a training step of OverLoCK-T on a CPU took 10 to 20 % less time, and up to 40 % less
    for small images (docs/notes/memory.md). The cost: the process never shrinks, and can grow because free blocks do not
    fit every size. The setting applies to allocations of the main thread and is inherited by forked processes. It has no
    effect on a preloaded allocator (jemalloc, tcmalloc).

    Returns:
        bool: whether the C library accepted the setting. False for other C libraries than glibc.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) == 1 for option, value in _KEEP_MEMORY.items())


@HOOKS.register_module()
class KeepFreedMemoryHook(Hook):
    """Call :func:`keep_freed_memory` before a run on the CPU. On other devices the hook does nothing. ::

    custom_hooks = [dict(type='overlock_mm.KeepFreedMemoryHook')]
    """

    def before_run(self, runner: Runner) -> None:
        if all(parameter.device.type == 'cpu' for parameter in runner.model.parameters()) and not keep_freed_memory():
            runner.logger.info('KeepFreedMemoryHook has no effect: the C library is not glibc')
