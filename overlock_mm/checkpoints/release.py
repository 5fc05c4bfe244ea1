"""The files of the published release: the one place that knows their names and addresses.

A checkpoint is named ``overlock_mm://overlock_t_in1k_224.pth`` wherever OpenMMLab takes one (``init_cfg``, ``load_from``,
inferencers, test scripts). It is looked for in torch's cache of downloads and downloaded there once; the address itself
does as well. Nothing is downloaded before a model is asked to load it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from ..config_path import config_root, list_configs, nearest_names

RELEASE = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/'
SCHEME = 'overlock_mm://'


@dataclass(frozen=True)
class ReleasedFile:
    """A checkpoint of the release.

    Attributes:
        name: of the file.
        family: 'classification', 'folded' (classification with folded branches), 'detection' (mmdet 2.x) or 'segmentation'
            (mmseg 0.x).
        arch: 'xt', 't', 's' or 'b'.
        config: the shipped config whose model it is, as in :func:`overlock_mm.list_configs`.
    """

    name: str
    family: str
    arch: str
    config: str

    @property
    def url(self) -> str:
        return RELEASE + self.name


def _released_files() -> dict[str, ReleasedFile]:
    files = []
    for arch in ('xt', 't', 's', 'b'):
        classifier = f'mmpretrain/overlock-{arch}_8xb256_in1k.py'
        files.append(ReleasedFile(f'overlock_{arch}_in1k_224.pth', 'classification', arch, classifier))
        folded = f'mmpretrain/overlock-{arch}_deploy_in1k.py'
        files.append(ReleasedFile(f'overlock_{arch}_in1k_224_reparam.pth', 'folded', arch, folded))
    for arch, size in (('t', 'tiny'), ('s', 'small'), ('b', 'base')):
        for schedule, config in (('1x', '1x'), ('3x', 'ms-crop-3x')):
            detector = f'mmdet/mask-rcnn_overlock-{arch}_fpn_{config}_coco.py'
            files.append(ReleasedFile(f'maskrcnn{schedule}_overlock_{size}_coco.pth', 'detection', arch, detector))
        segmentor = f'mmseg/overlock-{arch}_upernet_8xb2-160k_ade20k-512x512.py'
        files.append(ReleasedFile(f'upernet_overlock_{size}_ade20k.pth', 'segmentation', arch, segmentor))
    return {file.name: file for file in files}


#: Every file of the release, by name.
RELEASED = _released_files()


def find_released(checkpoint: str) -> ReleasedFile:
    """The released file of an ``overlock_mm://NAME``, or of its address.

    Raises:
        ValueError: the release has no such file; the message has the nearest names.
    """
    name = checkpoint
    for start in (SCHEME, RELEASE):
        name = name[len(start) :] if name.startswith(start) else name
    if name not in RELEASED:
        raise ValueError(f'the release has no file {name!r}; nearest: {nearest_names(name, RELEASED) or "none"}')
    return RELEASED[name]


def get_checkpoint(config: str) -> str:
    """``overlock_mm://NAME`` of the released weights of a shipped config, for whatever takes a checkpoint.

    ``init_detector(overlock_mm.get_config_path(name), overlock_mm.get_checkpoint(name))``

    Args:
        config: as in :func:`overlock_mm.list_configs`, such as 'mmdet/mask-rcnn_overlock-t_fpn_1x_coco'; '.py' may be left
            out.

    Raises:
        ValueError: nothing was released for this config; the message has the nearest configs with weights.
    """
    wanted = config if config.endswith('.py') else f'{config}.py'
    by_config = {file.config: file for file in RELEASED.values()}
    if wanted not in by_config:
        reason = 'nothing was released for' if wanted in list_configs() else 'there is no config'
        raise ValueError(f'{reason} {config!r}; nearest with weights: {nearest_names(wanted, by_config) or "none"}')
    return SCHEME + by_config[wanted].name


def register_models() -> None:
    """Make the shipped configs known by name to mmdet's and mmseg's inferencers and to mmpretrain's model hub.

    After it ``DetInferencer('mask-rcnn_overlock-t_fpn_1x_coco')``, ``MMSegInferencer('overlock-t_upernet_...')`` and
    ``mmpretrain.get_model('overlock-t_8xb256_in1k', pretrained=True)`` find config and weights as they find those of their
    own frameworks, and their ``list_models`` show them. It may be called more than once, and before or after the import
    of the frameworks; those that are not installed are left alone.
    """
    _register_with_mmengine()
    if importlib.util.find_spec('mmpretrain') is not None:
        _register_with_mmpretrain()


def _register_with_mmengine() -> None:
    from mmengine.infer import BaseInferencer

    if hasattr(BaseInferencer, '_models_without_overlock_mm'):
        return
    BaseInferencer._models_without_overlock_mm = staticmethod(BaseInferencer._get_models_from_metafile)

    def models_with_ours(folder: str) -> Iterator[dict]:
        yield from BaseInferencer._models_without_overlock_mm(folder)
        for framework in ('mmdet', 'mmseg'):
            # mmengine imports the framework whose folder it asks for.
            if framework in sys.modules and folder == BaseInferencer._get_repo_or_mim_dir(framework):
                yield from read_metafile(framework)

    BaseInferencer._get_models_from_metafile = staticmethod(models_with_ours)


def _register_with_mmpretrain() -> None:
    from mmpretrain.apis.model import ModelHub

    ModelHub._register_mmpretrain_models()
    if not all(ModelHub.has(model['Name'].lower()) for model in read_metafile('mmpretrain')):
        root = config_root()
        ModelHub.register_model_index(root / 'mmpretrain' / 'metafile.yml', config_prefix=root.parent)


def read_metafile(framework: str) -> list[dict]:
    """The models of configs/<framework>/metafile.yml, their configs by absolute paths; 'Weights' is None without any."""
    from mmengine.fileio import load

    root = config_root()
    models = load(str(root / framework / 'metafile.yml'))['Models']
    return [{'Weights': None, **model, 'Config': str(root.parent / model['Config'])} for model in models]
