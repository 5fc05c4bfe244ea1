"""Keeping freed memory in the process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch.nn as nn
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import DefaultScope

from overlock_mm import memory

#: Page faults of creating and freeing a map of 64 MiB, after a warm-up.
COUNT_FAULTS = """
import resource, torch
from overlock_mm.memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(10)
print(faults(20))
"""


def has_glibc() -> bool:
    return memory.platform.libc_ver()[0] == 'glibc'


@pytest.mark.skipif(not has_glibc(), reason='the C library is not glibc')
def test_kept_memory_has_few_page_faults():
    """Each setting runs in its own process, because it cannot be undone."""
    faults = {}
    for keep in (False, True):
        run = subprocess.run(
            [sys.executable, '-c', COUNT_FAULTS.format(keep=keep)], capture_output=True, text=True, check=True
        )
        faults[keep] = int(run.stdout)
    assert faults[True] < 0.2 * faults[False]


def test_other_c_libraries_are_not_changed(monkeypatch):
    monkeypatch.setattr(memory.platform, 'libc_ver', lambda: ('', ''))
    assert memory.keep_freed_memory() is False


class Runner:
    def __init__(self, device):
        self.model = nn.Linear(2, 2, device=device)
        self.logger = self
        self.messages = []

    def info(self, message):
        self.messages.append(message)


@pytest.mark.parametrize('device, calls', [('cpu', 1), ('meta', 0)])
def test_hook_acts_on_the_cpu_only(device, calls, monkeypatch):
    kept = []
    monkeypatch.setattr(memory, 'keep_freed_memory', lambda: kept.append(1) or True)
    with DefaultScope.overwrite_default_scope('mmengine'):
        hook = MMENGINE_HOOKS.build(dict(type='overlock_mm.KeepFreedMemoryHook'))
    runner = Runner(device)
    hook.before_run(runner)
    assert (len(kept), runner.messages) == (calls, [])


def test_hook_logs_that_it_has_no_effect(monkeypatch):
    monkeypatch.setattr(memory, 'keep_freed_memory', lambda: False)
    runner = Runner('cpu')
    memory.KeepFreedMemoryHook().before_run(runner)
    (message,) = runner.messages
    assert 'not glibc' in message
