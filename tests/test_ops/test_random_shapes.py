"""The ContMix operator against its reference on a few hundred random shapes, layouts and inputs."""

from __future__ import annotations

import pytest
import torch
from conftest import devices
from test_compiled import to, with_gradients
from test_contmix import make_arguments
from torch import Tensor

from overlock_mm.ops import contmix, contmix_reference

pytest.importorskip('hypothesis', reason='hypothesis is not installed (requirements/dev.txt)')

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@st.composite
def random_settings(draw):
    small, large = draw(st.sampled_from([1, 3, 5, 7])), draw(st.sampled_from([3, 5, 7, 9, 13, 15]))
    least = max(small, large)
    return dict(
        batch=draw(st.integers(0, 2)),
        height=draw(st.integers(least, least + 20)),
        width=draw(st.integers(least, least + 40)),
        per_group=draw(st.sampled_from([1, 3, 8, 10, 14, 16, 17, 33])),
        query_per_group=draw(st.sampled_from([1, 2, 8, 16, 19])),
        tokens=draw(st.integers(1, 3)),
        num_groups=draw(st.integers(1, 3)),
        small_kernel_size=small,
        large_kernel_size=large,
    )


LAYOUTS = {
    'contiguous': Tensor.contiguous,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'slice': lambda x: torch.cat([x, x, x], dim=1)[:, x.shape[1] : 2 * x.shape[1]],
    'strided': lambda x: torch.stack([x, x], dim=-1)[..., 0],
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(
    shape=random_settings(),
    missing=st.sets(st.sampled_from(['proj_bias', 'rpb_small', 'rpb_large'])),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
@devices
def test_equals_the_reference(device, shape, missing, layouts, dtype, seed):
    torch.manual_seed(seed)
    arguments = make_arguments(**shape, device=device)
    # Logits for which a softmax has more than one slot of weight, for a kernel of any size.
    arguments['query'] = arguments['query'] / (shape['query_per_group'] * shape['tokens'])
    arguments.update(dict.fromkeys(missing))
    grad_output = torch.randn_like(arguments['value'])
    expected = with_gradients(contmix_reference, arguments, grad_output)
    for name, layout in zip(('value', 'query', 'key'), layouts):
        arguments[name] = LAYOUTS[layout](arguments[name])
    got = with_gradients(contmix, to(arguments, dtype), LAYOUTS[layouts[0]](grad_output))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    # The gradient of a one-slot kernel's bias cancels to 0: rounding is judged by what cancels there.
    least = 0.1 * grad_output.norm()
    for x, y in zip(got, expected):
        assert x.shape == y.shape
        assert (x.double() - y).norm() <= tolerance * max(y.norm(), least)
