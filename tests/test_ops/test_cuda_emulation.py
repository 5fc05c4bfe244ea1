"""The CUDA kernels of ContMix, run on the host thread by thread (see emulation/), against the reference in float64."""

from __future__ import annotations

import math
import secrets
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import pytest
import torch
from emulated import DTYPES, H200, SOURCES, T4, Launch, build, execute, pack, relative_error, template_arguments, to_bytes
from torch import Tensor

from overlock_mm.ops import contmix_reference

# Relative (Frobenius) errors of the output and of the gradients. A half type rounds the output, which the backward reads.
TOLERANCES = {
    torch.float32: (2e-6, 1e-5),
    torch.float64: (1e-13, 1e-13),
    torch.float16: (1e-3, 3e-3),
    torch.bfloat16: (6e-3, 2e-2),
}
MAPS = ('value', 'query', 'output', 'grad_output', 'grad_value', 'grad_query')
SUMS = ('grad_keys', 'grad_bias', 'grad_rpb_small', 'grad_rpb_large')
GRADIENTS = ('grad_value', 'grad_query', *SUMS)


@pytest.fixture(scope='session')
def programs(tmp_path_factory):
    return build('contmix', tmp_path_factory.mktemp('contmix'))


@dataclass
class Case:
    """One call of the operator: sizes, layouts and wanted gradients. Inputs are drawn from `seed`."""

    kernel_sizes: tuple[int, int] = (3, 5)
    size: tuple[int, int] = (7, 9)
    channels: int = 4
    query_channels: int = 4
    batch: int = 1
    groups: int = 2
    dtype: torch.dtype = torch.float32
    layouts: dict[str, str] = field(default_factory=dict)  # of maps, by name: channels_last or sliced
    without: tuple[str, ...] = ()  # arguments that are None
    wanted: tuple[str, ...] = GRADIENTS
    shared_memory: int = H200
    partials: int = 0  # of the sums over the map: by default, as many as the operator would use
    variants: Optional[tuple[str, str, str]] = (
        None  # of forward, backward_query and backward_value that have to be launched
    )
    seed: int = 0

    @property
    def slots(self) -> int:
        return sum(k * k for k in self.kernel_sizes)

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def variant(launch: Launch) -> str:
    """The channels that a kernel has room for, or general."""
    rooms = template_arguments(launch.kernel)[:2]
    return 'general' if 0 in rooms else str(rooms[0])


@dataclass
class Result:
    tensors: dict[str, Tensor]
    launches: list[Launch]


