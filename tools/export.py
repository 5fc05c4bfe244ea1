"""Export a trained model out of the framework: to ONNX, torch.export, AOTInductor or OpenVINO.

    python tools/export.py mmseg/overlock-t_upernet_8xb2-160k_ade20k-512x512 upernet.pth \\
        --to onnx --size 512x512 --dynamic --out upernet.onnx

Classifiers, segmentors and detectors are exported whole. The output of the first two is the logits: (B, classes), or
(B, classes, H, W) at the size of the images. Detectors (RetinaNet, Faster, Mask and Cascade R-CNN) give boxes, scores,
labels and masks. Of other models, such as Mask2Former and DINO, only the backbone can be exported: --backbone-only, with
one output for each map. The input is a batch of normalised images (B, 3, H, W), float32. The size is fixed and the batch
is one; --dynamic frees batch, height and width.

The model is optimized first (overlock_mm.inference.optimize). The written file is run on a picture, and compared with the
model in PyTorch. docs/deploy.md has the routes that were tried.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import cv2
import export_detector
import matplotlib
import torch
import torch.nn as nn
from launch import read_config
from mmengine.config import Config, DictAction
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS
from mmengine.registry.utils import init_default_scope
from mmengine.runner import load_checkpoint
from torch import Tensor

from overlock_mm.inference import optimize
from overlock_mm.models import OverLoCK
from overlock_mm.models.layers import AdaptiveAvgPool2d
from overlock_mm.ops import _library, keep_operators

Run = Callable[[Tensor], list[Tensor]]

#: Largest relative error of an output. Rounding in float32 gives some 1e-6.
TOLERANCE = 1e-4
#: Share of the detections that must be those of mmdet. Rounding can change which of two boxes suppresses the other.
SHARE = 0.95
PICTURE = Path(matplotlib.get_data_path()) / 'sample_data' / 'grace_hopper.jpg'


# Targets: each writes a file, and gives a function that runs the file.


def to_torch_export(program: torch.export.ExportedProgram, out: Path) -> Run:
    torch.export.save(program, out)
    module = torch.export.load(out).module()
    return lambda images: outputs_of(module(images))


def to_aoti(program: torch.export.ExportedProgram, out: Path) -> Run:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    aoti_compile_and_package(program, package_path=str(out))
    run = aoti_load_package(str(out))
    return lambda images: outputs_of(run(images))


def to_onnx(program: torch.export.ExportedProgram, out: Path) -> Run:
    import onnxruntime

    torch.onnx.export(
        program,
        f=out,
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=['images'],
        output_names=names_of_outputs(program),
    )
    session = onnxruntime.InferenceSession(out, providers=['CPUExecutionProvider'])
    return lambda images: [torch.from_numpy(each) for each in session.run(None, {'images': images.numpy()})]


def names_of_outputs(program: torch.export.ExportedProgram) -> list[str]:
    """``output0``, ``output1``, ..., or the keys of a dict."""
    spec = program.call_spec.out_spec
    outputs = spec.unflatten(range(spec.num_leaves))
    return list(outputs) if isinstance(outputs, dict) else [f'output{i}' for i in range(spec.num_leaves)]


def to_openvino(program: torch.export.ExportedProgram, out: Path) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'model.onnx'
        to_onnx(program, file)
        return onnx_to_openvino(file, out, smallest_of(program))


def smallest_of(program: torch.export.ExportedProgram) -> Optional[int]:
    """The smallest height and width that the images of a graph may have. None if they are fixed.

    A detector has other free sizes, such as the number of boxes of a level.
    """
    (name,) = program.graph_signature.user_inputs
    (images,) = (node.meta['val'] for node in program.graph.nodes if node.name == name)
    free = [program.range_constraints[side.node.expr] for side in images.shape if not isinstance(side, int)]
    return max((int(each.lower) for each in free), default=None)


def onnx_to_openvino(file: Path, out: Path, smallest: Optional[int]) -> Run:
    """Convert a file of :func:`to_onnx`. ``smallest``: of free heights and widths. OpenVINO would not see it by itself."""
    import openvino

    model = openvino.convert_model(file)
    if smallest is not None:
        side = openvino.Dimension(smallest, -1)
        model.reshape({'images': openvino.PartialShape([openvino.Dimension(), 3, side, side])})
    openvino.save_model(model, out, compress_to_fp16=False)
    # Some processors would compute in bfloat16 by default.
    run = openvino.Core().compile_model(out, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda images: [torch.from_numpy(each) for each in run(images.numpy()).values()]


class Target(NamedTuple):
    """Where a model goes to: how it is written, the suffix of its file, and the modules that this needs."""

    write: Callable[[torch.export.ExportedProgram, Path], Run]
    suffix: str
    modules: tuple[str, ...] = ()
    runs_torch: bool = False  # and with it, the operators of this package


TARGETS = {
    'onnx': Target(to_onnx, '.onnx', ('onnx', 'onnxscript', 'onnxruntime')),
    'torch-export': Target(to_torch_export, '.pt2', runs_torch=True),
    'aoti': Target(to_aoti, '.pt2', runs_torch=True),
    'openvino': Target(to_openvino, '.xml', ('onnx', 'onnxscript', 'onnxruntime', 'openvino')),
}


# Models.


class Classifier(nn.Module):
    """An ``ImageClassifier``: images to logits (B, classes)."""

    def __init__(self, model: BaseModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, mode='tensor')


class Segmentor(Classifier):
    """An ``EncoderDecoder``: images to logits (B, classes, H, W), as mmseg's ``test_cfg.mode='whole'``."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode_decode(images, [dict(img_shape=images.shape[2:])])


