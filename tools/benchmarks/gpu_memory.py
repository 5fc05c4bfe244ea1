"""What training steps kept on a GPU, beside what gpu_cost.py counts without one.

    python tools/benchmarks/gpu_memory.py network.json     # a record of bench_backbone.py --mode train

It prints a table. It needs no GPU, but a binary that was built with CUDA.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gpu_cost
import harness
from peers import PEERS, build_peer

#: Of bench_backbone.py, those that gpu_cost.py counts.
OURS = ('ours', 'channels-last', 'ours-with-cp')


def counted_mib(name: str, case: dict) -> float:
    """MiB that the forward of an implementation keeps for its backward."""
    arch, size, batch = case['name'].split(', ')
    dtype = case['section'].split(', ')[1].split()[0]
    model = build_peer(name) if name in PEERS else gpu_cost.build(arch, with_cp=name == 'ours-with-cp')
    counts, _ = gpu_cost.measure(model, (int(batch.split()[1]), 3, *harness.image_size(size)), dtype=dtype)
    return counts['kept_mib']


def rows_of(record: dict) -> list[list[str]]:
    rows = [['case', 'implementation', 'kept MiB', 'counted', 'kept / counted', 'peak MiB']]
    for case in record['cases']:
        for name, result in case['implementations'].items():
            if name in (*OURS, *PEERS) and 'kept_bytes' in result:
                kept, counted = result['kept_bytes'] / 2**20, counted_mib(name, case)
                where = f'{case["name"]}, {case["section"]}'
                numbers = (kept, counted, kept / counted, result['peak_bytes'] / 2**20)
                rows.append([where, name, *map(harness.number, numbers)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('record', type=Path)
    record = json.loads(parser.parse_args().record.read_text())
    print(f'{harness.heading(record)}\n\n{harness.markdown(rows_of(record))}')


if __name__ == '__main__':
    main()
