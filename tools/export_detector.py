"""Whole detectors of mmdet in a form that exporters take.

mmdet's own post-processing gives a list of results for each image, whose lengths depend on the image. Here every step has
tensors of fixed sizes: what is dropped has a score of -1, and the best K stay. Only inside of :func:`suppress` and
:func:`pool` are there sizes that depend on values. The detections are the same.

B images of H x W pixels, K detections of each. Boxes are (x1, y1, x2, y2) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor

Size = Sequence[int]  # H and W


class Detector(nn.Module):
    """A detector of mmdet: images (B, 3, H, W) to a dict of boxes (B, K, 4), scores and labels (B, K), by falling scores.

    K is ``max_per_img`` of ``test_cfg``. Where there are fewer detections, the rest has scores of 0. With a mask head there
    are also masks (B, K, H, W), of type bool.

    Args:
        model: a ``RetinaNet``, or a ``TwoStageDetector`` with an RPN and a ``StandardRoIHead`` or ``CascadeRoIHead``, such
            as Faster, Mask and Cascade R-CNN.

    Raises:
        ValueError: a part of it is another one.
    """

    def __init__(self, model: BaseModel) -> None:
        super().__init__()
        check_detector(model)
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        size = images.shape[2:]
        maps = self.model.extract_feat(images)
        if hasattr(self.model, 'roi_head'):
            rpn, head = self.model.rpn_head, self.model.roi_head
            proposals = best(suppress(candidates(rpn, maps, size), rpn.test_cfg), rpn.test_cfg)
            found = classified(head, maps, proposals, size)
        else:
            head = self.model.bbox_head
            found = candidates(head, maps, size)
        boxes, scores, labels = best(suppress(found, head.test_cfg), head.test_cfg)
        out = dict(boxes=boxes, scores=scores.clamp(min=0), labels=labels)
        if getattr(head, 'with_mask', False):
            out['masks'] = paste(masks_of(head, maps, boxes, labels), boxes, size) >= head.test_cfg.mask_thr_binary
        return out


class Candidates(NamedTuple):
    """N boxes of each image (B, N, 4), with scores (B, N) and groups (B, N).

    The score of a box that is dropped is -1. Boxes of different groups do not suppress each other: groups are labels, or
    the levels of an RPN.
    """

    boxes: Tensor
    scores: Tensor
    groups: Tensor


def candidates(head: nn.Module, maps: Sequence[Tensor], size: Size) -> Candidates:
    """The best ``nms_pre`` boxes of each level of a dense head. Groups are the labels; of an RPN, the levels."""
    class_maps, delta_maps = head(maps)
    batch = class_maps[0].shape[0]
    all_priors = head.prior_generator.grid_priors([each.shape[2:] for each in class_maps], device=class_maps[0].device)
    levels = []
    for level, (class_map, delta_map, priors) in enumerate(zip(class_maps, delta_maps, all_priors)):
        logits = class_map.permute(0, 2, 3, 1).reshape(batch, -1, head.cls_out_channels)
        scores = logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(-1)[..., :-1]
        classes = scores.shape[2]
        scores, index = top(scores.flatten(1), head.test_cfg.nms_pre)
        place = index // classes
        deltas = chosen(delta_map.permute(0, 2, 3, 1).reshape(batch, -1, 4), place)
        boxes = head.bbox_coder.decode(priors[place.flatten()], deltas.flatten(0, 1), max_shape=size).view(deltas.shape)
        groups = torch.full_like(index, level) if is_rpn(head) else index % classes
        levels.append(Candidates(boxes, _large_enough(boxes, scores, head.test_cfg.get('min_bbox_size', -1)), groups))
    return Candidates(*(torch.cat(each, dim=1) for each in zip(*levels)))


def _large_enough(boxes: Tensor, scores: Tensor, smallest: float) -> Tensor:
    if smallest < 0:
        return scores
    sides = boxes[..., 2:] - boxes[..., :2]
    return scores.where((sides > smallest).all(dim=-1), -1)


def suppress(found: Candidates, cfg: Any) -> Candidates:
    """Drop boxes whose scores are not above ``score_thr``, and those that a better box of their image and group covers."""
    import torchvision

    boxes, scores, groups = found
    image, index = (scores > cfg.get('score_thr', -1)).nonzero().unbind(dim=1)
    # One call for all images and groups: each has a place of its own in the plane.
    shift = torch.stack([groups[image, index], image], dim=1).repeat(1, 2) * (boxes.max() + 1)
    kept = torchvision.ops.nms(boxes[image, index] + shift, scores[image, index], cfg.nms.iou_threshold)
    image, index = image[kept], index[kept]
    return Candidates(boxes, torch.full_like(scores, -1).index_put((image, index), scores[image, index]), groups)


def best(found: Candidates, cfg: Any) -> Candidates:
    """The ``max_per_img`` boxes with the highest scores."""
    scores, index = top(found.scores, cfg.max_per_img)
    return Candidates(chosen(found.boxes, index), scores, chosen(found.groups[..., None], index)[..., 0])


def top(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The highest scores (B, number) of (B, N), and their places. If N is smaller, the rest has a score of -1."""
    places = scores.shape[1]
    scores, index = F.pad(scores, (0, number), value=-1.0).topk(number)
    return scores, index.clamp(max=places - 1)