def load_config(config: str, options: Optional[dict] = None) -> Config:
    """The config of a file, or the shipped one of a name, with changed settings."""
    cfg = read_config(config)
    cfg.merge_from_dict(options or {})
    return cfg


def build_model(cfg: Config) -> BaseModel:
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)  # as mmengine's Runner does
    return revert_sync_batchnorm(MODELS.build(cfg.model)).eval()


def part_to_export(model: BaseModel, backbone_only: bool) -> nn.Module:
    """The module of a model that is exported: its forward takes images.

    Raises:
        ValueError: the backbone is no OverLoCK for images of 3 channels, or the whole model cannot be exported.
    """
    if not isinstance(getattr(model, 'backbone', None), OverLoCK):
        raise ValueError(f'the backbone must be an OverLoCK, got {type(model).__name__} with another')
    if model.backbone.in_channels != 3:
        raise ValueError(f'the backbone must take images of 3 channels, got one of {model.backbone.in_channels}')
    if backbone_only:
        return model.backbone
    if is_a(model, 'ImageClassifier'):
        return Classifier(model)
    if is_a(model, 'EncoderDecoder') and is_a(model.decode_head, 'BaseDecodeHead'):
        return Segmentor(model)
    reason = ''
    if is_a(model, 'BaseDetector'):
        try:
            return export_detector.Detector(model)
        except ValueError as error:
            reason = f' ({error})'
    raise ValueError(
        f'{type(model).__name__} cannot be exported as a whole{reason}. --backbone-only exports its backbone. Whole models '
        'can be an ImageClassifier, an EncoderDecoder whose head is a BaseDecodeHead (UPerHead is one, Mask2FormerHead is '
        'not), a RetinaNet, or a Faster, Mask or Cascade R-CNN'
    )


def is_a(module: nn.Module, name: str) -> bool:
    """Whether a class or a base of it has this name. The frameworks of other models need not be installed."""
    return any(kind.__name__ == name for kind in type(module).__mro__)


