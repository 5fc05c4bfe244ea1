"""Random calls of every public operator, for each instruction set (fuzz.py). `make sanitize` makes many more."""

from __future__ import annotations

import contextlib
import dataclasses
import os

import fuzz
import pytest
import torch
from conftest import instruction_sets, needs_gpu, run_with_instruction_set

from overlock_mm import ops
from overlock_mm.ops import _library

pytestmark = pytest.mark.skipif(
    os.environ.get('OVERLOCK_MM_WITH_OPS') == '0', reason='OVERLOCK_MM_WITH_OPS=0: built without the compiled operator'
)

#: Of each operator, for each instruction set.
CALLS = 60


def test_every_operator_is_called():
    # Without kernels to compare with a reference.
    others = {
        'contmix_kernels', 'contmix_reference', 'cuda_choices', 'keep_operators', 'set_cuda_kernels', 'use_references'
    }  # fmt: skip
    assert set(fuzz.OPERATORS) | others == set(ops.__all__)
    for name, operator in fuzz.OPERATORS.items():
        assert operator.function is getattr(ops, name)


@instruction_sets
def test_random_calls(capability, instruction_set):
    """The same in every run, so that a failure is that of a change. `make sanitize` makes others."""
    code = f"""
import fuzz
findings = [(name, *finding) for name in fuzz.OPERATORS for finding in fuzz.run(name, 0, {CALLS})]
assert not findings, '\\n'.join(f'fuzz.py {{name}} {{number}}: {{text}}' for name, number, text in findings)
"""
    run_with_instruction_set(code, __file__, capability, instruction_set)


@needs_gpu
@pytest.mark.parametrize('name', sorted(fuzz.OPERATORS))
def test_random_calls_on_a_gpu(name):
    findings = list(fuzz.run(name, 0, CALLS, device='cuda'))
    assert not findings, '\n'.join(f'fuzz.py {name} {number} --device cuda: {text}' for number, text in findings)


def spoil(monkeypatch, name, change):
    """Make the operator's results other ones; its reference keeps its own."""
    operator = fuzz.OPERATORS[name]

    def spoiled(*args, **kwargs):
        out = operator.function(*args, **kwargs)
        return out if _library.using_references() else change(out)

    monkeypatch.setitem(fuzz.OPERATORS, name, dataclasses.replace(operator, function=spoiled))
    return list(fuzz.run(name, 0, 40))


def test_wrong_numbers_are_found(monkeypatch):
    findings = spoil(monkeypatch, 'depthwise_conv2d', lambda out: out * 1.01)
    assert len(findings) > 10
    assert all('has a relative error of' in text for _, text in findings)
    number, text = findings[0]
    with pytest.raises(AssertionError) as raised:
        fuzz.call('depthwise_conv2d', number)
    assert str(raised.value) in text


def test_other_dtypes_and_layouts_are_found(monkeypatch):
    findings = spoil(monkeypatch, 'global_response_norm', lambda out: out.transpose(2, 3).contiguous().transpose(2, 3))
    assert findings
    findings = spoil(monkeypatch, 'global_response_norm', torch.Tensor.double)
    assert findings


def test_wrong_calls_that_return_are_found(monkeypatch):
    def lenient(*args, **kwargs):
        with contextlib.suppress(TypeError, ValueError):
            return ops.global_response_norm(*args, **kwargs)

    operator = dataclasses.replace(fuzz.OPERATORS['global_response_norm'], function=lenient)
    monkeypatch.setitem(fuzz.OPERATORS, 'global_response_norm', operator)
    findings = list(fuzz.run('global_response_norm', 0, 40))
    assert 5 < len(findings) < 35
    assert all('a wrong call returned' in text for _, text in findings)


def test_layouts_keep_the_numbers():
    x = torch.randn(2, 3, 4, 5)
    layouts = (fuzz.channels_last, fuzz.transposed, fuzz.sliced, fuzz.strided, fuzz.unaligned, fuzz.negated)
    laid_out = [layout(x) for layout in layouts]
    assert all(torch.equal(each, x) for each in laid_out)
    assert all(each.stride() != x.stride() or each.storage_offset() > 0 for each in laid_out)
    assert laid_out[-1].is_neg()
    assert torch.equal(fuzz.expanded(x)[1], x[0])


@pytest.mark.parametrize('device', ['meta', pytest.param('cuda', marks=needs_gpu)])
def test_moves_keep_numbers_and_layouts(device):
    x = torch.randn(2, 3, 4, 5)
    for layout in (fuzz.channels_last, fuzz.transposed, fuzz.sliced, fuzz.unaligned, fuzz.negated, fuzz.expanded):
        laid_out = layout(x)
        moved = fuzz.move(laid_out, device)
        assert moved.device.type == device
        assert (moved.stride(), moved.storage_offset()) == (laid_out.stride(), laid_out.storage_offset())
        assert moved.is_neg() == laid_out.is_neg()
        assert device == 'meta' or torch.equal(moved.cpu(), laid_out)


def test_a_call_is_made_again_by_its_number():
    for name, operator in fuzz.OPERATORS.items():
        first, second = (operator.draw(fuzz.Draw(f'{name} 7')) for _ in range(2))
        assert first.keys() == second.keys()
        pairs = list(zip(fuzz.leaves_of(first), fuzz.leaves_of(second)))
        assert pairs
        assert all(torch.equal(a, b) and a.stride() == b.stride() for (_, a), (_, b) in pairs)
