"""Memory in training: what autograd keeps of a block for the backward. This file alone knows.

:func:`run_block` runs a block under one of three policies, which change neither results nor gradients:

- ``'fast'``: autograd keeps what it asks for.
- ``'lean'``: maps that are cheap to make again are not kept: outputs of norms, activations, small depth-wise convolutions
  and products with scales. Outputs of matrix products, large convolutions and ContMix are kept, and sums.
- ``'checkpoint'``: only the inputs of the block are kept, and the backward runs the block again.

A block knows nothing of it. The lean policy watches PyTorch's functions from outside: a torch-function mode notes how each
cheap map was made, and hooks of saved tensors keep the note in place of the map. It does not see changes of a map through
``.data``, because they count no version.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..ops._autocast import autocast_disabled, autocast_dtype, is_autocast_enabled
from ..ops._library import operator, using_references
from ..ops._modes import is_compiling, is_exporting, unseen_by_modes
from ..ops.norms import norm_and_input
from ..ops.sync_norms import normalise_batch
from .layers import is_sharded

#: What ``OverLoCK(memory=...)`` takes.
POLICIES = ('lean', 'fast')


class _State(threading.local):
    inside_checkpoint = False
    inside_lean = False


_state = _State()


def run_block(policy: str, block: nn.Module, *inputs: Any) -> Any:
    """``block(*inputs)`` under a policy: 'fast', 'lean' or 'checkpoint'. Without gradients they are all the same.

    'lean' is 'fast' where somebody else decides what is kept: under torch.compile, in an export, in a checkpointed block,
    with references of operators, and under hooks of saved tensors that were set outside (where torch tells of them, from
    about 2.8 on). It is 'fast' too for a block with layers that were compiled, and where FSDP shards layers inside of the
    block: their weights are not there when another layer's backward needs their outputs. FSDP of whole blocks is lean.

    Raises:
        ValueError: there is no such policy.
    """
    if policy not in (*POLICIES, 'checkpoint'):
        raise ValueError(f'the policy must be one of {(*POLICIES, "checkpoint")}, got {policy!r}')
    if not torch.is_grad_enabled():
        return block(*inputs)
    if policy == 'checkpoint':
        return _run_checkpointed(block, *inputs)
    if policy == 'lean' and not _others_decide() and not _has_layers_of_others(block):
        with lean():
            return block(*inputs)
    return block(*inputs)


def _others_decide() -> bool:
    if is_compiling() or is_exporting() or using_references() or _state.inside_checkpoint:
        return True
    return not _state.inside_lean and _has_hooks()


def _has_hooks() -> bool:
    """Whether hooks of saved tensors are set."""
    top = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
    return top is not None and top(True) is not None


def _has_layers_of_others(block: nn.Module) -> bool:
    """Whether a part of the block was compiled, or sharded by FSDP."""
    compiled = getattr(sys.modules.get('torch._dynamo.eval_frame'), 'OptimizedModule', ())
    return any(
        isinstance(module, compiled)
        or module.__dict__.get('_compiled_call_impl') is not None
        or (module is not block and is_sharded(module))
        for module in block.modules()
    )


# ------------------------------------------------------------------------------------------------------ the lean policy


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """Context in which autograd does not keep maps that are cheap to make again."""
    before, _state.inside_lean = _state.inside_lean, True
    notebook = _Notebook()
    try:
        with torch.autograd.graph.saved_tensors_hooks(notebook.pack, _unpack), notebook:
            yield
    finally:
        _state.inside_lean = before
        notebook.clear()


Call = tuple[Callable, tuple, dict]


def _same_call(function: Callable, args: tuple, kwargs: dict, out: Any) -> Optional[Call]:
    return function, args, kwargs


def _scale_again(function: Callable, args: tuple, kwargs: dict, out: Any) -> Optional[Call]:
    """A sum of two maps is kept: it would need both."""
    return (function, args, kwargs) if args[3] is None else None


def _excitation_again(function: Callable, args: tuple, kwargs: dict, out: Any) -> Optional[Call]:
    """From its gates."""
    return operator('_gated'), (args[0], out[1], args[5]), {}


def _response_norm_again(function: Callable, args: tuple, kwargs: dict, out: Any) -> Optional[Call]:
    """From its scale: no sums are made again."""
    x, _, beta, _ = args
    return operator('_response_normed'), (x, out[1], beta), {}


def _gelu_norm_again(function: Callable, args: tuple, kwargs: dict, out: Any) -> Optional[Call]:
    """From its scale too."""
    x, weight, bias, _, beta, _ = args
    return operator('_gelu_residual_depthwise_normed'), (x, weight, bias, out[1], beta), {}


def _norm_again(function: Callable, args: tuple, kwargs: dict, out: Any) -> Optional[Call]:
    """Without the statistics, which only the backward of the first call reads."""
    return operator('layer_norm'), args, kwargs


def _batch_norm_again(function: Callable, args: tuple, kwargs: dict, out: Any) -> Optional[Call]:
    """With the statistics of the batch, the running ones are not updated a second time."""
    if kwargs.get('training'):
        args = (args[0], None, None)
    return function, args, kwargs


def _small_kernel_again(function: Callable, args: tuple, kwargs: dict, out: Any) -> Optional[Call]:
    """Residual 3x3 kernels and the branches beside a large kernel are cheap. Large kernels are not, and a plain 3x3 one
    stands before a batch norm, where keeping its output costs little."""
    _, weight, _, dilation, residual = args
    size = weight.shape[-1]
    return (function, args, kwargs) if residual or (size <= 9 and (size > 3 or dilation > 1)) else None


#: Functions whose outputs are cheap: the call that makes them again, or None where they are kept after all. Another
#: function than the one that was called makes the first output alone.
_CHEAP: dict[Callable, Callable[[Callable, tuple, dict, Any], Optional[Call]]] = {
    **dict.fromkeys(
        (
            F.layer_norm, F.gelu, F.silu, operator('layer_norm'), operator('gelu'), normalise_batch, torch.addcmul,
            Tensor.mul, Tensor.split, Tensor.permute, Tensor.contiguous, Tensor.to, Tensor.__getitem__,
        ),
        _same_call,
    ),
    F.batch_norm: _batch_norm_again,
    norm_and_input: _norm_again,
    operator('scale_and_shift'): _scale_again,
    operator('squeeze_excitation'): _excitation_again,
    operator('global_response_norm'): _response_norm_again,
    operator('gelu_residual_depthwise_norm'): _gelu_norm_again,
    operator('depthwise_conv2d'): _small_kernel_again,
}  # fmt: skip


class _Notebook(TorchFunctionMode):
    """Notes how cheap tensors are made, and finds the note of a tensor that autograd wants to keep."""

    def __init__(self) -> None:
        super().__init__()
        # By address. Few tensors share one, and the tensors stay alive here, so that no address is used again.
        self._notes: dict[int, list[_Note]] = {}
        self._count = 0

    def clear(self) -> None:
        for notes in self._notes.values():
            for note in notes:
                note.close()
        self._notes.clear()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        again = _CHEAP.get(function)
        if again is not None:
            call = again(function, args, kwargs, out)
            if call is not None:
                self._note(out if call[0] is function else out[0], call)
        return out

    def pack(self, tensor: Tensor) -> Union[_Note, _Kept]:
        with unseen_by_modes():
            kept = self.source(tensor)
            if type(kept) is _Note:
                kept.add_user()
            return kept

    def source(self, tensor: Tensor, before: Optional[int] = None) -> Union[_Note, _Kept]:
        """What stands for a tensor: a note, of the first ``before`` ones, or the tensor itself."""
        note = self.find(tensor, before)
        return note if note is not None and note.settle(self) else _Kept(tensor)

    def find(self, tensor: Tensor, before: Optional[int] = None) -> Optional[_Note]:
        # Most tensors have no note. They are passed over first.
        if type(tensor) is Tensor and not tensor.is_leaf and tensor.layout is torch.strided:
            notes = self._notes.get(tensor.data_ptr())
            if notes is not None and not tensor.is_complex():
                for note in reversed(notes):
                    if (before is None or note.number < before) and note.is_of(tensor):
                        return note
        return None

    def _note(self, out: Any, call: Call) -> None:
        outputs = out if isinstance(out, tuple) else (out,)
        first = outputs[0]
        if not first.requires_grad or type(first) is not Tensor or first.layout is not torch.strided:
            return
        if first.is_complex() or any(first is each for each in call[1]):
            return  # a complex tensor may be conjugated by a flag
        for index, each in enumerate(outputs):
            note = _Note(self._count, each, call, index if isinstance(out, tuple) else None)
            self._notes.setdefault(each.data_ptr(), []).append(note)
            self._count += 1


def _unpack(kept: Union[_Note, _Kept]) -> Tensor:
    return kept.value()


class _Kept:
    """A tensor that is kept. It must not change until the backward, and with hooks autograd does not check that."""

    __slots__ = ('_tensor', '_version')

    def __init__(self, tensor: Tensor) -> None:
        # A result could hold the node that holds this.
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = tensor._version

    def value(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                'one of the variables needed for gradient computation has been modified by an inplace operation: a tensor '
                f'of shape {tuple(self._tensor.shape)} is at version {self._tensor._version}; expected version '
                f'{self._version} instead'
            )
        return self._tensor.detach()


class _Note:
    """A tensor that is not kept: the call that makes it again.

    At first a note is no more than that. It is settled when autograd wants to keep the tensor: then what stands for the
    tensors of the call, notes or kept tensors, takes their places.

    Args:
        number: how many notes there were before.
        out: the tensor.
        call: function, arguments and keyword arguments.
        index: which of several outputs of the call it is, None for the only one.
    """

    def __init__(self, number: int, out: Tensor, call: Call, index: Optional[int]) -> None:
        self.number = number
        self._out: Optional[Tensor] = out
        self._version = out._version
        self._call: Optional[Call] = call
        self._tensors: Optional[list[Tensor]] = _tensors_in((*call[1], *call[2].values()))
        self._versions = [each._version for each in self._tensors]
        self._sources: Optional[list[Union[_Note, _Kept]]] = None
        self._index = index
        self._device_type = out.device.type
        self._autocast_dtype = None
        if self._device_type != 'meta' and is_autocast_enabled(self._device_type):
            self._autocast_dtype = autocast_dtype(self._device_type)
        # How many ask for the value in a backward, and how many of them have not asked yet.
        self._users = self._pending = 0
        self._value: Optional[Tensor] = None

    def is_of(self, tensor: Tensor) -> bool:
        """Whether this is the note of a tensor at its address, which was not changed in place since."""
        out = self._out
        same = out is tensor or (
            out.shape == tensor.shape and out.stride() == tensor.stride() and out.dtype == tensor.dtype
        )
        return same and tensor._version == self._version

    def settle(self, notebook: _Notebook) -> bool:
        """Whether the tensor can be made again: not if something that it was made of was changed in place since."""
        if self._sources is None:
            if self._versions != [each._version for each in self._tensors]:
                return False
            self._sources = [notebook.source(each, before=self.number) for each in self._tensors]
            sources = iter(self._sources)
            self._call = _replaced(self._call, Tensor, lambda _: next(sources))
        return True

    def close(self) -> None:
        """Let go of all tensors, with the notebook. A note that is not settled now is never asked for."""
        self._out = self._tensors = None
        if self._sources is None:
            self._call = None

    def add_user(self) -> None:
        if self._users == 0:
            for source in self._sources:
                if type(source) is _Note:
                    source.add_user()
        self._users += 1
        self._pending += 1

    def value(self) -> Tensor:
        """The tensor. It is made for the first user in a backward, and freed after the last."""
        if self._value is None:
            function, args, kwargs = _replaced(self._call, (_Note, _Kept), _unpack)
            with torch.no_grad(), self._autocast():
                out = function(*args, **kwargs)
            self._value = out if self._index is None else out[self._index]
        value = self._value
        self._pending -= 1
        if self._pending == 0:
            self._value, self._pending = None, self._users  # for another backward through a graph that is retained
        return value

    def _autocast(self) -> contextlib.AbstractContextManager:
        """Autocast as it was in the call."""
        if self._autocast_dtype is None:
            return autocast_disabled(self._device_type)
        return torch.autocast(self._device_type, dtype=self._autocast_dtype)


def _tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among arguments, and in lists and tuples among them, in their order."""
    found = []
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif type(each) in (list, tuple):
            found += _tensors_in(each)
    return found


def _replaced(values: Any, kind: Union[type, tuple[type, ...]], function: Callable[[Any], Any]) -> Any:
    """Arguments with function(each) in the place of each one of a kind."""
    if isinstance(values, kind):
        return function(values)
    if type(values) in (list, tuple):
        return type(values)([_replaced(each, kind, function) for each in values])
    if type(values) is dict:
        return {name: _replaced(each, kind, function) for name, each in values.items()}
    return values


# ------------------------------------------------------------------------------------------------------- checkpointing


def _run_checkpointed(block: nn.Module, *inputs: Any) -> Any:
    """The second run gives the first one's values and leaves no second trace.

    Batch norms normalise by the batch again, but only the first run updates their running statistics.
    """
    if is_compiling():
        # torch.compile traces the block once and updates the statistics once. It knows no context_fn.
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
    """Let batch norms update copies of their running statistics, which are thrown away."""
    # The dictionaries themselves: Module.__setattr__ takes ten times as long, for hundreds of buffers.
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.training]
    kept = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, kept):
        norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
    try:
        with _inside_checkpoint():
            yield
    finally:
        for norm, buffers in zip(norms, kept):
            norm._buffers.update(buffers)
