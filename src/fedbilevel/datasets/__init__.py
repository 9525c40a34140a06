"""Data sets by name, split into training and test rows and already normalised; nothing is downloaded.

mnist, fashion-mnist and heart-disease are read from a folder with their four files; the others come with scikit-learn.
"""

from ..errors import unknown_name
from . import shipped
from .base import Dataset, Facts, Folder, Source
from .embedded import breast_cancer, diabetes, digits
from .heart import heart_disease
from .idx import CHUNK, IDX_FILES, LARGEST, PIXELS, find_idx, idx_arrays, idx_folder, read_idx

DATASETS: dict[str, Source] = {each.name: each for each in vars(shipped).values() if isinstance(each, Source)}


def load(name: str, data_dir: Folder = None) -> Dataset:
    """The data set called `name`.

    Args:
        name: one of `DATASETS`.
        data_dir: for mnist and fashion-mnist, the folder with the four idx files (plain or .gz), for
            heart-disease that with the four hospitals' files; or its parent, where they lie in a folder
            called `name`. None: FEDBILEVEL_DATA (either folder too), then ~/.cache/fedbilevel/NAME. The
            data sets that come with scikit-learn do not use it.

    Raises:
        InputError: an unknown name, or files that are missing or unusable.
    """
    if name not in DATASETS:
        raise unknown_name("data set", name, DATASETS)
    return DATASETS[name](data_dir)


__all__ = [
    "CHUNK", "DATASETS", "IDX_FILES", "LARGEST", "PIXELS", "Dataset", "Facts", "Folder", "Source", "breast_cancer",
    "diabetes", "digits", "find_idx", "heart_disease", "idx_arrays", "idx_folder", "load", "read_idx",
]  # fmt: skip
