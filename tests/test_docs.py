"""README.md and the pages in docs: their commands and code run, their links lead somewhere, their figures have a source.

A fenced block is checked by its language:

- ``python``: runs, after the earlier blocks of its page.
- ``python title="mine.py"``: a config. It is written to this file. Its model, optimizer, hooks and visualizer are built.
- ``bash``: runs. ``python tools/train.py`` trains one epoch or one iteration if the data of its config are there, and else
  builds the model; so do launchers. Other tools are asked whether they know the options. ``make`` prints its commands.
- ``text``, ``bibtex``: not code.

``<!-- not run: REASON -->`` above a block says why it is not run. ``<!-- config: NAME -->`` above a python block makes its
lines settings of the shipped config NAME, and checks that config.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, import_file
from mmengine.config import Config
from mmengine.registry import HOOKS, OPTIMIZERS, VISUALIZERS
from mmengine.registry.utils import init_default_scope

pytest.importorskip('mmdet', reason='the blocks use the three frameworks')
pytest.importorskip('mmseg', reason='the blocks use the three frameworks')
pytest.importorskip('mmpretrain', reason='the blocks use the three frameworks')

sys.path.insert(0, str(ROOT / 'tests' / 'test_configs'))
from config_checks import build, parameter_settings

from overlock_mm.checkpoints.release import RELEASED
from overlock_mm.config_path import get_config_path
from overlock_mm.models import conversion
from overlock_mm.models.overlock import ARCHITECTURES
from overlock_mm.versions import SUPPORTED, supported_range

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
FENCE = re.compile(r'^( *)```(.*)\n(?s:(.*?))^ *```$', re.MULTILINE)
MARK = re.compile(r'<!-- (not run|config): (.+) -->\n *$')

pages = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)


@dataclass
class Block:
    line: int
    language: str
    title: str | None
    mark: str | None
    argument: str | None
    text: str


def blocks_of(page: Path) -> list[Block]:
    content = page.read_text()
    found = []
    for match in FENCE.finditer(content):
        indent, info, text = match.groups()
        title = re.search(r'title="(.+?)"', info)
        mark = MARK.search(content[: match.start() + len(indent)])
        found.append(
            Block(
                line=content.count('\n', 0, match.start()) + 1,
                language=info.split(' ')[0],
                title=title and title.group(1),
                mark=mark and mark.group(1),
                argument=mark and mark.group(2),
                text=re.sub(f'^{indent}', '', text, flags=re.MULTILINE),
            )
        )
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder: the checkout's tools and configs, a picture, data in COCO format and as masks."""
    for name in ('tools', 'configs'):
        (tmp_path / name).symlink_to(ROOT / name)
    # Narrow pictures stay small when detectors enlarge their longer side to 1333.
    picture = np.random.default_rng(0).integers(0, 256, (36, 960, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'picture.jpg'), picture)
    categories = [dict(id=1, name='cat'), dict(id=2, name='dog')]
    for split in ('train', 'val'):
        for name in (split, f'masks/{split}'):
            (tmp_path / 'mine' / name).mkdir(parents=True)
        (tmp_path / 'mine' / 'annotations').mkdir(exist_ok=True)
        images, annotations = [], []
        for i in range(2):
            cv2.imwrite(str(tmp_path / 'mine' / split / f'{i}.jpg'), picture)
            cv2.imwrite(str(tmp_path / 'mine' / 'masks' / split / f'{i}.png'), picture[..., 0] % 3)
            images.append(dict(id=i, file_name=f'{i}.jpg', height=36, width=960))
            for category in (1, 2):
                left = 40 * category
                outline = [left, 2, left + 30, 2, left + 30, 14, left, 14]
                annotations.append(
                    dict(id=10 * i + category, image_id=i, category_id=category, bbox=[left, 2, 30, 12], area=360,
                         iscrowd=0, segmentation=[outline])
                )  # fmt: skip
        content = json.dumps(dict(images=images, annotations=annotations, categories=categories))
        (tmp_path / 'mine' / 'annotations' / f'{split}.json').write_text(content)

    # T with one block a stage: its maps have the same channels.
    monkeypatch.setitem(ARCHITECTURES, 't', {**ARCHITECTURES['t'], 'depths': (1, 1, 1, 1), 'sub_depths': (1, 1)})
    conversion._backbone_weights.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', write_released)
    # mmengine formats the config of a run for its log, which takes seconds.
    monkeypatch.setattr(Config, 'pretty_text', property(lambda cfg: repr(cfg.to_dict())))
    yield tmp_path
    conversion._backbone_weights.cache_clear()


