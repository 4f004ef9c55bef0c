r"""MNIST as sequences of 784 pixels, in raster order or permuted."""

from pathlib import Path

import torch
from torch import Tensor

from nsm_graph.data.errors import MissingDataError
from nsm_graph.data.idx import read_idx
from nsm_graph.data.info import DatasetInfo, Splits
from nsm_graph.data.pixels import PixelSequences
from nsm_graph.data.stratify import random_state

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
PUBLISHER = "MNIST database of handwritten digits, LeCun, Cortes and Burges; plain or .gz"

# One order for every run: `permuted` results can only be compared under the same permutation.
PERMUTATION_SEED = 92


def load_mnist(*, root: Path, cache: Path, seed: int, permuted: bool = False) -> Splits:
    r"""60,000 + 10,000 grey images of 28 x 28 as sequences of 784 pixels in [0, 1].

    Validation: the last twelfth of the train file (5,000 of 60,000), whatever the seed. With
    :obj:`permuted` the pixels of every image are read in one fixed random order, the permutation
    of :class:`numpy.random.RandomState` with seed 92. Nothing is written to :obj:`cache`.
    """
    folder = root / "MNIST" / "raw"
    paths = [_plain_or_gzip(folder / name) for name in FILES]
    missing = [name for name, path in zip(FILES, paths, strict=True) if not path.is_file()]
    if missing:
        raise MissingDataError("MNIST", folder, missing, PUBLISHER)

    images, labels = _read(paths[0], paths[1])
    test_images, test_labels = _read(paths[2], paths[3])
    if images.size(1) != test_images.size(1):
        raise ValueError(
            f"{folder}: train images have {images.size(1)} pixels, test images "
            f"{test_images.size(1)}; put the original files there"
        )
    order = None
    if permuted:
        order = torch.from_numpy(random_state(PERMUTATION_SEED).permutation(images.size(1)))
    train = PixelSequences(images, labels, order=order)
    test = PixelSequences(test_images, test_labels, order=order)
    cut = len(train) - len(train) // 12
    name = "permuted_mnist" if permuted else "mnist"
    info = DatasetInfo(name, "classification", 1, None, 10)
    return Splits(train[:cut], train[cut:], test, info)


def _plain_or_gzip(path: Path) -> Path:
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


def _read(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} has {len(images)} images, {labels_path.name} {len(labels)} labels; "
            "put the two original files there"
        )
    if labels.numel() and int(labels.max()) > 9:
        raise ValueError(
            f"{labels_path}: expected labels 0 to 9, got {int(labels.max())}; "
            "put the original file there"
        )
    return images.flatten(1), labels
