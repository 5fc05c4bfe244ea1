"""Trading time for memory in training: what the backward makes again instead of keeping it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Optional, Union

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..ops._autocast import autocast_dtype, is_autocast_enabled
from ..ops._extension import is_compiling


class _State(threading.local):
    inside_checkpoint = False
    current: Optional[recomputing] = None


_state = _State()


class recomputing:
    """Context in which autograd does not keep tensors that are cheap to make again.

    ``with recomputing() as again: y = again(function, x)`` runs ``function(x)``. If an operation in the context wants to
    keep ``y`` for its backward, it keeps ``x`` instead, and ``y`` is made again of it; x may come from ``again`` itself.
    What is not made by ``again`` is kept as ever. Functions must be pure: the second run gives the same, and has no
    effects. Contexts nest. What modules with hooks make is kept.

    Nothing is recomputed without gradients, under torch.compile, whose partitioner decides for itself, in blocks that
    :func:`checkpoint_block` runs, which keep nothing at all, and under hooks of somebody else, such as
    ``torch.utils.checkpoint``, which are to see what is kept (where torch tells of them, from about 2.8 on).
    """

    def __init__(self) -> None:
        # By address, which few of the tensors that are looked for share with one that was made. Tensors stay alive in the
        # context, lest another one is taken for them at the same address.
        self._made: dict[int, list[tuple[Tensor, _Remade]]] = {}
        self._outer: Optional[recomputing] = None
        self._hooks: Any = None

    def __enter__(self) -> recomputing:
        if torch.is_grad_enabled() and not is_compiling() and not _state.inside_checkpoint and not _under_foreign_hooks():
            self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
            self._hooks.__enter__()
            self._outer, _state.current = _state.current, self
        return self

    def __exit__(self, *error: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*error)
            _state.current = self._outer
            self._made.clear()

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor, again: Optional[Callable] = None) -> Tensor:
        """``function(*inputs)``, to be made again by ``again`` where that is given, else by the same function."""
        out = function(*inputs)
        if self._hooks is not None and out.requires_grad and not has_hooks(function):
            sources = [self._find(tensor) or _Kept(tensor) for tensor in inputs]
            made = (out, _Remade(again or function, sources, out.device.type))
            self._made.setdefault(out.data_ptr(), []).append(made)
        return out

    def _find(self, tensor: Tensor) -> Optional[_Remade]:
        for made, how in reversed(self._made.get(tensor.data_ptr(), ())):
            if made.shape == tensor.shape and made.stride() == tensor.stride() and made.dtype == tensor.dtype:
                return how
        return None if self._outer is None else self._outer._find(tensor)

    def _pack(self, tensor: Tensor) -> Union[_Remade, _Kept]:
        kept = self._find(tensor) or _Kept(tensor)
        kept.want()
        return kept


def _unpack(kept: Union[_Remade, _Kept]) -> Tensor:
    return kept.take()


def has_hooks(function: Callable) -> bool:
    """Whether a module, or one in it, has hooks of its own, or a forward put in the place of its class's.

    They change what comes out or its gradient, look at it, or count how often it does.
    """
    module = function.func if isinstance(function, partial) else function
    if not isinstance(module, nn.Module):
        return False
    # By hand: this is asked a thousand times in a forward.
    attributes = module.__dict__
    if (
        attributes['_forward_hooks']
        or attributes['_forward_pre_hooks']
        or attributes['_backward_hooks']
        or attributes['_backward_pre_hooks']
        or 'forward' in attributes
    ):
        return True
    children = attributes['_modules']
    return len(children) > 0 and any(has_hooks(child) for child in children.values())


def all_modules_have_hooks() -> bool:
    """Whether there are hooks for every module, as PyTorch's ModuleTracker sets them: they see what is called."""
    kinds = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
    return any(len(getattr(nn.modules.module, f'_global{kind}')) > 0 for kind in kinds)


def _under_foreign_hooks() -> bool:
    top = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
    return _state.current is None and top is not None and top(True) is not None


class _Kept:
    """A tensor that is kept, and must not change until the backward: with hooks, autograd does not see to it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()  # the tensor itself could hold the node that holds this
        self._version = None if tensor.is_inference() else tensor._version

    def want(self) -> None:
        pass

    def take(self) -> Tensor:
        if self._version is not None and self._tensor._version != self._version:
            raise RuntimeError(
                'one of the variables needed for gradient computation has been modified by an inplace operation: a tensor '
                f'of shape {tuple(self._tensor.shape)} is at version {self._tensor._version}; expected version '
                f'{self._version} instead'
            )
        return self._tensor


class _Remade:
    """A tensor that was not kept: how to make it again, of tensors that were kept or are made again themselves."""

    def __init__(self, function: Callable[..., Tensor], sources: list[Union[_Remade, _Kept]], device_type: str) -> None:
        self._function = function
        self._sources = sources
        self._autocast: Any = contextlib.nullcontext()
        if device_type != 'meta':
            enabled = is_autocast_enabled(device_type)
            dtype = autocast_dtype(device_type) if enabled else None
            self._autocast = torch.autocast(device_type, dtype=dtype, enabled=enabled)
        # How many will ask for the value in a backward, and how many of them have not yet.
        self._wanted = self._pending = 0
        self._value: Optional[Tensor] = None

    def want(self) -> None:
        if self._wanted == 0:
            for source in self._sources:
                source.want()
        self._wanted += 1
        self._pending += 1

    def take(self) -> Tensor:
        """The value, which is made for the first that asks and let go with the last."""
        if self._value is None:
            sources = [source.take() for source in self._sources]
            with torch.no_grad(), self._autocast:
                self._value = self._function(*sources)
        value = self._value
        self._pending -= 1
        if self._pending == 0:
            self._value, self._pending = None, self._wanted  # a graph that is retained begins anew
        return value


def checkpoint_block(block: nn.Module, *inputs):
    """Run ``block(*inputs)``, keep only the inputs, and compute the block again in the backward.

    The second run must give the first one's values and leave no second trace: batch norms normalise with the batch again,
    but their running statistics are updated by the first run only.
    """

    if is_compiling():
        # torch.compile traces the block once and updates the statistics once; it knows no context_fn.
        return checkpoint(block, *inputs, use_reentrant=False)

    def contexts():
        return _inside_checkpoint(), _second_run(block)

    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _inside_checkpoint() -> Iterator[None]:
    before, _state.inside_checkpoint = _state.inside_checkpoint, True
    try:
        yield
    finally:
        _state.inside_checkpoint = before


@contextlib.contextmanager
def _second_run(block: nn.Module) -> Iterator[None]:
    with _inside_checkpoint(), _statistics_at_rest(block):
        yield


@contextlib.contextmanager
def _statistics_at_rest(block: nn.Module) -> Iterator[None]:
    """Let batch norms update copies of their running statistics, which are thrown away."""
    kept = [
        (norm, name, buffer)
        for norm in block.modules()
        if isinstance(norm, _BatchNorm)
        for name, buffer in norm.named_buffers(recurse=False)
    ]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)
