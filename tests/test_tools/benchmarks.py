"""The modules of tools/benchmarks, for their tests."""

from __future__ import annotations

import sys

from conftest import ROOT

FOLDER = ROOT / 'tools' / 'benchmarks'
sys.path.insert(0, str(FOLDER))

import bench_backbone  # noqa: E402
import bench_contmix  # noqa: E402
import bench_depthwise  # noqa: E402
import bfloat16_errors  # noqa: E402
import gpu_check  # noqa: E402
import gpu_cost  # noqa: E402
import gpu_memory  # noqa: E402
import harness  # noqa: E402
import operator_costs  # noqa: E402
import published  # noqa: E402
import variants  # noqa: E402

__all__ = [
    'FOLDER',
    'bench_backbone',
    'bench_contmix',
    'bench_depthwise',
    'bfloat16_errors',
    'gpu_check',
    'gpu_cost',
    'gpu_memory',
    'harness',
    'operator_costs',
    'published',
    'variants',
]
