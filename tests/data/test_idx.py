import gzip
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from nsm_graph.data import read_idx

ARRAYS = arrays(np.uint8, array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5))


def read(content: bytes, **options):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        return read_idx(path, **options)


@settings(deadline=None, max_examples=50)
@given(ARRAYS, st.booleans())
def test_round_trip(idx_bytes, array, is_gzip):
    content = idx_bytes(array)
    values = read(gzip.compress(content) if is_gzip else content, ndim=array.ndim)
    assert values.dtype == torch.uint8
    assert values.shape == array.shape
    assert (values.numpy() == array).all()


@settings(deadline=None, max_examples=50)
@given(ARRAYS, st.data(), st.booleans())
def test_truncated_file_is_refused(idx_bytes, array, data, is_gzip):
    content = idx_bytes(array)
    content = gzip.compress(content) if is_gzip else content
    with pytest.raises(ValueError, match=r"expected .*got .*put the original file there"):
        read(content[: data.draw(st.integers(0, len(content) - 1))])


@pytest.mark.parametrize("content", [b"\x00\x00\x0d\x01" + bytes(8), b"PK\x03\x04", b"<html>"])
def test_wrong_magic_is_refused(content):
    with pytest.raises(ValueError, match=r"expected an IDX header 00 00 08.*got"):
        read(content)


def test_longer_file_is_refused(idx_bytes):
    with pytest.raises(ValueError, match=r"expected 3 bytes of data for the shape .3., got 4"):
        read(idx_bytes(np.zeros(3)) + b"x")


def test_damaged_gzip_is_refused(idx_bytes):
    content = bytearray(gzip.compress(idx_bytes(np.arange(100))))
    content[-6] ^= 1  # in the checksum
    with pytest.raises(ValueError, match="expected a complete gzip file"):
        read(bytes(content))


def test_swapped_files_are_refused(idx_bytes):
    with pytest.raises(ValueError, match="expected 3 dimensions, got 1; images and labels"):
        read(idx_bytes(np.zeros(4)), ndim=3)