def smallest_side(backbone: OverLoCK) -> int:
    """The smallest height and width that one graph can hold.

    Maps smaller than the kernel of their stage are enlarged, and so take other steps.
    """
    stages = ((16, backbone.sub_blocks3), (32, backbone.sub_blocks4))
    return max(stride * (block.kernel_size - 1) + 1 for stride, stage in stages for block in stage)


def trace(module: nn.Module, size: tuple[int, int], smallest: Optional[int]) -> torch.export.ExportedProgram:
    """The graph of the optimized module.

    Args:
        module: takes images (B, 3, H, W).
        size: H and W. The batch is one.
        smallest: None, or the smallest H and W of a graph with free B, H and W.
    """
    module = optimize(module)
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            # Exporters do not know PyTorch's, except for one window.
            if type(layer) is nn.AdaptiveAvgPool2d and isinstance(layer.output_size, int) and layer.output_size > 1:
                parent.add_module(name, AdaptiveAvgPool2d(layer.output_size))
    if smallest is None:
        return torch.export.export(module, (torch.zeros(1, 3, *size),))
    side = torch.export.Dim.DYNAMIC(min=smallest)
    free = {0: torch.export.Dim.DYNAMIC, 2: side, 3: side}
    # A batch of one would be taken for a constant.
    return torch.export.export(module, (torch.zeros(2, 3, *size),), dynamic_shapes=(free,))


# The check.


def read_images(picture: Path, batch: int, size: tuple[int, int], model: BaseModel) -> Tensor:
    """A batch of one picture, shifted from image to image (B, 3, H, W), in RGB and normalised as the model takes it."""
    image = cv2.imread(str(picture))
    if image is None:
        raise ValueError(f'--picture must be an image, got {picture}')
    images = torch.from_numpy(cv2.resize(image, size[::-1])).permute(2, 0, 1).float()
    preprocessor = model.data_preprocessor
    if hasattr(preprocessor, 'mean'):
        images = (images.flip(0) - preprocessor.mean) / preprocessor.std
    return torch.stack([images.roll(8 * i, dims=2) for i in range(batch)])


def outputs_of(result) -> list[Tensor]:
    """The tensors of a model's result, which is a tensor, a tuple or a dict."""
    if isinstance(result, Tensor):
        return [result]
    return list(result.values() if isinstance(result, dict) else result)


def timed(run: Run, images: Tensor) -> tuple[list[Tensor], float]:
    """The outputs, and the seconds of the faster one of two runs after a first one."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        outputs = run(images)
        times.append(time.perf_counter() - start)
    return outputs, min(times[1:])


def error_of(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error (Frobenius norm) of an output.

    Raises:
        ValueError: there are other outputs, or their shapes differ.
    """
    shapes, expected_shapes = ([tuple(each.shape) for each in tensors] for tensors in (outputs, expected))
    if shapes != expected_shapes:
        raise ValueError(f'the outputs have shapes {shapes}, but PyTorch gives {expected_shapes}')
    return max(((got - each).norm() / each.norm()).item() for got, each in zip(outputs, expected))


# The command.


def size_of(text: str) -> tuple[int, int]:
    if not re.fullmatch(r'[1-9]\d*x[1-9]\d*', text):
        raise argparse.ArgumentTypeError(f'--size must be HxW, such as 512x1024, got {text}')
    height, width = text.split('x')
    return int(height), int(width)


