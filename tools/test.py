"""Test a checkpoint with any config of mmdet, mmsegmentation or mmpretrain."""

from __future__ import annotations

import argparse

from launch import add_options, build_runner, load_config
from mmengine.config import Config
from mmengine.runner import Runner


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file, or a name from overlock_mm.list_configs()')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions to a pickle file')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', metavar='DIR', help='draw predictions into this folder')
    parser.add_argument('--wait-time', type=float, default=2, help='how long a window stays, in seconds')
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation, by tta_model and tta_pipeline of the config'
    )
    add_options(parser)
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out must end in .pkl or .pickle, got {args.out}')
    return args


def draw_predictions(args: argparse.Namespace, cfg: Config) -> None:
    """Switch on the visualisation hook, whose settings differ between the three frameworks."""
    hook = cfg.default_hooks.get('visualization')
    if hook is None:
        raise ValueError('--show and --show-dir need default_hooks.visualization in the config')
    scope = cfg.get('default_scope', 'mmengine')
    if scope == 'mmpretrain':
        hook.update(enable=True, out_dir=args.show_dir)
    else:
        hook.draw = True
    if scope == 'mmdet':
        hook.test_out_dir = args.show_dir
    elif scope == 'mmseg' and args.show_dir:
        cfg.visualizer.save_dir = args.show_dir
    hook.update(show=args.show, wait_time=args.wait_time)
    if scope != 'mmdet':
        hook.interval = 1  # every picture, as in mmdet


def augment(cfg: Config) -> None:
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise ValueError('--tta needs tta_model and tta_pipeline in the config')
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def dump_predictions(runner: Runner, cfg: Config, file: str) -> None:
    from mmengine.evaluator import DumpResults

    if cfg.get('default_scope') == 'mmdet':
        from mmdet.evaluation import DumpDetResults as DumpResults  # encodes masks by run lengths
    runner.test_evaluator.metrics.append(DumpResults(out_file_path=file))


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        draw_predictions(args, cfg)
    if args.tta:
        augment(cfg)
    runner = build_runner(cfg)
    if args.out:
        dump_predictions(runner, cfg, args.out)
    runner.test()


if __name__ == '__main__':
    main()
