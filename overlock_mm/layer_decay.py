"""Layer-wise learning rate decay for fine-tuning."""

from __future__ import annotations

from typing import Optional

import torch.nn as nn
from mmengine.optim import DefaultOptimWrapperConstructor

from .registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor with layer-wise learning rate decay.

    The learning rate of a parameter is multiplied by ``layer_decay_rate`` once for each layer above it. All options of
    mmengine's ``paramwise_cfg`` (``custom_keys`` with ``lr_mult`` and ``decay_mult``, ``norm_decay_mult`` and so on) work
    as usual, and their factors multiply with this one. Necks and heads keep the full rate. The method
    ``get_layer_depth(name, prefix)`` of the backbone gives the layer of a parameter. :class:`OverLoCK` and some backbones
    of mmpretrain have it. ::

        optim_wrapper = dict(
            constructor='overlock_mm.LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.8, norm_decay_mult=0.0),
        )

    Raises:
        ValueError: ``layer_decay_rate`` is missing or not in (0, 1], or the optimizer config has no ``lr``.
        TypeError: the backbone has no ``get_layer_depth``.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: Optional[dict] = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(f'paramwise_cfg.layer_decay_rate must be in (0, 1], got {rate!r}')
        if self.base_lr is None:
            raise ValueError(f'the optimizer must have an lr, got {self.optimizer_cfg!r}')
        self.layer_decay_rate = rate

    def add_params(self, params: list, module: nn.Module, prefix: str = '', **kwargs) -> None:
        """Append a parameter group for each parameter of a module, with the learning rate of its layer.

        Args:
            params: list of parameter groups, changed in place.
            module: the whole model, or one of its submodules when mmengine calls this method recursively.
            prefix: prefix of the module's parameter names. It is empty for the whole model.
        """
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return  # a recursive call by mmengine: the rates are set once, for the whole model

        backbone = getattr(module, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise TypeError(f'layer decay needs a model whose backbone has get_layer_depth, got {type(backbone).__name__}')
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for group in params:
            layer, layers = backbone.get_layer_depth(names[id(group['params'][0])], 'backbone.')
            group['lr'] = group.get('lr', self.base_lr) * self.layer_decay_rate ** (layers - 1 - layer)
