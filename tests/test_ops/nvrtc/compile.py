"""Compile a CUDA source to PTX with NVRTC: `compile.py PACKAGES ARCHITECTURE SOURCE`. Prints the log and the number
of kernels.

PACKAGES is the folder of NVIDIA's wheels of NVRTC and of the runtime, which has the headers for devices. It is a process of
its own because NVRTC changes the locale.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

#: Stands for headers of the host, which NVRTC does not have.
HOST = Path(__file__).parent / 'host.h'
#: Without optimisation, which takes ten times as long and refuses no code. Functions of the host become functions of the
#: device, whose symbols are in no library.
OPTIONS = ('-std=c++17', '-G', '-default-device', '-rdc=true')


def host_headers(sources: Path, include: Path) -> list[str]:
    """The names of headers that sources include and NVRTC lacks. The runtime's needs some that come with nvcc."""
    files = [*sources.glob('*.cu'), *sources.glob('*.cuh'), *sources.glob('*.h'), *sources.parent.glob('*.h')]
    names = {name.decode() for file in files for name in re.findall(rb'#include <([\w.]+)>', file.read_bytes())}
    return sorted(name for name in names if name.startswith('cuda_runtime') or not (include / name).exists())


def compile_source(packages: Path, architecture: str, source: Path) -> tuple[str, str]:
    """The log, and the PTX: empty if it does not compile."""
    nvrtc = ctypes.CDLL(str(next(packages.glob('cuda_nvrtc/lib/libnvrtc.so*'))))
    include = packages / 'cuda_runtime' / 'include'
    names = host_headers(source.parent, include)

    def strings(values: list[str]):
        return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))

    def check(status: int) -> None:
        if status:
            raise RuntimeError(f'NVRTC failed with {status}')

    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    headers = strings([HOST.read_text()] * len(names))
    text, name = source.read_bytes(), str(source).encode()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, len(names), headers, strings(names)))
    options = [*OPTIONS, f'-arch={architecture}', f'-I{source.parent}', f'-I{include}']
    status = nvrtc.nvrtcCompileProgram(program, len(options), strings(options))

    def output(name: str) -> str:
        check(getattr(nvrtc, f'nvrtcGet{name}Size')(program, ctypes.byref(size)))
        text = ctypes.create_string_buffer(size.value)
        check(getattr(nvrtc, f'nvrtcGet{name}')(program, text))
        return text.value.decode()

    return output('ProgramLog'), '' if status else output('PTX')


if __name__ == '__main__':
    log, ptx = compile_source(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    kernels = set(re.findall(r'\.entry (\w+)', ptx))
    print(f'{log}\n{len(kernels)} kernels')
    sys.exit(not ptx)
