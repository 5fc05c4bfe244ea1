"""The architecture figure: its values are those of the network, and the picture in the docs is up to date."""

from __future__ import annotations

import re
import sys

import pytest
from conftest import ROOT, import_file

pytest.importorskip('matplotlib', reason='it draws')
sys.path.insert(0, str(ROOT / 'tools'))

from overlock_mm.models import OverLoCK  # noqa: E402
from overlock_mm.models.overlock import ARCHITECTURES  # noqa: E402


@pytest.fixture(scope='module')
def figure():
    return import_file(ROOT / 'tools' / 'draw_architecture.py')


@pytest.mark.parametrize('arch', ['xt', 'b'])
def test_values_are_those_of_the_variant(figure, arch):
    architecture = figure.read_architecture(arch, 224)
    settings = ARCHITECTURES[arch]
    c1, c2, c3, c4 = settings['channels']
    context = c4 // 4
    assert [each.blocks for each in architecture.stages.values()] == [*settings['depths'], *settings['sub_depths']]
    assert [each.kernels for each in architecture.stages.values()] == [(17,), (15,), (13,), (7,), (5, 13), (5, 7)]
    assert [each.shape for each in architecture.stages.values()] == [
        f'56 × 56 × {c1}',
        f'28 × 28 × {c2}',
        f'14 × 14 × {c3}',
        f'7 × 7 × {c4}',
        f'14 × 14 × ({c3} + {context})',
        f'7 × 7 × ({c4} + {context})',
    ]
    assert architecture.prior == f'7 × 7 × {context}'
    assert sum(architecture.parameters.values()) == sum(each.numel() for each in OverLoCK(arch).parameters())


def test_size_of_the_image_counts(figure):
    architecture = figure.read_architecture('xt', 256)
    assert architecture.stages['sub_blocks4'].size == (8, 8)
    assert architecture.prior == '8 × 8 × 84'


def test_all_values_are_drawn(figure):
    architecture = figure.read_architecture('t', 224)
    picture = figure.draw(architecture)
    (axes,) = picture.axes
    drawn = [text.get_text() for text in axes.texts]
    for stage in architecture.stages.values():
        assert stage.name in drawn and stage.shape in drawn
        assert f'{stage.blocks} blocks, {figure.kernels_of(stage)}' in drawn
    assert f'context prior\n{architecture.prior}' in drawn
    assert 'image\n224 × 224\n× 3' in drawn
    millions = [f'{number / 1e6:.1f} M parameters' for number in architecture.parameters.values()]
    assert all(any(text.endswith(each) for text in drawn) for each in millions)
    boxes = [patch for patch in axes.patches if isinstance(patch, figure.FancyBboxPatch)]
    narrow = [box for box in boxes if box.get_extents().width < 0.2 * picture.dpi]
    assert len(narrow) == sum(stage.blocks for stage in architecture.stages.values())
    figure.plt.close(picture)


def test_picture_of_the_docs_is_up_to_date(figure):
    """Its description has all values. Run tools/draw_architecture.py if they have changed."""
    text = figure.OUT.read_text(encoding='utf-8')
    (description,) = re.findall(r'<dc:description>([^<]*)</dc:description>', text)
    assert description == figure.read_architecture('t', 224).describe()


def test_pictures_are_the_same_in_every_run(figure, tmp_path, monkeypatch):
    files = [tmp_path / name for name in ('one.svg', 'two.svg')]
    for file in files:
        monkeypatch.setattr(sys, 'argv', ['draw_architecture.py', '--arch', 'xt', '--out', str(file)])
        figure.main()
    assert files[0].read_bytes() == files[1].read_bytes()
    assert '<dc:title>OverLoCK-XT</dc:title>' in files[0].read_text(encoding='utf-8')
