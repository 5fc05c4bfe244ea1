"""Names, addresses and configs of the released checkpoints.

``overlock_mm://overlock_t_in1k_224.pth`` names a released file wherever OpenMMLab takes a checkpoint (``init_cfg``,
``load_from``, inferencers, test scripts). Its full address works too. The file is downloaded to torch's cache when a model
first loads it.
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
    """A released checkpoint.

    Attributes:
        name: name of the file.
        family: 'classification', 'folded' (classification with folded branches), 'detection' (mmdet 2.x) or 'segmentation'
            (mmseg 0.x).
        arch: 'xt', 't', 's' or 'b'.
        config: the shipped config whose model has these weights, as in :func:`overlock_mm.list_configs`.
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


#: All released files by name.
RELEASED = _released_files()


def find_released(checkpoint: str) -> ReleasedFile:
    """Return the released file of an ``overlock_mm://NAME`` or of an address.

    Raises:
        ValueError: the release has no such file. The message has the nearest names.
    """
    name = checkpoint.removeprefix(SCHEME).removeprefix(RELEASE)
    if name not in RELEASED:
        nearest = nearest_names(name, RELEASED) or 'none'
        raise ValueError(f'the release has no file {name!r}; nearest: {nearest}. Give a file of your own by its path')
    return RELEASED[name]


def get_checkpoint(config: str) -> str:
    """Return the ``overlock_mm://NAME`` of the released weights for a shipped config.

    ``init_detector(overlock_mm.get_config_path(name), overlock_mm.get_checkpoint(name))``

    Args:
        config: a name from :func:`overlock_mm.list_configs`, such as 'mmdet/mask-rcnn_overlock-t_fpn_1x_coco'. The '.py' is
            optional.

    Raises:
        ValueError: the config does not exist or has no released weights. The message has the nearest configs with weights.
    """
    wanted = config if config.endswith('.py') else f'{config}.py'
    by_config = {file.config: file for file in RELEASED.values()}
    if wanted not in by_config:
        reason = 'there are no released weights for' if wanted in list_configs() else 'there is no config'
        raise ValueError(f'{reason} {config!r}; nearest with weights: {nearest_names(wanted, by_config) or "none"}')
    return SCHEME + by_config[wanted].name


def register_models() -> None:
    """Register the shipped configs by name with mmdet's and mmseg's inferencers and mmpretrain's model hub.

    Then ``DetInferencer('mask-rcnn_overlock-t_fpn_1x_coco')``, ``MMSegInferencer('overlock-t_upernet_...')`` and
    ``mmpretrain.get_model('overlock-t_8xb256_in1k', pretrained=True)`` find configs and weights, and ``list_models`` lists
    them. mmdet's and mmseg's inferencers refuse a config without released weights, unless they get other weights. The
    function can be called repeatedly, before or after the frameworks are imported. It skips frameworks that are
    not installed.
    """
    _register_with_mmengine()
    if importlib.util.find_spec('mmpretrain') is not None:
        _register_with_mmpretrain()


def _register_with_mmengine() -> None:
    from mmengine.infer import BaseInferencer

    if hasattr(BaseInferencer, '_models_without_overlock_mm'):
        return
    BaseInferencer._models_without_overlock_mm = staticmethod(BaseInferencer._get_models_from_metafile)

    def all_models(folder: str) -> Iterator[dict]:
        yield from BaseInferencer._models_without_overlock_mm(folder)
        for framework in ('mmdet', 'mmseg'):
            # mmengine has imported the framework before it asks for its folder.
            if framework in sys.modules and folder == BaseInferencer._get_repo_or_mim_dir(framework):
                for model in read_metafile(framework):
                    # Without weights an inferencer would draw the pictures of a random network. This name is refused.
                    yield {**model, 'Weights': model['Weights'] or f'{SCHEME}{framework}/{model["Name"]}'}

    BaseInferencer._get_models_from_metafile = staticmethod(all_models)


def _register_with_mmpretrain() -> None:
    from mmpretrain.apis.model import ModelHub

    ModelHub._register_mmpretrain_models()
    if not all(ModelHub.has(model['Name'].lower()) for model in read_metafile('mmpretrain')):
        root = config_root()
        ModelHub.register_model_index(root / 'mmpretrain' / 'metafile.yml', config_prefix=root.parent)


def read_metafile(framework: str) -> list[dict]:
    """Return the models in configs/<framework>/metafile.yml, with absolute config paths. 'Weights' may be None."""
    from mmengine.fileio import load

    root = config_root()
    models = load(str(root / framework / 'metafile.yml'))['Models']
    return [{'Weights': None, **model, 'Config': str(root.parent / model['Config'])} for model in models]
