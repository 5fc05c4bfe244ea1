"""One small forward and backward of the compiled ContMix operator for each dtype, against the reference on the CPU.

Small enough to run under compute-sanitizer; with borders, several tiles and odd numbers of channels.
"""

from __future__ import annotations

import argparse
import sys

import torch

from overlock_mm.ops import _extension, contmix_reference

#: Relative error (of Frobenius norms) allowed for an output or a gradient.
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def make_arguments(
    num_groups: int, per_group: int, query_per_group: int, kernel_sizes: tuple[int, int], size: tuple
) -> dict:
    ks, kl = kernel_sizes
    tensors = dict(
        value=torch.randn(2, 2 * num_groups * per_group, *size),
        query=torch.randn(2, num_groups * query_per_group, *size) * query_per_group**-0.5,
        key=torch.randn(2, num_groups * query_per_group, 7, 7),
        proj_weight=torch.randn(ks**2 + kl**2, 49) / 7,
        proj_bias=torch.randn(ks**2 + kl**2),
        rpb_small=torch.randn(num_groups, 2 * ks - 1, 2 * ks - 1),
        rpb_large=torch.randn(num_groups, 2 * kl - 1, 2 * kl - 1),
    )
    return dict(tensors, num_groups=num_groups, small_kernel_size=ks, large_kernel_size=kl)


def convert(arguments: dict, device: str, dtype: torch.dtype) -> dict:
    """Maps take the dtype; the parameters stay float32 unless it is float64."""
    converted = {}
    for name, each in arguments.items():
        if isinstance(each, torch.Tensor):
            wanted = dtype if each.ndim == 4 else torch.promote_types(dtype, torch.float32)
            each = each.detach().to(device, wanted).requires_grad_()
        converted[name] = each
    return converted


def outputs(function, arguments: dict) -> dict[str, torch.Tensor]:
    """The output, and the gradients by name for a gradient that is the output's cosine."""
    tensors = {name: each for name, each in arguments.items() if isinstance(each, torch.Tensor)}
    out = function(**arguments)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    gradients = torch.autograd.grad(out, tuple(tensors.values()), weights)
    return {'output': out.detach(), **{f'gradient of {name}': each for name, each in zip(tensors, gradients)}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', choices=['cpu', 'cuda'])
    device = parser.parse_args().device
    if _extension.missing or (device == 'cuda' and not _extension.build_info['cuda']):
        print(_extension.missing or 'overlock_mm was built without CUDA', file=sys.stderr)
        return 2
    torch.manual_seed(0)
    worst, wrong = 0.0, 0
    for settings in (
        dict(num_groups=2, per_group=16, query_per_group=16, kernel_sizes=(5, 13), size=(14, 19)),
        dict(num_groups=3, per_group=5, query_per_group=3, kernel_sizes=(5, 7), size=(9, 8)),
    ):
        arguments = make_arguments(**settings)
        for dtype, tolerance in DTYPES.items():
            given = convert(arguments, device, dtype)
            # The reference gets the numbers as rounded to the dtype.
            expected = outputs(contmix_reference, convert(convert(given, 'cpu', dtype), 'cpu', torch.float64))
            for name, got in outputs(torch.ops.overlock_mm.contmix, given).items():
                error = ((got.cpu().double() - expected[name]).norm() / expected[name].norm()).item()
                worst = max(worst, error)
                if not error <= tolerance:
                    wrong += 1
                    print(f'WRONG: {name}, {dtype}, {settings}: relative error {error:.2e}, more than {tolerance}')
    print(f'small case on {device}: {"WRONG" if wrong else "right"}, largest relative error {worst:.2e}')
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
