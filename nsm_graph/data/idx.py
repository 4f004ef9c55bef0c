r"""The IDX format: a typed header with big-endian sizes, then bytes.

Source: the format description published with MNIST. Differs: unsigned bytes only.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path, *, ndim: int | None = None) -> Tensor:
    r"""Reads an IDX file of unsigned bytes, plain or gzip.

    Args:
        path: The file; gzip is recognised by its content, not by its name.
        ndim: The number of dimensions that is expected; :obj:`None` for any.
            (default: :obj:`None`)

    Raises:
        ValueError: If the file is damaged or holds something else.
    """
    content = _content(Path(path))
    if len(content) < 4 or content[:3] != bytes([0, 0, UNSIGNED_BYTE]):
        raise ValueError(
            f"{path}: expected an IDX header 00 00 08 (unsigned bytes), got "
            f"{content[:3].hex(' ') or 'an empty file'}; put the original file there"
        )
    dimensions = content[3]
    if ndim is not None and dimensions != ndim:
        raise ValueError(
            f"{path}: expected {ndim} dimensions, got {dimensions}; "
            "images and labels may be swapped"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(
            f"{path}: expected a header of {start} bytes, got {len(content)}; "
            "the file is cut short, put the original file there"
        )
    shape = np.frombuffer(content, ">u4", count=dimensions, offset=4).tolist()
    expected, got = math.prod(shape), len(content) - start
    if got != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes of data for the shape {shape}, got {got}; "
            "the file is damaged, put the original file there"
        )
    # A bytearray is writable, as PyTorch wants; the slice copies once.
    values = np.frombuffer(bytearray(content[start:]), np.uint8)
    return torch.from_numpy(values).view(shape)


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a complete gzip file, got {error}; put the original file there"
        ) from error
