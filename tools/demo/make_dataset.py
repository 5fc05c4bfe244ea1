"""Make the demo's data set, in COCO layout: drawn objects with exact masks on real photographs.

The photographs come with scikit-image. The left 60 % of each is used for training images and the rest for validation
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

CLASSES = ('ball', 'sign', 'star', 'lifebuoy')
PHOTOGRAPHS = ('astronaut.png', 'chelsea.png', 'coffee.png', 'motorcycle_left.png', 'rocket.jpg', 'hubble_deep_field.jpg')
SIZE = 256
TRAIN_PART = 0.6
#: The light comes from above on the left, and towards the viewer.
LIGHT = np.array([-0.45, -0.6, 0.66])
#: Pixels are averages of FINE x FINE points.
FINE = 3


def draw(name: str, radius: int, angle: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Opacity (2 radius, 2 radius) and colours (2 radius, 2 radius, 3), both in 0..1, of an object of a class.

    Classes differ in outline, pattern and typical colours.
    """
    side = 2 * radius * FINE
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1
    u = columns * np.cos(angle) + rows * np.sin(angle)
    v = rows * np.cos(angle) - columns * np.sin(angle)
    inside, colours, slope = SHAPES[name](u, v, rng)
    brightness = 0.55 + 0.55 * shade(slope, columns, rows)
    colours = np.clip(colours * brightness[..., None], 0, 1)
    opacity = averaged(inside.astype(np.float64))
    return opacity, averaged(colours * inside[..., None]) / np.maximum(opacity, 1e-6)[..., None]


def shade(slope: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Light (0..1) on a surface that is inclined by ``slope`` (0..1) away from the middle of the object."""
    distance = np.maximum(np.hypot(x, y), 1e-6)
    upright = np.sqrt(1 - np.minimum(abs(slope), 1) ** 2)
    return np.clip(slope * (x * LIGHT[0] + y * LIGHT[1]) / distance + upright * LIGHT[2], 0, 1)


def averaged(values: np.ndarray) -> np.ndarray:
    side = len(values) // FINE
    return values.reshape(side, FINE, side, FINE, -1).mean(axis=(1, 3)).squeeze(-1 if values.ndim == 2 else ())


def paint(hue: float, saturation: float, rng: np.random.Generator) -> np.ndarray:
    """A colour (3,) near a hue and a saturation, both in 0..1."""
    return np.array(
        colorsys.hsv_to_rgb((hue + rng.normal(0, 0.02)) % 1, saturation * rng.uniform(0.85, 1), rng.uniform(0.85, 1))
    )


# Shapes: from coordinates in -1..1 to the points inside (H, W) bool, their colours (H, W, 3) and slopes (H, W) for `shade`.


def ball(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A beach ball: six parts around a white cap."""
    distance = np.hypot(u, v)
    part = np.floor(np.arctan2(v, u) / (np.pi / 3)).astype(int) % 3
    palette = np.stack([paint(0.6, 0.85, rng), paint(0.14, 0.85, rng), np.ones(3)])
    colours = np.where((distance < 0.2)[..., None], 1.0, palette[part])
    return distance <= 1, colours, distance


def sign(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A warning sign: a triangle with a red border and an exclamation mark."""
    v = v + 0.1
    border = np.min([0.5 - u * np.cos(a) - v * np.sin(a) for a in np.deg2rad([90, 210, 330])], axis=0)
    mark = (abs(u) < 0.09) & (v > -0.42) & (v < 0.12) | (np.hypot(u, v - 0.26) < 0.1)
    colours = np.where((border < 0.14)[..., None], paint(0.0, 0.9, rng), paint(0.14, 0.35, rng))
    return border >= 0, np.where(mark[..., None], 0.1, colours), np.zeros_like(u)


def star(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A golden star of five points, each with a bright and a dark side."""
    direction = np.arctan2(v, u) % (2 * np.pi / 5)
    from_tip = np.minimum(direction, 2 * np.pi / 5 - direction)
    x, y = 0.45 * np.cos(np.pi / 5), 0.45 * np.sin(np.pi / 5)  # a corner between two points
    reach = y / (np.cos(from_tip) * y - np.sin(from_tip) * (x - 1))
    side = np.where(direction < np.pi / 5, 1.0, 0.75)
    return np.hypot(u, v) <= reach, paint(0.13, 0.9, rng) * side[..., None], np.zeros_like(u)


def lifebuoy(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A ring with four red parts."""
    distance = np.hypot(u, v)
    is_red = np.floor(np.arctan2(v, u) / (np.pi / 4)) % 2 == 0
    colours = np.where(is_red[..., None], paint(0.02, 0.9, rng), 1.0)
    return (distance <= 1) & (distance >= 0.5), colours, (distance - 0.75) / 0.25


SHAPES = dict(zip(CLASSES, (ball, sign, star, lifebuoy)))


def background(photographs: list[np.ndarray], train: bool, rng: np.random.Generator) -> np.ndarray:
    """A random crop (SIZE, SIZE, 3) uint8 of the split's part of a photograph, flipped in half of the cases."""
    photograph = photographs[rng.integers(len(photographs))]
    border = int(photograph.shape[1] * TRAIN_PART)
    part = photograph[:, :border] if train else photograph[:, border:]
    side = int(rng.uniform(0.7, 1) * min(part.shape[:2]))
    top, left = (rng.integers(length - side + 1) for length in part.shape[:2])
    method = cv2.INTER_AREA if side > SIZE else cv2.INTER_CUBIC
    crop = cv2.resize(part[top : top + side, left : left + side], (SIZE, SIZE), interpolation=method)
    return crop[:, ::-1] if rng.uniform() < 0.5 else crop


def compose(photographs: list[np.ndarray], split: str, number: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """One image (SIZE, SIZE, 3) uint8 RGB, and the class index and visible mask of each of its objects."""
    rng = np.random.default_rng([{'train': 0, 'val': 1}[split], number])
    image = background(photographs, split == 'train', rng).astype(np.float64) / 255
    objects: list[tuple[int, np.ndarray]] = []
    areas: list[int] = []
    for _ in range(rng.integers(2, 5)):
        label = int(rng.integers(len(CLASSES)))
        radius = int(rng.integers(34, 60))
        top, left = rng.integers(-radius // 5, SIZE - 2 * radius + radius // 5, size=2)
        opacity, colours = (placed(part, top, left) for part in draw(CLASSES[label], radius, rng.uniform(-0.6, 0.6), rng))
        mask = opacity > 0.5
        # It may hide at most a quarter of each object behind it.
        remaining = [(other & ~mask).sum() for _, other in objects]
        if any(rest < 0.75 * area for rest, area in zip(remaining, areas)):
            continue
        objects = [(other_label, other & ~mask) for other_label, other in objects]
        objects.append((label, mask))
        areas.append(int(mask.sum()))
        shadow = 0.5 * cv2.GaussianBlur(np.roll(opacity, (6, 4), axis=(0, 1)), (0, 0), 5)
        image *= 1 - shadow[..., None]
        image += opacity[..., None] * (colours - image)
    image = image + rng.normal(0, 0.01, image.shape)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), objects


def placed(part: np.ndarray, top: int, left: int) -> np.ndarray:
    """A part of an image, on black. What is beyond a border is cut off."""
    matrix = np.array([[1, 0, left], [0, 1, top]], dtype=np.float64)
    return cv2.warpAffine(part, matrix, (SIZE, SIZE), flags=cv2.INTER_NEAREST)


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
        name = f'{number:06d}.jpg'
        cv2.imwrite(str(folder / name), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
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
