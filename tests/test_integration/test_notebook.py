"""The notebook runs from top to bottom, with random weights."""

from __future__ import annotations

import os

import pytest
from conftest import ROOT

nbclient = pytest.importorskip('nbclient', reason='runs the notebook')
nbformat = pytest.importorskip('nbformat', reason='reads the notebook')
pytest.importorskip('mmdet', reason='the notebook detects objects')
pytest.importorskip('skimage', reason='the notebook shows a photograph of scikit-image')

NOTEBOOK = ROOT / 'docs' / 'notebooks' / 'picture.ipynb'


def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert not any(cell.outputs for cell in cells)  # the file has none
    nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3').execute(cwd=str(NOTEBOOK.parent))

    texts = [''.join(output.text for output in cell.outputs if output.get('name') == 'stdout') for cell in cells]
    assert 'picture (512, 512, 3)' in texts[1]
    assert texts[2] == '0 detections: []\n'
    assert texts[3] == '[(1, 56, 64, 64), (1, 112, 32, 32), (1, 340, 16, 16), (1, 420, 8, 8)]\n'
    # Groups, map, kernel: of the small and of the large kernels.
    assert texts[6].startswith('[(8, 16, 16, 5, 5), (8, 16, 16, 13, 13)]')
    pictures = [sum('image/png' in output.get('data', {}) for output in cell.outputs) for cell in cells]
    assert pictures == [0, 0, 1, 1, 1, 1, 1]
