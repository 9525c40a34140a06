"""MNIST and Fashion-MNIST, from the folder that holds their files."""

from __future__ import annotations

from .base import Dataset, Folder, Source
from .idx import LIKE_MNIST, PIXELS, find_idx, idx_folder


def _source(name: str) -> Source:
    mean, deviation = PIXELS[name]
    said = (
        f"60,000 / 10,000 images of 784 pixels, 10 classes; (p/255 - {mean:.4f}) / {deviation:.4f}; from four idx files"
    )

    def read(data_dir: Folder) -> Dataset:
        return idx_folder(find_idx(name, data_dir), name)

    return Source(name, said, LIKE_MNIST, read)


MNIST, FASHION_MNIST = _source("mnist"), _source("fashion-mnist")
