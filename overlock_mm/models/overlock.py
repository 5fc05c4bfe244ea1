"""The OverLoCK backbone (Lou and Yu, "OverLoCK: An Overview-first-Look-Closely-next ConvNet", CVPR 2025)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoints.loading import TakesReleasedCheckpoints, check_variant, load_pretrained, openmmlab_name
from ..checkpoints.release import SCHEME
from ..ops._reference import is_channels_last
from ..registry import MODELS
from .arguments import positive_int
from .blocks import BasicBlock, DynamicBlock
from .economy import POLICIES, run_block
from .layers import GELU, Conv2d, LayerNorm2d, LayerScale
from .reparam import DilatedReparamConv

#: Published variants. ``num_groups`` is twice the heads that the release lists for a branch.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    'xt': dict(channels=(56, 112, 256, 336), depths=(2, 2, 3, 2), sub_depths=(6, 2), num_groups=(8, 12)),
    't': dict(channels=(64, 128, 256, 512), depths=(4, 4, 6, 2), sub_depths=(12, 2), num_groups=(8, 16)),
    's': dict(channels=(64, 128, 320, 512), depths=(6, 6, 8, 3), sub_depths=(16, 3), num_groups=(16, 32)),
    'b': dict(channels=(80, 160, 384, 576), depths=(8, 8, 10, 4), sub_depths=(20, 4), num_groups=(12, 18)),
}
LONG_NAMES = {'extreme-tiny': 'xt', 'xtiny': 'xt', 'tiny': 't', 'small': 's', 'base': 'b'}
ARCHITECTURE_DEFAULTS: dict[str, Any] = dict(kernel_sizes=(17, 15, 13, 7), mlp_ratio=4, sub_mlp_ratio=3)

#: The stages in the order of their depth; frozen_stages counts and with_cp names them.
STAGES = ('blocks1', 'blocks2', 'blocks3', 'blocks4', 'sub_blocks3', 'sub_blocks4')
OUT_TYPES = ('features', 'pyramid', 'pyramid_with_overview')


def _downsample(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        Conv2d(in_channels, out_channels, kernel_size=3, stride=2, bias=False), nn.BatchNorm2d(out_channels)
    )


def _stem(in_channels: int, out_channels: int) -> nn.Sequential:
    """Image to features at a quarter of its size: four 3x3 convolutions, of strides 2, 1, 2, 1."""
    half = out_channels // 2
    layers: list[nn.Module] = []
    for inputs, outputs, stride in (
        (in_channels, half, 2),
        (half, half, 1),
        (half, out_channels, 2),
        (out_channels, out_channels, 1),
    ):
        conv = Conv2d(inputs, outputs, kernel_size=3, stride=stride, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), GELU()]
    return nn.Sequential(*layers[:-1])


class ContextDownsample(nn.Module):
    """Features x and context h of stage 3 to half their size, for stage 4."""

    def __init__(self, in_channels: int, out_channels: int, context_channels: int) -> None:
        super().__init__()
        self.x_proj = _downsample(in_channels, out_channels)
        self.h_proj = _downsample(context_channels, context_channels)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.x_proj(x), self.h_proj(h)


@MODELS.register_module()
class OverLoCK(TakesReleasedCheckpoints):
    """OverLoCK backbone.

    Base-Net encodes the image to stride 16. Overview-Net makes a context prior from these features at stride 32. Focus-Net
    processes the stride-16 features again, guided by the prior (paper section 3.1). Parameters have the names of the
    released checkpoints, which load without conversion.

    Maps have shape (B, C, H, W). C1..C4 are the channels of the architecture, and Ch = C4 / 4 those of the context.

    Args:
        arch: 'xt', 't', 's' or 'b' ('extreme-tiny', 'tiny', 'small', 'base'; 'overlock_t' and so on), or a dict with

            - channels: C1..C4.
            - depths: blocks of blocks1..blocks4 (Base-Net has the first three, Overview-Net the fourth).
            - sub_depths: blocks of sub_blocks3 and sub_blocks4 (Focus-Net).
            - num_groups: groups of the dynamic kernels in sub_blocks3 and sub_blocks4. Twice these divide C3 and C4.
            - kernel_sizes: large kernels of stages 1..4, by default (17, 15, 13, 7).
            - mlp_ratio, sub_mlp_ratio: hidden channels of the MLPs in basic and dynamic blocks, by default 4 and 3 times C.
        in_channels: channels of the input image. With other than 3, the first convolution does not take its weights from a
            pre-trained file (unless ``init_cfg`` has ``adapt_channels=True``); all other layers do.
        out_type: one of the three flavours of the released checkpoints:

            - 'features': plain features, for classification.
            - 'pyramid': every output goes through its own LayerNorm, for segmentation.
            - 'pyramid_with_overview': the same, and the overview of the image is added to the last output, for
              detection.
        out_indices: the outputs, in the order in which they are returned. 0: blocks1, stride 4, C1 channels; 1: blocks2,
            stride 8, C2; 2: sub_blocks3, stride 16, C3 + Ch; 3: sub_blocks4, stride 32, C4 + Ch; with 'features' also 4:
            the overview (blocks4), stride 32, C4. The default is (3,) for 'features' and (0, 1, 2, 3) for pyramids.
            ``out_channels`` of the built backbone gives their channels. Stages that no output needs do not run.
        drop_path_rate: stochastic depth of the last block. It grows linearly over all blocks from 0.
        frozen_stages: the number of frozen stages, in the order ``blocks1..4, sub_blocks3, sub_blocks4``. The layers that
            lead to them are frozen too, and their batch norms use the running statistics. 0 freezes the stem, -1 nothing.
        norm_eval: whether batch norms use their running statistics in training.
        with_cp: checkpointing. The backward runs blocks again, which takes time and saves memory. True for all stages, or
            names among ``blocks1..4, sub_blocks3, sub_blocks4``. Running statistics are updated once.
        memory: policy for the blocks that are not in ``with_cp``. 'lean' makes norms, activations and small depth-wise
            convolutions again in the backward. 'fast' keeps their outputs. Results and gradients are the same.
        deploy: build the large convolutions in their folded form, that of the released ``*_reparam`` checkpoints. It loads
            folded and unfolded checkpoints. For the fastest inference see :func:`overlock_mm.inference.optimize`.
        init_cfg: mmengine's initialisation. ``dict(type='Pretrained', checkpoint=FILE)`` accepts the released files. A
            classification checkpoint also loads into a pyramid; the log names the weights that were left out. By default
            convolutions start from a truncated normal of std 0.02.
        pretrained: a checkpoint; short for ``init_cfg=dict(type='Pretrained', checkpoint=pretrained)``. mmseg's models hand
            theirs to the backbone. Without OpenMMLab's training use :meth:`from_pretrained`, which loads at once.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and what it got.
    """

    layers_of_data = ('patch_embed1.0',)

    def __init__(
        self,
        arch: Union[str, dict[str, Any]] = 't',
        in_channels: int = 3,
        out_type: str = 'features',
        out_indices: Optional[Sequence[int]] = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: Union[bool, Sequence[str]] = False,
        memory: str = 'lean',
        deploy: bool = False,
        init_cfg: Union[dict, list, None] = None,
        pretrained: Optional[str] = None,
    ) -> None:
        if pretrained is not None:
            if init_cfg is not None:
                raise ValueError(f'pretrained and init_cfg exclude each other, got {pretrained!r} and {init_cfg!r}')
            init_cfg = dict(type='Pretrained', checkpoint=pretrained)
        super().__init__(init_cfg)
        settings = resolve_architecture(arch)
        in_channels = positive_int('in_channels', in_channels)
        if out_type not in OUT_TYPES:
            raise ValueError(f'out_type must be one of {OUT_TYPES}, got {out_type!r}')
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate!r}')
        if frozen_stages not in range(-1, len(STAGES) + 1):
            raise ValueError(f'frozen_stages must be in -1..{len(STAGES)}, got {frozen_stages!r}')
        if memory not in POLICIES:
            raise ValueError(f'memory must be one of {POLICIES}, got {memory!r}')
        self.arch = arch
        self.in_channels = in_channels
        self.out_type = out_type
        self.out_indices = _resolve_out_indices(out_indices, out_type)
        self.frozen_stages = int(frozen_stages)
        self.norm_eval = norm_eval
        self.checkpointed_stages = _resolve_with_cp(with_cp)
        self.memory = memory
        self.deploy = deploy

        c1, c2, c3, c4 = settings['channels']
        k1, k2, k3, k4 = settings['kernel_sizes']
        context = c4 // 4
        all_channels = (c1, c2, c3 + context, c4 + context, c4)
        self.out_channels = tuple(all_channels[i] for i in self.out_indices)

        depths = (*settings['depths'], *settings['sub_depths'])
        rates = iter([drop_path_rate * i / (sum(depths) - 1) for i in range(sum(depths))])
        basic = dict(mlp_ratio=settings['mlp_ratio'], deploy=deploy)
        dynamic = dict(mlp_ratio=settings['sub_mlp_ratio'], context_channels=context, deploy=deploy)

        def basic_stage(stage: int, channels: int, kernel_size: int) -> nn.ModuleList:
            return nn.ModuleList(
                BasicBlock(channels, kernel_size, drop_path=next(rates), layer_scale=stage >= 3, **basic)
                for _ in range(depths[stage - 1])
            )

        self.patch_embed1 = _stem(in_channels, c1)
        self.patch_embed2 = _downsample(c1, c2)
        self.patch_embed3 = _downsample(c2, c3)
        self.patch_embed4 = _downsample(c3, c4)
        self.high_level_proj = Conv2d(c4, context, kernel_size=1)
        self.patch_embedx = ContextDownsample(c3, c4, context)
        self.blocks1 = basic_stage(1, c1, k1)
        self.blocks2 = basic_stage(2, c2, k2)
        self.blocks3 = basic_stage(3, c3, k3)
        self.blocks4 = basic_stage(4, c4, k4)
        groups3, groups4 = settings['num_groups']
        self.sub_blocks3 = nn.ModuleList(
            DynamicBlock(c3, num_groups=groups3, kernel_size=k3, drop_path=next(rates), mix_context=i > 0, **dynamic)
            for i in range(depths[4])
        )
        self.sub_blocks4 = nn.ModuleList(
            DynamicBlock(
                c4, num_groups=groups4, kernel_size=k4, drop_path=next(rates), mix_context=True, last=last, **dynamic
            )
            for last in [*[False] * (depths[5] - 1), True]
        )

        if out_type != 'features':
            # Only norms that are used, so that every parameter has a gradient. Norm 1 stands before stage 3: see forward.
            norms = sorted({*self.out_indices} | ({1} if self._depth > 0 else set()))
            if self._adds_overview:
                self.h_proj = nn.Sequential(Conv2d(c4, c4 + context, kernel_size=1), LayerScale(c4 + context, 1e-5))
                norms.append(4)
            self.extra_norm = nn.ModuleDict({str(i): LayerNorm2d(all_channels[i]) for i in norms})

        self._reset_parameters()
        self._freeze_stages()

    @classmethod
    def from_pretrained(
        cls,
        arch: Union[str, dict[str, Any]] = 't',
        checkpoint: Union[str, os.PathLike, None] = None,
        adapt_channels: bool = False,
        **kwargs: Any,
    ) -> OverLoCK:
        """Build a backbone and load its weights. A backbone that is only built is not loaded before ``init_weights()``.

        Args:
            arch: as in the constructor.
            checkpoint: a path, an address or ``overlock_mm://NAME``. The default is the variant's released ImageNet file,
                which is downloaded once.
            adapt_channels: with ``in_channels`` other than 3, make the first convolution of the file's, and do not start it
                afresh. See :func:`overlock_mm.checkpoints.loading.load_pretrained`.
            kwargs: other arguments of the constructor.

        Raises:
            OSError: the file is missing or damaged, or the download failed.
            ValueError: an argument or the checkpoint does not fit, or an ``arch`` of one's own has no checkpoint.
        """
        if checkpoint is None:
            if not isinstance(arch, str):
                raise ValueError(f'checkpoint must be given, because there is none for arch={arch!r}')
            checkpoint = f'{SCHEME}overlock_{_resolve_name(arch)}_in1k_224.pth'
        backbone = cls(arch, **kwargs)
        load_pretrained(backbone, checkpoint, adapt_channels=adapt_channels)
        return backbone

    @property
    def _depth(self) -> int:
        """How far the outputs need the network to run: 0 blocks1, 1 blocks2, 2 blocks4, 3 sub_blocks3, 4 all."""
        return max((0, 1, 3, 4, 2)[index] for index in self.out_indices)

    @property
    def _adds_overview(self) -> bool:
        return self.out_type == 'pyramid_with_overview' and 3 in self.out_indices

    def _reset_parameters(self) -> None:
        for module in self.modules():
            # Norms, LayerScales, GRNs and relative position biases start as they are built.
            if isinstance(module, nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # Checked even with strict=False.
        check_variant(self, state_dict, prefix)
        if self.deploy and f'{prefix}blocks1.0.proj.1.origin_bn.weight' in state_dict:
            print_log('The checkpoint is not folded: its dilated branches are folded on loading.', logger='current')
        super()._load_from_state_dict(state_dict, prefix, *args)

    @staticmethod
    def _checkpoint_filter(state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        """Called by mmpretrain's ``ImageClassifier`` before it loads: a released file, whose names are flat, fits too."""
        wrapped = state_dict.get(f'{prefix}model')
        if isinstance(wrapped, Mapping):  # mmengine unwraps state_dict only
            del state_dict[f'{prefix}model']
            state_dict.update({f'{prefix}{name}': tensor for name, tensor in wrapped.items()})
        if f'{prefix}patch_embed1.0.weight' not in state_dict:
            return
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[prefix + openmmlab_name(name[len(prefix) :])] = state_dict.pop(name)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Layer of a parameter for layer-wise learning rates, and the number of layers.

        Layers follow the data. The stem is layer 0, ``blocks1`` layer 1, ``blocks2`` layer 2. Three blocks of ``blocks3``
        make a layer, the overview (``blocks4``) is one, three blocks of ``sub_blocks3`` make a layer, ``sub_blocks4`` is
        one. The last layer has the norms of a pyramid and everything behind the backbone. OverLoCK-T has 12 layers. The
        paper has no such rule. ConvNeXt's rule is that three deep blocks make a layer.

        Args:
            param_name: full name of the parameter.
            prefix: of the backbone's parameters, such as 'backbone.'.
        """
        basic, focus = (-(-len(blocks) // 3) for blocks in (self.blocks3, self.sub_blocks3))
        overview, last = 3 + basic, 5 + basic + focus
        if not param_name.startswith(prefix):
            return last, last + 1
        stage, _, rest = param_name[len(prefix) :].partition('.')
        layers = dict(
            patch_embed1=0, blocks1=1, patch_embed2=2, blocks2=2, patch_embed3=3, patch_embed4=overview, blocks4=overview,
            high_level_proj=overview, patch_embedx=last - 1, sub_blocks4=last - 1,
        )  # fmt: skip
        if stage in ('blocks3', 'sub_blocks3'):
            first = 3 if stage == 'blocks3' else overview + 1
            return first + int(rest.split('.', 1)[0]) // 3, last + 1
        return layers.get(stage, last), last + 1

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, in_channels, H, W), of any size from 1 x 1, to a tuple of maps, in the order of ``out_indices``.

        A map at stride s has ceil(H / s) x ceil(W / s) positions. Outputs are contiguous, or channels_last if the input is.

        Raises:
            TypeError: the input is no floating-point tensor.
            ValueError: the input has another rank or number of channels, or is empty.
        """
        self._check_input(x)
        memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        x = x.contiguous(memory_format=torch.channels_last)  # the layout of every map of the network
        features = {}

        # Base-Net
        x = features[0] = self._run('blocks1', self._embed('patch_embed1', x))
        if self._depth > 0:
            x = self._run('blocks2', self._embed('patch_embed2', x))
            if self.out_type != 'features':
                # The released dense checkpoints were trained with the normalised map going on into stage 3.
                x = self.extra_norm['1'](x)
            features[1] = x
        # Overview-Net
        if self._depth > 1:
            x = self._run('blocks3', self._embed('patch_embed3', x))
            overview = features[4] = self._run('blocks4', self._embed('patch_embed4', x))
        # Focus-Net
        if self._depth > 2:
            prior = self.high_level_proj(overview)
            # On CUDA, autocast interpolates in float32. The context stays in half precision.
            h = F.interpolate(prior, x.shape[2:], mode='bilinear', align_corners=False).to(prior.dtype)
            x, h = self._focus('sub_blocks3', x, h, h)
            features[2] = torch.cat([x, h], dim=1)
        if self._depth > 3:
            features[3] = self._focus('sub_blocks4', *self._embed('patch_embedx', x, h), prior)
        # mmcv's operators, such as RoIAlign, ignore strides and read memory as contiguous.
        return tuple(self._output(i, features).contiguous(memory_format=memory_format) for i in self.out_indices)

    def _embed(self, name: str, *maps: Tensor) -> Union[Tensor, tuple[Tensor, ...]]:
        return run_block(self.memory, getattr(self, name), *maps)

    def _run(self, stage: str, x: Tensor) -> Tensor:
        for block in getattr(self, stage):
            x = run_block(self._policy(stage), block, x)
        return x

    def _focus(self, stage: str, x: Tensor, h: Tensor, prior: Tensor) -> Union[Tensor, tuple[Tensor, Tensor]]:
        out = x, h
        for block in getattr(self, stage):
            out = run_block(self._policy(stage), block, *out, prior)
        return out

    def _policy(self, stage: str) -> str:
        return 'checkpoint' if stage in self.checkpointed_stages else self.memory

    def _output(self, index: int, features: dict[int, Tensor]) -> Tensor:
        if self.out_type == 'features' or index == 1:
            return features[index]
        out = self.extra_norm[str(index)](features[index])
        if index == 3 and self._adds_overview:
            out = out + self.h_proj(self.extra_norm['4'](features[4]))
        return out

    def _check_input(self, x: Tensor) -> None:
        if isinstance(x, torch.fx.Proxy):
            raise TypeError(
                'the input must be a Tensor, got a Proxy: torch.fx.symbolic_trace cannot trace OverLoCK, because its '
                'steps depend on the size of the map. torch.export.export(model, (images,)) gives a graph, and out_indices '
                'chooses the outputs'
            )
        if not isinstance(x, Tensor):
            raise TypeError(f'the input must be a Tensor, got {type(x).__name__}')
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f'the input must have shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}')
        if not x.is_floating_point():
            raise TypeError(f'the input must be a floating-point Tensor, got {x.dtype}')
        if 0 in x.shape:
            raise ValueError(f'the input must not be empty, got shape {tuple(x.shape)}')

    def switch_to_deploy(self) -> None:
        """Fold the branches of every large convolution into its kernel, for good: the form of the ``*_reparam`` files."""
        for module in self.modules():
            if isinstance(module, DilatedReparamConv):
                module.switch_to_deploy()
        self.deploy = True

    def train(self, mode: bool = True) -> OverLoCK:
        """Set training mode, but for frozen stages and, with ``norm_eval``, for batch norms."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        parts = [
            ('patch_embed1',),
            ('blocks1',),
            ('patch_embed2', 'blocks2'),
            ('patch_embed3', 'blocks3'),
            ('patch_embed4', 'blocks4'),
            ('high_level_proj', 'sub_blocks3'),
            ('patch_embedx', 'sub_blocks4'),
        ]
        frozen = [getattr(self, name) for stage in parts[: self.frozen_stages + 1] for name in stage]
        if self.frozen_stages >= 2 and self.out_type != 'features' and self._depth > 0:
            frozen.append(self.extra_norm['1'])  # it stands before stage 3, not only before an output
        for module in frozen:
            module.eval()
            module.requires_grad_(False)
        # Stages that no output needs do not run: without a gradient, as DistributedDataParallel wants it.
        for stage in parts[(2, 3, 5, 6, 7)[self._depth] :]:
            for name in stage:
                getattr(self, name).requires_grad_(False)


def resolve_architecture(arch: Union[str, dict[str, Any]]) -> dict[str, Any]:
    """Complete settings of an architecture given by name or as a dict (see :class:`OverLoCK`).

    Raises:
        TypeError: ``arch`` is neither str nor dict.
        ValueError: the name is unknown, or a setting is missing, unknown or does not fit.
    """
    if isinstance(arch, str):
        return {**ARCHITECTURE_DEFAULTS, **ARCHITECTURES[_resolve_name(arch)]}
    if not isinstance(arch, dict):
        raise TypeError(f'arch must be a str or a dict, got {arch!r}')
    lengths = dict(channels=4, depths=4, sub_depths=2, num_groups=2, kernel_sizes=4)
    settings = {**ARCHITECTURE_DEFAULTS, **arch}
    unknown, missing = settings.keys() - {*lengths, *ARCHITECTURE_DEFAULTS}, lengths.keys() - settings.keys()
    if unknown or missing:
        raise ValueError(f'arch has unknown settings {sorted(unknown)} and lacks {sorted(missing)}, got {arch!r}')
    for name, length in lengths.items():
        values = settings[name]
        if not isinstance(values, (tuple, list)) or len(values) != length:
            raise ValueError(f'arch[{name!r}] must be {length} ints, got {values!r}')
        settings[name] = tuple(positive_int(f'arch[{name!r}][{i}]', value) for i, value in enumerate(values))
    for name in ('mlp_ratio', 'sub_mlp_ratio'):
        settings[name] = positive_int(f'arch[{name!r}]', settings[name])
    for channels, groups in zip(settings['channels'][2:], settings['num_groups']):
        if channels % (2 * groups):
            raise ValueError(f"arch['num_groups']: 2 * {groups} must divide the {channels} channels of its stage")
    if settings['channels'][0] % 2 or settings['channels'][3] % 4:
        raise ValueError(f"arch['channels']: C1 must be even and C4 a multiple of 4, got {settings['channels']!r}")
    return settings


def _resolve_name(arch: str) -> str:
    """Return 'xt', 't', 's' or 'b' for any name of a variant, such as 'tiny' or 'overlock_t'."""
    name = re.sub('^overlock[-_]', '', arch.lower())
    name = LONG_NAMES.get(name, name)
    if name not in ARCHITECTURES:
        known = ', '.join([*ARCHITECTURES, *LONG_NAMES])
        raise ValueError(f'arch must be a dict or one of {known}, got {arch!r}')
    return name


def _resolve_out_indices(out_indices: Optional[Sequence[int]], out_type: str) -> tuple[int, ...]:
    number = 5 if out_type == 'features' else 4
    if out_indices is None:
        return (3,) if out_type == 'features' else (0, 1, 2, 3)
    if isinstance(out_indices, (Integral, str)) or not all(isinstance(i, Integral) for i in out_indices):
        raise TypeError(f'out_indices must be a sequence of ints, got {out_indices!r}')
    out_indices = tuple(map(int, out_indices))
    if not out_indices or len(set(out_indices)) < len(out_indices) or not set(out_indices) <= set(range(number)):
        raise ValueError(
            f'out_indices must be different numbers in 0..{number - 1} with out_type={out_type!r}, got {out_indices!r}'
        )
    return out_indices


def _resolve_with_cp(with_cp: Union[bool, Sequence[str]]) -> frozenset[str]:
    if isinstance(with_cp, bool):
        return frozenset(STAGES if with_cp else ())
    if isinstance(with_cp, str) or not set(with_cp) <= set(STAGES):
        raise ValueError(f'with_cp must be a bool or a sequence of names among {STAGES}, got {with_cp!r}')
    return frozenset(with_cp)
