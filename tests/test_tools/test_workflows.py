"""The workflows and the Dockerfile call make with targets that exist, and install the pinned torch."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
import yaml
from conftest import ROOT

WORKFLOWS = sorted((ROOT / '.github' / 'workflows').glob('*.yml'))
TORCH = re.search(r'^torch==(\S+)', (ROOT / 'requirements' / 'torch.txt').read_text(), re.MULTILINE).group(1)


def commands_of(file) -> list[str]:
    if file.name == 'Dockerfile':
        return re.findall(r'^RUN (.+)', file.read_text(), re.MULTILINE)
    jobs = yaml.safe_load(file.read_text())['jobs'].values()
    return [line for job in jobs for step in job['steps'] for line in step.get('run', '').splitlines()]


@pytest.mark.parametrize('file', [ROOT / 'Dockerfile', *WORKFLOWS], ids=lambda file: file.stem)
def test_commands_exist(file):
    """make would run them: in a dry run."""
    own = [shlex.split(command) for command in commands_of(file) if command.startswith(('make ', '.ci/'))]
    assert own
    for program, *arguments in own:
        if program == 'make':
            done = subprocess.run(['make', '--dry-run', *arguments], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        else:
            assert (ROOT / program).stat().st_mode & 0o100


def test_the_pinned_torch_has_wheels():
    workflow = yaml.safe_load((ROOT / '.github' / 'workflows' / 'wheels.yml').read_text())
    assert TORCH in workflow['jobs']['wheel']['strategy']['matrix']['torch']
    assert f'torch=={TORCH}+cpu' in (ROOT / 'Dockerfile').read_text()


def test_another_torch_is_installed_on_demand():
    command = ['make', '--dry-run', '--always-make', 'wheel', 'TORCH=torch==2.10.0+cpu', 'VENV=.venv']
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert 'install -r requirements/build.txt torch==2.10.0+cpu' in done.stdout
    assert 'OVERLOCK_MM_PIN_TORCH=1' in done.stdout
