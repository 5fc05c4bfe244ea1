"""The operators in ``torch.ops.overlock_mm``: compiled ones where there is a binary, references everywhere else.

The dispatcher chooses. The binary has kernels for the CPU, and most of them for CUDA. Where an operator has no kernels, its
reference is registered (keys ``Autograd`` and ``CompositeExplicitAutograd``); without a binary, for the CPU too. With the
key ``CompositeImplicitAutograd``, torch.compile would decompose the compiled operators as well.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..versions import version_numbers
from . import _checks, _reference
from ._autocast import autocast_disabled, cast_as_autocast
from ._modes import is_compiling, is_exporting

_BUILD_COMMAND = 'pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps .'

#: As in csrc: defined here where there is no binary.
SCHEMAS = {
    'contmix': '(Tensor value, Tensor query, Tensor key, Tensor proj_weight, Tensor? proj_bias, Tensor? rpb_small, '
    'Tensor? rpb_large, *, int num_groups, int small_kernel_size, int large_kernel_size, float scale=1.0) -> Tensor',
    'depthwise_conv2d': '(Tensor x, Tensor weight, Tensor? bias, int dilation, bool residual) -> Tensor',
    'gelu': '(Tensor x) -> Tensor',
    'branch_norms': '(Tensor x, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, int[] dilations, '
    'float eps) -> (Tensor output, Tensor mean, Tensor variance)',
    '_branch_statistics': '(Tensor x, Tensor[] weights, int[] dilations) -> (Tensor mean, Tensor variance)',
    '_branch_norms_given': '(Tensor x, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, Tensor mean, '
    'Tensor variance, int[] dilations, float eps) -> Tensor',
    '_branch_norms_sums': '(Tensor grad_output, Tensor x, Tensor[] weights, Tensor mean, int[] dilations) -> '
    '(Tensor grad_sum, Tensor products)',
    '_branch_norms_gradients': '(Tensor grad_output, Tensor x, Tensor[] weights, Tensor[] norm_weights, Tensor mean, '
    'Tensor variance, Tensor grad_mean, Tensor product_mean, int[] dilations, float eps) -> '
    '(Tensor grad_x, Tensor grad_weights)',
    'global_response_norm': '(Tensor x, Tensor gamma, Tensor beta, float eps) -> (Tensor output, Tensor scale)',
    '_response_normed': '(Tensor x, Tensor scale, Tensor beta) -> Tensor',
    'layer_norm': '(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor',
    'residual_depthwise_norm': '(Tensor x, Tensor weight, Tensor? bias, Tensor gamma, Tensor beta, float eps) -> Tensor',
    'residual_depthwise_norm_': '(Tensor(a!) x, Tensor weight, Tensor? bias, Tensor gamma, Tensor beta, float eps) -> ()',
    'gelu_residual_depthwise_norm': '(Tensor x, Tensor weight, Tensor? bias, Tensor gamma, Tensor beta, float eps) '
    '-> (Tensor output, Tensor scale)',
    '_gelu_residual_depthwise_normed': '(Tensor x, Tensor weight, Tensor? bias, Tensor scale, Tensor beta) -> Tensor',
    'scale_and_shift': '(Tensor x, Tensor scale, Tensor? shift, Tensor? other) -> Tensor',
    'scaled_sum': '(Tensor x, Tensor scale, Tensor shift, Tensor other, Tensor other_scale, Tensor other_shift) -> Tensor',
    'squeeze_excitation': '(Tensor x, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, '
    'Tensor expand_bias, Tensor? other) -> (Tensor output, Tensor gate)',
    '_gated': '(Tensor x, Tensor gate, Tensor? other) -> Tensor',
    'transpose': '(Tensor matrices) -> Tensor',
}

# The binary.


def _load() -> tuple[Optional[str], dict[str, Any]]:
    """Load the binary, which defines the operators: why it is missing (None if it is there), and its build information."""
    binaries = sorted(Path(__file__).parent.glob('_C*.so'))
    if not binaries:
        return 'overlock_mm was installed without its compiled operators', {}
    # With another torch it may load, and then read structures of another layout: it is asked before.
    built_for = re.search(rb'{"torch": "([\d.]+)', binaries[0].read_bytes()).group(1).decode()
    if version_numbers(built_for)[:2] != version_numbers(torch.__version__)[:2]:
        return f'the compiled operators were built for torch {built_for}, this is torch {torch.__version__}', {}
    try:
        torch.ops.load_library(binaries[0])
        return None, json.loads(torch.ops.overlock_mm._build_info())
    except (OSError, RuntimeError) as error:
        return f'the compiled operators do not load with torch {torch.__version__}: {error}', {}


#: Why the binary is missing (None if it is there), and what it was built for: ``torch``, ``compiler``, ``cpu`` (the
#: instruction set used here), ``cuda`` and ``cuda_architectures`` (None: for the CPU alone).
missing, build_info = _load()


def announce_on_import() -> None:
    """Warn of what will be slow: everything, without a binary; the GPU of this machine, without CUDA in it."""
    if missing:
        _announce_fallback('cpu')
    elif build_info['cuda'] is None and torch.cuda.device_count():
        _announce_fallback('cuda')


@cache
def _announce_fallback(device_type: str) -> None:
    reason = missing
    if not reason and device_type == 'cuda':
        reason = 'overlock_mm was built without CUDA, but there is a GPU'
    elif not reason:
        reason = f'there is no compiled operator for the device {device_type!r}'
    force = 'FORCE_CUDA=1 ' if device_type == 'cuda' else ''
    warnings.warn(
        f'{reason}: ContMix runs through its reference in plain PyTorch, several times slower and with many times the '
        "memory, and so do, on the CPU, the depth-wise convolutions and norms. To build it, in overlock_mm's sources, with "
        f'a C++ compiler (and a CUDA toolkit that fits torch, for a GPU):\n    {force}{_BUILD_COMMAND}',
        RuntimeWarning,
        stacklevel=5,
    )


# The references as operators: with checks, and with outputs in the memory format that the compiled operators give them.


def _as_operator(reference: Callable, check: Callable) -> Callable:
    @wraps(reference)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        check(x, *args, **kwargs)
        out = reference(x, *args, **kwargs)
        if isinstance(out, tuple):
            return _laid_out_as(x, out[0]), *out[1:]
        return out if out is None else _laid_out_as(x, out)

    return run


def _laid_out_as(x: Tensor, out: Tensor) -> Tensor:
    return out.contiguous(memory_format=torch.channels_last if _reference.is_channels_last(x) else torch.contiguous_format)


def _contmix(value: Tensor, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    value, query, key = cast_as_autocast(value), cast_as_autocast(query), cast_as_autocast(key)
    _checks.check_contmix(value, query, key, *args, **kwargs)
    with autocast_disabled(value.device.type):
        return _laid_out_as(value, _reference.contmix_reference(value, query, key, *args, **kwargs))


def _branch_statistics(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _checks.check_branches(x, *args)
    return _reference.branch_statistics(x, *args)


def _branch_norms_sums(*args: Any) -> tuple[Tensor, Tensor]:
    _checks.check_branch_norms_sums(*args)
    return _reference.branch_norms_sums(*args)


def _branch_norms_gradients(grad_output: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _checks.check_branch_norms_gradients(grad_output, x, *args)
    grad_x, grad_weights = _reference.branch_norms_gradients(grad_output, x, *args)
    return _laid_out_as(x, grad_x), grad_weights


def _scaled_sum(*args: Tensor) -> Tensor:
    _checks.check_scaled_sum(*args)
    return _reference.scaled_sum(*args).contiguous(memory_format=torch.channels_last)


def _gelu(x: Tensor) -> Tensor:
    _checks.check_gelu(x)
    return F.gelu(x)


def _transpose(matrices: Tensor) -> Tensor:
    _checks.check_transpose(matrices)
    return _reference.transpose(matrices)


#: The plain references, by the names of the operators.
references: dict[str, Callable] = {
    'contmix': _contmix,
    'depthwise_conv2d': _as_operator(_reference.depthwise_conv2d, _checks.check_depthwise_conv2d),
    'gelu': _gelu,
    'branch_norms': _as_operator(_reference.branch_norms, _checks.check_branch_norms),
    '_branch_statistics': _branch_statistics,
    '_branch_norms_given': _as_operator(_reference.branch_norms_given, _checks.check_branch_norms_given),
    '_branch_norms_sums': _branch_norms_sums,
    '_branch_norms_gradients': _branch_norms_gradients,
    'global_response_norm': _as_operator(_reference.global_response_norm, _checks.check_response_norm),
    '_response_normed': _as_operator(_reference.response_normed, _checks.check_response_normed),
    'layer_norm': _as_operator(_reference.layer_norm, _checks.check_layer_norm),
    'residual_depthwise_norm': _as_operator(_reference.residual_depthwise_norm, _checks.check_residual_depthwise_norm),
    'residual_depthwise_norm_': _as_operator(_reference.residual_depthwise_norm_, _checks.check_residual_depthwise_norm),
    'gelu_residual_depthwise_norm': _as_operator(
        _reference.gelu_residual_depthwise_norm, _checks.check_residual_depthwise_norm
    ),
    '_gelu_residual_depthwise_normed': _as_operator(
        _reference.gelu_residual_depthwise_normed, _checks.check_residual_depthwise_normed
    ),
    'scale_and_shift': _as_operator(_reference.scale_and_shift, _checks.check_scale_and_shift),
    'scaled_sum': _scaled_sum,
    'squeeze_excitation': _as_operator(_reference.squeeze_excitation, _checks.check_squeeze_excitation),
    '_gated': _as_operator(_reference.gated, _checks.check_gated),
    'transpose': _transpose,
}


def _announced_contmix(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    _announce_fallback(value.device.type)
    return _contmix(value, *args, **kwargs)


#: What runs where there are no compiled kernels.
fallbacks: dict[str, Callable] = {
    **references,
    'contmix': _announced_contmix,
    'branch_norms': _as_operator(_reference.lean_branch_norms, _checks.check_branch_norms),
    'gelu_residual_depthwise_norm': _as_operator(
        _reference.lean_gelu_residual_depthwise_norm, _checks.check_residual_depthwise_norm
    ),
}


def _register() -> torch.library.Library:
    library = torch.library.Library('overlock_mm', 'FRAGMENT')
    for name, schema in SCHEMAS.items():
        if missing:
            library.define(name + schema)
        for key in ('Autograd', 'CompositeExplicitAutograd'):
            library.impl(name, fallbacks[name], key)
    return library


_registrations = _register()  # they end with it
_operators: dict[str, Callable] = {name: getattr(torch.ops.overlock_mm, name).default for name in SCHEMAS}


def operator(name: str) -> Callable:
    """``torch.ops.overlock_mm.<name>.default``, or its reference in an export and where references are asked for.

    :func:`keep_operators` leaves operators in exports.
    """
    exports_reference = is_exporting() and not _state.keeping_operators
    return references[name] if exports_reference or using_references() else _operators[name]


class _State(threading.local):
    using_references = False
    keeping_operators = False


_state = _State()


def using_references() -> bool:
    """Whether :func:`use_references` is in force. torch.compile does not look at it."""
    return not is_compiling() and _state.using_references


@contextlib.contextmanager
def use_references() -> Iterator[None]:
    """Context in which all operators run their references in plain PyTorch, on every device, in this thread.

    For comparisons, debugging and benchmarks. :func:`branch_norms` then has each branch's convolution and batch norm by
    itself, and autograd keeps all their outputs, as with ``OverLoCK(memory='fast')``. ::

        with use_references():
            model(images)
    """
    before, _state.using_references = _state.using_references, True
    try:
        yield
    finally:
        _state.using_references = before


@contextlib.contextmanager
def keep_operators() -> Iterator[None]:
    """Context in which ``torch.export.export`` leaves this package's operators in the graph, in this thread.

    Without it, a graph has their references in plain PyTorch, and runs anywhere. With it, the graph is small and as fast as
    the package, and runs where the compiled operators are loaded: with this package, or in C++ after ``dlopen`` of its
    ``_C.abi3.so``. Not for ``strict=True``, which does not look at this context. ::

        with torch.no_grad(), keep_operators():
            program = torch.export.export(optimize(model), (images,))

    Raises:
        RuntimeError: there are no compiled operators; the message says why.
    """
    if missing:
        raise RuntimeError(f'there are no compiled operators to keep: {missing}')
    before, _state.keeping_operators = _state.keeping_operators, True
    try:
        yield
    finally:
        _state.keeping_operators = before
