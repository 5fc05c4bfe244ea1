"""Tables and curves of what bench_backbone.py measured."""

from __future__ import annotations

from collections import Counter
from typing import Any, Optional

import contmix_report
from contmix_report import Table, machine_line, milliseconds, number, times, with_spread

#: Line and colour of an implementation in a picture: the network's are thick.
STYLES = {
    'published': dict(color='black', linewidth=2, marker='s'),
    'published-folded': dict(color='dimgray', linewidth=2, marker='s', linestyle=':'),
    'ours': dict(color='tab:red', linewidth=2, marker='o'),
    'ours-deploy': dict(color='darkred', linewidth=2, marker='o', linestyle=':'),
    'ours-channels-last': dict(color='tab:orange', linewidth=2, marker='^'),
    'ours-deploy-channels-last': dict(color='tab:orange', linewidth=2, marker='^', linestyle=':'),
    'ours-compiled': dict(color='tab:purple', linewidth=2, marker='v'),
    'ours-cuda-graph': dict(color='tab:pink', linewidth=2, marker='D'),
    'ours-with-cp': dict(color='tab:brown', linewidth=2, marker='P'),
    'convnext-tiny': dict(color='tab:blue', linestyle='--', marker='.'),
    'convnext-small': dict(color='royalblue', linestyle='--', marker='.'),
    'convnext-base': dict(color='navy', linestyle='--', marker='.'),
    'swin-tiny': dict(color='tab:green', linestyle='--', marker='.'),
    'torchvision-convnext-tiny': dict(color='tab:cyan', linestyle='--', marker='x'),
    'torchvision-swin-tiny': dict(color='yellowgreen', linestyle='--', marker='x'),
}


def label(case: dict[str, Any]) -> str:
    return f'{short_label(case)}, {precision(case)}, {mode_of(case)}'


def mode_of(case: dict[str, Any]) -> str:
    return case['mode'] + (', fused AdamW' if case.get('fused_adamw') else '')


def short_label(case: dict[str, Any]) -> str:
    height, width = case['size']
    return f'{case["arch"]} {case["out_type"]}, {height}x{width}, batch {case["batch"]}'


def precision(case: dict[str, Any]) -> str:
    if case['dtype'] == 'float32':
        return 'float32'
    return f'{case["dtype"]} {"weights" if case["cast"] else "autocast"}'


def mebibytes(count: Optional[int]) -> str:
    return '' if count is None else number(count / 2**20)


def table_of(cases: list[dict[str, Any]]) -> Table:
    """A row for every case and implementation."""
    table = [['case', 'implementation', 'ms', 'images/s', 'published / it', 'it / ours', 'saved MiB', 'peak MiB']]
    for case in cases:
        name_of_case = short_label(case)
        for name, result in case['implementations'].items():
            row = [name_of_case, name]
            name_of_case = ''
            if 'skipped' in result:
                row.append(result['skipped'])
            else:
                row += [with_spread(result), number(result['images_per_second'])]
                row += [with_spread(result[key], times) if key in result else '' for key in ('speedup', 'over_ours')]
                row += [mebibytes(result.get(key)) for key in ('saved_bytes', 'peak_bytes')]
            table.append(row + [''] * (len(table[0]) - len(row)))
    return table


def parts_table(case: dict[str, Any]) -> Table:
    """A row for every part of the network: what it has to do, and what the implementations take for it."""
    names = [name for name, result in case['implementations'].items() if 'parts' in result]
    table = [['part', 'G multiply-adds', 'MB', 'floor ms', *(f'{name}: ms (over floor)' for name in names)]]
    parts = [part for part in case['floor'] if part in case['work']]
    sums = dict.fromkeys(names, 0.0)
    for part in parts:
        work, floor = case['work'][part], case['floor'][part]
        row = [part, number(work['multiply_adds'] / 1e9), number(work['bytes'] / 1e6), milliseconds(floor)]
        for name in names:
            seconds = case['implementations'][name]['parts'].get(part, 0.0)
            sums[name] += seconds
            row.append(f'{milliseconds(seconds)} ({times(seconds / floor)})')
        table.append(row)
    total = [sum(case['work'][part][key] for part in parts) for key in ('multiply_adds', 'bytes')]
    floor = sum(case['floor'].values())
    row = ['sum', number(total[0] / 1e9), number(total[1] / 1e6), milliseconds(floor)]
    table.append([*row, *(f'{milliseconds(sums[name])} ({times(sums[name] / floor)})' for name in names)])
    whole = [case['implementations'][name]['median'] for name in names]
    table.append(['whole, timed apart', '', '', '', *(f'{milliseconds(s)} ({times(s / floor)})' for s in whole)])
    return table


def sections(record: dict[str, Any]) -> list[tuple[str, Table]]:
    """Titles and tables: one for each mode and precision, then where the time goes."""
    found = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in record['cases']:
        groups.setdefault((mode_of(case), precision(case)), []).append(case)
    for (mode, dtype), cases in groups.items():
        found.append((f'{mode}, {dtype}', table_of(cases)))
    for case in record['cases']:
        if any('parts' in result for result in case['implementations'].values()):
            found.append((f'Parts of {label(case)}', parts_table(case)))
    return found