def chosen(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K, C) of (B, N, C)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


# The second stage.


def classified(head: nn.Module, maps: Sequence[Tensor], proposals: Candidates, size: Size) -> Candidates:
    """A box for each proposal and label, refined by all stages of a ``StandardRoIHead`` or ``CascadeRoIHead``."""
    batch, number = proposals.scores.shape
    rois, logits = rois_of(proposals.boxes), []
    stages = list(zip(_stages(head.bbox_roi_extractor), _stages(head.bbox_head)))
    for stage, (extractor, bbox_head) in enumerate(stages, 1):
        class_logits, deltas = bbox_head(pool(extractor, maps, rois))
        logits.append(class_logits)
        if stage < len(stages):
            labels = class_logits[:, :-1].argmax(dim=1)
            boxes = bbox_head.regress_by_class(rois[:, 1:], labels, deltas, dict(img_shape=size))
            rois = torch.cat([rois[:, :1], boxes], dim=1)
    scores = (sum(logits) / len(logits)).softmax(dim=1)[:, :-1].reshape(batch, number, -1)
    scores = scores.where(proposals.scores[..., None] >= 0, -1)
    boxes = bbox_head.bbox_coder.decode(rois[:, 1:], deltas, max_shape=size).reshape(batch, number, -1, 4)
    labels = torch.arange(scores.shape[2], device=scores.device).expand_as(scores)
    return Candidates(boxes.expand(*scores.shape, 4).flatten(1, 2), scores.flatten(1), labels.flatten(1))


