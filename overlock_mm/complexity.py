"""The compiled operators in mmengine's counter of operations (``mmengine.analysis``)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .ops import flops, keep_operators
from .versions import require

require('mmengine', __name__)

from mmengine.analysis import complexity_analysis  # noqa: E402


@contextlib.contextmanager
def operators_counted() -> Iterator[None]:
    """Context in which ``mmengine.analysis`` counts the operators of this package.

    mmengine traces a model. Without this context, a trace has the operators in plain PyTorch, which does more operations.
    mmengine also puts hooks on all layers: so each branch beside a large kernel runs, and counts. As in mmengine, a
    multiply-add is one operation. ::

        with operators_counted():
            analysis = get_model_complexity_info(backbone, (3, 224, 224))

    Raises:
        RuntimeError: there are no compiled operators; the message says why.
    """
    with keep_operators():
        yield


def _handle(formula: Callable[..., int]) -> Callable[[list, list], int]:
    """As mmengine calls it: with the values of a traced graph."""
    return lambda inputs, outputs: formula(*map(_argument, inputs)) // 2


def _argument(value: Any) -> Any:
    """The shape of a tensor, the shapes of a list of tensors, or a constant."""
    if value.isCompleteTensor():
        return value.type().sizes()
    if value.node().kind() == 'prim::ListConstruct':
        return [_argument(each) for each in value.node().inputs()]
    return value.toIValue()


#: By the names of operators. A trace has ContMix as it is called, with the map of tokens.
_FORMULAS = {**flops.FORMULAS, 'contmix': flops.contmix_of_tokens}
complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(
    {f'overlock_mm::{name}': _handle(formula) for name, formula in _FORMULAS.items()}
)
