"""Export a trained model out of the framework: to ONNX, torch.export, AOTInductor or OpenVINO.

    python tools/export.py mmseg/overlock-t_upernet_8xb2-160k_ade20k-512x512 upernet.pth \\
        --to onnx --size 512x512 --dynamic --out upernet.onnx

Classifiers and segmentors are exported whole: their output is the logits, (B, classes) or (B, classes, H, W) at the size of
the images. Of detectors and of segmentors with queries (Mask2Former) only the backbone can be exported: --backbone-only, with
one output for each map. The input is a batch of normalised images, (B, 3, H, W), float32. The size is fixed, with a batch of
one; --dynamic frees batch, height and width.

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
import matplotlib
import torch
import torch.nn as nn
from mmengine.config import Config, DictAction
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS
from mmengine.registry.utils import init_default_scope
from mmengine.runner import load_checkpoint
from torch import Tensor
from torch.export import Dim, ExportedProgram

import overlock_mm
from overlock_mm.inference import optimize
from overlock_mm.models import OverLoCK
from overlock_mm.models.layers import AdaptiveAvgPool2d

Run = Callable[[Tensor], list[Tensor]]

#: Largest relative error of an output. Rounding in float32 gives some 1e-6.
TOLERANCE = 1e-4
PICTURE = Path(matplotlib.get_data_path()) / 'sample_data' / 'grace_hopper.jpg'


# Targets: each writes a file, and gives a function that runs the file.


def to_torch_export(program: ExportedProgram, out: Path) -> Run:
    torch.export.save(program, out)
    module = torch.export.load(out).module()
    return lambda images: outputs_of(module(images))


def to_aoti(program: ExportedProgram, out: Path) -> Run:
    torch._inductor.aoti_compile_and_package(program, package_path=str(out))
    run = torch._inductor.aoti_load_package(str(out))
    return lambda images: outputs_of(run(images))


def to_onnx(program: ExportedProgram, out: Path) -> Run:
    import onnxruntime

    names = ['logits'] if len(program.graph_signature.user_outputs) == 1 else None
    torch.onnx.export(
        program, f=out, dynamo=True, verbose=False, external_data=False, input_names=['images'], output_names=names
    )
    session = onnxruntime.InferenceSession(out, providers=['CPUExecutionProvider'])
    return lambda images: [torch.from_numpy(each) for each in session.run(None, {'images': images.numpy()})]


def to_openvino(program: ExportedProgram, out: Path) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'model.onnx'
        to_onnx(program, file)
        return onnx_to_openvino(file, out)


def onnx_to_openvino(file: Path, out: Path) -> Run:
    import openvino

    openvino.save_model(openvino.convert_model(file), out, compress_to_fp16=False)
    # Some processors would compute in bfloat16 by default.
    model = openvino.Core().compile_model(out, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda images: [torch.from_numpy(each) for each in model(images.numpy()).values()]


class Target(NamedTuple):
    """Where a model goes to: how it is written, the suffix of its file, and the modules that this needs."""

    write: Callable[[ExportedProgram, Path], Run]
    suffix: str
    modules: tuple[str, ...] = ()


TARGETS = {
    'onnx': Target(to_onnx, '.onnx', ('onnx', 'onnxscript', 'onnxruntime')),
    'torch-export': Target(to_torch_export, '.pt2'),
    'aoti': Target(to_aoti, '.pt2'),
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


def load_model(config: str, checkpoint: str, options: Optional[dict]) -> BaseModel:
    """Build the model of a config (a file, or the name of a shipped one) with the weights of a checkpoint, all of them."""
    cfg = Config.fromfile(config if Path(config).is_file() else overlock_mm.get_config_path(config))
    cfg.merge_from_dict(options or {})
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)  # as mmengine's Runner
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    load_checkpoint(model, checkpoint, map_location='cpu', strict=True)
    return model.eval()


def part_to_export(model: BaseModel, backbone_only: bool) -> nn.Module:
    """The module of a model that is exported: its forward takes images.

    Raises:
        ValueError: the backbone is no OverLoCK, or the whole model cannot be exported.
    """
    if not isinstance(getattr(model, 'backbone', None), OverLoCK):
        raise ValueError(f'the backbone must be an OverLoCK, got {type(model).__name__} with another')
    if backbone_only:
        return model.backbone
    kinds = [kind.__name__ for kind in type(model).__mro__]
    if 'ImageClassifier' in kinds:
        return Classifier(model)
    if 'EncoderDecoder' in kinds and 'BaseDecodeHead' in [kind.__name__ for kind in type(model.decode_head).__mro__]:
        return Segmentor(model)
    raise ValueError(
        f'{" with ".join(type(each).__name__ for each in (model, getattr(model, "decode_head", None)) if each is not None)} '
        'cannot be exported as a whole. --backbone-only exports its backbone. Whole models can be an ImageClassifier, or an '
        "EncoderDecoder whose head is a BaseDecodeHead, such as UPerHead"
    )


def smallest_side(backbone: OverLoCK) -> int:
    """The smallest height and width of a graph with free sizes.

    Maps that are smaller than the kernel of their stage take other steps (they are enlarged), which a graph does not have.
    """
    stages = ((16, backbone.sub_blocks3), (32, backbone.sub_blocks4))
    return max(stride * (block.kernel_size - 1) + 1 for stride, stage in stages for block in stage)


def trace(module: nn.Module, size: tuple[int, int], dynamic: bool) -> ExportedProgram:
    """The graph of a module that takes images (B, 3, H, W), with an optimized backbone.

    Args:
        module: from :func:`part_to_export`.
        size: H and W. The batch is one.
        dynamic: B, H and W are free. H and W must be at least :func:`smallest_side`.
    """
    module = optimize(module)
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            # Exporters do not know PyTorch's, except for one window.
            if type(layer) is nn.AdaptiveAvgPool2d and isinstance(layer.output_size, int) and layer.output_size > 1:
                parent.add_module(name, AdaptiveAvgPool2d(layer.output_size))
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if dynamic else None
    images = torch.zeros(2 if dynamic else 1, 3, *size)  # a batch of one would be a constant
    return torch.export.export(module, (images,), dynamic_shapes=(free,))


# The check.


def read_images(picture: Path, batch: int, size: tuple[int, int], model: BaseModel) -> Tensor:
    """A batch of one picture (B, 3, H, W), normalised as the model's data preprocessor does it."""
    image = cv2.imread(str(picture))
    if image is None:
        raise ValueError(f'--picture must be an image, got {picture}')
    images = torch.from_numpy(cv2.resize(image, size[::-1])).permute(2, 0, 1).float()
    preprocessor = model.data_preprocessor
    if hasattr(preprocessor, 'mean'):
        images = (images.flip(0) - preprocessor.mean) / preprocessor.std
    return torch.stack([images.roll(8 * i, dims=2) for i in range(batch)])