def write_released(url: str, file: str) -> None:
    """Write random weights in the form of a released file, in place of its download."""
    released = RELEASED[url.rsplit('/', 1)[-1]]
    cfg = Config.fromfile(get_config_path(released.config))
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    weights = {name: value for name, value in build(cfg).state_dict().items() if not name.startswith('data_prep')}
    weights = conversion.to_released_names(weights, conversion.describe_checkpoint(weights))
    number = dict(detection=80, segmentation=150).get(released.family)
    meta = dict(CLASSES=tuple(map(str, range(number or 0))), PALETTE=[[0, 0, 0]] * (number or 0))
    torch.save(dict(meta=meta, state_dict=weights) if number else weights, file)


def check_config(cfg: Config) -> None:
    """Build everything of a config that needs no data."""
    init_default_scope(cfg.default_scope)
    model = build(cfg, 'meta')
    assert set(parameter_settings(model, cfg)) == {name for name, p in model.named_parameters() if p.requires_grad}
    OPTIMIZERS.build({**cfg.optim_wrapper.optimizer, 'params': [torch.nn.Parameter(torch.zeros(1))]})
    VISUALIZERS.build({**cfg.visualizer, 'name': os.urandom(4).hex(), 'save_dir': '.'})
    for hook in [*cfg.default_hooks.values(), *cfg.get('custom_hooks', [])]:
        HOOKS.build(copy.deepcopy(hook))


def run_tool(words: list[str]) -> None:
    """Run a script of this project as the command ``python WORDS...``, as far as the machine and the data allow."""
    launched = [word for word in words if word.endswith(('tools/train.py', 'tools/test.py'))]
    if launched:
        words = words[words.index(launched[0]) :]
    script = Path(words[0])
    if script.resolve().is_relative_to(ROOT) and not launched:
        check_options(words)
        if script.name == 'export.py':
            check_export(words)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', words)
        if launched:
            run_framework(import_file(script), is_alone='--launcher' not in words)
        else:  # a script of a framework
            runpy.run_path(str(script), run_name='__main__')


def check_options(words: list[str]) -> None:
    """Call a script with --help, and look for the options of a command in its answer."""
    answer = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(answer), pytest.raises(SystemExit) as end:
        patch.setattr(sys, 'argv', [words[0], '--help'])
        patch.syspath_prepend(str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name='__main__')
    assert not end.value.code
    options = {word for word in words if word.startswith('--')}
    known = set(re.findall(r'--[a-z][a-z0-9-]*', answer.getvalue()))
    assert options <= known, f'{words[0]} does not know {options - known}'


