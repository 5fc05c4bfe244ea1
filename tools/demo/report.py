"""Draw the predictions of a trained detector beside the ground truth, and the curves of its training.

Usage: python tools/demo/report.py CONFIG CHECKPOINT WORK_DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import matplotlib
import mmcv
import numpy as np
import torch
from mmdet.apis import init_detector
from mmdet.registry import DATASETS, VISUALIZERS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402


def draw_predictions(config: Config, checkpoint: str, file: Path, count: int = 9, columns: int = 3) -> None:
    """Draw ``count`` validation images into one picture, each as a pair: ground truth left, predictions right."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = init_detector(config, checkpoint, device=device)
    dataset = DATASETS.build(config.val_dataloader.dataset)
    visualizer = VISUALIZERS.build(dict(type='DetLocalVisualizer', name='report', line_width=2, alpha=0.45))
    visualizer.dataset_meta = dataset.metainfo
    pairs = []
    for index in range(min(count, len(dataset))):
        sample = dataset[index]
        with torch.no_grad():
            result = model.test_step(pseudo_collate([sample]))[0].cpu()
        image = mmcv.imread(result.img_path, channel_order='rgb')
        visualizer.add_datasample('pair', image, result, pred_score_thr=0.5, show=False)
        pairs.append(framed(visualizer.get_image()))
    pairs += [np.full_like(pairs[0], 255)] * (-len(pairs) % columns)
    rows = [np.hstack(pairs[i : i + columns]) for i in range(0, len(pairs), columns)]
    mmcv.imwrite(np.vstack(rows)[..., ::-1], str(file), [cv2.IMWRITE_JPEG_QUALITY, 88])


def framed(pair: np.ndarray, gap: int = 6) -> np.ndarray:
    return cv2.copyMakeBorder(pair, gap, gap, gap, gap, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def draw_curves(work_dir: Path, file: Path) -> None:
    """Plot losses and average precisions of all runs of a work dir, over the training iterations."""
    losses: dict[str, dict[int, float]] = {}
    precisions: dict[str, dict[int, float]] = {}
    for log in sorted(work_dir.glob('*/vis_data/scalars.json')):
        iteration = 0
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            if 'loss' in entry:
                iteration = entry['iter']
                for name, value in entry.items():
                    if name.startswith('loss'):
                        losses.setdefault(name, {})[iteration] = value
            for name in ('coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP', 'coco/segm_mAP_50'):
                if name in entry:
                    precisions.setdefault(name, {})[iteration] = entry[name]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for axis, curves, title in ((left, losses, 'training losses'), (right, precisions, 'validation AP')):
        for name, points in curves.items():
            axis.plot(list(points), list(points.values()), label=name, marker='o' if axis is right else None)
        axis.set(title=title, xlabel='iteration', ylim=(0, 1 if axis is right else None))
        axis.grid(alpha=0.3)
        if curves:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('work_dir', type=Path)
    args = parser.parse_args()
    draw_predictions(Config.fromfile(args.config), args.checkpoint, args.work_dir / 'predictions.jpg')
    draw_curves(args.work_dir, args.work_dir / 'curves.png')
    print(f'Drew {args.work_dir / "predictions.jpg"} and {args.work_dir / "curves.png"}')


if __name__ == '__main__':
    main()
