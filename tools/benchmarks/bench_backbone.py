"""Time and memory of the backbone, beside its published form and beside other backbones.

    python tools/benchmarks/bench_backbone.py                               # OverLoCK-T, inference, three image sizes
    python tools/benchmarks/bench_backbone.py --mode train --size 512x512 --batch 1 2 4 --json backbone.json
    python tools/benchmarks/bench_backbone.py --arch xt s b --size 512x512 --peers --json backbone.json --resume

The implementations have the same weights and the four outputs that detectors use:

    published         the published computation in eager PyTorch: every convolution, norm and activation is a call of its
                      own on a contiguous map, branches are added one by one, ContMix writes its kernels to memory
    published-folded  the same with folded branches, as in the released *_reparam checkpoints (eval)
    ours              the backbone as it is built
    ours-fast         with memory='fast': nothing is computed twice in the backward (train)
    ours-with-cp      with with_cp=True: all blocks are computed twice (train)
    optimized         overlock_mm.inference.optimize(backbone) (eval)
    channels-last     ours or, in eval, optimized, with model and input in channels_last
    compiled          torch.compile of ours (train) or of its folded form (eval), as one graph
    cuda-graph        forward and backward of ours or, in eval, optimized, recorded as a CUDA graph (on a GPU)

Peers compute something else: ConvNeXt and Swin Transformer of torchvision, with four outputs.

eval is a forward without gradients. train is a forward, a backward of given gradients of the outputs, and a step of AdamW.
Outputs and, in training, the gradients of all parameters are checked against the published form. kept is what the forward
leaves allocated for the backward, outputs included. peak is the height of a call above what was allocated before it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional
from unittest import mock

import harness
import torch
import torch.nn as nn
from harness import Case, Run, Skipped
from peers import PEERS, build_peer
from published import contmix_published
from torch import Tensor

from overlock_mm.inference import optimize
from overlock_mm.models import OverLoCK, blocks
from overlock_mm.models.layers import LayerNorm2d
from overlock_mm.models.overlock import ARCHITECTURES
from overlock_mm.models.reparam import DilatedReparamConv
from overlock_mm.ops import use_references

#: Names of implementations, and the modes in which they run.
IMPLEMENTATIONS = {
    'published': ('eval', 'train'),
    'published-folded': ('eval',),
    'ours': ('eval', 'train'),
    'ours-fast': ('train',),
    'ours-with-cp': ('train',),
    'optimized': ('eval',),
    'channels-last': ('eval', 'train'),
    'compiled': ('eval', 'train'),
    'cuda-graph': ('eval', 'train'),
}
DEFAULTS = ('published', 'published-folded', 'ours', 'ours-fast', 'ours-with-cp', 'optimized')
DTYPES = ('float32', 'bfloat16', 'float16')
#: Of each output, and of all gradients as one vector. Two ways of rounding to half types at every step differ by as much as
#: either is off.
TOLERANCES = {
    'float32': dict(output=1e-3, gradient=1e-2),
    'bfloat16': dict(output=0.2, gradient=0.5),
    'float16': dict(output=0.05, gradient=0.2),
}


@dataclass(frozen=True)
class Settings:
    """What a case measures."""

    arch: str
    size: tuple[int, int]
    batch: int
    dtype: str
    training: bool
    device: torch.device
    tf32: bool = False  # for float32

    @property
    def name(self) -> str:
        return f'{self.arch}, {self.size[0]}x{self.size[1]}, batch {self.batch}'

    def image(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.batch, 3, *self.size, generator=generator).to(self.device)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Move weights and statistics off the zeros and ones that many start as, so that each matters in the check."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith('running_var'):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point() and (tensor.ndim < 4 or tensor.shape[1:].numel() == 1 or tensor.shape[0] == 1):
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)


def copy_of(weights: OverLoCK, settings: Settings, **options: Any) -> OverLoCK:
    """A backbone with the same weights and other options."""
    model = OverLoCK(settings.arch, out_type='pyramid_with_overview', **options)
    model.load_state_dict(weights.state_dict())
    return model


class Published(nn.Module):
    """The published computation of a backbone, in eager PyTorch and on contiguous maps.

    Args:
        model: with memory='fast', so that autograd keeps everything. Hooks change how it runs.
    """

    def __init__(self, model: OverLoCK) -> None:
        super().__init__()
        self.model = model
        model.patch_embed1.register_forward_pre_hook(lambda module, inputs: inputs[0].contiguous())
        for module in model.modules():
            if isinstance(module, LayerNorm2d):
                module.register_forward_hook(lambda module, inputs, out: out.contiguous())
            elif isinstance(module, DilatedReparamConv):
                # Where one branch has a hook, all are called and added one by one, at evaluation too.
                module.lk_origin.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with use_references(), mock.patch.object(blocks, 'contmix', contmix_published):
            return self.model(x)


def build_model(name: str, weights: OverLoCK, settings: Settings) -> nn.Module:
    """The implementation of that name, in the case's mode, on its device.

    Raises:
        Skipped: it does not run on this device, or with the installed packages.
    """
    if name == 'cuda-graph' and settings.device.type != 'cuda':
        raise Skipped('for a GPU only')
    if name in PEERS:
        try:
            model = build_peer(name)
        except ImportError as error:
            raise Skipped(f'torchvision is not installed ({error})') from None
    elif name.startswith('published'):
        model = copy_of(weights, settings, memory='fast')
        if name == 'published-folded':
            model.switch_to_deploy()
        model = Published(model)
    else:
        memory = 'fast' if name == 'ours-fast' else 'lean'
        model = copy_of(weights, settings, with_cp=name == 'ours-with-cp', memory=memory)
    model.train(settings.training)
    model.to(settings.device)
    if name == 'compiled' and not settings.training:
        model.switch_to_deploy()
    if name == 'channels-last':
        model.to(memory_format=torch.channels_last)
    if name == 'optimized' or (name in ('cuda-graph', 'channels-last') and not settings.training):
        return optimize(model)
    return model


class Step:
    """Forward and, in training, backward and update of a model on one image."""

    def __init__(self, model: nn.Module, image: Tensor, settings: Settings, function: Callable) -> None:
        self.image, self.training, self.function = image, settings.training, function
        self.autocast: Callable[[], Any] = contextlib.nullcontext
        if settings.dtype != 'float32':
            self.autocast = lambda: torch.autocast(settings.device.type, harness.DTYPES[settings.dtype])
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.outputs: tuple[Tensor, ...] = ()
        self.cotangents: list[Tensor] = []
        if self.training:
            # A learning rate of 0 does all the work of a step and leaves the weights as they are.
            self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0)

    def infer(self) -> tuple[Tensor, ...]:
        with torch.no_grad(), self.autocast():
            return tuple(self.function(self.image))

    def forward(self) -> None:
        with self.autocast():
            self.outputs = tuple(self.function(self.image))

    def backward(self) -> None:
        if not self.cotangents:
            generator = torch.Generator().manual_seed(2)
            self.cotangents = [torch.randn(out.shape, generator=generator).to(out) for out in self.outputs]
        torch.autograd.backward(self.outputs, self.cotangents)
        self.outputs = ()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def results(self) -> dict[str, list[Tensor]]:
        if not self.training:
            return dict(output=list(self.infer()))
        self.forward()
        outputs = [out.detach().clone() for out in self.outputs]
        self.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        gradient = torch.cat([each.flatten().float() for each in gradients])
        self.update()
        return dict(output=outputs, gradient=[gradient])

    @property
    def steps(self) -> list[Callable]:
        return [self.forward, self.backward, self.update] if self.training else [self.infer]


class RecordedStep(Step):
    """The forward and, in training, the backward are recorded as one CUDA graph, which a forward replays."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.record()
                if self.training:
                    super().update()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.recorded = self.record()

    def record(self) -> tuple[Tensor, ...]:
        if not self.training:
            return super().infer()
        super().forward()
        outputs = self.outputs
        super().backward()
        return outputs

    def infer(self) -> tuple[Tensor, ...]:
        self.graph.replay()
        return self.recorded

    def forward(self) -> None:
        self.outputs = self.infer()

    def backward(self) -> None:
        self.outputs = ()

    def update(self) -> None:
        self.optimizer.step()  # the graph writes the same gradients again


