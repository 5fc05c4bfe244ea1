"""Run the demo: make a small data set, train OverLoCK Mask R-CNN on it, test it, draw its predictions.

It writes metrics.json (with mmdet's keys), the checkpoint, predictions.jpg and curves.png into the work dir. Finished steps
are skipped, and an interrupted training resumes. If the network, the config or the demo has changed, earlier results are
renamed and the demo starts again.

Usage: python tools/demo/run.py [--work-dir work_dirs/demo]
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs' / 'mmdet' / 'mask-rcnn_overlock-xt_fpn_demo.py'
DATA = ROOT / 'data' / 'demo'
SOURCES = ('overlock_mm/**/*.py', 'configs/mmdet/mask-rcnn_overlock-*_fpn_*.py', 'tools/demo/*.py', 'requirements/*.txt')
SHOWN = ('coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP', 'coco/segm_mAP_50')


def fingerprint() -> str:
    """Hash of all files that the results depend on."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def run(*command: object) -> None:
    words = [str(word) for word in command]
    print(f'\n$ {shlex.join(words)}', flush=True)
    subprocess.run([sys.executable, *words[1:]], check=True, cwd=ROOT, env={**os.environ, **hidden_gpu()})


@functools.cache
def hidden_gpu() -> dict[str, str]:
    """Environment that hides the GPU if mmcv's operators were built without CUDA."""
    import torch
    from mmcv.ops import get_compiling_cuda_version

    if not torch.cuda.is_available() or 'not available' not in get_compiling_cuda_version():
        return {}
    print(
        '*** This machine has a GPU, but mmcv has CPU operators only (make env says why). The demo runs on the CPU.',
        flush=True,
    )
    return {'CUDA_VISIBLE_DEVICES': ''}


def tested_metrics(folder: Path) -> dict[str, float]:
    """Metrics of the newest test in a work dir: mmengine writes them to <time>/<time>.json."""
    newest = max(folder.glob('*/[0-9]*.json'), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'demo')
    work_dir = parser.parse_args().work_dir.resolve()

    mark, results = work_dir / 'fingerprint', work_dir / 'metrics.json'
    current = fingerprint()
    if mark.is_file() and mark.read_text() != current:
        aside = work_dir.with_name(f'{work_dir.name}.{time.strftime("%Y%m%d_%H%M%S")}')
        work_dir.rename(aside)
        print(f'The network, the config or the demo has changed; earlier results are now in {aside}')
    work_dir.mkdir(parents=True, exist_ok=True)
    mark.write_text(current)

    if not results.is_file():
        start = time.time()
        run('python', 'tools/demo/make_dataset.py', DATA)
        run('python', 'tools/train.py', CONFIG, '--work-dir', work_dir, '--resume')
        checkpoint = Path((work_dir / 'last_checkpoint').read_text())
        run('python', 'tools/test.py', CONFIG, checkpoint, '--work-dir', work_dir / 'test')
        run('python', 'tools/demo/report.py', CONFIG, checkpoint, work_dir)
        # The metrics are written last: they mark the demo as complete.
        results.write_text(json.dumps(tested_metrics(work_dir / 'test'), indent=2))
        print(f'\nDone in {(time.time() - start) / 60:.1f} minutes.')
    metrics = json.loads(results.read_text())
    print('  '.join(f'{name} {metrics[name]:.3f}' for name in SHOWN))
    print(f'See {work_dir}: metrics.json, predictions.jpg (ground truth on the left), curves.png, the checkpoint')


if __name__ == '__main__':
    main()
