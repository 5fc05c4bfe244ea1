"""Convolutions with what stands beside them, each by the fastest way there is.

At inference a deployed model folds its batch norms into the convolutions beside them, and on the CPU packs the weights as
oneDNN wants them. The parameters stay as they are, so that a folded model saves and loads what the release's
re-parameterised one does: what is folded is made of them when it is first needed, and kept until they change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import _maps, depthwise_conv2d
from ..ops._autocast import cast_as_autocast, dtype_under_autocast, is_autocast_enabled
from ..ops._extension import is_compiling
from ..ops._packed import PackedConv2d, can_pack
from ..ops._products import conv2d_as_product, is_faster_as_product
from .layers import DepthwiseConv, ResidualDepthwiseConv, batch_norm, is_plain, is_plain_gelu
from .recompute import all_modules_have_hooks, recomputing

#: Positions of a bfloat16 map from which on oneDNN's depth-wise 3x3 convolution is faster than this package's, where the
#: processor computes in bfloat16.
_LARGE_MAP = 4200


def convolve(
    again: recomputing,
    conv: nn.Conv2d,
    x: Tensor,
    norm: Optional[nn.Module] = None,
    activation: Optional[nn.Module] = None,
    deploy: bool = False,
) -> Tensor:
    """``activation(norm(conv(x)))``: in a deployed model, at inference, one convolution."""
    name = _name_of(activation)
    packed = None
    if activation is None or name:
        packed = packed_conv(conv, x, norm, deploy, activated=name is not None)
    if packed:
        return packed(cast_as_autocast(x), name)
    if norm is None:
        y = _convolve(again, conv, x)
    elif deploy and _is_one_of_ours(conv) and _is_fixed(norm):
        weight, bias = _folded(conv, norm, norm_first=False)
        if isinstance(conv, DepthwiseConv):
            y = depthwise_conv2d(x, weight, bias, conv.dilation[0])
        else:
            y = F.conv2d(x, weight, bias, conv.stride, conv.padding)
    else:
        y = batch_norm(again, norm, _convolve(again, conv, x))
    return y if activation is None else again(activation, y)


def add_convolved(
    again: recomputing, x: Tensor, conv: nn.Conv2d, y: Tensor, norm: nn.Module, deploy: bool, inplace: bool
) -> Tensor:
    """``x + norm(conv(y))``. ``inplace``: nobody else needs ``x``, which the result may take the place of."""
    packed = packed_conv(conv, y, norm, deploy) if inplace else None
    if packed and x.dtype == dtype_under_autocast(y):
        return packed.add_to(x, cast_as_autocast(y))
    return again(torch.add, convolve(again, conv, y, norm, deploy=deploy), x)


def add_projected(
    again: recomputing,
    x: Tensor,
    conv: nn.Conv2d,
    y: Tensor,
    norm: Optional[nn.Module],
    deploy: bool,
    inplace: bool,
    scale: Optional[Tensor] = None,
    shift: Optional[Tensor] = None,
) -> Tensor:
    """``x * scale + shift + conv(norm(y))`` of a 1x1 convolution, with scale and shift (C), or without what is None.

    ``inplace``: as of :func:`add_convolved`.
    """
    packed = packed_conv(conv, y, norm, deploy, norm_first=True, shift=shift) if inplace else None
    if packed and x.dtype == dtype_under_autocast(y):
        return packed.add_to(x if scale is None else x.mul_(_per_channel(scale, x)), cast_as_autocast(y))
    weight, bias = conv.weight, conv.bias
    if norm is not None and deploy and _is_fixed(norm):
        weight, bias = _folded(conv, norm, norm_first=True)
    elif norm is not None:
        y = batch_norm(again, norm, y)
    if shift is not None:
        bias = shift if bias is None else bias + shift
    y = _pointwise(y, weight, bias)
    return x + y if scale is None else torch.addcmul(y, x, _per_channel(scale, x))


def packed_conv(
    conv: nn.Conv2d,
    x: Tensor,
    norm: Optional[nn.Module] = None,
    deploy: bool = False,
    norm_first: bool = False,
    shift: Optional[Tensor] = None,
    activated: bool = False,
) -> Optional[PackedConv2d]:
    """``norm(conv(x)) + shift``, or ``conv(norm(x)) + shift``, as one convolution; None where it is not to be.

    ``activated``: it takes along an activation.
    """
    if not (deploy and (_is_one_of_ours(conv) or is_plain(conv, ResidualDepthwiseConv)) and can_pack(x)):
        return None
    if norm is not None and not _is_fixed(norm):
        return None
    dtype = dtype_under_autocast(x)
    if isinstance(conv, DepthwiseConv):
        small = conv.kernel_size[0] == 3 and conv.dilation[0] == 1
        large_half = dtype == torch.bfloat16 and x.shape[2] * x.shape[3] >= _LARGE_MAP and _maps.HAS_FAST_BFLOAT16
        if not small or not (activated or large_half):
            return None
    sources = _sources(conv, norm) if shift is None else [*_sources(conv, norm), shift]
    if any(source.is_inference() for source in sources):  # without versions, they would be packed anew at every call
        return None
    if conv.weight.dtype != x.dtype and not is_autocast_enabled(x.device.type):
        return None  # a convolution says what is wrong

    def pack() -> PackedConv2d:
        weight, bias = _fold(conv, norm, norm_first, shift)
        return PackedConv2d(weight.to(dtype), bias.to(dtype), conv.stride, conv.padding, conv.groups, x.shape)

    settings = (dtype, conv.stride, conv.padding, conv.groups, norm_first, None if norm is None else norm.eps)
    return until_changed(conv, sources, settings, pack)


#: Of each norm or layer: what was folded, and of which versions of which tensors.
_kept: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def until_changed(owner: nn.Module, sources: list[Tensor], settings: object, fold: Callable[[], Any]) -> Any:
    """``fold()``, kept with ``owner`` until one of the tensors behind it, or the settings, change."""
    versions = [settings]
    for source in sources:
        if source.is_inference():  # these have no versions
            return fold()
        versions += source.data_ptr(), source.dtype, source._version
    kept = _kept.get(owner)
    if kept is None or kept[0] != versions:
        # The sources are held, lest others come to lie where they were.
        kept = _kept[owner] = (versions, [source.detach() for source in sources], fold())
    return kept[2]


def forget_folded(module: nn.Module) -> None:
    """Have everything folded anew. A change through ``.data`` is not seen without it."""
    for child in module.modules():
        _kept.pop(child, None)


def _is_fixed(norm: nn.Module) -> bool:
    """Whether it is a fixed affine map, and no gradient goes through it. torch.compile fuses it by itself."""
    return (
        is_plain(norm, nn.BatchNorm2d)
        and norm._parameters.get('weight') is not None
        and not norm.training
        and norm.running_mean is not None
        and not torch.is_grad_enabled()
        and not is_compiling()
    )


def is_pointwise(conv: nn.Module) -> bool:
    """Whether it is nothing but a 1x1 convolution."""
    return is_plain(conv, nn.Conv2d) and conv.weight.shape[2:] == (1, 1) and conv.stride == (1, 1) and _is_simple(conv)


def _is_one_of_ours(conv: nn.Module) -> bool:
    return (is_plain(conv, nn.Conv2d) and _is_simple(conv)) or is_plain(conv, DepthwiseConv)


def _is_simple(conv: nn.Conv2d) -> bool:
    """Whether a weight, its stride and a padding of zeros that keeps the size are all there is to it: somebody may have put
    another in the place of ours."""
    return (
        conv.padding == tuple(k // 2 for k in conv.kernel_size)
        and conv.padding_mode == 'zeros'
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv._parameters.get('weight') is not None
    )


def _name_of(activation: Optional[nn.Module]) -> Optional[str]:
    """What :class:`PackedConv2d` calls it; None for those that it does not know."""
    if is_plain_gelu(activation):
        return 'gelu'
    return 'silu' if is_plain(activation, nn.SiLU) else None


def _convolve(again: recomputing, conv: nn.Module, x: Tensor) -> Tensor:
    if isinstance(conv, ResidualDepthwiseConv):
        return again(conv, x)
    ours = is_plain(conv, nn.Conv2d) and _is_simple(conv)
    if ours and is_faster_as_product(x, conv.weight, conv.bias, conv.stride) and not all_modules_have_hooks():
        return conv2d_as_product(x, conv.weight, conv.bias, conv.stride)
    return conv(x)


def _pointwise(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """A 1x1 convolution."""
    if is_faster_as_product(x, weight, bias, (1, 1)):
        return conv2d_as_product(x, weight, bias)
    return F.conv2d(x, weight, bias)


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.view(1, -1, 1, 1).to(x.dtype)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d, norm_first: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias of convolution and norm in one."""

    def fold() -> tuple[Tensor, Tensor]:
        weight, bias = _fold(conv, norm, norm_first)
        # In the layout that the convolution would bring a 3x3 kernel into at every call.
        weight = weight.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)
        return weight.contiguous() if isinstance(conv, DepthwiseConv) else weight, bias.to(conv.weight.dtype)

    return until_changed(norm, _sources(conv, norm), (norm.eps, norm_first), fold)


