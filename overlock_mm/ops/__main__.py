"""``python -m overlock_mm.ops``: how the operators are built, and which run here, for bug reports."""

from __future__ import annotations

import platform

import torch

import overlock_mm

from . import _library


def main() -> None:
    info = _library.build_info
    lines = {
        'overlock_mm': overlock_mm.__version__,
        'Python': platform.python_version(),
        'torch': f'{torch.__version__} (CUDA {torch.version.cuda or "none"})',
        'GPU': ', '.join(
            f'{torch.cuda.get_device_name(i)} (sm_{"".join(map(str, torch.cuda.get_device_capability(i)))})'
            for i in range(torch.cuda.device_count())
        )
        or 'none',
        'CPU capability': torch.backends.cpu.get_cpu_capability(),
        'threads': torch.get_num_threads(),
    }
    if info:
        cuda = f'CUDA {info["cuda"]} for {info["cuda_architectures"]}' if info['cuda'] else 'without CUDA'
        lines['compiled operators'] = f'torch {info["torch"]}, {cuda}, compiler {info["compiler"]}'
        lines['used on the CPU'] = f'compiled operators, {info["cpu"]}'
        on_gpu = 'compiled operators' if info['cuda'] else 'REFERENCES: built without CUDA'
    else:
        lines['compiled operators'] = f'MISSING: {_library.missing}'
        lines['used on the CPU'] = on_gpu = 'REFERENCES'
    if torch.cuda.is_available():
        lines['used on the GPU'] = on_gpu
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f'{name:{width}}  {value}')


if __name__ == '__main__':
    main()
