"""Freed memory stays with the process, for training on a CPU."""

from __future__ import annotations

import ctypes
import platform

from mmengine.hooks import Hook
from mmengine.runner import Runner

from .registry import HOOKS

# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = {_M_TRIM_THRESHOLD: -1, _M_MMAP_MAX: 0}


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, for the whole process and for good.

    glibc gives large blocks back to the system when they are freed. The next map of that size begins with page faults,
    which can take longer than what fills it: without them a training step of OverLoCK-T on a CPU took a tenth to a fifth
    less time, and for small images up to two fifths (docs/performance.md). In return the process stays as large as it once
    was, or larger: what is free lies in pieces, which do not fit every size. It is for what the main thread allocates, and
    goes over to processes that are forked from it. Where another allocator was preloaded (jemalloc, tcmalloc), it changes
    nothing.

    Returns:
        bool: whether the C library has taken the settings. Others than glibc are left as they are.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) == 1 for option, value in _NEVER.items())


@HOOKS.register_module()
class KeepFreedMemoryHook(Hook):
    """Keep freed memory in a run on the CPU, as :func:`keep_freed_memory` does.

    Other devices have allocators of their own: there it does nothing. ::

        custom_hooks = [dict(type='overlock_mm.KeepFreedMemoryHook')]
    """

    def before_run(self, runner: Runner) -> None:
        if all(parameter.device.type == 'cpu' for parameter in runner.model.parameters()) and not keep_freed_memory():
            runner.logger.info('KeepFreedMemoryHook: the C library is not glibc, and is left as it is')
