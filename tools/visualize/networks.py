"""What all kinds of pictures need: a network with its weights, photographs, and the maps inside of the network."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional, Union

import cv2
import numpy as np
import torch
import torch.nn as nn
from export import build_model, load_config
from mmengine.config import Config
from mmengine.runner import load_checkpoint
from torch import Tensor

from overlock_mm.checkpoints.loading import load_pretrained
from overlock_mm.models import OverLoCK
from overlock_mm.models.overlock import ARCHITECTURES, LONG_NAMES

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
#: Of ImageNet, in RGB: for a backbone by itself, and for configs that name none.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Network(NamedTuple):
    """A network that is looked at, in evaluation mode.

    Attributes:
        model: the whole model of a config, or the backbone.
        config: None for a backbone by itself.
        weights: where they come from, for captions.
    """

    model: nn.Module
    config: Optional[Config]
    weights: str

    @property
    def backbone(self) -> OverLoCK:
        return getattr(self.model, 'backbone', self.model)

    @property
    def name(self) -> str:
        return f'OverLoCK-{arch_of(self.backbone).upper()}'

    @property
    def has_random_weights(self) -> bool:
        return self.weights == 'random weights'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    names = (*ARCHITECTURES, *LONG_NAMES)
    which.add_argument('--arch', choices=names, metavar='ARCH', help=f'a backbone: {", ".join(names)} (default: t)')
    which.add_argument('--config', help='a model: config file, or a name from overlock_mm.list_configs()')
    parser.add_argument('--checkpoint', metavar='FILE', help='a path, an address, or overlock_mm://NAME (default: random)')


def load_network(arch: Optional[str], config: Optional[str], checkpoint: Optional[str], seed: int = 0) -> Network:
    """The model of a config, or a backbone by itself. Random weights are the same in every run.

    Raises:
        OSError: a file is missing or damaged, or the download failed.
        ValueError: the backbone of the config is no OverLoCK, or the checkpoint does not fit.
    """
    torch.manual_seed(seed)
    cfg = None
    if config is None:
        model = OverLoCK(arch or 't')
        if checkpoint is not None:
            load_pretrained(model, checkpoint)
    else:
        cfg = load_config(config)
        model = build_model(cfg)
        if not isinstance(getattr(model, 'backbone', None), OverLoCK):
            raise ValueError(f'--config must have an OverLoCK as its backbone, got {type(model).__name__} with another')
        if checkpoint is not None:
            try:
                load_checkpoint(model, checkpoint, map_location='cpu', strict=True)
            except RuntimeError as error:  # the names that are missing or unknown
                raise ValueError(f'--checkpoint does not fit --config: {error}') from error
    model.eval().requires_grad_(False)
    return Network(model, cfg, 'random weights' if checkpoint is None else f'weights of {Path(checkpoint).name}')


def arch_of(backbone: OverLoCK) -> str:
    """'xt', 't', 's' or 'b', or 'custom' for an architecture given as a dict."""
    if not isinstance(backbone.arch, str):
        return 'custom'
    name = backbone.arch.removeprefix('overlock_')
    return LONG_NAMES.get(name, name)


# Photographs.


def find_pictures(paths: Iterable[Path]) -> list[Path]:
    """The files among paths, and the images in those that are folders.

    Raises:
        ValueError: a path does not exist, or there is no image.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise ValueError(f'PICTURE must be an image or a folder of images, got {path}, which does not exist')
        found += sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not found:
        raise ValueError(f'PICTURE must be an image or a folder of images, got {" ".join(map(str, paths))}: no image')
    return found


def read_picture(file: Path, size: int, square: bool = False) -> np.ndarray:
    """An image, (H, W, 3) in RGB of 0..255, resized to a shorter side of ``size``, and cropped at its centre if ``square``.

    Raises:
        ValueError: the file is no image.
    """
    picture = cv2.imread(str(file))
    if picture is None:
        raise ValueError(f'PICTURE must be an image, got {file}')
    height, width = picture.shape[:2]
    scale = size / min(height, width)
    shape = max(size, round(width * scale)), max(size, round(height * scale))
    picture = cv2.resize(picture, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)[..., ::-1]
    if square:
        top, left = (picture.shape[0] - size) // 2, (picture.shape[1] - size) // 2
        picture = picture[top : top + size, left : left + size]
    return np.ascontiguousarray(picture)


def normalised(picture: np.ndarray, network: Optional[Network] = None) -> Tensor:
    """The input (1, 3, H, W) for a picture (H, W, 3) in RGB."""
    preprocessor = getattr(network.model, 'data_preprocessor', None) if network is not None else None
    mean, std = (getattr(preprocessor, name, None) for name in ('mean', 'std'))
    mean = torch.tensor(MEAN) if mean is None else mean.flatten().cpu()
    std = torch.tensor(STD) if std is None else std.flatten().cpu()
    image = (torch.from_numpy(picture).float() - mean) / std
    return image.permute(2, 0, 1).unsqueeze(0)


# Maps inside of a network.

Output = Union[Tensor, tuple[Tensor, ...]]


@contextlib.contextmanager
def recorded(layers: dict[str, nn.Module]) -> Iterator[dict[str, Output]]:
    """Context that records the outputs of layers, by their names."""
    outputs: dict[str, Output] = {}

    def record(name: str) -> Callable:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    hooks = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def as_map(output: Output) -> Tensor:
    """One map (B, C, H, W) for the output of a block.

    Blocks of Focus-Net give features and context, which become [x, h]. Those of Swin give tokens (B, H * W, C) of a square.
    """
    if not isinstance(output, Tensor):
        return torch.cat(output, dim=1)
    if output.ndim == 3:
        side = math.isqrt(output.shape[1])
        return output.transpose(1, 2).unflatten(2, (side, side))
    return output
