"""Figures as PNG files, and one HTML page that holds them all."""

from __future__ import annotations

import base64
import html
import textwrap
from pathlib import Path

import cv2
import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.image import AxesImage  # noqa: E402

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #222; }}
figure {{ margin: 2.5rem 0; }}
img {{ max-width: 100%; border: 1px solid #ddd; border-radius: 4px; }}
</style>
<h1>{title}</h1>
{figures}
</html>
"""
_FIGURE = """<figure id="{name}">
<img src="data:image/png;base64,{data}" alt="{caption}">
</figure>
"""


class Page:
    """A folder of PNG files, with ``index.html``, which needs no other file.

    Args:
        folder: is made if it does not exist.
        title: of the page.
    """

    def __init__(self, folder: Path, title: str) -> None:
        self.folder = folder
        self.title = title
        self.files: dict[str, str] = {}  # names of the PNG files, and their captions
        folder.mkdir(parents=True, exist_ok=True)

    def add_figure(self, figure: Figure, name: str, caption: str) -> Path:
        """Save a figure, with its caption below it."""
        width = figure.get_size_inches()[0]
        text = '\n'.join(textwrap.wrap(caption, max(40, int(width * 15))))
        figure.supxlabel(text, fontsize=9, color='0.35', x=0.01, ha='left')
        file = self._next_file(name, caption)
        figure.savefig(file, dpi=120, facecolor='white')
        plt.close(figure)
        return file

    def _next_file(self, name: str, caption: str) -> Path:
        """Pictures of two folders can have the same name."""
        number, unique = 1, f'{name}.png'
        while unique in self.files:
            number += 1
            unique = f'{name}_{number}.png'
        self.files[unique] = caption
        return self.folder / unique

    def write(self) -> Path:
        """Write ``index.html``."""
        figures = ''.join(
            _FIGURE.format(
                name=html.escape(Path(name).stem, quote=True),
                caption=html.escape(caption, quote=True),
                data=base64.b64encode((self.folder / name).read_bytes()).decode(),
            )
            for name, caption in self.files.items()
        )
        file = self.folder / 'index.html'
        file.write_text(_PAGE.format(title=html.escape(self.title), figures=figures), encoding='utf-8')
        return file


def show(axes: Axes, picture: np.ndarray, title: str = '', **settings) -> AxesImage:
    """Draw an image or a map without ticks."""
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    image = axes.imshow(picture, **settings)
    axes.autoscale(False)  # marks at the border do not move it
    return image


def enlarged(field: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map (h, w) at the size of its picture, with a rectangle for each position."""
    return cv2.resize(np.asarray(field, dtype=np.float32), (width, height), interpolation=cv2.INTER_NEAREST)
