"""Batch norms folded into the convolutions beside them, for inference.

The parameters stay as they are, so that a folded model saves and loads what the release's re-parameterised one does: what
is folded is made of them when it is first needed, and kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..ops import depthwise_conv2d
from .layers import DepthwiseConv, batch_norm, is_plain
from .recompute import has_hooks, is_compiling, recomputing


def conv_norm(again: recomputing, conv: nn.Conv2d, norm: nn.Module, x: Tensor, deploy: bool) -> Tensor:
    """``norm(conv(x))``: in a deployed model, at inference, one convolution."""
    if not (deploy and type(conv) in (nn.Conv2d, DepthwiseConv) and not has_hooks(conv) and _is_fixed(norm)):
        return batch_norm(again, norm, conv(x))
    weight, bias = _folded(conv, norm, norm_first=False)
    if isinstance(conv, DepthwiseConv):
        return depthwise_conv2d(x, weight, bias, conv.dilation[0])
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


def folded_projection(norm: nn.Module, conv: nn.Conv2d, deploy: bool) -> Optional[tuple[Tensor, Tensor]]:
    """Weight and bias of the one 1x1 convolution that ``conv(norm(x))`` is, in a deployed model, at inference."""
    return _folded(conv, norm, norm_first=True) if deploy and is_plain(conv, nn.Conv2d) and _is_fixed(norm) else None


#: Of each norm or layer: what was folded, and of which versions of which tensors.
_kept: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def until_changed(owner: nn.Module, sources: list[Tensor], settings: object, fold: Callable[[], Any]) -> Any:
    """``fold()``, kept with ``owner`` until one of the tensors behind it, or the settings, change."""
    if any(source.is_inference() for source in sources):  # these have no versions
        return fold()
    versions = [settings, *((source.data_ptr(), source.dtype, source._version) for source in sources)]
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
        and norm.affine
        and not norm.training
        and norm.running_mean is not None
        and not torch.is_grad_enabled()
        and not is_compiling()
    )


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d, norm_first: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias of convolution and norm in one."""
    # Training changes the statistics without telling their versions, but the count of batches.
    sources = [conv.weight, conv.bias, norm.weight, norm.bias]
    sources += [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    sources = [source for source in sources if source is not None]
    return until_changed(norm, sources, norm.eps, lambda: _fold(conv, norm, norm_first))


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """What to fold in: float64, but on devices that have none."""
    return torch.float32 if tensor.device.type == 'mps' else torch.float64


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, norm_first: bool) -> tuple[Tensor, Tensor]:
    """In float64, rounded once, but where there is none."""
    exact = exact_dtype(conv.weight)
    scale = norm.weight.to(exact) / torch.sqrt(norm.running_var.to(exact) + norm.eps)
    shift = norm.bias.to(exact) - norm.running_mean.to(exact) * scale
    weight = conv.weight.to(exact)
    bias = torch.zeros_like(weight[:, 0, 0, 0]) if conv.bias is None else conv.bias.to(exact)
    if norm_first:
        bias = bias + weight.flatten(1) @ shift
        weight = weight * scale.view(1, -1, 1, 1)
    else:
        bias = bias * scale + shift
        weight = weight * scale.view(-1, 1, 1, 1)
    # In the layout that the convolution would bring a 3x3 kernel into at every call.
    weight = weight.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)
    return weight.contiguous() if isinstance(conv, DepthwiseConv) else weight, bias.to(conv.weight.dtype)


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
                    norm = layers and isinstance(layers[0], nn.modules.batchnorm._BatchNorm)
                    x = conv_norm(again, layer, layers.pop(0), x, self.deploy) if norm else layer(x)
                else:
                    x = again(layer, x)
        return x
