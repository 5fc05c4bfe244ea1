"""Operators that torch-function modes see as one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

Function = TypeVar('Function', bound=Callable)


def overridable(function: Function) -> Function:
    """Make a Python operator overridable, as PyTorch's own functions are.

    A ``TorchFunctionMode``, or a subclass of Tensor among the arguments, receives the operator itself and not the calls inside
    of it.
    """

    @wraps(function)
    def operator(*args, **kwargs):
        tensors = tuple(each for each in args if isinstance(each, Tensor))
        if has_torch_function(tensors):
            return handle_torch_function(operator, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    return operator  # type: ignore[return-value]
