"""Options that tools/train.py and tools/test.py share, and the config and runner that they make."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

# Importing overlock_mm also lets torch read mmengine's checkpoints.
from overlock_mm.config_path import get_config_path
from overlock_mm.versions import SUPPORTED, require


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/<name of the config>)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='change settings of the config, as in train_cfg.max_epochs=6 or key="[a,b]" (no spaces within a value)',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    # torch.distributed.launch passes this option; torchrun sets LOCAL_RANK.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def read_config(config: str) -> Config:
    """The config of a file, or the shipped one of a name."""
    return Config.fromfile(config if Path(config).is_file() else get_config_path(config))


def load_config(args: argparse.Namespace) -> Config:
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    try:
        cfg = read_config(args.config)
    except ImportError as error:
        # A base such as 'mmdet::...' needs its framework: name it, and the version.
        for module in ('mmdet', 'mmseg', 'mmpretrain'):
            if module in str(error):
                require(module, args.config)
        raise
    if cfg.get('default_scope') in SUPPORTED:
        require(cfg.default_scope, args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    # The command line overrides the config. The default is the name of the config's file.
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    return cfg


def build_runner(cfg: Config) -> Runner:
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
