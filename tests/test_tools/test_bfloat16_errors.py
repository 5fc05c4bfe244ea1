"""The tool that compares errors in bfloat16."""

from __future__ import annotations

import secrets

import pytest
import torch
import torch.nn as nn
from benchmarks import bfloat16_errors


def test_errors_of_one_convolution():
    """One product with a power of two: float32 is exact, and bfloat16 rounds the input and the output."""
    torch.manual_seed(secrets.randbits(31))
    conv = nn.Conv2d(4, 4, 1, bias=False)
    nn.init.constant_(conv.weight, 0.0)
    with torch.no_grad():
        conv.weight[range(4), range(4)] = 2.0
    model = nn.Sequential(conv, nn.Flatten(0))
    images = [torch.randn(1, 4, 9, 9) for _ in range(3)]

    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x):
            return (self.model(x),)

    assert bfloat16_errors.errors(lambda each: each, Outputs(), images, bfloat16=False, trains=False) == [0.0]
    (error,) = bfloat16_errors.errors(lambda each: each, Outputs(), images, bfloat16=True, trains=False)
    assert 2**-11 < error < 2**-8
    (error,) = bfloat16_errors.errors(lambda each: each, Outputs(), images, bfloat16=True, trains=True)
    assert 2**-11 < error < 2**-7


def test_prints_a_row_of_every_subject(capsys):
    pytest.importorskip('torchvision')
    assert bfloat16_errors.main(['--arch', 'xt', '--size', '64x64', '--images', '1']) == 0
    rows = [line.split(' | ') for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip('| ') for row in rows] == [each[0] for each in bfloat16_errors.SUBJECTS for _ in range(2)]
    for of_float32, of_bfloat16 in zip(rows[::2], rows[1::2]):
        assert (of_float32[1], of_bfloat16[1]) == ('float32', 'bfloat16')
        numbers = [[float(cell.strip('| ')) for cell in row[2:] if cell.strip('| ')] for row in (of_float32, of_bfloat16)]
        assert len(numbers[0]) == len(numbers[1]) in (1, 4)
        assert all(exact < rounded for exact, rounded in zip(*numbers))
