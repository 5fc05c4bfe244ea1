"""The backbone as OpenMMLab uses one."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import KeptBytes, autocast_dtypes, devices, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from overlock_mm.models import OverLoCK
from overlock_mm.models.blocks import BasicBlock, DynamicBlock
from overlock_mm.models.overlock import ARCHITECTURES, LONG_NAMES, STAGES

PYRAMIDS = ('pyramid', 'pyramid_with_overview')


@pytest.mark.parametrize('framework', ['mmdet', 'mmseg', 'mmpretrain'])
def test_builds_from_every_registry_without_custom_imports(framework):
    pytest.importorskip(framework, reason=f'{framework} is not installed')
    code = (
        f'from {framework}.registry import MODELS\n'
        'import sys\n'
        'assert "overlock_mm" not in sys.modules\n'
        'model = MODELS.build(dict(type="overlock_mm.OverLoCK", arch="xt"))\n'
        'print(type(model).__module__)'
    )
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == 'overlock_mm.models.overlock'


@pytest.mark.parametrize('arch, millions', [('xt', 16), ('t', 33), ('s', 56), ('b', 95)], ids=['xt', 't', 's', 'b'])
def test_published_sizes(arch, millions):
    """Parameters as the paper's table gives them: of the folded classifier, whose head has 1024 hidden channels."""
    backbone = OverLoCK(arch, deploy=True)
    features = backbone.out_channels[-1]
    head = features * 1024 + 2 * 1024 + 1024 * 1000 + 1000
    assert round((sum(p.numel() for p in backbone.parameters()) + head) / 1e6) == millions


@pytest.mark.parametrize('name', LONG_NAMES)
def test_long_names(name):
    from overlock_mm.models.overlock import resolve_architecture

    assert resolve_architecture(name) == resolve_architecture(LONG_NAMES[name])
    assert LONG_NAMES[name] in ARCHITECTURES


@pytest.mark.parametrize('name', ['overlock_{}', 'overlock-{}', 'OverLoCK-{}'])
@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_released_names(name, arch):
    from overlock_mm.models.overlock import resolve_architecture

    assert resolve_architecture(name.format(arch)) == resolve_architecture(arch)


def test_integers_of_numpy(small_arch):
    """Settings that were computed. They are ints in the network, so that it is the same."""
    arch = {name: np.array(values).tolist() for name, values in small_arch.items()}
    arch = {
        name: [np.int64(value) for value in values] if isinstance(values, list) else values for name, values in arch.items()
    }
    backbone = OverLoCK(
        {**arch, 'mlp_ratio': np.int32(4)}, in_channels=np.int64(4), out_type='pyramid', out_indices=np.arange(4),
        frozen_stages=np.int16(1), drop_path_rate=np.float32(0.25),
    )  # fmt: skip
    plain = OverLoCK(small_arch, in_channels=4, out_type='pyramid', frozen_stages=1, drop_path_rate=0.25)
    assert repr(backbone) == repr(plain)
    settings = [backbone.in_channels, backbone.frozen_stages, *backbone.out_indices, *backbone.out_channels]
    assert {type(value) for value in settings} == {int}
    assert [out.shape[1] for out in backbone(torch.randn(2, 4, 32, 32))] == list(plain.out_channels)


