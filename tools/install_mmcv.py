"""Install the pinned mmcv with its operators: a wheel of OpenMMLab if there is one, else it is built, once per machine.

PyPI has mmcv's operators only as source. OpenMMLab's index has wheels for some versions of torch. A wheel fits one version
of torch, one version of Python, and either the CPU or one CUDA. So wheels are kept outside the checkout, under a key of
these versions, and not in pip's cache, which does not tell them apart. The build folder is kept until the wheel is
finished, so an interrupted build resumes.

Usage: python tools/install_mmcv.py [--requirement requirements/mmcv.txt] [--cache DIR]
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME

#: Wheels of mmcv by CUDA and torch. The maintained fork has wheels too, of onedl-mmcv, which mmdet 3.3 does not accept.
INDEX = 'https://download.openmmlab.com/mmcv/dist'
PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check']


def pinned_version(requirement: Path) -> str:
    match = re.search(r'^mmcv==(\S+)', requirement.read_text(), flags=re.M)
    if match is None:
        raise SystemExit(f'{requirement} has no line "mmcv==VERSION"')
    return match.group(1)


def builds_with_cuda() -> bool:
    """Whether there is a GPU, and an nvcc that fits torch. FORCE_CUDA=1 or 0 overrides the choice."""
    forced = os.environ.get('FORCE_CUDA')
    if forced == '0' or (forced != '1' and not torch.cuda.is_available()):
        return False
    problem = cuda_problem()
    if problem and forced == '1':
        raise SystemExit(f'FORCE_CUDA=1, but {problem}')
    if problem:
        print(
            f'\n*** This machine has a GPU, but {problem}.\n'
            '*** mmcv gets CPU operators, and models run on the CPU. Fix this and run make env again.\n',
            flush=True,
        )
    return not problem


def cuda_problem() -> str | None:
    """Why nvcc cannot compile for the installed torch; None if it can."""
    if torch.version.cuda is None:
        return 'the installed torch is a CPU build'
    if CUDA_HOME is None:
        return 'no CUDA toolkit was found: set CUDA_HOME to the folder that holds bin/nvcc'
    nvcc = Path(CUDA_HOME) / 'bin' / 'nvcc'
    said = subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout
    release = re.search(r'release (\d+)\.', said)
    if release is None or release.group(1) != torch.version.cuda.split('.')[0]:
        found = release.group(1) if release else 'an unknown version'
        return f'torch is built for CUDA {torch.version.cuda} and {nvcc} belongs to CUDA {found}'
    return None


def wheel_key(cuda: bool) -> str:
    python = f'cp{sys.version_info.major}{sys.version_info.minor}-{sysconfig.get_platform()}'
    if not cuda:
        return f'torch{torch.__version__}-{python}-cpu'
    archs = os.environ.get('TORCH_CUDA_ARCH_LIST')
    if not archs:
        archs = ' '.join(
            sorted({'{}.{}'.format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())})
        )
    return f'torch{torch.__version__}-{python}-cu{torch.version.cuda}-sm{re.sub(r"[ ;]+", "_", archs or "default")}'


def works(version: str, cuda: bool) -> bool:
    """Whether the installed mmcv has that version and its operators load; in another process, because it may crash."""
    check = (
        'import mmcv, mmcv._ext, mmcv.ops\n'
        f'assert mmcv.__version__ == {version!r}\n'
        'from mmcv.ops import get_compiling_cuda_version\n'
        f'assert ("not available" not in get_compiling_cuda_version()) == {cuda!r}\n'
    )
    return subprocess.run([sys.executable, '-c', check], capture_output=True).returncode == 0


def find_kept(version: str, cuda: bool, folder: Path) -> Path | None:
    return next(folder.glob('mmcv-*.whl'), None)


def find_built(version: str, cuda: bool, folder: Path) -> Path | None:
    """The wheel of OpenMMLab's index for this torch and CUDA in ``folder``; None if there is none or no connection."""
    minor = '.'.join(torch.__version__.split('.')[:2])
    device = f'cu{torch.version.cuda}'.replace('.', '') if cuda else 'cpu'
    index = f'{INDEX}/{device}/torch{minor}.0/index.html'
    print(f'Looking for a built mmcv {version} in {index}', flush=True)
    command = [
        *PIP,
        'download',
        '--no-deps',
        '--only-binary',
        ':all:',
        '--no-cache-dir',
        '--no-index',
        '--find-links',
        index,
    ]
    command += ['--retries', '0', '--timeout', '10', '--dest', str(folder), f'mmcv=={version}']
    subprocess.run(command, capture_output=True)
    return next(folder.glob('mmcv-*.whl'), None)


