"""Build steps beyond pyproject.toml: the compiled operators, and configs and tools inside the package.

The operators are compiled against the installed torch, always for the CPU, and for CUDA if there is a CUDA toolkit that
fits this torch. One binary serves every Python version.

Environment variables:
    OVERLOCK_MM_WITH_OPS=0  leave the compiled operators out: their references in plain PyTorch run instead
    FORCE_CUDA=1            compile for CUDA or fail (no GPU is needed); FORCE_CUDA=0: do not
    CUDA_HOME               the CUDA toolkit; without it, the one of the nvcc on PATH
    TORCH_CUDA_ARCH_LIST    GPU architectures, e.g. "8.0;9.0+PTX"; without it those of the GPUs in this machine, or, if it
                            has none, those of 7.0, 7.5, 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0 that the toolkit knows
    CXXFLAGS                more flags for the C++ compiler. They come last, so that they override those of this file
    MAX_JOBS                number of compilers that run at the same time
    OVERLOCK_MM_PIN_TORCH=1 for wheels that others install (make wheel): the version names torch and CUDA, and the wheel
                            requires this minor version of torch
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Optional

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
SOURCES = Path('overlock_mm/ops/csrc')
#: Tools that need a checkout, and write into it.
CHECKOUT_ONLY = ('demo', 'install_mmcv.py', 'sanitize.py')
ARCHITECTURES = ('7.0', '7.5', '8.0', '8.6', '8.9', '9.0', '10.0', '12.0')


class BuildWithConfigs(build_py):
    """Puts configs, tools and the model index into the package as .mim, as OpenMMLab's packages do.

    An editable install needs no copy: they are beside the package.
    """

    def run(self):
        super().run()
        if not self.editable_mode:
            resources = Path(self.build_lib) / 'overlock_mm' / '.mim'
            shutil.rmtree(resources, ignore_errors=True)
            for name in ('configs', 'tools'):
                ignored = shutil.ignore_patterns('__pycache__', *CHECKOUT_ONLY)
                shutil.copytree(ROOT / name, resources / name, ignore=ignored)
            shutil.copy2(ROOT / 'model-index.yml', resources)


class VersionOfWheel(egg_info):
    """Puts :func:`local_version` behind the version, also where the setup.cfg of an sdist says that there is none."""

    def finalize_options(self):
        self.tag_build = local_version()
        super().finalize_options()


class BuildError(SystemExit):
    """Ends the build with a message, without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f'overlock_mm: {message}')


def say(message: str) -> None:
    print(f'overlock_mm: {message}', file=sys.stderr, flush=True)


def import_torch():
    """The torch that the operators will run with.

    pip builds in an isolated environment, whose torch would be a different one. The interpreter is the same: without the
    paths that pip sets, it finds the torch of the environment that the package is installed into.
    """
    try:
        import torch
    except ImportError:
        code = 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])'
        outside = subprocess.run([sys.executable, '-E', '-s', '-c', code], capture_output=True, text=True)
        if outside.returncode:
            raise BuildError(
                'the compiled operator is built against the installed torch, and this build sees none. An '
                'isolated build can hide it (that of uv does). Install torch, setuptools, wheel and ninja first, then:\n'
                '    pip install --no-build-isolation .    (or uv pip install --no-build-isolation .)\n'
                'or leave the operator out, which is slow:\n    OVERLOCK_MM_WITH_OPS=0 pip install .'
            ) from None
        sys.path.append(outside.stdout.strip())
        import torch
    return torch


