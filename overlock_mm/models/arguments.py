"""Checks of the models' arguments."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def positive_int(name: str, value: Any) -> int:
    """Return an argument as an int. It can be one of numpy's.

    Args:
        name: of the argument, for the message.

    Raises:
        ValueError: the value is no integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f'{name} must be a positive int, got {value!r}')
    return int(value)