def build(name: str, weights: OverLoCK, settings: Settings) -> Run:
    """The implementation of that name, ready to run."""
    model, image = build_model(name, weights, settings), settings.image()
    if settings.training and name in ('published', *PEERS):
        on_meta = copy.deepcopy(model).to('meta')
        harness.require_memory(lambda: on_meta(image.to('meta')), settings.device)
    if name == 'channels-last':
        image = image.contiguous(memory_format=torch.channels_last)
    function: Callable = model
    if name == 'compiled':
        torch._dynamo.reset()  # compiled for one shape at a time: earlier ones must not count as recompilations
        function = torch.compile(model, fullgraph=True, dynamic=False)
    step = (RecordedStep if name == 'cuda-graph' else Step)(model, image, settings, function)
    return Run(step.steps, step.results, counts_memory=name != 'cuda-graph')


# --------------------------------------------------------------------------------------------------------------- cases


def case_of(settings: Settings, names: list[str]) -> Case:
    mode = 'train' if settings.training else 'eval'
    own = [name for name in names if name in IMPLEMENTATIONS]
    preferred = ('ours', *own) if settings.training else ('optimized', 'ours', *own)

    def weights() -> OverLoCK:
        torch.manual_seed(0)
        model = OverLoCK(settings.arch, out_type='pyramid_with_overview')
        randomise(model)
        return model

    return Case(
        section=f'{mode}, {settings.dtype}' + (' in TF32' if settings.tf32 else ''),
        group=settings.name,
        name=settings.name,
        implementations=names,
        yardstick=next((name for name in preferred if name in own), names[0]),
        build=lambda name: build(name, weights(), settings),
        expected=lambda: build('published', weights(), settings).results(),
        tolerances=TOLERANCES['float16' if settings.tf32 else settings.dtype],  # with as many bits
        baselines=('published', 'published-folded'),
        peers=tuple(PEERS),
    )


