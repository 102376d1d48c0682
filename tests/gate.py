"""The nbval plugin of `make nbval`: clean kernels, and figures count too, as decoded pixels.

nbval drops ``image/png`` before it compares outputs. Byte equality would be too strict (another
processor moves a point by a fraction of a pixel), so two figures are equal if they have the same
size and their pixels differ little on average.
"""

import base64
import io
import os
import tempfile

import numpy as np
from nbval.plugin import IPyNbCell, IPyNbFile
from PIL import Image

from helpers.execute import clean_environment

TOLERANCE = 0.002  # mean absolute difference of channels from 0 to 1; measured drift is below 1e-4


class Picture:
    """A figure that equals another one if their pixels nearly do."""

    def __init__(self, png):
        image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
        self.pixels = np.asarray(image) / 255

    def __eq__(self, other):
        same_size = self.pixels.shape == other.pixels.shape
        return same_size and np.abs(self.pixels - other.pixels).mean() < TOLERANCE

    def __repr__(self):
        return f"<figure of {self.pixels.shape[1]} x {self.pixels.shape[0]} pixels>"


def pytest_configure(config):
    """Let nbval's kernels start as `make execute` starts them."""
    folder = tempfile.TemporaryDirectory(prefix="nb-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    clean = clean_environment(folder.name)
    os.environ.clear()
    os.environ.update(clean)


def pytest_itemcollected(item):
    """Let figures through to nbval's comparison, as pictures."""
    if isinstance(item, IPyNbCell) and isinstance(item.parent, IPyNbFile):
        item.parent.skip_compare = tuple(k for k in item.parent.skip_compare if k != "image/png")
        sanitize = item.sanitize
        item.sanitize = lambda s: Picture(s) if str(s).startswith("iVBORw0KGgo") else sanitize(s)
