"""Build steps that pyproject.toml cannot say; the metadata is there."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
#: Tools that work on a checkout, and would write into it.
CHECKOUT_ONLY = ('demo', 'install_mmcv.py')


class BuildWithConfigs(build_py):
    """Puts configs and tools into the package as .mim, where OpenMMLab's packages keep them.

    An editable install needs no copy: there they are beside the package.
    """

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in ('configs', 'tools'):
                target = Path(self.build_lib) / 'overlock_mm' / '.mim' / name
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns('__pycache__', *CHECKOUT_ONLY))


setup(cmdclass={'build_py': BuildWithConfigs})
