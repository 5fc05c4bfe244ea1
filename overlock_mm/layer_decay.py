"""Learning rates that fall from layer to layer towards the image, for fine-tuning."""

from __future__ import annotations

from typing import Optional

import torch.nn as nn
from mmengine.optim import DefaultOptimWrapperConstructor

from .registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with learning rates times ``layer_decay_rate`` ** (layers above a parameter's).

    All options of mmengine's ``paramwise_cfg`` (``custom_keys`` with ``lr_mult`` and ``decay_mult``, ``norm_decay_mult``
    and so on) work as they do there, and multiply with it. What follows the backbone keeps the full rate. The backbone
    says which layer a parameter is in, by ``get_layer_depth(name, prefix)``, as :class:`OverLoCK` and some of mmpretrain's
    do. ::

        optim_wrapper = dict(
            constructor='overlock_mm.LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.8, norm_decay_mult=0.0),
        )

    Raises:
        ValueError: ``layer_decay_rate`` is missing or not in (0, 1], or the optimizer has no ``lr``.
        TypeError: the model's backbone has no ``get_layer_depth``.
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
        """Append the parameter groups of a module, one for each parameter; at the top, with their layers' rates.

        Args:
            params: list of groups, to append to.
            module: the module; first the whole model.
            prefix: of its parameters' names, empty for the whole model.
        """
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return  # mmengine calls this for every submodule; what follows is done once, for the whole model

        backbone = getattr(module, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise TypeError(f'layer decay needs a model whose backbone has get_layer_depth, got {type(backbone).__name__}')
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for group in params:
            layer, layers = backbone.get_layer_depth(names[id(group['params'][0])], 'backbone.')
            group['lr'] = group.get('lr', self.base_lr) * self.layer_decay_rate ** (layers - 1 - layer)