@pytest.mark.parametrize('out_type', ('features', *PYRAMIDS))
@pytest.mark.parametrize(
    'size', [(1, 1), (1, 2), (2, 1), (3, 50), (50, 3), (1, 200), (31, 33), (64, 64), (97, 65), (5, 5)], ids=str
)
@torch.no_grad()
def test_any_size(small_arch, out_type, size):
    indices = (0, 1, 2, 3, 4) if out_type == 'features' else (0, 1, 2, 3)
    backbone = OverLoCK(small_arch, out_type=out_type, out_indices=indices).eval()
    outputs = backbone(torch.randn(1, 3, *size))
    assert len(outputs) == len(indices) == len(backbone.out_channels)
    for out, channels, stride in zip(outputs, backbone.out_channels, (4, 8, 16, 32, 32)):
        assert out.shape == (1, channels, *(-(-length // stride) for length in size))
        assert out.isfinite().all()


@torch.no_grad()
def test_out_indices_choose_and_order(small_arch):
    full = OverLoCK(small_arch, out_indices=(0, 1, 2, 3, 4)).eval()
    some = OverLoCK(small_arch, out_indices=(4, 3, 0)).eval()
    some.load_state_dict(full.state_dict())
    x = torch.randn(1, 3, 40, 40)
    outputs = full(x)
    for got, index in zip(some(x), (4, 3, 0)):
        assert torch.equal(got, outputs[index])
    assert some.out_channels == tuple(full.out_channels[i] for i in (4, 3, 0))


@pytest.mark.parametrize('out_type', ('features', *PYRAMIDS))
@pytest.mark.parametrize('out_indices', [None, (1, 2, 3), (3,), (0, 1, 2), (0, 1), (0,), (4,)], ids=str)
def test_every_trainable_parameter_receives_a_gradient(small_arch, out_type, out_indices):
    """DistributedDataParallel needs it: stages that no output needs are not trainable."""
    if out_indices == (4,) and out_type != 'features':
        pytest.skip('the overview is an output of plain features only')
    backbone = OverLoCK(small_arch, out_type=out_type, out_indices=out_indices)
    for parameter in backbone.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # GRNs start at zero, and block gradients there
    outputs = backbone(torch.randn(2, 3, 80, 96))
    sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    # A bias in front of a batch norm has a zero gradient; a weight has not.
    assert [name for name, p in trained.items() if p.ndim > 1 and not p.grad.abs().sum() > 0] == []
    assert ('sub_blocks4.0.rpb2' in trained) == (out_indices is None or 3 in out_indices)
    assert 'blocks1.0.dwconv.weight' in trained


@torch.no_grad()
def test_deterministic(small_arch):
    backbone = OverLoCK(small_arch, drop_path_rate=0.5)
    x = torch.randn(2, 3, 64, 64)
    backbone.eval()
    assert torch.equal(backbone(x)[0], backbone(x)[0])
    backbone.train()
    torch.manual_seed(1)
    first = backbone(x)[0]
    assert not torch.equal(backbone(x)[0], first)
    torch.manual_seed(1)
    assert torch.equal(backbone(x)[0], first)


@pytest.mark.parametrize('with_cp', [True, ['blocks1', 'sub_blocks3']], ids=str)
def test_recomputing_changes_nothing(small_arch, with_cp):
    """The same outputs, gradients and running statistics, with stochastic depth too."""
    x = torch.randn(4, 3, 64, 64)
    results = []
    for setting in (False, with_cp):
        torch.manual_seed(0)
        backbone = OverLoCK(small_arch, drop_path_rate=0.3, with_cp=setting).double()
        out = backbone(x.double())[0]
        out.square().sum().backward()
        results.append((out, {n: p.grad for n, p in backbone.named_parameters()}, dict(backbone.named_buffers())))
    (out, gradients, buffers), (out_cp, gradients_cp, buffers_cp) = results
    assert torch.equal(out, out_cp)
    assert all(torch.equal(gradients[name], gradients_cp[name]) for name in gradients)
    assert all(torch.equal(buffers[name], buffers_cp[name]) for name in buffers)
    assert buffers_cp['blocks1.0.proj.2.num_batches_tracked'] == 1


def test_recomputing_saves_memory(small_arch):
    def kept(with_cp):
        backbone = OverLoCK(small_arch, with_cp=with_cp)
        with KeptBytes() as storages:
            out = backbone(torch.randn(2, 3, 128, 128))
            return storages.count(), out

    assert kept(True)[0] < kept(['blocks1'])[0] < kept(False)[0]


PARTS = (
    ('patch_embed1',),
    ('blocks1',),
    ('patch_embed2', 'blocks2', 'extra_norm.1'),
    ('patch_embed3', 'blocks3'),
    ('patch_embed4', 'blocks4'),
    ('high_level_proj', 'sub_blocks3'),
    ('patch_embedx', 'sub_blocks4'),
)


@pytest.mark.parametrize('frozen', range(-1, 7))
def test_frozen_stages(small_arch, frozen):
    backbone = OverLoCK(small_arch, out_type='pyramid', frozen_stages=frozen)
    backbone.eval()
    backbone.train()
    frozen_names = tuple(f'{name}.' for part in PARTS[: frozen + 1] for name in part)
    others = tuple(f'{name}.' for part in PARTS[frozen + 1 :] for name in part) + ('extra_norm.',)
    for name, parameter in backbone.named_parameters():
        assert name.startswith(frozen_names + others)
        assert parameter.requires_grad != name.startswith(frozen_names), name
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    outputs = backbone(torch.randn(2, 3, 64, 64))
    sum(out.sum() for out in outputs).backward()
    for name, buffer in backbone.named_buffers():
        if name.endswith('num_batches_tracked'):
            assert torch.equal(buffer, before[name]) == name.startswith(frozen_names), name


@torch.no_grad()
def test_synchronised_batch_norms(small_arch):
    """Every shipped config asks for them; the Runner converts the model after it was built and frozen."""
    from mmengine.model import convert_sync_batchnorm

    backbone = OverLoCK(small_arch, out_type='pyramid', frozen_stages=1).eval()
    x = torch.randn(1, 3, 64, 64)
    expected, names = backbone(x), list(backbone.state_dict())
    backbone = convert_sync_batchnorm(backbone, 'torch')
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in backbone.modules())
    assert list(backbone.state_dict()) == names
    assert not any(p.requires_grad for p in backbone.blocks1.parameters())
    backbone.train()
    assert not any(m.training for m in backbone.blocks1.modules() if isinstance(m, _BatchNorm))
    backbone.eval().switch_to_deploy()
    for out, reference in zip(backbone(x), expected):
        assert relative_error(out, reference) < 1e-5


def test_norm_eval(small_arch):
    backbone = OverLoCK(small_arch, norm_eval=True)
    assert backbone.train() is backbone
    assert backbone.training
    norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
    assert norms
    assert not any(m.training for m in norms)
    assert all(p.requires_grad for p in backbone.parameters())


def test_drop_path_grows_over_all_blocks():
    backbone = OverLoCK('xt', drop_path_rate=0.17)
    rates = [getattr(block, 'drop_path', None) or block.proj[9] for stage in STAGES for block in getattr(backbone, stage)]
    rates = [rate.drop_prob for rate in rates]
    assert rates == pytest.approx([0.17 * i / 16 for i in range(17)])


def test_initialisation():
    backbone = OverLoCK('xt', out_type='pyramid_with_overview')
    block = backbone.sub_blocks3[0]
    assert block.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp[0].weight.abs().max() <= 2.0
    assert not block.mlp[0].bias.any()
    assert not block.rpb2.any()
    assert (backbone.h_proj[1].weight == 1e-5).all()
    assert (block.ls1.weight == 1).all()


@torch.no_grad()
def test_memory_layouts(small_arch):
    backbone = OverLoCK(small_arch, out_type='pyramid_with_overview').eval()
    x = torch.randn(2, 3, 50, 70)
    expected = backbone(x)
    wide = torch.empty(2, 3, 50, 140)[..., ::2]
    wide.copy_(x)
    assert not wide.is_contiguous()
    for out, reference in zip(backbone(wide), expected):
        assert relative_error(out, reference) < 1e-6
    backbone.to(memory_format=torch.channels_last)
    for out, reference in zip(backbone(x.contiguous(memory_format=torch.channels_last)), expected):
        assert relative_error(out, reference) < 1e-5


@pytest.mark.parametrize('out_type', ('features', *PYRAMIDS))
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_outputs_are_laid_out_as_the_input(small_arch, out_type, memory_format):
    backbone = OverLoCK(small_arch, out_type=out_type, out_indices=(0, 1, 2, 3)).eval()
    for out in backbone(torch.randn(2, 3, 64, 96).contiguous(memory_format=memory_format)):
        assert out.is_contiguous(memory_format=memory_format)


@torch.no_grad()
def test_regions_of_an_fpn_see_their_values(small_arch):
    """mmcv's RoIAlign reads memory, not strides: the features it sees must be those that a copy of them holds."""
    mmdet_models = pytest.importorskip('mmdet.models', reason="the neck is mmdet's")
    roi_align = pytest.importorskip('mmcv.ops', reason='mmcv was built without operators').roi_align
    backbone = OverLoCK(small_arch, out_type='pyramid_with_overview').eval()
    neck = mmdet_models.FPN(list(backbone.out_channels), 16, num_outs=5)
    rois = torch.tensor([[0, 3.0, 5.0, 40.0, 44.0], [1, 20.0, 10.0, 60.0, 30.0]])
    for level, feature in enumerate(neck(backbone(torch.randn(2, 3, 64, 64)))[:4]):
        scale = 1 / 4 / 2**level
        expected = roi_align(feature.clone(memory_format=torch.contiguous_format), rois, (7, 7), scale, 0, 'avg', True)
        assert torch.equal(roi_align(feature, rois, (7, 7), scale, 0, 'avg', True), expected)


@autocast_dtypes
def test_autocast(small_arch, dtype):
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    backbone = OverLoCK(small_arch, out_type='pyramid_with_overview')
    x = torch.randn(2, 3, 64, 80)
    expected = backbone(x)
    with torch.autocast('cpu', dtype=dtype):
        outputs = backbone(x)
    for out, reference in zip(outputs, expected):
        assert relative_error(out, reference) < tolerance
    sum(out.float().square().mean() for out in outputs).backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in backbone.parameters())


@torch.no_grad()
def test_float16_survives_large_activations(small_arch):
    """GRN's sum of squares over a map leaves float16's range early."""
    from overlock_mm.models.layers import GlobalResponseNorm

    norm = GlobalResponseNorm(4)
    norm.gamma.normal_()
    x = 100 * torch.rand(1, 4, 60, 60)
    out = norm.half()(x.half())
    assert out.dtype == torch.float16
    assert relative_error(out, norm.float()(x)) < 2e-3


@torch.no_grad()
@pytest.mark.parametrize('gradients', [True, False])
@pytest.mark.parametrize('deploy', [True, False])
def test_compiles_into_one_graph(small_arch, deploy, gradients):
    torch._dynamo.reset()
    backbone = OverLoCK(small_arch, out_type='pyramid_with_overview', deploy=deploy).eval()
    compiled = torch.compile(backbone, fullgraph=True, backend='aot_eager')
    for size in ((64, 64), (96, 64)):
        x = torch.randn(1, 3, *size)
        with torch.set_grad_enabled(gradients):
            for out, reference in zip(compiled(x), backbone(x)):
                assert relative_error(out, reference) < 1e-5


@pytest.mark.parametrize('with_cp', [False, True])
def test_training_compiles(small_arch, with_cp):
    """With and without recomputation; the running statistics are updated once."""
    x = torch.randn(2, 3, 64, 64)
    results = []
    for compiles in (False, True):
        torch.manual_seed(0)
        backbone = OverLoCK(small_arch, with_cp=with_cp)
        run = torch.compile(backbone, backend='aot_eager') if compiles else backbone
        run(x)[0].square().mean().backward()
        results.append(({name: p.grad for name, p in backbone.named_parameters()}, dict(backbone.named_buffers())))
    (gradients, buffers), (compiled_gradients, compiled_buffers) = results
    weights = [name for name in gradients if gradients[name].ndim > 1 and gradients[name].abs().sum() > 0]
    assert len(weights) > 100
    for name in weights:
        assert relative_error(compiled_gradients[name], gradients[name]) < 1e-3, name
    for name in buffers:
        assert torch.allclose(compiled_buffers[name], buffers[name], rtol=1e-4, atol=1e-6), name


@devices
def test_device(small_arch, device):
    """Building, folding and running keep to the device."""
    backbone = OverLoCK(small_arch, out_type='pyramid_with_overview').to(device).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = [out.cpu() for out in backbone(x.to(device))]
    backbone.switch_to_deploy()
    assert all(value.device.type == device for value in backbone.state_dict().values())
    for out, reference in zip(backbone(x.to(device)), expected):
        assert relative_error(out.cpu(), reference) < 1e-4


def test_shapes_without_data(small_arch):
    backbone = OverLoCK(small_arch, out_type='pyramid').to('meta')
    assert [tuple(out.shape[2:]) for out in backbone(torch.empty(1, 3, 800, 1344, device='meta'))][0] == (200, 336)


def test_other_input_channels(small_arch):
    assert OverLoCK(small_arch, in_channels=5)(torch.randn(2, 5, 64, 64))[0].shape == (2, 50, 2, 2)


@pytest.mark.parametrize(
    'settings, error, message',
    [
        (dict(arch='huge'), ValueError, "arch must be a dict or one of xt, t, s, b, .*, got 'huge'"),
        (dict(arch=3), TypeError, 'arch must be a str or a dict, got 3'),
        (dict(arch=dict(channels=(8, 8, 8, 8))), ValueError, "lacks .*'depths'"),
        (dict(change=dict(width=3)), ValueError, "unknown settings .*'width'"),
        (dict(change=dict(depths=(1, 1))), ValueError, r"arch\['depths'\] must be 4 ints, got \(1, 1\)"),
        (dict(change=dict(depths=(1, 0, 1, 1))), ValueError, r"arch\['depths'\]\[1\] must be a positive int, got 0"),
        (dict(change=dict(mlp_ratio=2.5)), ValueError, r"arch\['mlp_ratio'\] must be a positive int, got 2.5"),
        (dict(change=dict(num_groups=(5, 4))), ValueError, r'2 \* 5 must divide the 24 channels'),
        (dict(change=dict(channels=(8, 12, 24, 42), num_groups=(2, 3))), ValueError, 'C4 a multiple of 4'),
        (dict(change=dict(kernel_sizes=(9, 7, 7, 4))), ValueError, 'kernel_size must be one of .*, got 4'),
        (dict(in_channels=0), ValueError, 'in_channels must be a positive int, got 0'),
        (dict(out_type='dense'), ValueError, "out_type must be one of .*, got 'dense'"),
        (dict(out_indices=(5,)), ValueError, r'out_indices must be different numbers in 0..4 .*, got \(5,\)'),
        (dict(out_indices=(4,), out_type='pyramid'), ValueError, r'out_indices must be different numbers in 0..3'),
        (dict(out_indices=(-1,)), ValueError, r'out_indices .*, got \(-1,\)'),
        (dict(out_indices=(1, 1)), ValueError, 'out_indices must be different'),
        (dict(out_indices=()), ValueError, 'out_indices must be different'),
        (dict(out_indices=3), TypeError, 'out_indices must be a sequence of ints, got 3'),
        (dict(drop_path_rate=1.5), ValueError, r'drop_path_rate must be in \[0, 1\), got 1.5'),
        (dict(frozen_stages=7), ValueError, 'frozen_stages must be in -1..6, got 7'),
        (dict(with_cp=['blocks9']), ValueError, r"with_cp must be a bool or .*, got \['blocks9'\]"),
    ],
)  # fmt: skip
def test_bad_settings(small_arch, settings, error, message):
    settings = dict(settings)
    arch = settings.pop('arch', {**small_arch, **settings.pop('change', {})})
    with pytest.raises(error, match=message):
        OverLoCK(arch, **settings)


@pytest.mark.parametrize(
    'make, error, message',
    [
        (lambda: torch.randn(1, 4, 32, 32), ValueError, r'the input must have shape \(B, 3, H, W\), got \(1, 4, 32, 32\)'),
        (lambda: torch.randn(3, 32, 32), ValueError, r'the input must have shape .*, got \(3, 32, 32\)'),
        (lambda: torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, 'floating-point Tensor, got torch.uint8'),
        (lambda: torch.randn(0, 3, 32, 32), ValueError, r'the input must not be empty, got shape \(0, 3, 32, 32\)'),
        (lambda: torch.randn(1, 3, 0, 32), ValueError, 'the input must not be empty'),
        (lambda: [torch.randn(3, 32, 32)], TypeError, 'the input must be a Tensor, got list'),
    ],
)  # fmt: skip
def test_bad_input(small_arch, make, error, message):
    with pytest.raises(error, match=message):
        OverLoCK(small_arch)(make())


@pytest.mark.skipif(not hasattr(torch, 'get_autocast_dtype'), reason='torch < 2.4 cannot set it by device')
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_on_cuda_keeps_the_maps_in_half_precision(small_arch, dtype):
    """Fake tensors go through CUDA's autocast without a GPU. It interpolates in float32, and the CPU's does not."""
    dtypes = []
    with FakeTensorMode(), torch.device('cuda'):
        model = OverLoCK(small_arch)
        for module in model.modules():
            if isinstance(module, (BasicBlock, DynamicBlock)):
                module.register_forward_pre_hook(lambda _, maps: dtypes.extend(each.dtype for each in maps))
        torch.set_autocast_enabled('cuda', True)
        torch.set_autocast_dtype('cuda', dtype)
        try:
            model(torch.empty(1, 3, 160, 192))
        finally:
            torch.set_autocast_enabled('cuda', False)
            torch.set_autocast_dtype('cuda', torch.float16)
    assert len(dtypes) == 4 + 4 * 3
    assert set(dtypes) == {dtype}
