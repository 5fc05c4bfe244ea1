"""setup.py: what it builds for which machine, and its messages."""

from __future__ import annotations

import builtins
import os
import re
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest
from conftest import ROOT, import_file

import overlock_mm


@pytest.fixture
def setup():
    return import_file(ROOT / 'setup.py')


@pytest.fixture
def toolkit(tmp_path):
    """A stand-in for a CUDA toolkit: of version 12.4, for three architectures."""
    nvcc = tmp_path / 'toolkit' / 'bin' / 'nvcc'
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        '#!/bin/sh\n'
        'case "$1" in\n'
        '--version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;\n'
        '--list-gpu-arch) echo compute_50; echo compute_80; echo compute_90 ;;\n'
        f'--dryrun) echo "#$ TOP={tmp_path / "toolkit"}/bin/.." >&2 ;;\n'
        'esac\n'
    )
    nvcc.chmod(0o755)
    return tmp_path / 'toolkit'


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in (
        'CUDA_HOME',
        'CUDA_PATH',
        'FORCE_CUDA',
        'TORCH_CUDA_ARCH_LIST',
        'OVERLOCK_MM_WITH_OPS',
        'OVERLOCK_MM_PIN_TORCH',
    ):
        monkeypatch.delenv(name, raising=False)


def torch_with(cuda, gpu=False):
    return SimpleNamespace(
        __version__='2.9.9', version=SimpleNamespace(cuda=cuda), cuda=SimpleNamespace(is_available=lambda: gpu)
    )


def torch_with_gpus(*capabilities):
    cuda = SimpleNamespace(device_count=lambda: len(capabilities), get_device_capability=lambda index: capabilities[index])
    return SimpleNamespace(cuda=cuda)


def test_cuda_where_toolkit_and_torch_agree(setup, toolkit, monkeypatch, capsys):
    monkeypatch.setenv('CUDA_HOME', str(toolkit))
    for force in (None, '', '1'):
        assert setup.choose_cuda(torch_with('12.8'), force) == toolkit
        assert f'building for the CPU and for CUDA 12.4 ({toolkit})' in capsys.readouterr().err
    assert setup.choose_cuda(torch_with('12.8'), '0') is None
    assert 'FORCE_CUDA=0: building for the CPU alone' in capsys.readouterr().err


@pytest.mark.parametrize(
    'cuda, there, message',
    [
        ('13.0', True, r'the CUDA toolkit in .*toolkit is 12.4, but torch 2.9.9 wants 13.0'),
        (None, True, r'torch 2.9.9 is a build without CUDA'),
        ('12.8', False, r'no CUDA toolkit was found \(no CUDA_HOME, no nvcc\); torch 2.9.9 wants 12.8'),
    ],
)
def test_every_mismatch_is_named(setup, toolkit, monkeypatch, capsys, cuda, there, message):
    monkeypatch.setattr(setup, 'cuda_toolkit', lambda: toolkit if there else None)
    assert setup.choose_cuda(torch_with(cuda), None) is None
    said = capsys.readouterr().err
    assert 'building for the CPU alone: ' in said
    with pytest.raises(SystemExit, match=f'FORCE_CUDA=1, but {message}'):
        setup.choose_cuda(torch_with(cuda), '1')
    assert setup.choose_cuda(torch_with(cuda, gpu=True), None) is None
    loud = capsys.readouterr().err
    assert 'THERE IS A GPU, BUT' in loud
    assert 'FORCE_CUDA=1 pip install' in loud


def test_the_toolkit_is_found(setup, toolkit, tmp_path, monkeypatch):
    """By CUDA_HOME, or by an nvcc on PATH, which may be a script that calls the real one."""
    monkeypatch.setenv('PATH', str(toolkit / 'bin'))
    assert setup.cuda_toolkit() == toolkit
    script = tmp_path / 'bin' / 'nvcc'
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv('PATH', str(script.parent))
    assert setup.cuda_toolkit() == toolkit


def test_a_stale_cuda_home_ends_a_build_for_cuda_only(setup, tmp_path, monkeypatch, capsys):
    message = 'CUDA_HOME must be the folder of a CUDA toolkit, with bin/nvcc in it, got'
    monkeypatch.setenv('CUDA_HOME', str(tmp_path / 'none'))
    assert setup.choose_cuda(torch_with('12.8'), None) is None
    assert f'building for the CPU alone: {message}' in capsys.readouterr().err
    with pytest.raises(SystemExit, match=message):
        setup.choose_cuda(torch_with('12.8'), '1')


