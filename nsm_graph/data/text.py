r"""A text file as characters, each to be predicted from those before it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from nsm_graph.data.errors import MissingDataError
from nsm_graph.data.info import DatasetInfo, Splits

# Each of the splits needs a character and its successor.
MIN_CHARACTERS = 40


def load_text(*, root: Path, cache: Path, seed: int, path: str | Path | None = None) -> Splits:
    r"""A UTF-8 text file as symbols, cut in order: 90 % train, 5 % validation, 5 % test.

    The symbols are the distinct characters of the whole file, in code point order. Each split is
    one long :class:`~torch_geometric.data.Data`; :obj:`y` is :obj:`x` one character later, so the
    last character of a split is a target only. :obj:`path` is ``root/tinyshakespeare/input.txt``
    if not given. :obj:`cache` and :obj:`seed` are not used.
    """
    file = Path(path).expanduser() if path is not None else root / "tinyshakespeare" / "input.txt"
    if not file.is_file():
        publisher = "any UTF-8 text" if path is not None else "Tiny Shakespeare, Karpathy, char-rnn"
        raise MissingDataError("text", file.parent, [file.name], publisher)
    try:
        # Bytes, then decode: universal newlines would change the characters.
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: expected UTF-8, got {error.reason} at byte {error.start}; convert the file"
        ) from error
    if len(text) < MIN_CHARACTERS:
        raise ValueError(
            f"{file}: expected at least {MIN_CHARACTERS} characters, got {len(text)}; "
            "choose a longer text"
        )

    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    alphabet, ids = np.unique(points, return_inverse=True)
    symbols = [chr(point) for point in alphabet]
    tokens = torch.from_numpy(ids.astype(np.int64))
    first, second = len(tokens) * 90 // 100, len(tokens) * 95 // 100
    count = len(symbols)
    return Splits(
        train=[_next_token(tokens[:first])],
        validation=[_next_token(tokens[first:second])],
        test=[_next_token(tokens[second:])],
        info=DatasetInfo("text", "next_token", 1, count, count, symbols=symbols),
    )


def _next_token(tokens: Tensor) -> Data:
    return Data(x=tokens[:-1], y=tokens[1:])