def cuda_toolkit() -> Optional[Path]:
    """The folder of the CUDA toolkit, if there is one.

    Raises:
        LookupError: an environment variable names a folder that is not a CUDA toolkit.
    """
    for variable in ('CUDA_HOME', 'CUDA_PATH'):
        if os.environ.get(variable):
            folder = Path(os.environ[variable])
            if not (folder / 'bin' / 'nvcc').is_file():
                raise LookupError(f'{variable} must be the folder of a CUDA toolkit, with bin/nvcc in it, got {folder}')
            return folder
    nvcc = shutil.which('nvcc')
    if nvcc is None:
        return Path('/usr/local/cuda') if Path('/usr/local/cuda/bin/nvcc').is_file() else None
    # It may be a link, or a script that calls the real nvcc.
    trial = subprocess.run([nvcc, '--dryrun', '-x', 'cu', os.devnull], capture_output=True, text=True)
    top = re.search(r'^#\$ TOP=(.+)$', trial.stderr, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parents[1]


def toolkit_version(toolkit: Path) -> str:
    out = subprocess.run([toolkit / 'bin' / 'nvcc', '--version'], capture_output=True, text=True, check=True).stdout
    return re.search(r'release (\d+\.\d+)', out).group(1)


def choose_cuda(torch, force: Optional[str]) -> Optional[Path]:
    """The toolkit to compile for CUDA with, or None for the CPU alone. Prints the reason.

    Args:
        torch: the module.
        force: FORCE_CUDA: '1' for CUDA or an error, '0' for the CPU alone, None or '' for CUDA if there is a toolkit.
    """
    if force == '0':
        say('FORCE_CUDA=0: building for the CPU alone')
        return None

    problem = toolkit = version = None
    try:
        toolkit = cuda_toolkit()
        version = toolkit_version(toolkit) if toolkit else None
    except LookupError as error:
        problem = str(error)
    if torch.version.cuda is None:
        problem = f'torch {torch.__version__} is a build without CUDA'
    elif problem is None and toolkit is None:
        problem = f'no CUDA toolkit was found (no CUDA_HOME, no nvcc); torch {torch.__version__} wants {torch.version.cuda}'
    elif problem is None and version.split('.')[0] != torch.version.cuda.split('.')[0]:
        problem = f'the CUDA toolkit in {toolkit} is {version}, but torch {torch.__version__} wants {torch.version.cuda}'
    if problem is None:
        say(f'building for the CPU and for CUDA {version} ({toolkit})')
        return toolkit
    if force == '1':
        raise BuildError(f'FORCE_CUDA=1, but {problem}')
    if torch.cuda.is_available():
        say('=' * 100)
        say(f'THERE IS A GPU, BUT {problem}: ContMix will be SLOW on it. Get the toolkit, then build again with')
        say('    FORCE_CUDA=1 pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps .')
        say('=' * 100)
    else:
        say(f'building for the CPU alone: {problem}')
    return None


def import_cpp_extension(torch):
    """PyTorch's extension of setuptools. It reads CUDA_HOME now."""
    try:
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        if error.name != 'pkg_resources':
            raise
        raise BuildError(
            f'torch {torch.__version__} builds with setuptools < 81 only, which has pkg_resources. Run\n'
            '    pip install "setuptools<81" wheel\n'
            '    pip install --no-build-isolation --no-deps .'
        ) from None
    return cpp_extension


def default_architectures(torch, toolkit: Path) -> str:
    """Architectures of the GPUs in this machine, or, if it has none, ARCHITECTURES. The last as PTX too, for later GPUs.

    Only architectures that the toolkit compiles for and that torch knows.
    """
    cpp_extension = import_cpp_extension(torch)

    command = [toolkit / 'bin' / 'nvcc', '--list-gpu-arch']
    of_toolkit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    def is_known(architecture: str) -> bool:
        os.environ['TORCH_CUDA_ARCH_LIST'] = architecture
        try:
            cpp_extension._get_cuda_arch_flags()
        except ValueError:
            return False
        finally:
            del os.environ['TORCH_CUDA_ARCH_LIST']
        return f'compute_{architecture.replace(".", "")}' in of_toolkit

    present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    chosen = [f'{major}.{minor}' for major, minor in sorted(present)]
    if not chosen or not all(map(is_known, chosen)):
        chosen = list(filter(is_known, ARCHITECTURES))
    return ';'.join(chosen) + '+PTX'


def operator_extension() -> dict:
    """Keyword arguments of ``setup`` that build overlock_mm.ops._C."""
    if os.environ.get('OVERLOCK_MM_WITH_OPS') == '0':
        say('OVERLOCK_MM_WITH_OPS=0: leaving the compiled operator out')
        return {}
    if os.name == 'nt':
        raise BuildError(
            'the operator needs GCC or Clang (it uses their vector types). OVERLOCK_MM_WITH_OPS=0 leaves it out'
        )
    torch = import_torch()
    toolkit = choose_cuda(torch, os.environ.get('FORCE_CUDA'))
    if toolkit:
        os.environ['CUDA_HOME'] = str(toolkit)  # cpp_extension reads it when it is imported
        if not os.environ.get('TORCH_CUDA_ARCH_LIST'):
            os.environ['TORCH_CUDA_ARCH_LIST'] = default_architectures(torch, toolkit)
    cpp_extension = import_cpp_extension(torch)

    sources = [path for part in ('.', 'autograd', 'autocast', 'cpu') for path in (SOURCES / part).glob('*.cpp')]
    flags = {'cxx': ['-O3', '-g0', '-ffp-contract=fast'], 'nvcc': ['-O3']}
    if sys.platform == 'linux' and compiler_is_clang():
        say("Clang's OpenMP is not torch's: the CPU kernels will run on ONE thread; with CXX=g++ CC=gcc, on all")
    elif sys.platform == 'linux':
        # For at::parallel_for. Only for compilation: linking it would load the system's OpenMP, with a second pool of
        # threads beside that of torch.
        flags['cxx'].append('-fopenmp')
    flags['cxx'] += os.environ.get('CXXFLAGS', '').split()
    macros = []
    if toolkit:
        sources += [*(SOURCES / 'cuda').glob('*.cpp'), *(SOURCES / 'cuda').glob('*.cu')]
        architectures = os.environ['TORCH_CUDA_ARCH_LIST']
        say(f'GPU architectures: {architectures}')
        macros += [('OVERLOCK_MM_WITH_CUDA', None), ('OVERLOCK_MM_CUDA_ARCHITECTURES', f'"{architectures}"')]
    extension = (cpp_extension.CUDAExtension if toolkit else cpp_extension.CppExtension)(
        'overlock_mm.ops._C',
        sorted(map(str, sources)),
        define_macros=macros,
        extra_compile_args=flags if toolkit else flags['cxx'],
        py_limited_api=True,
    )
    return dict(
        ext_modules=[extension],
        cmdclass=dict(build_ext=cpp_extension.BuildExtension),
        # Without ninja a binary newer than its .cpp files would be kept, although torch, CUDA or a header has changed.
        options=dict(bdist_wheel=dict(py_limited_api='cp39'), build_ext=dict(force=True)),
    )


def pins_torch() -> bool:
    """Whether the package is for others. Without its binary it fits every torch."""
    return os.environ.get('OVERLOCK_MM_PIN_TORCH') == '1' and os.environ.get('OVERLOCK_MM_WITH_OPS') != '0'


def torch_requirement() -> str:
    """What pip installs the package with: the binary works with one minor version of torch alone."""
    return f'torch=={minor_version(import_torch())}.*' if pins_torch() else 'torch>=2.1'


def local_version() -> str:
    """The end of the version of a wheel, such as '+torch211cu130'. pip tells wheels apart by it."""
    if not pins_torch():
        return ''
    torch = import_torch()
    device = f'cu{torch.version.cuda}' if choose_cuda(torch, os.environ.get('FORCE_CUDA')) else 'cpu'
    return f'+torch{minor_version(torch)}{device}'.replace('.', '')


def minor_version(torch) -> str:
    """'2.11' of 2.11.0+cu130."""
    return '.'.join(torch.__version__.split('.')[:2])


def compiler_is_clang() -> bool:
    command = [*os.environ.get('CXX', 'c++').split(), '--version']
    try:
        return 'clang' in subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:  # the build will say so
        return False


def wants_extension(commands: list[str]) -> bool:
    """Whether a command of setup.py builds the package. An sdist and the metadata need no torch."""
    builds = ('build', 'build_ext', 'bdist', 'bdist_wheel', 'editable_wheel', 'install', 'develop')
    return any(command in builds for command in commands)


if __name__ == '__main__':
    arguments = operator_extension() if wants_extension(sys.argv[1:]) else {}
    commands = dict(build_py=BuildWithConfigs, egg_info=VersionOfWheel)
    arguments['cmdclass'] = dict(arguments.get('cmdclass', {}), **commands)
    setup(install_requires=[torch_requirement()], **arguments)