def outputs_of(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


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
    parser.add_argument('--picture', type=Path, default=PICTURE, metavar='FILE', help='picture for the check')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='change the config')
    args = parser.parse_args()
    target = TARGETS[args.to]
    if args.out.suffix != target.suffix:
        parser.error(f'--out must end in {target.suffix} for --to {args.to}, got {args.out}')
    if not args.out.parent.is_dir():
        parser.error(f'{args.out.parent} is not a folder')
    missing = [name for name in target.modules if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f'--to {args.to} needs {", ".join(missing)}: pip install {" ".join(missing)}')
    if not hasattr(torch.compiler, '_is_exporting_flag'):
        parser.error(f'exports need torch >= 2.7, got {torch.__version__}')
    return args


@torch.no_grad()
def main() -> None:
    args = parse_args()
    try:
        model = load_model(args.config, args.checkpoint, args.cfg_options)
        module = part_to_export(model, args.backbone_only)
        smallest = smallest_side(model.backbone)
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

    with step('Tracing (minutes with --dynamic)'):
        program = trace(module, args.size, args.dynamic)
    with step(f'Writing and loading {args.out} (can take minutes)'):
        run = TARGETS[args.to].write(program, args.out)
    print(f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, {len(program.graph.nodes)} nodes in the graph')
    if args.dynamic:
        print(f'Height and width are free from {smallest} on. Results for smaller images are wrong or an error.')

    optimized = optimize(module)
    for images in checks:
        _, eager_time = timed(lambda each: outputs_of(optimized(each)), images)
        outputs, exported_time = timed(run, images)
        error = error_of(outputs, outputs_of(module(images)))
        print(
            f'{"x".join(map(str, images.shape))}: relative error {error:.1e}, {exported_time:.3f} s '
            f'(PyTorch, optimized: {eager_time:.3f} s)'
        )
        if not error < TOLERANCE:
            sys.exit(f'the error must be below {TOLERANCE}: {args.out} is not usable')


if __name__ == '__main__':
    main()