def lay_out(tensor: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A copy of a map in a layout, and the flat storage that it is a view of: NaN elsewhere."""
    batch, channels, height, width = tensor.shape
    if layout == 'channels_last':
        storage = tensor.new_empty(batch, height, width, channels)
        view = storage.permute(0, 3, 1, 2)
    elif layout == 'sliced':
        storage = tensor.new_full((batch + 1, channels + 3, height + 2, 2 * width + 1), torch.nan)
        view = storage[1:, 2:-1, 1:-1, 1::2]
    else:
        storage = view = torch.empty_like(tensor)
    view.copy_(tensor)
    return view, storage.view(-1)


def draw(case: Case) -> dict[str, Optional[Tensor]]:
    """Inputs. Some slots have more weight than others, but none has all of it."""
    generator = torch.Generator().manual_seed(case.seed)
    height, width = case.size

    def random(*shape, dtype=case.dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def bias(name, *shape):
        return None if name in case.without else random(*shape, dtype=case.accumulator)

    return dict(
        value=random(case.batch, 2 * case.groups * case.channels, height, width),
        query=random(case.batch, case.groups * case.query_channels, height, width),
        grad_output=random(case.batch, 2 * case.groups * case.channels, height, width),
        keys=random(case.batch, case.groups, case.slots, case.query_channels, dtype=case.accumulator)
        / case.query_channels**0.5,
        bias=bias('bias', case.slots),
        rpb_small=bias('rpb_small', case.groups, *2 * (2 * case.kernel_sizes[0] - 1,)),
        rpb_large=bias('rpb_large', case.groups, *2 * (2 * case.kernel_sizes[1] - 1,)),
    )


def run(program: Path, case: Case, inputs: dict[str, Optional[Tensor]], folder: Path, reversed_threads=False) -> Result:
    """Forward and backward by the kernels, into outputs that were filled with NaN. Partial sums are summed."""
    maps, storages = {}, {}
    for name in MAPS:
        if name in inputs:
            tensor = inputs[name]
        elif name == 'output' or name in case.wanted:
            tensor = torch.full_like(inputs['query' if name == 'grad_query' else 'value'], torch.nan)
        else:
            continue
        maps[name], storages[name] = lay_out(tensor, case.layouts.get(name, 'contiguous'))

    backward = bool(case.wanted)
    sizes = (case.batch, case.groups, *case.size, case.channels, case.query_channels, *case.kernel_sizes)
    data = pack(DTYPES.index(case.dtype), *sizes, case.shared_memory, reversed_threads, case.partials)
    data += pack(*(name in case.wanted for name in SUMS))
    for name in MAPS:
        if name in maps and (backward or name != 'grad_output'):
            data += pack(*maps[name].stride(), maps[name].storage_offset()) + to_bytes(storages[name])
        else:
            data += pack(0, 0, 0, 0, 0) + to_bytes(None)
    data += b''.join(to_bytes(inputs[name]) for name in ('keys', 'bias', 'rpb_small', 'rpb_large'))
    blobs = execute(program, data, folder)
    (partials,) = struct.unpack('q', blobs[0])
    tensors = {}
    for name, blob in zip(('output', 'logsumexp', 'grad_value', 'grad_query', *SUMS), blobs[1:9]):
        if not blob:
            continue
        flat = torch.frombuffer(blob, dtype=case.dtype if name in MAPS else case.accumulator)
        if name in MAPS:
            view = maps[name]
            tensors[name] = flat.as_strided(view.shape, view.stride(), view.storage_offset())
            written = torch.zeros_like(flat, dtype=torch.bool)
            written.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
            assert flat[~written].isnan().all(), f'{name} is written outside of the map: {case}'
        elif name == 'logsumexp':
            tensors[name] = flat.view(case.batch, 2, case.groups, *case.size)
        else:
            sums = flat.view(partials, case.batch, case.groups, -1)
            tensors[name] = sums.double().sum(0)
    return Result(tensors, [Launch.parse(line) for line in blobs[9].decode().splitlines()])


def reference(case: Case, inputs: dict[str, Optional[Tensor]]) -> dict[str, Tensor]:
    """The same by autograd on the reference, in float64. With an identity for projection, its keys are M itself."""
    tokens = int((case.slots - 1) ** 0.5) + 1
    leaves = {name: tensor.double().requires_grad_() for name, tensor in inputs.items() if tensor is not None}
    keys = leaves['keys'].transpose(-2, -1).flatten(1, 2)  # (B, G * query_channels, L)
    keys = torch.nn.functional.pad(keys, (0, tokens**2 - case.slots)).unflatten(-1, (tokens, tokens))
    output = contmix_reference(
        leaves['value'],
        leaves['query'],
        keys,
        torch.eye(case.slots, tokens**2, dtype=torch.float64),
        leaves.get('bias'),
        leaves.get('rpb_small'),
        leaves.get('rpb_large'),
        num_groups=case.groups,
        small_kernel_size=case.kernel_sizes[0],
        large_kernel_size=case.kernel_sizes[1],
    )
    output.backward(leaves['grad_output'])
    return {'output': output.detach(), **{f'grad_{name}': leaf.grad for name, leaf in leaves.items()}}


def check(program: Path, case: Case, folder: Path, inputs: Optional[dict[str, Optional[Tensor]]] = None) -> Result:
    """Wanted results equal the reference, and nothing else is written."""
    inputs = inputs or draw(case)
    result, expected = run(program, case, inputs, folder), reference(case, inputs)
    for_output, for_gradients = TOLERANCES[case.dtype]
    assert relative_error(result.tensors['output'], expected['output']) <= for_output, case
    assert set(result.tensors) == {'output', 'logsumexp', *case.wanted}
    for name in case.wanted:
        actual = result.tensors[name]
        if name in SUMS:
            # d(bias) is one for all images and groups, d(rpb) for all images.
            actual = actual.sum((0, 1)) if name == 'grad_bias' else actual if name == 'grad_keys' else actual.sum(0)
        if name in expected:
            assert relative_error(actual, expected[name]) <= for_gradients, (name, case)
        else:
            assert actual.isfinite().all(), (name, case)
    if case.variants is not None:
        assert tuple(map(variant, result.launches)) == case.variants, case
    return result


CASES = {
    # The sizes of the models. Both sides of the maps need several tiles, and some tiles have no border.
    '5-13': Case((5, 13), (33, 47), 16, 16, groups=1, variants=('16',) * 3),
    '5-13-map-13': Case((5, 13), (13, 13), 16, 16, batch=2, groups=1),
    '5-7': Case((5, 7), (18, 39), 14, 14, variants=('16',) * 3),
    '5-7-map-7': Case((5, 7), (7, 7), 10, 10, batch=2),
    '5-7-channels-8': Case((5, 7), (33, 35), 8, 8, groups=1, variants=('8',) * 3),
    # Other sizes.
    '3-5': Case((3, 5), (17, 16), 5, 2, batch=2),
    '1-3': Case((1, 3), (16, 17), 1, 8, groups=3),
    '5-3': Case((5, 3), (5, 35), 8, 16),
    '3-3-map-3': Case((3, 3), (3, 3), 1, 1),
    '1-1-map-1': Case((1, 1), (1, 1), 3, 3, wanted=('grad_value',)),  # The gradients of one slot's logit are 0.
    '3-11': Case((3, 11), (40, 11), 4, 4, groups=1),
    '3-17': Case((3, 17), (19, 23), 8, 2, groups=1),
    '3-23': Case((3, 23), (23, 24), 4, 4, groups=1),
    # Too many channels for a staged variant, or too little shared memory.
    '20-channels': Case((3, 5), (11, 19), 20, 20, variants=('general',) * 3),
    '20-query-channels': Case((3, 5), (11, 19), 4, 20),
    '20-channels-2-query-channels': Case((5, 7), (9, 19), 20, 2),
    '5-13-general': Case((5, 13), (17, 17), 16, 16, groups=1, shared_memory=20000, variants=('general',) * 3),
    '5-13-small-tiles': Case((5, 13), (20, 33), 16, 16, groups=1, shared_memory=T4, variants=('16', 'general', '16')),
    # Types.
    'float64': Case((3, 7), (17, 20), 8, 8, dtype=torch.float64, variants=('general',) * 3),
    'float64-20-channels': Case((3, 5), (9, 18), 20, 20, dtype=torch.float64),
    'float16': Case((5, 7), (18, 21), 16, 16, dtype=torch.float16, groups=1),
    'float16-8': Case((3, 5), (18, 21), 8, 8, dtype=torch.float16),
    'float16-20-channels': Case((3, 5), (9, 18), 20, 20, dtype=torch.float16),
    'bfloat16': Case((5, 7), (18, 21), 14, 14, dtype=torch.bfloat16, groups=1),
    'bfloat16-8': Case((3, 5), (18, 21), 8, 8, dtype=torch.bfloat16),
    'bfloat16-20-channels': Case((3, 5), (9, 18), 20, 20, dtype=torch.bfloat16),
    # Layouts.
    'channels-last': Case((3, 5), (18, 21), 10, 10, batch=2, layouts=dict.fromkeys(MAPS, 'channels_last')),
    'sliced': Case((3, 5), (9, 21), 14, 8, batch=2, layouts=dict.fromkeys(MAPS, 'sliced')),
    'mixed-layouts': Case((3, 5), (9, 21), layouts=dict(zip(MAPS, ('channels_last', 'sliced', 'sliced') * 2)), batch=2),
    'general-channels-last': Case((3, 5), (9, 17), 20, 20, layouts=dict.fromkeys(MAPS, 'channels_last')),
    'general-sliced': Case((3, 5), (9, 17), 20, 20, batch=2, layouts=dict.fromkeys(MAPS, 'sliced')),
    # Missing arguments, gradients that are not wanted.
    'without-bias': Case((3, 5), (9, 20), without=('bias',)),
    'without-rpb': Case((3, 5), (9, 20), without=('rpb_small', 'rpb_large')),
    'without-small-rpb': Case((3, 5), (9, 20), without=('bias', 'rpb_small')),
    'general-without-biases': Case((3, 5), (9, 20), 20, 20, without=('bias', 'rpb_small', 'rpb_large')),
    'forward-only': Case((3, 5), (9, 20), wanted=()),
    **{f'only-{name}': Case((3, 5), (9, 20), wanted=(name,)) for name in GRADIENTS},
    'general-only-grad_rpb': Case((3, 5), (9, 20), 20, 20, wanted=('grad_rpb_large',)),
    'all-but-grad_value': Case((3, 5), (18, 34), wanted=GRADIENTS[1:]),
    # Blocks of backward_query that have several tiles each.
    '1-partial': Case((1, 3), (17, 33), 2, 2, partials=1),
    '4-partials': Case((3, 5), (25, 34), groups=1, partials=4),
    'general-2-partials': Case((1, 3), (9, 33), 20, 20, groups=1, partials=2),
}


@pytest.mark.parametrize('name', CASES)
def test_equals_the_reference(programs, tmp_path, name):
    CASES[name].seed = secrets.randbits(31)
    check(programs['sanitized'], CASES[name], tmp_path)


def test_equals_the_reference_as_shipped(programs, tmp_path):
    case = Case((5, 13), (33, 40), 16, 16, batch=2, seed=secrets.randbits(31))
    check(programs['plain'], case, tmp_path)


@pytest.mark.parametrize('channels', [16, 20], ids=['staged', 'general'])
def test_the_order_of_threads_does_not_matter(programs, tmp_path, channels):
    """To the bit: no barrier is missing, and no sum depends on the order in which threads arrive."""
    case = Case((3, 7), (18, 35), channels, channels, seed=secrets.randbits(31))
    inputs = draw(case)
    first = run(programs['plain'], case, inputs, tmp_path).tensors
    for reversed_threads in (False, True):
        again = run(programs['plain'], case, inputs, tmp_path, reversed_threads).tensors
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name]), (name, reversed_threads, case)


@pytest.mark.parametrize('channels', [8, 20], ids=['staged', 'general'])
def test_logsumexp(programs, tmp_path, channels):
    case = Case((1, 3), (5, 17), channels, channels, groups=2, wanted=(), without=('rpb_small', 'rpb_large'))
    inputs = draw(case)
    result = run(programs['plain'], case, inputs, tmp_path)
    query = inputs['query'].double().unflatten(1, (case.groups, -1))
    logits = torch.einsum('bgdyx,bgld->bglyx', query, inputs['keys'].double()) + inputs['bias'].double().view(-1, 1, 1)
    expected = torch.stack([logits[:, :, :1].logsumexp(2), logits[:, :, 1:].logsumexp(2)], 1)
    assert relative_error(result.tensors['logsumexp'], expected / math.log(2)) <= 1e-6


@pytest.mark.parametrize('channels', [8, 20], ids=['staged', 'general'])
def test_minus_infinity_masks_its_slot(programs, tmp_path, channels):
    """The first ones too, so that the running maximum is -inf for a while."""
    case = Case((3, 5), (9, 18), channels, channels, seed=secrets.randbits(31))
    inputs, masked = draw(case), [0, 9, 10, 12]
    inputs['rpb_large'][:, :3] = -torch.inf
    inputs['bias'][masked] = -torch.inf
    result = check(programs['plain'], case, tmp_path, inputs)
    grad_keys = result.tensors['grad_keys'].view(case.batch, case.groups, case.slots, -1)
    assert (grad_keys[:, :, masked] == 0).all()


@pytest.mark.parametrize('channels', [8, 20], ids=['staged', 'general'])
@pytest.mark.parametrize(
    'masked, wanted',
    # Where a whole kernel is masked, the logarithm of its sum rounds to the largest logit: the forward alone is exact.
    [(slice(9, 20), ('grad_value',)), (slice(0, 9), ())],
    ids=['some slots', 'a whole kernel'],
)
def test_the_lowest_float_masks_and_is_finite(programs, tmp_path, channels, masked, wanted):
    case = Case((3, 5), (9, 18), channels, channels, wanted=wanted, seed=secrets.randbits(31))
    inputs = draw(case)
    inputs['bias'][masked] = torch.finfo(torch.float32).min
    assert check(programs['plain'], case, tmp_path, inputs).tensors['output'].isfinite().all()


@pytest.mark.parametrize('channels', [8, 20], ids=['staged', 'general'])
def test_all_slots_masked_gives_nan(programs, tmp_path, channels):
    case = Case((1, 3), (5, 6), channels, channels, wanted=())
    inputs = draw(case)
    inputs['bias'][0] = -torch.inf
    output = run(programs['plain'], case, inputs, tmp_path).tensors['output']
    half = output.shape[1] // 2
    assert output[:, :half].isnan().all()
    assert output[:, half:].isfinite().all()


@pytest.mark.parametrize('channels', [8, 20], ids=['staged', 'general'])
@pytest.mark.parametrize('name', ['value', 'query', 'grad_output'])
def test_nan_spreads_as_in_the_reference(programs, tmp_path, channels, name):
    """The reference has NaN in the same places."""
    wanted = ('grad_value', 'grad_query') if name == 'grad_output' else ()
    case = Case((3, 5), (18, 19), channels, channels, groups=1, wanted=wanted, seed=secrets.randbits(31))
    for row, column in ((0, 0), (8, 17), (17, 5)):
        inputs = draw(case)
        inputs[name][0, 1, row, column] = torch.nan
        actual = run(programs['plain'], case, inputs, tmp_path).tensors
        readers = window_readers(case.size, 3, row, column)
        if name == 'value':
            expected = torch.zeros_like(actual['output'], dtype=torch.bool)
            expected[0, 1] = readers
            assert torch.equal(actual['output'].isnan(), expected), case
        elif name == 'query':
            expected = torch.zeros(case.size, dtype=torch.bool)
            expected[row, column] = True
            assert torch.equal(actual['output'].isnan(), expected.expand_as(actual['output'])), case
        else:
            expected = torch.zeros_like(actual['grad_value'], dtype=torch.bool)
            expected[0, 1] = window_of(case.size, 3, row, column)
            assert torch.equal(actual['grad_value'].isnan(), expected), case
            assert actual['grad_query'].isnan().any(1).sum() == 1, case


def window_of(size, kernel_size, row, column) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    top, left = (min(max(p - kernel_size // 2, 0), n - kernel_size) for p, n in zip((row, column), size))
    mask[top : top + kernel_size, left : left + kernel_size] = True
    return mask


def window_readers(size, kernel_size, row, column) -> Tensor:
    return torch.tensor([[window_of(size, kernel_size, y, x)[row, column] for x in range(size[1])] for y in range(size[0])])


def test_large_logits_stay_finite(programs, tmp_path):
    case = Case((3, 5), (9, 18), wanted=(), seed=secrets.randbits(31))
    inputs = draw(case)
    inputs['query'] *= 1e3
    output = run(programs['plain'], case, inputs, tmp_path).tensors['output']
    assert relative_error(output, reference(case, inputs)['output']) < 1e-3


def test_empty_batch(programs, tmp_path):
    case = Case(batch=0)
    result = run(programs['sanitized'], case, draw(case), tmp_path)
    assert result.launches == []


@pytest.mark.parametrize(
    'case',
    [
        Case((3, 5), (18, 34), batch=2),
        Case((3, 5), (9, 20), wanted=('grad_value',)),
        Case((3, 5), (9, 20), without=('bias',), wanted=('grad_query', 'grad_keys', 'grad_rpb_large')),
        Case((1, 1), (9, 3), 1, 1, groups=385, wanted=('grad_query',)),  # fewer sums than tiles
    ],
    ids=['all', 'value', 'some', 'many groups'],
)
def test_launches_are_those_that_are_stated(programs, tmp_path, monkeypatch, case):
    """The kernels, and the operator's own sums of partial sums, whose number is that of the launched blocks."""
    monkeypatch.syspath_prepend(SOURCES.parents[3] / 'tools' / 'benchmarks')
    import operator_costs

    inputs = draw(case)
    forward, *backward = run(programs['plain'], case, inputs, tmp_path).launches
    arguments = [inputs[name] for name in ('value', 'query', 'keys', 'bias', 'rpb_small', 'rpb_large')]
    logsumexp = torch.empty(case.batch, 2, case.groups, *case.size)
    stated = operator_costs.cost_of_contmix(*arguments, *case.kernel_sizes, outputs=[inputs['value'], logsumexp])
    assert stated.launches == len([forward])

    wanted = [name in case.wanted for name in GRADIENTS]
    outputs = [each if want else torch.empty(0) for each, want in zip(arguments, wanted)]
    saved = (inputs['value'], logsumexp, *case.kernel_sizes, wanted)
    stated = operator_costs.cost_of_contmix_backward(inputs['grad_output'], *arguments, *saved, outputs=outputs)
    assert stated.launches == len(backward) + sum(wanted[2:])
    partials = operator_costs.partials_of_contmix(*case.size, case.batch * case.groups)
    blocks = [launch.blocks for launch in backward if 'backward_query' in launch.kernel]
    assert blocks == [partials * case.batch * case.groups] * any(wanted[1:])