def heading(record: dict[str, Any]) -> str:
    lines = [machine_line(record)]
    if record['ceilings']:
        rates = [f'{record["ceilings"]["bytes_per_second"] / 1e9:.0f} GB/s']
        for name, rate in record['ceilings']['multiply_adds_per_second'].items():
            rates.append(f'{rate * 2 / 1e12:.3g} TFLOP/s {name}')
        lines.append(f'ceilings: {", ".join(rates)}')
    return '\n'.join(lines)


def as_text(record: dict[str, Any]) -> str:
    blocks = [heading(record)]
    blocks += [f'{title}\n{contmix_report.as_text(table)}' for title, table in sections(record)]
    return '\n\n'.join(blocks)


def as_markdown(record: dict[str, Any]) -> str:
    blocks = [heading(record).replace('\n', '\n\n')]
    blocks += [f'### {title}\n\n{contmix_report.as_markdown(table)}' for title, table in sections(record)]
    return '\n\n'.join(blocks) + '\n'


# -------------------------------------------------------------------------------------------------------------- curves


def most_common(values: list[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def curves(record: dict[str, Any], dtype: Optional[str] = None) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """What to draw: a title, what the horizontal axis counts ('pixels' or 'batch'), and the cases.

    Of one variant and precision, those of most cases.
    """
    cases = [case for case in record['cases'] if dtype in (None, case['dtype'])]
    cases = [case for case in cases if not case.get('fused_adamw')] or cases
    if not cases:
        return []

    def kind(case: dict[str, Any]) -> tuple:
        return case['arch'], case['out_type'], case['dtype'], case['cast']

    chosen = most_common([kind(case) for case in cases])
    cases = [case for case in cases if kind(case) == chosen]
    arch = chosen[0].upper() if len(chosen[0]) < 3 else chosen[0]
    name = f'OverLoCK-{arch}, {precision(cases[0])}'
    batch = min(case['batch'] for case in cases)
    by_size = [case for case in cases if case['batch'] == batch]
    size = most_common([tuple(case['size']) for case in cases])
    by_batch = [case for case in cases if tuple(case['size']) == size]
    rows = [(f'{name}, batch {batch}', 'pixels', by_size), (f'{name}, {size[0]}x{size[1]}', 'batch', by_batch)]
    curved = [row for row in rows if len({position(case, row[1]) for case in row[2]}) > 1]
    return curved or rows[:1]


def position(case: dict[str, Any], axis: str) -> int:
    return case['batch'] if axis == 'batch' else case['size'][0] * case['size'][1]


def label_of_position(case: dict[str, Any], axis: str) -> str:
    return str(case['batch']) if axis == 'batch' else f'{case["size"][0]}x{case["size"][1]}'


def plot(record: dict[str, Any], file: str, dtype: Optional[str] = None) -> None:
    """Time and memory over the size of the image, and over the number of images, a column for each quantity."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    rows = curves(record, dtype)
    if not rows:
        return
    modes = [mode for mode in ('eval', 'train') if any(case['mode'] == mode for _, _, cases in rows for case in cases)]
    columns = [(mode, 'median', 1e3, f'{mode}: ms') for mode in modes]
    if 'train' in modes:
        columns.append(('train', 'saved_bytes', 2**-20, 'train: MiB saved for the backward'))
    columns += [(mode, 'peak_bytes', 2**-20, f'{mode}: MiB at the peak') for mode in modes]
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(4.6 * len(columns), 4.2 * len(rows)), squeeze=False)
    shown: dict[str, Any] = {}
    for line, (title, axis, cases) in zip(axes, rows):
        for panel, (mode, key, scale, words) in zip(line, columns):
            for name, style in STYLES.items():
                points = sorted(
                    (position(case, axis), case['implementations'][name][key] * scale)
                    for case in cases
                    if case['mode'] == mode and key in case['implementations'].get(name, {})
                )
                if points:
                    shown[name] = panel.plot(*zip(*points), **style)[0]
            panel.set(xscale='log', yscale='log', title=words, xlabel='images' if axis == 'batch' else 'size of the image')
            ticks = {position(case, axis): label_of_position(case, axis) for case in cases}
            panel.set_xticks(list(ticks), list(ticks.values()), rotation=0 if axis == 'batch' else 30)
            panel.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            panel.grid(alpha=0.3, which='both')
        line[0].set_ylabel(title)
    names = [name for name in STYLES if name in shown]
    figure.legend([shown[name] for name in names], names, loc='lower center', ncol=min(len(names), 2 * len(columns)))
    figure.suptitle(f'Backbones on {record["machine"]["device"]}')
    figure.tight_layout(rect=(0, 0.12 / len(rows), 1, 1))
    figure.savefig(file, dpi=110)
    plt.close(figure)
