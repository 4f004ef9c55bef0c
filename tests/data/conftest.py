"""Tiny raw files in the formats of the real ones, and no way to the network."""

import gzip
import os
import pickle
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(os.environ.get("NSM_GRAPH_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def real_data():
    """Gives the folder that holds a real dataset, or skips."""

    def folder(*parts: str) -> Path:
        if not SHARED.joinpath(*parts).exists():
            pytest.skip(f"no real {'/'.join(parts)}; set NSM_GRAPH_DATA to a folder that has it")
        return SHARED

    return folder


@pytest.fixture
def tree():
    """Lists everything below a folder, to see that nothing was written."""
    return lambda folder: sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="session")
def idx_bytes():
    """Gives an array's bytes in the IDX format."""

    def encode(array: np.ndarray) -> bytes:
        header = struct.pack(">HBB", 0, 8, array.ndim)
        sizes = struct.pack(f">{array.ndim}I", *array.shape)
        return header + sizes + array.astype(np.uint8).tobytes()

    return encode


@pytest.fixture
def mnist_root(tmp_path, idx_bytes):
    """24 + 6 images of 4 x 4; the test files are gzip."""
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 24), ("t10k", 6)):
        images = idx_bytes(rng.integers(0, 256, (count, 4, 4)))
        labels = idx_bytes(np.arange(count) % 10)
        suffix, pack = (".gz", gzip.compress) if prefix == "t10k" else ("", bytes)
        (raw / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(images))
        (raw / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(labels))
    return tmp_path / "root"


@pytest.fixture
def write_tu():
    """Writes a TU set of paths: graph g has 1 + g % 5 nodes and class g % 2."""

    def write(
        raw: Path, name: str, num_graphs: int = 40, *, labels=True, attributes=False, edges=False
    ) -> None:
        raw.mkdir(parents=True)
        sizes = [1 + g % 5 for g in range(num_graphs)]
        starts = np.cumsum([0, *sizes])
        pairs = [
            pair
            for start, size in zip(starts, sizes, strict=False)
            for i in range(start + 1, start + size)
            for pair in ((i, i + 1), (i + 1, i))
        ]
        nodes = range(sum(sizes))
        lines = {
            "A": [f"{i}, {j}" for i, j in pairs],
            "graph_indicator": [g + 1 for g, size in enumerate(sizes) for _ in range(size)],
            "graph_labels": [g % 2 for g in range(num_graphs)],
        }
        if labels:
            lines["node_labels"] = [node % 3 for node in nodes]
        if attributes:
            lines["node_attributes"] = [f"{node * 0.5}" for node in nodes]
        if edges:
            lines["edge_labels"] = [e % 2 for e in range(len(pairs))]
        for part, rows in lines.items():
            (raw / f"{name}_{part}.txt").write_text("".join(f"{row}\n" for row in rows))

    return write


@pytest.fixture
def zinc_root(tmp_path):
    """Six molecules a split (paths of 1 to 6 atoms), of which the index files choose three."""
    raw = tmp_path / "root" / "ZINC" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "val", "test"):
        molecules = []
        for size in range(1, 7):
            bonds = torch.zeros(size, size, dtype=torch.long)
            for i in range(size - 1):
                bonds[i, i + 1] = bonds[i + 1, i] = 1 + i % 3
            molecules.append(
                {
                    "atom_type": torch.arange(size),
                    "bond_type": bonds,
                    "logP_SA_cycle_normalized": torch.tensor([size / 2]),
                }
            )
        (raw / f"{part}.pickle").write_bytes(pickle.dumps(molecules))
        (raw / f"{part}.index").write_text("0,3,5\n")
    return tmp_path / "root"
