"""The network in its published form, in eager PyTorch, step by step: what the backbone is measured against.

:func:`published` takes a backbone, with all its weights, and gives one whose modules run as the equations are written,
whatever overlock_mm.models fuses, folds or recomputes: each convolution, norm and activation is a call of its own and
writes its map, the branches of a large convolution are added up one by one, ContMix is
:func:`published.contmix_published`. Names and parameters stay, so that gradients and statistics can be compared too.

Maps are (B, C, H, W), contiguous, as the published code keeps them.
"""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from published import contmix_published
from torch import Tensor

from overlock_mm.models.blocks import BasicBlock, DynamicBlock
from overlock_mm.models.layers import (
    GlobalResponseNorm,
    LayerNorm2d,
    LayerScale,
    ResidualDepthwiseConv,
    SqueezeExcitation,
)
from overlock_mm.models.overlock import OverLoCK, _ContextDownsample
from overlock_mm.models.reparam import DILATED_BRANCHES, DilatedReparamConv, fold_branches


class PlainLayerNorm2d(LayerNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2).contiguous()


class PlainLayerScale(LayerScale):
    def forward(self, x: Tensor) -> Tensor:
        # The weight has the shape of the depth-wise 1x1 convolution that it is run as.
        return F.conv2d(x, self.weight, self.bias, groups=x.shape[1])


class PlainResidualDepthwiseConv(ResidualDepthwiseConv):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.conv2d(x, self.weight, self.bias, padding=self.padding, groups=self.groups)


class PlainSqueezeExcitation(SqueezeExcitation):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.proj(x)


class PlainGlobalResponseNorm(GlobalResponseNorm):
    def forward(self, x: Tensor) -> Tensor:
        # Half maps: autocast takes a norm in float32, and so does a whole model in half here.
        exact = torch.promote_types(x.dtype, torch.float32)
        response = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=exact)
        response = response / (response.mean(dim=1, keepdim=True) + self.eps)
        return (self.gamma * response + 1).to(x.dtype) * x + self.beta.to(x.dtype)


class PlainDilatedReparamConv(DilatedReparamConv):
    def forward(self, x: Tensor) -> Tensor:
        out = self.lk_origin(x)
        if self.deploy:
            return out
        out = self.origin_bn(out)
        for k, dilation in DILATED_BRANCHES[self.kernel_size]:
            branch = getattr(self, f'dil_conv_k{k}_{dilation}')(x)
            out = out + getattr(self, f'dil_bn_k{k}_{dilation}')(branch)
        return out


class PlainBasicBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        return self.ls(x) + self.proj(x)


