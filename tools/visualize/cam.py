"""Grad-CAM (Selvaraju et al., ICCV 2017) of Overview-Net and of Focus-Net, by the package grad-cam.

It shows where evidence for a class comes from. The model is a classifier: that of ``--config``, or that of
the ImageNet config of ``--arch``.
"""

from __future__ import annotations

import argparse
import importlib.util

import numpy as np
import torch
import torch.nn as nn
from export import Classifier, is_a
from matplotlib.figure import Figure
from torch import Tensor

from .networks import load_network, normalised, read_picture
from .page import Page, plt, show

BLOCKS = {'Overview-Net': 'blocks4', 'Focus-Net': 'sub_blocks4'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--size', type=int, default=224, help='side of the squares that are cut out (default: 224)')
    parser.add_argument('--class', type=int, dest='category', metavar='INDEX', help='class (default: the predicted one)')


def run(args: argparse.Namespace, page: Page) -> None:
    if importlib.util.find_spec('pytorch_grad_cam') is None:
        raise ValueError('cam needs a package of the extra overlock_mm[visualize]: pip install grad-cam')
    config = args.config or f'mmpretrain/overlock-{args.arch or "t"}_8xb256_in1k'
    network = load_network(None, config, args.checkpoint)
    if not is_a(network.model, 'ImageClassifier'):
        raise ValueError(f'cam needs a classifier, got the {type(network.model).__name__} of {config}')
    classifier = Classifier(network.model)
    blocks = {name: getattr(network.backbone, stage)[-1] for name, stage in BLOCKS.items()}
    for file in args.pictures:
        picture = read_picture(file, args.size, square=True)
        image = normalised(picture, network)
        with torch.no_grad():
            scores = classifier(image)[0].softmax(dim=0)
        category = int(scores.argmax()) if args.category is None else args.category
        if not 0 <= category < len(scores):
            raise ValueError(f'--class must be in 0..{len(scores) - 1}, got {category}')
        cams = {name: grad_cam(classifier, block, image, category) for name, block in blocks.items()}
        of_class = f'{class_name(category, len(scores))}, score {scores[category]:.2g}'
        caption = f'{file.name}, {network.name}, {network.weights}. Grad-CAM of {of_class}.'
        page.add_figure(draw(picture, cams), f'{file.stem}_cam', caption)


def grad_cam(classifier: nn.Module, block: nn.Module, image: Tensor, category: int) -> np.ndarray:
    """Grad-CAM (H, W) of a class at the output (B, C, h, w) of a block, scaled to 0..1.

    Args:
        classifier: an image (1, 3, H, W) to logits (1, classes).
        block: a part of it.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with GradCAM(classifier, [block]) as cam:
        return cam(image.clone().requires_grad_(), [ClassifierOutputTarget(category)])[0]


def class_name(category: int, num_classes: int) -> str:
    if num_classes == 1000:
        from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

        return f'class {category} ({IMAGENET_CATEGORIES[category]})'
    return f'class {category}'


def draw(picture: np.ndarray, cams: dict[str, np.ndarray]) -> Figure:
    figure, axes = plt.subplots(1, 1 + len(cams), figsize=(3.2 * (1 + len(cams)) + 0.6, 3.7), layout='compressed')
    show(axes[0], picture, 'picture')
    grey = picture.mean(axis=2).astype(np.uint8)
    for axis, (name, cam) in zip(axes[1:], cams.items()):
        show(axis, grey, name, cmap='gray', vmin=0, vmax=255)
        image = axis.imshow(cam, cmap='inferno', vmin=0, vmax=1, alpha=0.6)
    figure.colorbar(image, ax=axes, label='Grad-CAM / largest', shrink=0.8)
    return figure