def test_architectures(setup, toolkit):
    """The toolkit's stand-in knows 5.0, 8.0 and 9.0."""
    assert setup.default_architectures(torch_with_gpus(), toolkit) == '8.0;9.0+PTX'
    assert setup.default_architectures(torch_with_gpus((9, 0), (8, 0), (9, 0)), toolkit) == '8.0;9.0+PTX'
    assert setup.default_architectures(torch_with_gpus((9, 0)), toolkit) == '9.0+PTX'
    assert setup.default_architectures(torch_with_gpus((12, 0)), toolkit) == '8.0;9.0+PTX'
    assert 'TORCH_CUDA_ARCH_LIST' not in os.environ


def test_architectures_that_torch_does_not_know_are_left_out(setup, toolkit, monkeypatch):
    from torch.utils import cpp_extension

    def refuse():
        if os.environ['TORCH_CUDA_ARCH_LIST'] == '9.0':
            raise ValueError('Unknown CUDA arch (9.0) or GPU not supported')

    monkeypatch.setattr(cpp_extension, '_get_cuda_arch_flags', refuse)
    assert setup.default_architectures(torch_with_gpus(), toolkit) == '8.0+PTX'


def test_an_isolated_build_finds_the_torch_outside(setup, tmp_path):
    """pip puts a folder of its own on PYTHONPATH, which here has a torch that does not import."""
    isolated = tmp_path / 'isolated'
    isolated.mkdir()
    (isolated / 'torch.py').write_text("raise ImportError('not this one')")
    code = (
        'import importlib.util\n'
        f'spec = importlib.util.spec_from_file_location("setup_of_overlock_mm", {str(ROOT / "setup.py")!r})\n'
        'module = importlib.util.module_from_spec(spec)\n'
        'spec.loader.exec_module(module)\n'
        'import sys\n'
        f'sys.path[:] = [{str(isolated)!r}, *(path for path in sys.path if "site-packages" not in path)]\n'
        'try:\n'
        '    import torch\n'
        'except ImportError:\n'
        f'    sys.path.remove({str(isolated)!r})\n'
        'print(module.import_torch().__version__)\n'
    )
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, capture_output=True, text=True)
    import torch

    assert done.stdout.strip() == torch.__version__, done.stderr


def test_without_torch_it_says_what_to_do(setup, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    monkeypatch.setattr(setup.subprocess, 'run', lambda *args, **kwargs: SimpleNamespace(returncode=1, stdout=''))
    with pytest.raises(
        SystemExit,
        match='this build sees none(.|\n)*uv pip install --no-build-isolation(.|\n)*OVERLOCK_MM_WITH_OPS=0 pip install',
    ):
        setup.import_torch()


def test_an_old_torch_beside_new_setuptools_says_what_to_do(setup, monkeypatch):
    """torch.utils.cpp_extension of torch 2.1 imports pkg_resources, which setuptools 81 no longer has."""

    def import_module(name, *args, **kwargs):
        if name == 'torch.utils' and args[2:] and 'cpp_extension' in args[2]:
            raise ModuleNotFoundError("No module named 'pkg_resources'", name='pkg_resources')
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(builtins, '__import__', import_module)
    with pytest.raises(SystemExit, match=r'torch 2\.1\.2 builds with setuptools < 81 only(.|\n)*"setuptools<81"'):
        setup.import_cpp_extension(SimpleNamespace(__version__='2.1.2'))


@pytest.mark.parametrize(
    'version, cuda, force, requirement, local',
    [
        ('2.11.0+cu130', '13.0', '1', 'torch==2.11.*', '+torch211cu130'),
        ('2.11.0+cu130', '13.0', '0', 'torch==2.11.*', '+torch211cpu'),
        ('2.9.1+cpu', None, None, 'torch==2.9.*', '+torch29cpu'),
        ('2.1.2', '12.1', None, 'torch==2.1.*', '+torch21cu121'),
    ],
)
def test_a_wheel_for_others_names_torch_and_cuda(setup, toolkit, monkeypatch, version, cuda, force, requirement, local):
    torch = SimpleNamespace(
        __version__=version, version=SimpleNamespace(cuda=cuda), cuda=SimpleNamespace(is_available=lambda: False)
    )
    monkeypatch.setattr(setup, 'import_torch', lambda: torch)
    monkeypatch.setattr(setup, 'toolkit_version', lambda folder: cuda)
    monkeypatch.setenv('CUDA_HOME', str(toolkit))
    if force:
        monkeypatch.setenv('FORCE_CUDA', force)
    assert (setup.torch_requirement(), setup.local_version()) == ('torch>=2.1', '')
    monkeypatch.setenv('OVERLOCK_MM_PIN_TORCH', '1')
    assert (setup.torch_requirement(), setup.local_version()) == (requirement, local)
    monkeypatch.setenv('OVERLOCK_MM_WITH_OPS', '0')
    assert (setup.torch_requirement(), setup.local_version()) == ('torch>=2.1', '')


def test_the_metadata_of_a_wheel_for_others(setup, tmp_path):
    """The names that setuptools writes, without a compilation."""
    import torch

    command = [sys.executable, '-W', 'ignore', 'setup.py', '-q', 'egg_info', '--egg-base', tmp_path]
    environment = {**os.environ, 'OVERLOCK_MM_PIN_TORCH': '1', 'FORCE_CUDA': '0'}
    source = tmp_path / 'source'
    source.mkdir()
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'overlock_mm'):
        (source / name).symlink_to(ROOT / name)
    (source / 'setup.cfg').write_text('[egg_info]\ntag_build =\n')  # as sdists have it
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    minor = '.'.join(torch.__version__.split('.')[:2])
    metadata = tmp_path / 'overlock_mm.egg-info'
    version = re.search(r'^Version: (.+)$', (metadata / 'PKG-INFO').read_text(), re.MULTILINE).group(1)
    assert version == f'{overlock_mm.__version__}+torch{minor.replace(".", "")}cpu'
    assert (metadata / 'requires.txt').read_text().startswith(f'torch=={minor}.*\n')


