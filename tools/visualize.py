"""Draw what an OverLoCK network sees: PNG files, and a page with all of them that needs no other file (index.html).

    python tools/visualize.py erf --arch t --checkpoint overlock_mm://overlock_t_in1k_224.pth --out maps PICTURE...
    python tools/visualize.py predictions --config mmdet/mask-rcnn_overlock-t_fpn_1x_coco --checkpoint FILE --out maps

erf          effective receptive fields of stages, beside ConvNeXt and Swin of mmpretrain
prior        what the context prior sees, and how the features of Focus-Net change with it
kernels      the dynamic kernels of chosen positions, over the photograph
cam          Grad-CAM of a classifier, of Overview-Net and of Focus-Net
predictions  predictions beside the ground truth, for the validation data of a config

PICTURE is an image or a folder of images. Without --checkpoint the weights are random, and the captions say so.
docs/pictures.md explains the pictures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from visualize import cam, erf, kernels, networks, predictions, prior
from visualize.page import Page

KINDS = {'erf': erf, 'prior': prior, 'kernels': kernels, 'cam': cam, 'predictions': predictions}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest='kind', required=True, metavar='{' + ','.join(KINDS) + '}')
    for name, kind in KINDS.items():
        one = kinds.add_parser(name, description=kind.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        networks.add_arguments(one)
        one.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder of the pictures')
        kind.add_arguments(one)
        if kind is predictions:
            one.add_argument('pictures', nargs='*', type=Path, metavar='PICTURE', help='of the data (default: the first)')
        else:
            one.add_argument('pictures', nargs='+', type=Path, metavar='PICTURE', help='image, or folder of images')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.checkpoint is None:
        print('The weights are random: pictures show the architecture, and nothing that was learnt.', file=sys.stderr)
    try:
        kind = KINDS[args.kind]
        if kind is not predictions:
            args.pictures = networks.find_pictures(args.pictures)
        page = Page(args.out, f'OverLoCK: {args.kind}')
        kind.run(args, page)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f'no picture was drawn: {error}')
    print(f'{len(page.files)} pictures in {page.write()}')


if __name__ == '__main__':
    main()
