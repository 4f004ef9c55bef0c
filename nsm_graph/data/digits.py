r"""Scikit-learn's digits: real data that comes with a package, nothing to download."""

from pathlib import Path

import torch

from nsm_graph.data.info import DatasetInfo, Splits
from nsm_graph.data.pixels import PixelSequences
from nsm_graph.data.stratify import Indices, stratified_choice

# The test images are the same for every seed, so that runs can be compared.
TEST_SIZE, TEST_SEED = 360, 0


def load_digits(*, root: Path, cache: Path, seed: int, validation_fraction: float = 0.1) -> Splits:
    r"""1,797 grey images of 8 x 8 as sequences of 64 pixels in [0, 1], ten classes.

    Test: 360 images, stratified, the same for every seed. Validation: a stratified
    :obj:`validation_fraction` of the other 1,437, drawn with :obj:`seed`; 0 for none.
    :obj:`root` and :obj:`cache` are not used.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {validation_fraction}; choose a number in [0, 1), 0 for none"
        )
    try:
        from sklearn.datasets import load_digits as bundled_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed; "
            "run: pip install scikit-learn"
        ) from error

    grey, classes = bundled_digits(return_X_y=True)
    pixels = torch.from_numpy(grey).to(torch.uint8)
    labels = torch.from_numpy(classes).long()

    test, rest = stratified_choice(classes, TEST_SIZE, TEST_SEED)
    size = round(validation_fraction * len(rest))
    validation, train = stratified_choice(classes[rest], size, seed)

    def images(part: Indices) -> PixelSequences:
        return PixelSequences(pixels[part], labels[part], scale=16)

    info = DatasetInfo("digits", "classification", 1, None, 10)
    return Splits(images(rest[train]), images(rest[validation]), images(test), info)