def cases_of(options: argparse.Namespace) -> list[Case]:
    cases = []
    for arch, mode, dtype, batch, size in itertools.product(
        options.arch, options.mode, options.dtype, options.batch, options.size
    ):
        names = [name for name in options.implementations if mode in IMPLEMENTATIONS[name]] + options.peers
        if not names:
            raise ValueError(f'--implementations: none is for --mode {mode}, got {", ".join(options.implementations)}')
        tf32 = options.tf32 and dtype == 'float32'
        cases.append(case_of(Settings(arch, size, batch, dtype, mode == 'train', options.device, tf32), names))
    return cases


def make_parser() -> argparse.ArgumentParser:
    parser = harness.make_parser(__doc__)
    what = parser.add_argument_group('what to measure')
    what.add_argument('--arch', nargs='+', default=['t'], choices=ARCHITECTURES, help='variants; default: t')
    what.add_argument(
        '--size', nargs='+', type=harness.image_size, default=list(harness.SIZES), metavar='HxW',
        help='image sizes; default: 224x224 512x512 800x1344',
    )  # fmt: skip
    what.add_argument('--batch', nargs='+', type=harness.positive_int, default=[1], metavar='N', help='images; default: 1')
    what.add_argument('--dtype', nargs='+', default=['float32'], choices=DTYPES, help='of autocast; default: float32')
    what.add_argument('--mode', nargs='+', default=['eval'], choices=('eval', 'train'), help='default: eval')
    what.add_argument(
        '--implementations', nargs='*', default=list(DEFAULTS), choices=IMPLEMENTATIONS, metavar='NAME',
        help=f'see above; default: {", ".join(DEFAULTS)}',
    )  # fmt: skip
    what.add_argument(
        '--peers', nargs='*', default=list(PEERS), choices=PEERS, metavar='NAME',
        help=f'among {", ".join(PEERS)}; default: all; without a name: none',
    )  # fmt: skip
    return parser


def main(arguments: Optional[list[str]] = None) -> int:
    return harness.main(make_parser(), cases_of, arguments)


if __name__ == '__main__':
    sys.exit(main())