@contextlib.contextmanager
def step(doing: str) -> Iterator[None]:
    print(f'{doing} ... ', end='', flush=True)
    start = time.perf_counter()
    yield
    print(f'{time.perf_counter() - start:.0f} s', flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', help='config file, or a name from overlock_mm.list_configs()')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='a path, an address, or overlock_mm://NAME')
    parser.add_argument('--to', choices=list(TARGETS), required=True, help='what is written')
    parser.add_argument('--size', type=size_of, required=True, metavar='HxW', help='height and width of the images')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help='file to write')
    parser.add_argument('--dynamic', action='store_true', help='free batch, height and width')
    parser.add_argument('--backbone-only', action='store_true', help='export the backbone, without neck and heads')
    parser.add_argument(
        '--keep-operators',
        action='store_true',
        help="leave this package's compiled operators in the graph, for torch-export and aoti",
    )
    parser.add_argument(
        '--picture',
        type=Path,
        default=PICTURE,
        metavar='FILE',
        help='picture for the check (default: a photograph of matplotlib)',
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='change the config')
    parser.add_argument('--overwrite', action='store_true', help='replace FILE if it exists')
    args = parser.parse_args()
    target = TARGETS[args.to]
    if args.out.suffix != target.suffix:
        parser.error(f'--out must end in {target.suffix} for --to {args.to}, got {args.out}')
    if args.out.exists() and not args.overwrite:
        parser.error(f'{args.out} already exists: remove it, or use --overwrite')
    if not args.out.parent.is_dir():
        parser.error(f'{args.out.parent} is not a folder')
    missing = [name for name in target.modules if importlib.util.find_spec(name) is None]
    if missing:
        names = ' '.join(missing)
        parser.error(f'--to {args.to} needs packages of the extra overlock_mm[deploy]: pip install {names}')
    if args.keep_operators and not target.runs_torch:
        names = ' and '.join(name for name, each in TARGETS.items() if each.runs_torch)
        parser.error(f'--keep-operators is for {names}, got --to {args.to}')
    if args.keep_operators and _library.missing:
        parser.error(f'there are no operators for --keep-operators: {_library.missing}')
    if not hasattr(torch.compiler, '_is_exporting_flag'):
        parser.error(f'exports need torch >= 2.7, got {torch.__version__}')
    return args


@torch.no_grad()
def main() -> None:
    args = parse_args()
    try:
        model = build_model(load_config(args.config, args.cfg_options))
        load_checkpoint(model, args.checkpoint, map_location='cpu', strict=True)
        module = part_to_export(model, args.backbone_only)
        smallest = smallest_side(model.backbone) if args.dynamic else None
        if args.dynamic and min(args.size) < smallest:
            raise ValueError(
                f'--size must be at least {smallest}x{smallest} with --dynamic, got {args.size[0]}x{args.size[1]}: '
                'smaller images take other steps. Without --dynamic any size can be exported'
            )
        checks = [read_images(args.picture, 1, args.size, model)]
        if args.dynamic:
            checks.append(read_images(args.picture, 2, (args.size[0] + 37, args.size[1] + 75), model))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f'nothing was exported: {error}')

    operators = keep_operators() if args.keep_operators else contextlib.nullcontext()
    with step('Tracing (minutes with --dynamic)'), operators:
        program = trace(module, args.size, smallest)
    with step(f'Writing and loading {args.out} (can take minutes)'):
        run = TARGETS[args.to].write(program, args.out)
    print(f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, {len(program.graph.nodes)} nodes in the graph')
    if args.dynamic:
        print(f'Batch, height and width are free. Height and width must be at least {smallest}.')

    optimized = optimize(module)
    for images in checks:
        _, eager_time = timed(lambda each: outputs_of(optimized(each)), images)
        outputs, exported_time = timed(run, images)
        if isinstance(module, export_detector.Detector):
            result = export_detector.compare(outputs, model, images)
            refused = not result.share >= SHARE and f'{SHARE:.0%} of the detections must be the same'
        else:
            error = error_of(outputs, outputs_of(module(images)))
            result = f'relative error {error:.1e}'
            refused = not error < TOLERANCE and f'the error must be below {TOLERANCE}'
        print(
            f'{"x".join(map(str, images.shape))}: {result}, {exported_time:.3f} s (PyTorch, optimized: {eager_time:.3f} s)'
        )
        if refused:
            sys.exit(f'{refused}: {args.out} is not usable')


if __name__ == '__main__':
    main()
