"""Tables and a picture of what bench_contmix.py measured."""

from __future__ import annotations

import statistics
from typing import Any, Optional

MODES = ('forward', 'forward_backward')
Table = list[list[str]]


def label(case: dict[str, Any]) -> str:
    shape = case['shape']
    height, width = shape['input']
    return f'{",".join(case["archs"])} stage {shape["stage"]}, {height}x{width}, batch {case["batch"]}, {case["dtype"]}'


def machine_line(record: dict[str, Any]) -> str:
    machine = record['machine']
    where = machine['device']
    if machine['device_type'] == 'cpu':
        where += f', {machine["threads"]} threads, {machine["cpu_capability"]}'
    commit, _, dirty = (machine['git_commit'] or 'unknown').partition('-')
    return f'{where}; torch {machine["torch"]}; {machine["date"][:10]}; commit {commit[:12]}{dirty and "-" + dirty}'


def heading(record: dict[str, Any]) -> str:
    ceilings = record['ceilings']
    rates = [f'{ceilings["bytes_per_second"] / 1e9:.0f} GB/s']
    rates += [f'{rate * 2 / 1e12:.3g} TFLOP/s {name}' for name, rate in ceilings['multiply_adds_per_second'].items()]
    if ceilings['exponentials_per_second']:
        rates.append(f'{ceilings["exponentials_per_second"] / 1e9:.3g}e9 exponentials/s')
    return f'{machine_line(record)}\nceilings: {", ".join(rates)}'


def number(value: float) -> str:
    """With three digits, or all those of a large one."""
    return f'{value:.0f}' if value >= 100 else f'{value:.3g}'


def milliseconds(seconds: float) -> str:
    return number(seconds * 1e3)


def with_spread(result: dict[str, float], show=milliseconds) -> str:
    return f'{show(result["median"])} [{show(result["q1"])}-{show(result["q3"])}]'


def times(ratio: float) -> str:
    return f'{number(ratio)}x'


def full_table(record: dict[str, Any]) -> Table:
    """A row for every case and implementation."""
    on_gpu = record['machine']['device_type'] == 'cuda'
    table = [
        ['case', 'implementation', 'fwd ms', 'fwd+bwd ms', 'fwd / contmix', 'fwd+bwd / contmix', 'saved', 'over floor']
    ]
    if on_gpu:
        table[0].append('peak MiB')
    for case in record['cases']:
        name_of_case = label(case)
        for name, result in case['implementations'].items():
            row = [name_of_case, name]
            if 'skipped' in result:
                row += [result['skipped'], '', '', '', '', '']
            else:
                both = [result[mode] for mode in MODES]
                row += [with_spread(each) for each in both]
                row += [with_spread(each['ratio'], times) if 'ratio' in each else '' for each in both]
                row += [f'{result["saved_ratio"]:.2f}', ' '.join(times(each['over_floor']) for each in both)]
                if on_gpu:
                    row.append(f'{both[1]["peak_bytes"] / 2**20:.0f}')
            table.append(row + [''] * (len(table[0]) - len(row)))
            name_of_case = ''
        row = ['', 'floor', *(milliseconds(case['floor'][mode]['seconds']) for mode in MODES)]
        table.append(row + [''] * (len(table[0]) - len(row)))
    return table


def short_table(record: dict[str, Any]) -> Table:
    """A row for every input, stage, batch and dtype: times of the variants, and geometric means of ratios over them."""
    archs = [arch for arch in ('xt', 't', 's', 'b') if any(arch in case['archs'] for case in record['cases'])]
    baselines = [
        name
        for name in ('published', 'reference', 'compiled', 'natten')
        if any('skipped' not in case['implementations'].get(name, {'skipped': ''}) for case in record['cases'])
    ]
    of_archs = '/'.join(archs)
    table = [['input', 'stage', 'batch', 'dtype', f'fwd ms {of_archs}', f'fwd+bwd ms {of_archs}', 'over floor', 'saved']]
    table[0] += [f'{name} over contmix' for name in baselines]
    rows: dict[tuple, list[dict[str, Any]]] = {}
    for case in record['cases']:
        shape = case['shape']
        rows.setdefault((tuple(shape['input']), shape['stage'], case['batch'], case['dtype']), []).append(case)
    for ((height, width), stage, batch, dtype), cases in rows.items():
        row = [f'{height}x{width}', str(stage), str(batch), dtype]
        ours = {arch: case['implementations']['contmix'] for case in cases for arch in case['archs']}
        for mode in MODES:
            medians = [ours.get(arch, {}).get(mode, {}).get('median') for arch in archs]
            row.append('/'.join('-' if median is None else milliseconds(median) for median in medians))
        row.append(_means(cases, 'contmix', 'over_floor'))
        saved = [case['implementations']['contmix'].get('saved_ratio') for case in cases]
        row.append(f'{max(saved):.2f}' if all(saved) else '-')
        for name in baselines:
            row.append(_means(cases, name, 'ratio'))
        table.append(row)
    return table


def _means(cases: list[dict[str, Any]], name: str, key: str) -> str:
    """'2.5x 3.1x': geometric means of a ratio of the forward, and of forward and backward."""
    means = []
    for mode in MODES:
        found = [case['implementations'].get(name, {}).get(mode, {}).get(key) for case in cases]
        ratios = [each['median'] if isinstance(each, dict) else each for each in found if each is not None]
        means.append(times(statistics.geometric_mean(ratios)) if ratios else '-')
    return ' '.join(means) if set(means) != {'-'} else '-'


def as_text(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table)]
    # What is said in place of numbers may run on.
    widths[2] = max(len(row[2]) for row in table if any(row[3:]))
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table)


def as_markdown(table: Table) -> str:
    lines = ['| ' + ' | '.join(row) + ' |' for row in table]
    lines.insert(1, '|' + '---|' * len(table[0]))
    return '\n'.join(lines)


def plot(record: dict[str, Any], file: str, title: Optional[str] = None) -> None:
    """Times over multiply-adds, a panel for each dtype and mode."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    dtypes = sorted({case['dtype'] for case in record['cases']})
    if not dtypes:
        return
    names = ['contmix', 'published', 'reference', 'compiled', 'natten']
    figure, axes = plt.subplots(len(dtypes), 2, figsize=(11, 4.2 * len(dtypes)), squeeze=False, sharex='col')
    for row, dtype in zip(axes, dtypes):
        cases = [case for case in record['cases'] if case['dtype'] == dtype]
        for axis, mode, words in zip(row, MODES, ('forward', 'forward and backward')):
            for name, marker in zip(names, 'os^vD'):
                points = [
                    (case['work'][mode]['multiply_adds'], case['implementations'][name][mode]['median'] * 1e3)
                    for case in cases
                    if 'median' in case['implementations'].get(name, {}).get(mode, {})
                ]
                if points:
                    axis.scatter(*zip(*points), s=20, marker=marker, label=name)
            floors = [(case['work'][mode]['multiply_adds'], case['floor'][mode]['seconds'] * 1e3) for case in cases]
            axis.scatter(*zip(*floors), s=60, marker='_', color='black', label='floor')
            axis.set(xscale='log', yscale='log', title=f'{words}, {dtype}', xlabel='multiply-adds', ylabel='ms')
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.suptitle(title or f'ContMix on {record["machine"]["device"]}')
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