def build(version: str, cuda: bool, folder: Path) -> Path:
    """Build mmcv's wheel in ``folder/build``, and return its path in ``folder``."""
    kind = 'CUDA' if cuda else 'CPU'
    print(f'Building mmcv {version} with {kind} operators in {folder} (once per machine)', flush=True)
    work = folder / 'build'
    work.mkdir(parents=True, exist_ok=True)
    source = work / f'mmcv-{version}'
    if not source.is_dir():
        # With build isolation mmcv builds without operators, and reports nothing.
        command = [*PIP, 'download', '--no-deps', '--no-binary', 'mmcv', '--no-cache-dir', '--no-build-isolation']
        subprocess.run([*command, '--dest', str(work), f'mmcv=={version}'], check=True)
        unpacked = work / 'unpacking'
        shutil.rmtree(unpacked, ignore_errors=True)
        with tarfile.open(next(work.glob(f'mmcv-{version}.tar.gz'))) as sdist:
            sdist.extractall(unpacked)
        (unpacked / f'mmcv-{version}').rename(source)

    env = {**os.environ, 'MMCV_WITH_OPS': '1', 'FORCE_CUDA': '1' if cuda else '0'}
    env.setdefault('MAX_JOBS', str(os.cpu_count() or 1))
    # Without debug information the build takes half the time.
    env['CFLAGS'] = f'{env.get("CFLAGS", "")} -g0 -O2'.strip()
    if cuda:
        # Headers of cuSPARSE, cuBLAS and others come with torch. Some toolkits lack them.
        headers = [str(path) for path in Path(sysconfig.get_path('purelib')).glob('nvidia/*/include')]
        env['CPATH'] = os.pathsep.join([*headers, *filter(None, [env.get('CPATH')])])
    else:
        env['CUDA_VISIBLE_DEVICES'] = ''  # mmcv builds for CUDA wherever torch sees a GPU
    out = work / 'wheel'
    shutil.rmtree(out, ignore_errors=True)
    command = [
        *PIP,
        'wheel',
        '-v',
        '--no-deps',
        '--no-cache-dir',
        '--no-build-isolation',
        '--wheel-dir',
        str(out),
        str(source),
    ]
    log = work / 'build.log'
    with (
        log.open('w') as file,
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        ) as process,
    ):
        for line in process.stdout:
            file.write(line)
            # ninja's own counter: [12/137] c++ -MMD ... -c /path/to/roi_align.cpp ...
            step = re.search(r'\[(\d+)/(\d+)\].*?([\w.]+\.(?:cpp|cu))\b', line)
            if step:
                print(f'  mmcv {step.group(1):>3} of {step.group(2)}: {step.group(3)}', flush=True)
    if process.returncode != 0:
        tail = ''.join(log.read_text().splitlines(keepends=True)[-40:])
        raise SystemExit(f'{tail}\nBuilding mmcv {version} failed; see the log {log}')
    built = next(out.glob('mmcv-*.whl'))
    wheel = folder / built.name
    built.replace(wheel)
    shutil.rmtree(work)
    return wheel


#: Where a wheel comes from, and what gives its path. The first one that works is taken.
SOURCES = {'kept from an earlier installation': find_kept, 'built by OpenMMLab': find_built, 'built here': build}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--requirement', type=Path, default=Path(__file__).parents[1] / 'requirements' / 'mmcv.txt')
    parser.add_argument('--cache', type=Path, help="folder for wheels; default: overlock_mm in the user's cache folder")
    args = parser.parse_args()
    cache = args.cache or Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'overlock_mm'

    version, cuda = pinned_version(args.requirement), builds_with_cuda()
    if works(version, cuda):
        print(f'mmcv {version} with operators is installed')
        return
    folder = cache / f'mmcv-{version}' / wheel_key(cuda)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one build at a time on this machine
        for source, find in SOURCES.items():
            wheel = find(version, cuda, folder)
            if wheel is None:
                continue
            print(f'Installing {wheel.name}, {source}', flush=True)
            subprocess.run([*PIP, 'install', '--no-deps', '--no-cache-dir', '--force-reinstall', str(wheel)], check=True)
            if works(version, cuda):
                return
            print(f'The operators of {wheel.name} do not load', flush=True)
            wheel.unlink()
    raise SystemExit(f'mmcv {version} was built and installed, but its operators do not load')


if __name__ == '__main__':
    main()