def _sources(conv: nn.Conv2d, norm: Optional[nn.BatchNorm2d]) -> list[Tensor]:
    """What convolution and norm are folded of."""
    # Out of the dicts: an attribute of a module takes ten times as long, and this is asked for every layer of a forward.
    sources = [*conv._parameters.values()]
    if norm is not None:
        # Training changes the statistics without telling their versions, but the count of batches.
        sources += [*norm._parameters.values(), *norm._buffers.values()]
    return [source for source in sources if source is not None]


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """What to fold in: float64, but on devices that have none."""
    return torch.float32 if tensor.device.type == 'mps' else torch.float64


def _fold(
    conv: nn.Conv2d, norm: Optional[nn.BatchNorm2d], norm_first: bool, shift: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64, but where there is none: to be rounded once."""
    exact = exact_dtype(conv.weight)
    weight = conv.weight.to(exact)
    bias = torch.zeros_like(weight[:, 0, 0, 0]) if conv.bias is None else conv.bias.to(exact)
    if norm is not None:
        scale = norm.weight.to(exact) / torch.sqrt(norm.running_var.to(exact) + norm.eps)
        beta = norm.bias.to(exact) - norm.running_mean.to(exact) * scale
        if norm_first:
            bias = bias + weight.flatten(1) @ beta
            weight = weight * scale.view(1, -1, 1, 1)
        else:
            bias = bias * scale + beta
            weight = weight * scale.view(-1, 1, 1, 1)
    if isinstance(conv, ResidualDepthwiseConv):
        middle = conv.kernel_size[0] // 2
        weight = weight.clone()
        weight[:, :, middle, middle] += 1
    return weight, bias if shift is None else bias + shift.to(exact)


class ConvSequential(nn.Sequential):
    """Convolutions with batch norms and activations. Autograd keeps the convolutions' outputs, and no more.

    Args:
        layers: as of ``nn.Sequential``.
        deploy: fold the norms at inference.
    """

    def __init__(self, *layers: nn.Module, deploy: bool = False) -> None:
        super().__init__(*layers)
        self.deploy = deploy

    def switch_to_deploy(self) -> None:
        self.deploy = True

    def forward(self, x: Tensor) -> Tensor:
        with recomputing() as again:
            layers = list(self)
            while layers:
                layer = layers.pop(0)
                if isinstance(layer, nn.Conv2d):
                    norm = layers.pop(0) if layers and isinstance(layers[0], _BatchNorm) else None
                    activation = layers.pop(0) if layers and not isinstance(layers[0], (nn.Conv2d, _BatchNorm)) else None
                    x = convolve(again, layer, x, norm, activation, self.deploy)
                else:
                    x = again(layer, x)
        return x