class PlainDynamicBlock(DynamicBlock):
    def forward(self, x: Tensor, h: Tensor, prior: Tensor):
        if self.mix_context:
            h = self.x_scale(h) + self.h_scale(prior)
        shortcut = self.dwconv1(torch.cat([x, h], dim=1))
        normed = self.norm1(shortcut)
        fused = self.fusion(normed)
        gate = self.gate(fused)
        lepe = self.lepe(fused)
        mixed = self.mix(fused, normed)
        mixed = self.se_layer(self.dyconv_proj(mixed) + lepe)
        x = self.ls1(shortcut) + self.drop_path(self.proj(gate * mixed))
        x = self.dwconv2(x)
        x = self.ls2(x) + self.drop_path(self.mlp(self.norm2(x)))
        return x if self.last else x.split([self.channels, self.context_channels], dim=1)

    def mix(self, fused: Tensor, normed: Tensor) -> Tensor:
        """ContMix, on an enlarged map where the kernel does not fit into it."""
        size = fused.shape[2:]
        enlarged = size_of_mixing(self.kernel_size, *size)
        if enlarged != size:
            fused, normed = (
                F.interpolate(each, enlarged, mode='bilinear', align_corners=False) for each in (fused, normed)
            )
        x, h = normed.split([self.channels, self.context_channels], dim=1)
        mixed = contmix_published(
            fused,
            self.weight_query(x) * (self.channels // self.num_groups) ** -0.5,
            self.weight_key(h),
            self.weight_proj.weight.flatten(1),
            self.weight_proj.bias,
            self.rpb1,
            self.rpb2,
            num_groups=self.num_groups,
            small_kernel_size=self.small_kernel_size,
            large_kernel_size=self.kernel_size,
        )
        return mixed if enlarged == size else F.adaptive_avg_pool2d(mixed, size)


def size_of_mixing(kernel_size: int, height: int, width: int) -> tuple[int, int]:
    """Of the map on which ContMix runs: its own size, or that to which it is enlarged for the kernel to fit into it."""
    if min(height, width) >= kernel_size:
        return height, width
    # The published products, which rounding may leave one short of the kernel.
    if height < width:
        return kernel_size, max(kernel_size, int(kernel_size / height * width))
    return max(kernel_size, int(kernel_size / width * height)), kernel_size


class PlainContextDownsample(_ContextDownsample):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.x_proj(x), self.h_proj(h)


class PlainOverLoCK(OverLoCK):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # What no output needs does not run, as in OverLoCK: it would move the running statistics of its norms.
        depth = max((0, 1, 3, 4, 2)[index] for index in self.out_indices)
        outputs = {}
        pyramid = self.out_type != 'features'

        x = outputs[0] = self.in_turn(self.blocks1, self.patch_embed1(x.contiguous()))
        if depth > 0:
            x = self.in_turn(self.blocks2, self.patch_embed2(x))
            if pyramid:
                x = self.extra_norm['1'](x)  # goes on normalised, as the dense checkpoints were trained
            outputs[1] = x
        if depth > 1:
            x = self.in_turn(self.blocks3, self.patch_embed3(x))
            overview = outputs[4] = self.in_turn(self.blocks4, self.patch_embed4(x))
        if depth > 2:
            prior = self.high_level_proj(overview)
            context = h = F.interpolate(prior, x.shape[2:], mode='bilinear', align_corners=False)
            for block in self.sub_blocks3:
                x, h = block(x, h, context)
            outputs[2] = torch.cat([x, h], dim=1)
        if depth > 3:
            x, h = self.patch_embedx(x, h)
            for block in self.sub_blocks4[:-1]:
                x, h = block(x, h, prior)
            outputs[3] = self.sub_blocks4[-1](x, h, prior)

        if pyramid:
            for index in {0, 2, 3}.intersection(self.out_indices):
                outputs[index] = self.extra_norm[str(index)](outputs[index])
            if self.out_type == 'pyramid_with_overview' and 3 in self.out_indices:
                outputs[3] = outputs[3] + self.h_proj(self.extra_norm['4'](overview))
        return tuple(outputs[index].contiguous() for index in self.out_indices)

    @staticmethod
    def in_turn(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        return x


#: Class of a module, or of one of its bases: what it becomes. The first that fits counts.
PLAIN_CLASSES: tuple[tuple[type, type], ...] = (
    (OverLoCK, PlainOverLoCK),
    (_ContextDownsample, PlainContextDownsample),
    (BasicBlock, PlainBasicBlock),
    (DynamicBlock, PlainDynamicBlock),
    (DilatedReparamConv, PlainDilatedReparamConv),
    (LayerNorm2d, PlainLayerNorm2d),
    (LayerScale, PlainLayerScale),
    (ResidualDepthwiseConv, PlainResidualDepthwiseConv),
    (SqueezeExcitation, PlainSqueezeExcitation),
    (GlobalResponseNorm, PlainGlobalResponseNorm),
    # Subclasses of torch's own layers that do the same in another way.
    *((base, base) for base in (nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.GELU, nn.SiLU, nn.AdaptiveAvgPool2d)),
)


def published(model: OverLoCK, folded: bool = False) -> OverLoCK:
    """A copy of the backbone, of the same weights and mode, that computes as the published code does.

    Args:
        model: in any mode, with any settings; ``with_cp`` has no effect on the copy.
        folded: fold the branches of the dilated convolutions into one convolution each, which makes of it the form of the
            released ``*_reparam`` checkpoints, for evaluation. All batch norms that stand elsewhere stay.

    Raises:
        ValueError: the model is folded already (``deploy``).
    """
    if model.deploy:
        raise ValueError('the model must not be folded: build it with deploy=False, and give it before switch_to_deploy')
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__class__ = next((plain for base, plain in PLAIN_CLASSES if isinstance(module, base)), type(module))
    if folded:
        for module in model.modules():
            if isinstance(module, DilatedReparamConv):
                _fold(module)
        model.deploy = True
    return model


@torch.no_grad()
def _fold(module: DilatedReparamConv) -> None:
    weight, bias = fold_branches(module.state_dict(), '', module.kernel_size, module.origin_bn.eps)
    conv = module.lk_origin
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    conv.bias = nn.Parameter(bias, requires_grad=conv.weight.requires_grad)
    for name in [name for name in module._modules if name != 'lk_origin']:
        delattr(module, name)
    module.deploy = True
