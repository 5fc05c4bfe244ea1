"""Make the demo's data set, in COCO layout: drawn objects with exact masks on real photographs.

The photographs come with scikit-image. The left 70 % of each is used for training images and the rest for validation
images, so the two have no background in common. Each image depends only on its split and its number, so every run makes the
same images.

Usage: python tools/demo/make_dataset.py data/demo [--train 200] [--val 50]
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import skimage
from pycocotools import mask as coco_mask
from tqdm import tqdm

#: The classes, and the hues (of 0..1) of the two colours of each.
HUES = {'ball': (0.60, 0.15), 'sign': (0.15, 0.0), 'star': (0.80, 0.80), 'lifebuoy': (0.0, 0.5)}
CLASSES = tuple(HUES)
PHOTOGRAPHS = (
    'astronaut.png', 'chelsea.png', 'coffee.png', 'motorcycle_left.png', 'rocket.jpg', 'brick.png', 'grass.png',
    'gravel.png', 'hubble_deep_field.jpg', 'camera.png',
)  # fmt: skip
SIZE = 128
TRAIN_PART = 0.7


def object_at(
    name: str, x: float, y: float, radius: float, angle: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mask (SIZE, SIZE) bool and colours (SIZE, SIZE, 3) in 0..1 of an object of a class around (x, y).

    Classes differ in outline, pattern and typical colours.
    """
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    u = ((columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)) / radius
    v = ((rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)) / radius
    distance, direction = np.hypot(u, v), np.arctan2(v, u)
    if name == 'ball':
        mask, pattern = distance <= 1, distance < 0.45
    elif name == 'sign':
        # Distance to the nearest of the three sides, of an equilateral triangle.
        inside = np.min([0.5 - u * np.cos(a) - v * np.sin(a) for a in np.deg2rad([90, 210, 330])], axis=0)
        mask, pattern = inside >= 0, inside < 0.14
    elif name == 'star':
        reach = 0.42 + 0.58 * abs((direction / (2 * np.pi / 5)) % 1 * 2 - 1) ** 1.5
        mask, pattern = distance <= reach, np.zeros_like(u, dtype=bool)
    else:
        mask, pattern = (distance <= 1) & (distance >= 0.5), np.floor(direction / (np.pi / 4)) % 2 == 0
    one, two = (
        np.array(colorsys.hsv_to_rgb((hue + rng.normal(0, 0.02)) % 1, rng.uniform(*saturation), rng.uniform(0.75, 1)))
        for hue, saturation in zip(HUES[name], ((0.7, 1), (0.0, 0.8)))
    )
    light = np.clip(0.9 - 0.25 * (u * np.cos(angle) - v * np.sin(angle)), 0.5, 1.2)[..., None]
    return mask, np.clip(np.where(pattern[..., None], two, one) * light, 0, 1)


def background(photographs: list[np.ndarray], train: bool, rng: np.random.Generator) -> np.ndarray:
    """A random crop (SIZE, SIZE, 3) uint8 of the split's part of a photograph, flipped in half of the cases."""
    photograph = photographs[rng.integers(len(photographs))]
    border = int(photograph.shape[1] * TRAIN_PART)
    part = photograph[:, :border] if train else photograph[:, border:]
    side = int(rng.uniform(0.5, 1) * min(part.shape[:2]))
    top, left = (rng.integers(length - side + 1) for length in part.shape[:2])
    crop = cv2.resize(part[top : top + side, left : left + side], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return crop[:, ::-1] if rng.uniform() < 0.5 else crop


def compose(photographs: list[np.ndarray], split: str, number: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """One image (SIZE, SIZE, 3) uint8 RGB, and the class index and visible mask of each of its objects."""
    rng = np.random.default_rng([{'train': 0, 'val': 1}[split], number])
    image = background(photographs, split == 'train', rng).astype(np.float64) / 255
    objects: list[tuple[int, np.ndarray]] = []
    areas: list[int] = []
    for _ in range(rng.integers(1, 4)):
        label = int(rng.integers(len(CLASSES)))
        radius = rng.uniform(18, 30)
        x, y = rng.uniform(radius * 0.8, SIZE - radius * 0.8, size=2)
        mask, colours = object_at(CLASSES[label], x, y, radius, rng.uniform(0, 2 * np.pi), rng)
        # It may hide at most half of each object behind it.
        remaining = [(other & ~mask).sum() for _, other in objects]
        if any(rest < 0.5 * area for rest, area in zip(remaining, areas)):
            continue
        objects = [(other_label, other & ~mask) for other_label, other in objects]
        objects.append((label, mask))
        areas.append(int(mask.sum()))
        image[mask] = colours[mask]
    image = image + rng.normal(0, 0.02, image.shape)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), objects


def annotate(objects: list[tuple[int, np.ndarray]], image_id: int, first_id: int) -> list[dict]:
    annotations = []
    for offset, (label, mask) in enumerate(objects):
        encoded = coco_mask.encode(np.asfortranarray(mask))
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        left, top = int(columns[0]), int(rows[0])
        annotations.append(
            dict(
                id=first_id + offset,
                image_id=image_id,
                category_id=label + 1,
                bbox=[left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                area=int(mask.sum()),
                segmentation=dict(size=[SIZE, SIZE], counts=encoded['counts'].decode()),
                iscrowd=0,
            )
        )
    return annotations


def make_split(root: Path, split: str, count: int, photographs: list[np.ndarray]) -> None:
    folder, file = root / f'{split}2017', root / 'annotations' / f'instances_{split}2017.json'
    info = dict(description='drawn objects on photographs', version=hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
    made = json.loads(file.read_text()) if file.is_file() else {}
    if made.get('info') == info and len(made['images']) == count:
        print(f'{folder}: {count} images are there')
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file.parent.mkdir(exist_ok=True)
    images, annotations = [], []
    for number in tqdm(range(count), desc=str(folder), unit='image'):
        image, objects = compose(photographs, split, number)
        name = f'{number:06d}.png'
        cv2.imwrite(str(folder / name), image[..., ::-1])
        images.append(dict(id=number, file_name=name, height=SIZE, width=SIZE))
        annotations += annotate(objects, number, len(annotations) + 1)
    categories = [dict(id=index + 1, name=name) for index, name in enumerate(CLASSES)]
    # The annotations are written last, in one step: they mark the split as complete.
    unfinished = file.with_suffix('.unfinished')
    unfinished.write_text(json.dumps(dict(info=info, images=images, annotations=annotations, categories=categories)))
    unfinished.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', type=Path, help='folder to make')
    parser.add_argument('--train', type=int, default=200, help='number of training images')
    parser.add_argument('--val', type=int, default=50, help='number of validation images')
    args = parser.parse_args()
    shipped = Path(skimage.__file__).parent / 'data'
    photographs = [cv2.imread(str(shipped / name), cv2.IMREAD_COLOR)[..., ::-1] for name in PHOTOGRAPHS]
    make_split(args.root, 'train', args.train, photographs)
    make_split(args.root, 'val', args.val, photographs)


if __name__ == '__main__':
    main()
