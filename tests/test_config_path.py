"""Finding shipped configs by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import overlock_mm


def test_every_listed_config_has_a_path():
    names = overlock_mm.list_configs()
    assert 'mmdet/mask-rcnn_overlock-t_fpn_1x_coco.py' in names
    for name in names:
        path = Path(overlock_mm.get_config_path(name))
        assert path.is_absolute()
        assert path.is_file()
        assert overlock_mm.get_config_path(name[:-3]) == str(path)


def test_name_must_be_a_str():
    with pytest.raises(TypeError, match='name must be a str, got None'):
        overlock_mm.get_config_path(None)


def test_error_has_the_nearest_names():
    with pytest.raises(
        FileNotFoundError, match=r"no config 'mmdet/mask-rcnn_overlock-t_fpn_1x.py' .*overlock-t_fpn_1x_coco.py"
    ):
        overlock_mm.get_config_path('mmdet/mask-rcnn_overlock-t_fpn_1x.py')
    with pytest.raises(FileNotFoundError, match=r'overlock_mm.list_configs\(\) has all names'):
        overlock_mm.get_config_path('zzzzzzz')
