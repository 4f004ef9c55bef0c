import builtins

import pytest
import torch
from torch_geometric.loader import DataLoader

from nsm_graph.data import MissingDataError, PixelSequences, load


def test_digits():
    pytest.importorskip("sklearn")
    splits = load("digits", seed=0)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [1293, 144, 360]
    first = splits.train[0]
    assert first.x.shape == (64, 1) and first.x.dtype == torch.float32
    assert first.y.shape == (1,) and first.y.dtype == torch.int64
    assert first.num_nodes == 64
    pixels = splits.train.pixels
    assert pixels.min() == 0 and pixels.max() == 16
    assert float(torch.cat([data.x for data in splits.test]).max()) == 1.0
    assert splits.info.task == "classification" and splits.info.out_channels == 10


def test_digits_splits_are_disjoint_and_deterministic():
    pytest.importorskip("sklearn")
    one, same, other = (load("digits", seed=seed) for seed in (1, 1, 2))
    none = load("digits", validation_fraction=0)
    assert torch.equal(one.train.pixels, same.train.pixels)
    assert not torch.equal(one.validation.pixels, other.validation.pixels)
    # The test images do not depend on the seed.
    assert torch.equal(one.test.pixels, other.test.pixels)
    assert len(none.train) == 1437 and len(none.validation) == 0
    assert (one.test.labels.bincount() - 36).abs().max() <= 1

    # All images of this set differ, so sets of images show that splits are disjoint and complete.
    def images(*parts):
        return [tuple(row) for part in parts for row in part.pixels.tolist()]

    assert len(set(images(one.train, one.validation, one.test))) == 1797
    assert set(images(one.train, one.validation)) == set(images(none.train))


def test_digits_without_scikit_learn(monkeypatch):
    def without(name, *args):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return importing(name, *args)

    importing = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"not installed; run: pip install scikit-learn$"):
        load("digits")


@pytest.mark.parametrize("fraction", [-0.1, 1, float("nan")])
def test_digits_bad_fraction(fraction):
    with pytest.raises(ValueError, match="validation_fraction is"):
        load("digits", validation_fraction=fraction)


def test_mnist(mnist_root, tmp_path, tree):
    before = tree(mnist_root)
    splits = load("mnist", root=mnist_root, cache=tmp_path / "cache")
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [22, 2, 6]
    assert splits.train[3].x.shape == (16, 1) and splits.train[3].y.tolist() == [3]
    assert [data.y.item() for data in splits.validation] == [2, 3]
    assert tree(mnist_root) == before and not (tmp_path / "cache").exists()

    batch = next(iter(DataLoader(splits.train, batch_size=4)))
    assert batch.x.shape == (64, 1) and batch.y.shape == (4,)
    assert batch.ptr.tolist() == [0, 16, 32, 48, 64]


def test_mnist_permuted(mnist_root):
    plain = load("mnist", root=mnist_root).test
    one = load("mnist", root=mnist_root, permuted=True, seed=0).test
    two = load("mnist", root=mnist_root, permuted=True, seed=1).test
    assert torch.equal(one.pixels, two.pixels)
    assert not torch.equal(one.pixels, plain.pixels)
    assert torch.equal(one.pixels.sort(1).values, plain.pixels.sort(1).values)


def test_mnist_missing(mnist_root):
    file = mnist_root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    file.unlink()
    with pytest.raises(MissingDataError) as caught:
        load("mnist", root=mnist_root)
    line = str(caught.value)
    assert line.startswith(
        f"MNIST is missing: put t10k-labels-idx1-ubyte into {file.parent} (MNIST"
    )
    assert "\n" not in line


def test_mnist_damaged(mnist_root, idx_bytes):
    raw = mnist_root / "MNIST" / "raw"
    labels, images = raw / "train-labels-idx1-ubyte", raw / "train-images-idx3-ubyte"
    labels.write_bytes(idx_bytes(torch.arange(24).numpy()))
    with pytest.raises(ValueError, match="expected labels 0 to 9, got 23"):
        load("mnist", root=mnist_root)
    labels.write_bytes(idx_bytes(torch.zeros(23).numpy()))
    with pytest.raises(ValueError, match="has 24 images, train-labels-idx1-ubyte 23 labels"):
        load("mnist", root=mnist_root)
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"expected 384 bytes of data .* got 383"):
        load("mnist", root=mnist_root)


def test_pixel_sequences():
    images = PixelSequences(torch.arange(12).view(3, 4).byte(), torch.arange(3))
    assert repr(images) == "PixelSequences(3, length=4)"
    assert [data.y.item() for data in images] == [0, 1, 2]
    assert images[-1].y.item() == 2 and len(images[1:]) == 2
    with pytest.raises(ValueError, match="3 images, but 2 labels"):
        PixelSequences(torch.zeros(3, 4), torch.zeros(2))


def test_real_mnist(real_data):
    splits = load("mnist", root=real_data("MNIST"))
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [55000, 5000, 10000]
    assert splits.train[0].y.item() == 5 and splits.test[0].y.item() == 7