def check_export(words: list[str]) -> None:
    """Do what a command of tools/export.py does before it reads the checkpoint."""
    pytest.importorskip('openvino', reason='the extra "deploy" is not installed')
    if not hasattr(torch.compiler, '_is_exporting_flag'):
        pytest.skip('torch < 2.7 does not say that it exports')
    tool = import_file(Path(words[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', words)
        args = tool.parse_args()
    with torch.device('meta'):
        model = tool.build_model(tool.load_config(args.config, args.cfg_options))
    tool.part_to_export(model, args.backbone_only)


def run_framework(tool, is_alone: bool) -> None:
    """Train or test with the parsed command line of tools/train.py or tools/test.py."""
    args = tool.parse_args()
    cfg = tool.load_config(args)
    is_training = hasattr(tool, 'apply')
    if is_training:
        tool.apply(args, cfg)
    else:
        cfg.load_from = args.checkpoint
    dataset = cfg.train_dataloader.dataset
    if not is_alone or not Path(dataset.data_root).is_dir():
        check_config(cfg)
        return
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    if 'max_epochs' in cfg.train_cfg:
        cfg.train_cfg.max_epochs = 1
    else:
        cfg.train_cfg.update(max_iters=1, val_interval=1)
        for head in ('decode_head', 'auxiliary_head'):
            cfg.model[head].channels = 16  # UPerNet has 512, which takes most of the time
    runner = tool.build_runner(cfg)
    if is_training:
        before = copy.deepcopy(runner.model.state_dict())
        runner.train()
        assert any(not torch.equal(value, before[name]) for name, value in runner.model.state_dict().items())
    else:
        assert runner.test()


def run_bash(text: str, folder: Path) -> None:
    """Run a block in bash. Its calls of Python scripts are recorded, and then run in this process, with its imports."""
    programs, record = folder / '.programs', folder / '.record'
    programs.mkdir(exist_ok=True)
    record.write_text('')
    recorder = f'printf "%s\\0" "$@" >>{record}; printf "\\n" >>{record}'
    python = f'case "$1 $2" in -c*|"-m overlock_mm"*) exec {sys.executable} "$@";; esac\n{recorder}'
    for name, script in dict(python=python, srun=recorder, make=f'exec {shutil.which("make")} -n -C {ROOT} "$@"').items():
        (programs / name).write_text(f'#!/bin/sh\n{script}\n')
        (programs / name).chmod(0o755)
    environment = {**os.environ, 'PATH': f'{programs}:{os.environ["PATH"]}', 'PYTHONPATH': str(ROOT)}
    command = ['bash', '-euo', 'pipefail', '-c', text]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for call in record.read_text().split('\0\n')[:-1]:
        run_tool(call.split('\0'))


def check_block(block: Block, folder: Path, namespace: dict) -> None:
    if block.mark == 'not run' or block.language in ('text', 'bibtex', 'cpp'):
        return
    if block.language == 'bash':
        run_bash(block.text, folder)
    elif block.title is not None:
        (folder / block.title).write_text(block.text)
        check_config(Config.fromfile(block.title))
    elif block.mark == 'config':
        (folder / 'settings.py').write_text(f'_base_ = [{get_config_path(block.argument)!r}]\n{block.text}')
        check_config(Config.fromfile('settings.py'))
    else:
        exec(compile(block.text, 'block', 'exec'), namespace)


@pytest.mark.filterwarnings('ignore')
@pages
def test_blocks_run(page, folder):
    namespace = {}
    for block in blocks_of(page):
        try:
            check_block(block, folder, namespace)
        except (Exception, SystemExit) as error:
            raise AssertionError(f'{page.relative_to(ROOT)}, line {block.line}:\n{block.text}') from error


@pages
def test_blocks_have_a_language(page):
    languages = {'python', 'bash', 'text', 'bibtex', 'cpp'}
    assert {block.language for block in blocks_of(page)} <= languages
    # An indented block after an empty line would not be found.
    text = FENCE.sub('', page.read_text())
    assert not re.search(r'(?<=\n\n)    (?! *[-*\d])\S', text)


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r'^#+ (.+)$', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pages
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        if target.startswith(('https://', 'http://')):
            continue
        name, _, anchor = target.partition('#')
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), target


def metafile_results(file: Path) -> dict[str, dict[str, float]]:
    """Return the metrics of the models in a metafile, by the name of the model. The first value of a name counts."""
    found = {}
    content = yaml.safe_load(file.read_text())
    for model in content if isinstance(content, list) else content['Models']:
        results = model.get('Results') or []
        metrics = {}
        for result in results if isinstance(results, list) else [results]:
            for name, value in result['Metrics'].items():
                metrics.setdefault(name, value)
        found[model['Name']] = metrics
    return found


@functools.lru_cache
def framework_results(module: str) -> dict[str, dict[str, float]]:
    configs = Path(sys.modules[module].__file__).parent / '.mim' / 'configs'
    found = {}
    for family in ('convnext', 'swin', 'swin_transformer'):
        for file in (configs / family).glob('metafile.y*ml'):
            found.update(metafile_results(file))
    return found


#: Models of the installed frameworks in the table of the README: those of ConvNeXt and of Swin for T, S and B.
OTHERS = {
    'fpn_1x': ('mmdet', [None] * 3, ['mask-rcnn_swin-t-p4-w7_fpn_1x_coco', None, None]),
    'fpn_ms': (
        'mmdet',
        ['mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco', None, None],
        ['mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco', 'mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco', None],
    ),
    'upernet': (
        'mmseg',
        [f'convnext-{size}_upernet_8xb2-amp-160k_ade20k-512x512' for size in ('tiny', 'small', 'base')],
        [f'swin-{size}-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512' for size in ('tiny', 'small', 'base')],
    ),
    'in1k': (
        'mmpretrain',
        ['convnext-tiny_32xb128_in1k', 'convnext-small_32xb128_in1k', 'convnext-base_3rdparty_in1k'],
        [f'swin-{size}_3rdparty_in1k' for size in ('tiny', 'small', 'base')],
    ),
}


def shown(metrics: dict[str, float] | None) -> str:
    if not metrics:
        return '–'
    names = ('box AP', 'mask AP') if 'box AP' in metrics else ('mIoU',) if 'mIoU' in metrics else ('Top 1 Accuracy',)
    return ' / '.join(str(metrics[name]) for name in names)


def test_accuracies_are_those_of_the_metafiles():
    import mmdet  # noqa: F401
    import mmpretrain  # noqa: F401
    import mmseg  # noqa: F401

    rows = re.findall(r'\[(XT|T|S|B)\]\((configs/\S+?)\), \[weights\]\((\S+?)\) \| (.+?) \| (.+?) \| (.+?) \|', readme())
    assert len(rows) == 13
    for arch, config, weights, ours, convnext, swin in rows:
        name, released = Path(config).stem, RELEASED[weights.rsplit('/', 1)[-1]]
        assert (released.url, f'configs/{released.config}', released.arch) == (weights, config, arch.lower())
        assert ours == shown(metafile_results(ROOT / Path(config).parent / 'metafile.yml')[name])
        kind = next(kind for kind in OTHERS if kind in name)
        module, *others = OTHERS[kind]
        for cell, models in zip((convnext, swin), others):
            model = None if arch == 'XT' else models['TSB'.index(arch)]
            assert cell == shown(framework_results(module)[model] if model else None)


#: Messages on the page of troubleshooting that are those of other packages.
OTHERS_MESSAGES = (
    'No module named', 'MMCV==', 'A module that was compiled using NumPy', 'operator torchvision::nms',
    'OverLoCK is not in the', 'Given groups=1', 'in child config', 'need at least one array', '… is not a meta file',
    'Target …', 'Weights only load failed', 'size mismatch for', 'Expected more than 1 value', 'CheckpointError',
    'indices element out of data bounds',
)  # fmt: skip


def test_messages_are_those_of_the_package():
    files = [ROOT / 'setup.py', *(ROOT / 'overlock_mm').rglob('*.py'), *(ROOT / 'tools').glob('*.py')]
    files += (ROOT / 'overlock_mm' / 'ops' / 'csrc').rglob('*.h')
    # Messages go over several lines of the sources.
    sources = [re.sub(r"""['"]\s*\n\s*f?['"]""", '', file.read_text()) for file in files]
    rows = re.findall(r'^\| `(.+?)`', (ROOT / 'docs' / 'troubleshooting.md').read_text(), re.MULTILINE)
    own = [message for message in rows if not message.startswith(OTHERS_MESSAGES)]
    assert len(own) > 20
    for message in own:
        assert any(all(part in source for part in message.split('…')) for source in sources), message


def readme() -> str:
    return (ROOT / 'README.md').read_text()


def project() -> dict:
    return pytest.importorskip('tomllib', reason='reads pyproject.toml').loads((ROOT / 'pyproject.toml').read_text())[
        'project'
    ]


def test_readme_is_short():
    assert len(readme().splitlines()) <= 110


def test_badges_are_true():
    badges = dict(re.findall(r'badge/(\w+)-(.+?)-\w+\)', readme()))
    assert badges['license'].replace('--', '-') == project()['license']['text']
    assert badges['python'].replace('%E2%89%A5%20', '>=') == project()['requires-python']
    assert badges['torch'].replace('%E2%89%A5%20', 'torch>=') == supported_range('torch')
    assert badges['arXiv'] in project()['urls']['Paper']


def test_extras_have_the_supported_versions():
    extras = project()['optional-dependencies']
    for module, extra in (('mmdet', 'detection'), ('mmseg', 'segmentation'), ('mmpretrain', 'classification')):
        assert {supported_range('mmengine'), supported_range(module)} <= set(extras[extra])
    assert import_file(ROOT / 'setup.py').torch_requirement() == supported_range('torch')
    named = set(re.search(r'"\.\[(.+)\]"', readme()).group(1).split(','))
    assert named == extras.keys() - {'deploy', 'timm', 'visualize'}
    assert set(SUPPORTED) == {'torch', 'mmengine', 'mmdet', 'mmseg', 'mmpretrain', 'timm'}
