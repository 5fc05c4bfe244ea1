"""OptimizeForInferenceHook in a real run of mmengine's, beside the hooks that change and save the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import relative_error
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from overlock_mm.inference.blocks import FoldedBasicBlock
from overlock_mm.models import OverLoCK
from overlock_mm.models.blocks import BasicBlock


class Pictures(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.randn(3, 64, 64, generator=generator))


class Model(BaseModel):
    def __init__(self, arch: dict) -> None:
        super().__init__()
        self.backbone = OverLoCK(arch)
        self.head = nn.Conv2d(50, 2, 1)
        self.tested = []

    def forward(self, inputs: torch.Tensor, mode: str):
        out = self.head(self.backbone(inputs)[0]).mean(dim=(2, 3))
        if mode == 'loss':
            return dict(loss=F.mse_loss(out, torch.ones_like(out)))
        return list(out)


class Mean(BaseMetric):
    def process(self, data_batch, data_samples) -> None:
        self.results.extend(float(sample.mean()) for sample in data_samples)

    def compute_metrics(self, results) -> dict:
        return dict(mean=sum(results) / len(results))


class Watch(Hook):
    """What validates, and what is there when other hooks look at the model afterwards."""

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self.during, self.after, self.metrics = [], [], []

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.during.append(type(runner.model.val_step.__self__.backbone.blocks1[0]))

    def after_val_epoch(self, runner, metrics=None) -> None:
        self.after.append(type(runner.model.val_step.__self__.backbone.blocks1[0]))
        self.metrics.append(metrics['mean'])


def train(small_arch, work_dir, hooks):
    torch.manual_seed(0)
    watch = Watch()
    loader = dict(batch_size=2, num_workers=0, collate_fn=dict(type='default_collate'))
    runner = Runner(
        model=Model(small_arch),
        work_dir=str(work_dir),
        train_dataloader=dict(dataset=Pictures(), sampler=dict(type='DefaultSampler', shuffle=False), **loader),
        val_dataloader=dict(dataset=Pictures(), sampler=dict(type='DefaultSampler', shuffle=False), **loader),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        val_cfg=dict(),
        val_evaluator=[Mean()],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', save_best='mean', rule='less')),
        custom_hooks=[*hooks, watch],
        randomness=dict(seed=0),
        experiment_name=work_dir.name,
        default_scope='mmengine',
        log_level='ERROR',
    )
    runner.train()
    return runner, watch


@pytest.mark.parametrize('others', [[], [dict(type='EMAHook', momentum=0.5)]], ids=['alone', 'with EMA'])
def test_validation_is_by_an_optimized_copy(small_arch, tmp_path, others):
    """The same scores, also with the averaged weights, and training and checkpoints do not notice."""
    _, plain = train(small_arch, tmp_path / 'plain', others)
    runner, watch = train(small_arch, tmp_path / 'optimized', [*others, dict(type='overlock_mm.OptimizeForInferenceHook')])
    assert set(plain.during) == {BasicBlock}
    assert set(watch.during) == {FoldedBasicBlock}
    assert set(watch.after) == {BasicBlock}
    assert watch.metrics == pytest.approx(plain.metrics, rel=1e-4)
    assert len(set(watch.metrics)) == 2
    states = []
    for name in ('plain', 'optimized'):
        (best,) = (tmp_path / name).glob('best_mean_*.pth')
        states.append(torch.load(best, weights_only=False)['state_dict'])
    assert states[0].keys() == states[1].keys() == runner.model.state_dict().keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_testing_is_by_an_optimized_copy(small_arch, tmp_path):
    runner, _ = train(small_arch, tmp_path / 'run', [dict(type='overlock_mm.OptimizeForInferenceHook')])
    seen = []

    class Look(Hook):
        def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
            seen.append(type(runner.model.test_step.__self__.backbone.blocks1[0]))

    runner.register_hook(Look())
    runner._test_dataloader, runner._test_evaluator, runner._test_cfg = runner._val_dataloader, [Mean()], dict()
    runner._test_loop = dict()
    metrics = runner.test()
    assert set(seen) == {FoldedBasicBlock}
    assert type(runner.model.test_step.__self__.backbone.blocks1[0]) is BasicBlock
    x = torch.stack([Pictures()[i]['inputs'] for i in range(4)])
    with torch.no_grad():
        expected = runner.model.eval()(x, mode='tensor')
    assert relative_error(torch.tensor(metrics['mean']), torch.stack(expected).mean()) < 1e-4


def test_a_second_pass_in_the_same_epoch(small_arch, tmp_path):
    """mmpretrain's EMAHook scores the averaged weights, then the model's own, before other hooks see the epoch's end."""
    pytest.importorskip('mmpretrain')
    ema = dict(type='mmpretrain.EMAHook', momentum=0.5, evaluate_on_ema=True, evaluate_on_origin=True)
    scores = []
    for name, hooks in (('plain', []), ('optimized', [dict(type='overlock_mm.OptimizeForInferenceHook')])):
        runner, _ = train(small_arch, tmp_path / name, [ema, *hooks])
        scalars = runner.message_hub.log_scalars
        scores.append([scalars[key].current() for key in ('val/mean', 'val/mean_origin')])
    assert scores[0][0] != pytest.approx(scores[0][1], rel=1e-3)
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


def test_an_interrupted_validation(small_arch, tmp_path):
    """The runner keeps its model: it can be saved, validated and trained."""
    runner, _ = train(small_arch, tmp_path / 'run', [dict(type='overlock_mm.OptimizeForInferenceHook')])
    model, names = runner.model, list(runner.model.state_dict())
    expected = runner.val()

    class Interrupt(Hook):
        active = True

        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
            if self.active:
                raise KeyboardInterrupt

    interrupt = Interrupt()
    runner.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.val()
    assert runner.model is model
    assert list(runner.model.state_dict()) == names
    interrupt.active = False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    assert runner.val()['mean'] != pytest.approx(expected['mean'], rel=1e-3)
    model.train()(torch.randn(2, 3, 64, 64), mode='loss')['loss'].backward()
    assert model.head.weight.grad.any()