def masks_of(head: nn.Module, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
    """The probabilities of foreground on a grid in each box (B, K, m, m), averaged over the stages."""
    rois = rois_of(boxes)
    stages = list(zip(_stages(head.mask_roi_extractor), _stages(head.mask_head)))
    masks = sum(mask_head(pool(extractor, maps, rois)).sigmoid() for extractor, mask_head in stages) / len(stages)
    if masks.shape[1] == 1:
        return masks.reshape(*labels.shape, *masks.shape[2:])
    index = labels.reshape(-1, 1, 1, 1).expand(-1, 1, *masks.shape[2:])
    return masks.gather(1, index).reshape(*labels.shape, *masks.shape[2:])


def rois_of(boxes: Tensor) -> Tensor:
    """(B, K, 4) to (B * K, 5): each box behind the number of its image."""
    image = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    return torch.cat([image.view(-1, 1, 1).expand(-1, boxes.shape[1], 1), boxes], dim=2).flatten(0, 1)


def pool(extractor: nn.Module, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
    """RoIAlign of each box on the level of its size: (rois, C, S, S). As mmdet's ``SingleRoIExtractor``."""
    import torchvision

    maps = maps[: extractor.num_inputs]
    level_of = extractor.map_roi_levels(rois, len(maps))
    empty = (rois[:, 3:] <= rois[:, 1:3]).any(dim=1)
    out = rois.new_zeros(rois.shape[0], extractor.out_channels, *extractor.roi_layers[0].output_size)
    for level, (each, layer) in enumerate(zip(maps, extractor.roi_layers)):
        here = level_of == level
        if layer.sampling_ratio == 0:
            here &= ~empty  # they have no samples, and so zeros. OpenVINO would take samples.
        (index,) = here.nonzero(as_tuple=True)
        settings = layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned
        out = out.index_put((index,), torchvision.ops.roi_align(each, rois[index], *settings))
    return out


def paste(masks: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Masks on grids in boxes (B, K, m, m), interpolated bilinearly at the pixels of the image: (B, K, H, W).

    They are zero outside of their boxes.
    """
    x1, y1, x2, y2 = boxes.unbind(dim=2)
    rows = _weights(y1, y2, size[0], masks.shape[2])
    columns = _weights(x1, x2, size[1], masks.shape[3])
    return rows @ masks @ columns.transpose(2, 3)


def _weights(start: Tensor, end: Tensor, pixels: int, cells: int) -> Tensor:
    """Linear interpolation along one side of boxes, as a matrix: (B, K, pixels, cells)."""
    pixel = torch.arange(pixels, device=start.device) + 0.5
    position = (pixel - start[..., None]) / (end - start)[..., None] * cells - 0.5
    distance = position[..., None] - torch.arange(cells, device=start.device)
    return (1 - distance.abs()).clamp(min=0)


def _stages(part: nn.Module) -> list[nn.Module]:
    """The modules of a cascade, or the only one."""
    return list(part) if isinstance(part, nn.ModuleList) else [part]


# The check.


class Agreement(NamedTuple):
    """How the detections of a graph agree with those of mmdet, over all images."""

    of_mmdet: int
    of_graph: int
    both: int
    box: float  # the largest difference of a coordinate, in pixels, of detections that both have
    score: float
    mask: float  # the share of pixels that differ, of all pixels of their masks

    def __str__(self) -> str:
        return (
            f'{self.both} of {self.of_mmdet} detections of mmdet (and {self.of_graph - self.both} others), boxes within '
            f'{self.box:.1e} pixels, scores within {self.score:.1e}, masks equal but for {self.mask:.1e} of their pixels'
        )

    @property
    def share(self) -> float:
        """Of the detections that both have. 1 if there are none."""
        return self.both / max(self.of_mmdet, self.of_graph, 1) if self.of_mmdet or self.of_graph else 1.0


def compare(outputs: Sequence[Tensor], model: BaseModel, images: Tensor) -> Agreement:
    """Compare the outputs of a graph with what mmdet's detector predicts.

    A detection is the same if it has the same label, a box within 0.1 pixels and a score within 0.001.
    """
    counts, pixels, differences = [0, 0, 0], [0, 0], [[0.0], [0.0]]
    for found, expected in zip(zip(*outputs), predict(model, images)):
        valid = found[1] > 0
        boxes, scores, labels, *masks = (each[valid] for each in found)
        counts[0] += len(expected)
        counts[1] += len(boxes)
        for i in range(len(expected)):
            box = (boxes - expected.bboxes[i]).abs().amax(dim=1)
            score = (scores - expected.scores[i]).abs()
            same = (labels == expected.labels[i]) & (box < 0.1) & (score < 1e-3)
            if not same.any():
                continue
            j = box.where(same, torch.inf).argmin()
            counts[2] += 1
            differences[0].append(box[j].item())
            differences[1].append(score[j].item())
            if masks:
                one, other = masks[0][j], expected.masks[i]
                pixels[0] += (one ^ other).sum().item()
                pixels[1] += (one | other).sum().item()
    return Agreement(*counts, *map(max, differences), pixels[0] / max(pixels[1], 1))


def predict(model: BaseModel, images: Tensor) -> list[Any]:
    """mmdet's predictions for normalised images of one size: ``InstanceData`` for each."""
    from mmdet.structures import DetDataSample

    size = tuple(images.shape[2:])
    shapes = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    samples = model.predict(images, [DetDataSample(metainfo=shapes) for _ in images], rescale=False)
    return [sample.pred_instances for sample in samples]


# What is known.

#: Names of the classes that a part may have. Derived classes have steps of their own.
KNOWN = {
    'bbox_head': ('RetinaHead',),
    'rpn_head': ('RPNHead',),
    'roi_head': ('StandardRoIHead', 'CascadeRoIHead'),
    'roi_head.bbox_head': ('BBoxHead', 'ConvFCBBoxHead', 'Shared2FCBBoxHead', 'Shared4Conv1FCBBoxHead'),
    'roi_head.mask_head': ('FCNMaskHead',),
    'roi_head.bbox_roi_extractor': ('SingleRoIExtractor',),
    'roi_head.mask_roi_extractor': ('SingleRoIExtractor',),
    'roi_head.shared_head': (),
    'mask_head': (),
}


def is_rpn(head: nn.Module) -> bool:
    return type(head).__name__ == 'RPNHead'


def check_detector(model: BaseModel) -> None:
    """Check that :class:`Detector` knows all parts of a model.

    Raises:
        ValueError: a part is another one.
    """
    _check('the model', model, ('SingleStageDetector', 'TwoStageDetector'), derived=True)
    heads = ('rpn_head', 'roi_head') if hasattr(model, 'roi_head') else ('bbox_head',)
    for name in heads:
        if getattr(model, name, None) is None:
            raise ValueError(f'{name} must be one of {KNOWN[name]}, got None')
    for name, known in KNOWN.items():
        for part in _parts(model, name):
            _check(name, part, known)
    for module in model.modules():
        if hasattr(module, 'bbox_coder'):
            _check('bbox_coder', module.bbox_coder, ('DeltaXYWHBBoxCoder',))
        if getattr(module, 'custom_activation', False):
            raise ValueError(f'loss_cls must have no activation of its own, got {type(module.loss_cls).__name__}')
        for layer in getattr(module, 'roi_layers', ()):
            _check('roi_layer', layer, ('RoIAlign',))
            if layer.pool_mode != 'avg':
                raise ValueError(f"pool_mode of RoIAlign must be 'avg', got {layer.pool_mode!r}")
    for name in heads:
        _check_settings(name, getattr(model, name).test_cfg or {})


def _check_settings(name: str, cfg: Any) -> None:
    nms = cfg.get('nms', {})
    if set(nms) != {'type', 'iou_threshold'} or nms['type'] != 'nms':
        raise ValueError(f"nms in test_cfg of {name} must have type 'nms' and iou_threshold, and nothing else, got {nms}")
    for number in ('max_per_img',) if name == 'roi_head' else ('nms_pre', 'max_per_img'):
        if cfg.get(number, -1) <= 0:
            raise ValueError(f'{number} in test_cfg of {name} must be above 0, got {cfg.get(number)}')


def _parts(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules at a place: all stages of a cascade, or none."""
    for attribute in name.split('.'):
        model = getattr(model, attribute, None)
    return [] if model is None else _stages(model)


def _check(name: str, part: Any, known: Sequence[str], derived: bool = False) -> None:
    kinds = type(part).__mro__ if derived else [type(part)]
    if not any(kind.__name__ in known for kind in kinds):
        raise ValueError(f'{name} must be {" or ".join(known) or "left out"}, got {type(part).__name__}')
