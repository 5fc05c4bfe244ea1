"""Predictions beside the ground truth, for the validation data of a config."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.registry import DATASETS, VISUALIZERS
from mmengine.structures import BaseDataElement

from .networks import Network, load_network
from .page import Page, plt, show

LEGIBLE = 400  # the shorter side, in pixels, from which names of classes can be read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--count', type=int, default=12, help='pictures if none is named (default: 12)')
    parser.add_argument('--score', type=float, default=0.3, help='smallest score of a detection (default: 0.3)')


def run(args: argparse.Namespace, page: Page) -> None:
    if args.config is None:
        raise ValueError('predictions needs --config: its model and its validation data')
    network = load_network(None, args.config, args.checkpoint)
    dataset = DATASETS.build(network.config.val_dataloader.dataset)
    panels_of = {'mmdet': detector_panels, 'mmseg': segmentor_panels}.get(network.config.default_scope, classifier_panels)
    for index in chosen_indices(dataset, args.pictures, args.count):
        result = predict(network, dataset[index])
        file = Path(result.img_path)
        image = mmcv.imread(str(file), channel_order='rgb')
        caption = f'{file.name}, {type(network.model).__name__} with {network.name}, {network.weights}.'
        panels = panels_of(image, result, dataset.metainfo, args.score)
        page.add_figure(draw(panels), f'{file.stem}_predictions', caption)


def chosen_indices(dataset: BaseDataset, names: list[Path], count: int) -> Iterator[int]:
    """The samples of the named pictures, or the first ones.

    Raises:
        ValueError: a picture is not in the data.
    """
    if not names:
        yield from range(min(count, len(dataset)))
        return
    indices = {Path(dataset.get_data_info(i)['img_path']).name: i for i in range(len(dataset))}
    for name in names:
        if name.name not in indices:
            raise ValueError(f"PICTURE must be in the config's validation data, as {min(indices)} is, got {name}")
        yield indices[name.name]


def predict(network: Network, sample: dict) -> BaseDataElement:
    """The data sample with its ground truth and its prediction, on the CPU."""
    with torch.no_grad():
        return network.model.test_step(pseudo_collate([sample]))[0].cpu()


# Panels of a picture (H, W, 3) in RGB, by their titles. The pictures have the size of the file, as predictions have.


def detector_panels(
    image: np.ndarray, result: BaseDataElement, metainfo: dict[str, Any], score: float
) -> dict[str, np.ndarray]:
    zoom = -(-LEGIBLE // min(image.shape[:2]))
    if zoom > 1:
        image = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
        enlarge(result.gt_instances, zoom)
        enlarge(result.pred_instances, zoom)
    return drawn_panels('mmdet.DetLocalVisualizer', image, result, metainfo, pred_score_thr=score)


def segmentor_panels(
    image: np.ndarray, result: BaseDataElement, metainfo: dict[str, Any], score: float
) -> dict[str, np.ndarray]:
    return drawn_panels('mmseg.SegLocalVisualizer', image, result, metainfo, with_labels=False)


def classifier_panels(
    image: np.ndarray, result: BaseDataElement, metainfo: dict[str, Any], score: float
) -> dict[str, np.ndarray]:
    classes, scores, label = metainfo['classes'], result.pred_score, int(result.pred_label)
    if len(classes) != len(scores):
        raise ValueError(f'--config must have data with the {len(scores)} classes of its model, got {len(classes)}')
    truth = ', '.join(classes[int(i)] for i in result.gt_label)
    return {f'ground truth: {truth}\nprediction: {classes[label]}, score {scores[label]:.2g}': image}


def drawn_panels(
    visualizer_type: str, image: np.ndarray, result: BaseDataElement, metainfo: dict[str, Any], **settings
) -> dict[str, np.ndarray]:
    """The image, and with the ground truth and the prediction as the framework's visualizer draws them."""
    visualizer = VISUALIZERS.build(dict(type=visualizer_type, name='panels'))
    visualizer.dataset_meta = metainfo
    panels = {'picture': image}
    for title, truth in (('ground truth', True), ('prediction', False)):
        visualizer.add_datasample(title, image, result, draw_gt=truth, draw_pred=not truth, show=False, **settings)
        panels[title] = visualizer.get_image()
    return panels


def enlarge(instances: BaseDataElement, zoom: int) -> None:
    """Scale boxes and masks, if there are any."""
    instances.bboxes = instances.bboxes * zoom
    if 'masks' in instances:
        masks = instances.masks  # of the data: BitmapMasks or PolygonMasks; of a prediction: a Tensor
        masks = masks.numpy() if isinstance(masks, torch.Tensor) else masks.to_ndarray()
        instances.masks = masks.astype(bool).repeat(zoom, axis=1).repeat(zoom, axis=2)


def draw(panels: dict[str, np.ndarray]) -> Figure:
    height, width = next(iter(panels.values())).shape[:2]
    side = 3.5 if len(panels) > 1 else 5
    figure, axes = plt.subplots(
        1, len(panels), figsize=(side * len(panels), side * height / width + 0.8), squeeze=False, layout='compressed'
    )
    for axis, (title, image) in zip(axes[0], panels.items()):
        show(axis, image, title)
    return figure
