"""FuseForTrainingHook in a real run of mmengine's, beside the hooks that copy, save and validate the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from overlock_mm.models import OverLoCK
from overlock_mm.training.fuse import FusedSequential


class Pictures(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return dict(inputs=torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index)))


class Model(BaseModel):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: torch.Tensor, mode: str):
        out = self.backbone(inputs)
        out = (out if isinstance(out, torch.Tensor) else out[-1]).mean(dim=(2, 3))
        return dict(loss=F.mse_loss(out, torch.ones_like(out))) if mode == 'loss' else list(out)


class Mean(BaseMetric):
    def process(self, data_batch, data_samples) -> None:
        self.results.extend(float(sample.mean()) for sample in data_samples)

    def compute_metrics(self, results) -> dict:
        return dict(mean=sum(results) / len(results))


OTHERS = (dict(type='EMAHook', momentum=0.5), dict(type='overlock_mm.OptimizeForInferenceHook'))


def train(backbone: nn.Module, work_dir, hooks: list[dict], others=OTHERS) -> Runner:
    loader = dict(batch_size=2, num_workers=0, collate_fn=dict(type='default_collate'))
    sampler = dict(type='DefaultSampler', shuffle=False)
    runner = Runner(
        model=Model(backbone),
        work_dir=str(work_dir),
        train_dataloader=dict(dataset=Pictures(), sampler=sampler, **loader),
        val_dataloader=dict(dataset=Pictures(), sampler=sampler, **loader),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        val_cfg=dict(),
        val_evaluator=[Mean()],
        custom_hooks=[*hooks, *others],
        randomness=dict(seed=0),
        experiment_name=work_dir.name,
        default_scope='mmengine',
        log_level='WARNING',
    )
    runner.train()
    return runner


def test_training_is_the_same(small_arch, tmp_path):
    """Scores, and checkpoints with their averaged weights, to rounding."""
    runners, files = [], []
    for name, hooks in (('plain', []), ('fused', [dict(type='overlock_mm.FuseForTrainingHook')])):
        torch.manual_seed(0)
        runners.append(train(OverLoCK(small_arch), tmp_path / name, hooks))
        files.append(torch.load(tmp_path / name / 'epoch_2.pth', weights_only=False))
    kinds = [{type(module) for module in runner.model.modules()} for runner in runners]
    assert [FusedSequential in each for each in kinds] == [False, True]
    scores = [runner.message_hub.get_scalar('val/mean').current() for runner in runners]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    for part in ('state_dict', 'ema_state_dict'):
        plain, fused = (file[part] for file in files)
        assert plain.keys() == fused.keys()
        for name, value in plain.items():
            assert torch.allclose(fused[name], value, rtol=1e-3, atol=1e-5), name


def test_a_model_without_such_layers(tmp_path, capfd):
    runner = train(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU()), tmp_path, [dict(type='overlock_mm.FuseForTrainingHook')], []
    )
    assert type(runner.model.backbone) is nn.Sequential
    assert 'FuseForTrainingHook has no effect' in ''.join(capfd.readouterr())