def test_clang_is_told_from_gcc(setup, tmp_path, monkeypatch):
    for version, expected in (('Debian clang version 14.0.6', True), ('g++ (Debian 12.2.0) 12.2.0', False)):
        compiler = tmp_path / 'compiler'
        compiler.write_text(f'#!/bin/sh\necho "{version}"\n')
        compiler.chmod(0o755)
        monkeypatch.setenv('CXX', str(compiler))
        assert setup.compiler_is_clang() is expected
    monkeypatch.setenv('CXX', str(tmp_path / 'none'))
    assert not setup.compiler_is_clang()


def test_flags_of_the_user_come_last(setup, monkeypatch):
    monkeypatch.setenv('FORCE_CUDA', '0')
    monkeypatch.setenv('CXXFLAGS', '-O1 -fsanitize=address')
    (extension,) = setup.operator_extension()['ext_modules']
    flags = extension.extra_compile_args
    assert flags[-2:] == ['-O1', '-fsanitize=address']
    assert '-O3' in flags


def test_the_operator_can_be_left_out(setup, monkeypatch, capsys):
    monkeypatch.setenv('OVERLOCK_MM_WITH_OPS', '0')
    assert setup.operator_extension() == {}
    assert 'leaving the compiled operator out' in capsys.readouterr().err


def test_an_sdist_needs_no_torch_and_carries_the_sources(setup, tmp_path):
    # As setuptools' build_meta calls setup.py.
    assert not setup.wants_extension(['sdist', '--formats', 'gztar', '--dist-dir', 'x'])
    assert not setup.wants_extension(['dist_info', '--output-dir', 'x', '--keep-egg-info'])
    assert not setup.wants_extension(['egg_info'])
    assert setup.wants_extension(['bdist_wheel', '--dist-dir', 'x'])
    assert setup.wants_extension(['editable_wheel', '--dist-dir', 'x'])
    (tmp_path / 'torch.py').write_text("raise ImportError('an sdist needs no torch')")
    command = [sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', tmp_path, 'sdist', '--dist-dir', tmp_path]
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as archive:
        names = {name.split('/', 1)[-1] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / setup.SOURCES).rglob('*.*')}
    assert any(name.endswith('.cu') for name in sources)
    assert sources <= names
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / 'configs').rglob('*.*') if path.suffix in ('.py', '.yml')}
    tools = {str(path.relative_to(ROOT)) for path in (ROOT / 'tools').rglob('*.*') if path.suffix in ('.py', '.sh')}
    assert {'configs/mmdet/metafile.yml', 'tools/train.py'} <= configs | tools
    assert configs | tools | {'model-index.yml'} <= names
    assert {'Makefile', 'tests/test_ops/emulation/case.h'} <= names
    assert not any(name.endswith(('.so', '.o')) for name in names)
