"""Convolutions with packed weights against torch.nn.functional.conv2d."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch.autograd import forward_ad

from overlock_mm.inference.onednn import PackedConv2d, can_pack

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason='this torch has no oneDNN, and nothing is packed'
)


def has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


dtypes = pytest.mark.parametrize(
    'dtype',
    [
        torch.float32,
        pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not has_bfloat16(), reason='the processor has no bfloat16')),
    ],
    ids=str,
)
#: Batch, channels in and out, height, width, kernel size, stride, groups.
SHAPES = [
    (1, 16, 32, 9, 7, 1, 1, 1),
    (2, 7, 5, 4, 6, 1, 1, 1),
    (2, 8, 16, 1, 1, 1, 1, 1),
    (2, 3, 32, 33, 20, 3, 2, 1),
    (1, 40, 24, 14, 14, 3, 1, 1),
    (2, 20, 20, 5, 30, 3, 1, 20),
    (0, 8, 8, 5, 5, 1, 1, 1),
]
shapes = pytest.mark.parametrize('shape', SHAPES, ids=str)
LAYOUTS = {
    'contiguous': torch.Tensor.contiguous,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'slice': lambda x: torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
}


def make(shape, dtype=torch.float32, bias=True):
    batch, inputs, outputs, height, width, k, stride, groups = shape
    x = torch.randn(batch, inputs, height, width).to(dtype)
    weight = (torch.randn(outputs, inputs // groups, k, k) / k).to(dtype)
    bias = torch.randn(outputs).to(dtype) if bias else None
    packed = PackedConv2d(weight, bias, (stride, stride), (k // 2, k // 2), groups, x.shape)
    return packed, x, lambda x: F.conv2d(x.double(), weight.double(), bias.double(), stride, k // 2, 1, groups)


def check(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    if expected.numel():
        assert relative_error(got, expected) < (1e-6 if dtype == torch.float32 else 1e-2)


@needs_onednn
@dtypes
@shapes
@pytest.mark.parametrize('layout', LAYOUTS)
def test_equals_conv2d(shape, layout, dtype):
    packed, x, plain = make(shape, dtype)
    with torch.no_grad():
        got = packed(LAYOUTS[layout](x))
        check(got, plain(x), dtype)
        assert got.shape[0] == 0 or got.abs().max() > 0.1


@needs_onednn
@dtypes
@shapes
@pytest.mark.parametrize('activation', ['gelu', 'silu'])
def test_activations(shape, activation, dtype):
    packed, x, plain = make(shape, dtype)
    with torch.no_grad():
        check(packed(x, activation), getattr(F, activation)(plain(x)), dtype)


@needs_onednn
@pytest.mark.parametrize('activation', ['gelu', 'silu'])
def test_activations_are_accurate(activation):
    """Over all of their range, beside PyTorch's own."""
    x = torch.linspace(-12, 12, 64 * 1001, dtype=torch.float64).view(1, 64, 13, 77)
    packed = PackedConv2d(torch.eye(64).view(64, 64, 1, 1), None)
    expected = getattr(F, activation)(x)
    with torch.no_grad():
        assert (packed(x.float(), activation).double() - expected).abs().max() < 2e-6


@needs_onednn
@dtypes
@shapes
def test_add_to(shape, dtype):
    packed, x, plain = make(shape, dtype)
    with torch.no_grad():
        before = torch.randn_like(plain(x)).to(dtype).contiguous(memory_format=torch.channels_last)
        out = before.clone(memory_format=torch.preserve_format)
        got = packed.add_to(out, x)
        assert got.data_ptr() == out.data_ptr()
        check(got, before.double() + plain(x), dtype)
        # Of another layout it is left alone.
        sliced = torch.cat([before, before], dim=1)[:, : before.shape[1]]
        check(packed.add_to(sliced, x), before.double() + plain(x), dtype)
        assert torch.equal(sliced, before)


@needs_onednn
def test_another_size_than_it_was_packed_for():
    packed, _, plain = make(SHAPES[0])
    for size in ((1, 16, 1, 1), (3, 16, 50, 41), (1, 16, 128, 200)):
        x = torch.randn(size)
        with torch.no_grad():
            check(packed(x), plain(x), torch.float32)


@needs_onednn
def test_without_bias_and_size():
    weight, x = torch.randn(8, 4, 3, 3), torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        got = PackedConv2d(weight, None, padding=(1, 1))(x)
    assert relative_error(got, F.conv2d(x.double(), weight.double(), padding=1)) < 1e-6


@needs_onednn
def test_weights_are_copied():
    weight, bias, x = torch.randn(8, 4, 1, 1), torch.randn(8), torch.randn(2, 4, 9, 9)
    packed = PackedConv2d(weight, bias)
    with torch.no_grad():
        before = packed(x)
        weight.zero_()
        bias.zero_()
        assert torch.equal(packed(x), before)


@needs_onednn
def test_bad_arguments():
    with pytest.raises(TypeError, match=r'weight must be float32 or bfloat16, got torch.float64'):
        PackedConv2d(torch.randn(4, 4, 1, 1, dtype=torch.float64), None)
    packed, x, _ = make(SHAPES[0])
    with torch.no_grad(), pytest.raises(ValueError, match="activation must be 'gelu', 'silu' or None, got 'relu'"):
        packed(x, 'relu')


@needs_onednn
def test_can_pack():
    x = torch.randn(1, 4, 5, 5)
    assert can_pack(x)
    assert not can_pack(x.clone().requires_grad_())
    with torch.no_grad():
        assert can_pack(x.clone().requires_grad_())
        assert can_pack(x)
        assert can_pack(x.bfloat16()) == has_bfloat16()
        for other in (x.double(), x.half(), x.to('meta'), torch.nn.Parameter(x)):
            assert not can_pack(other)
        with torch.autocast('cpu', torch.bfloat16):
            assert can_pack(x) == has_bfloat16()
            assert not can_pack(x.double())
        with torch.backends.mkldnn.flags(enabled=False):
            assert not can_pack(x)
        with forward_ad.dual_level():
            assert not can_pack(x)
        assert can_pack(x)
        traced = []
        torch.jit.trace(lambda x: (traced.append(can_pack(x)), x + 1)[1], x, check_trace=False)
        assert traced
        assert not any(traced)
