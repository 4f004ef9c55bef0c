r"""Processed graphs: made beside the raw files' folder, never in it, whole or not at all.

An entry of the cache is a root folder for a PyG dataset class: ``raw`` links to the raw files,
``processed`` is what PyG made of them. It is made in a temporary folder and renamed when complete,
so whatever has an entry's name is complete. The name holds a digest of what the entry depends on.
"""

import hashlib
import os
import pickle
import shutil
import socket
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch_geometric
from torch_geometric.data import InMemoryDataset
from torch_geometric.transforms import BaseTransform

from nsm_graph.data.errors import MissingDataError

# What PyG's readers and PyTorch raise on damaged files; not OSError, which a full disk raises too.
UNREADABLE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
SECONDS_TO_CONNECT = 20.0


@dataclass(frozen=True)
class GraphFiles:
    r"""The raw files of one PyG dataset.

    Args:
        name: Its folder: the files are looked for in ``root/name/raw``.
        files: The files it cannot do without.
        publisher: Where they come from, in words.
        dataset: PyG's class, called as ``dataset(root, pre_transform=..., **arguments)``.
        arguments: Further arguments of the class.
        folder: Where below its root the class keeps ``raw``.
        check: Raises :class:`ValueError` if the files in a folder disagree.
    """

    name: str
    files: tuple[str, ...]
    publisher: str
    dataset: type[InMemoryDataset]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""
    check: Callable[[Path], None] = lambda folder: None

    def missing(self, raw: Path) -> list[str]:
        return [name for name in self.files if not (raw / name).is_file()]

    def open(self, entry: Path, transform: BaseTransform | None, **options: Any) -> InMemoryDataset:
        r"""PyG's dataset on an entry of the cache."""
        try:
            return self.dataset(str(entry), pre_transform=transform, **self.arguments, **options)
        except UNREADABLE as error:
            raise ValueError(
                f"cache entry {entry} is damaged ({error}); delete that folder and try again"
            ) from error


def prepare(source: GraphFiles, root: Path, cache: Path, transform: BaseTransform | None) -> Path:
    r"""The root folder to hand to PyG's class, with everything processed.

    Raises:
        MissingDataError: If the files are neither there nor downloadable.
        ValueError: If they cannot be read, or :obj:`cache` cannot be written.
    """
    raw = root / source.name / "raw"
    if source.missing(raw):
        raw = _download(source, raw, cache)
    raw = raw.resolve()
    state = [(file.name, *_stamp(file)) for file in sorted(raw.iterdir())]
    key = repr((str(raw), state, repr(transform), torch_geometric.__version__))
    entry = cache / f"{source.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if entry.is_dir():
        return entry
    with whole_or_nothing(entry) as staging:
        _link(raw, staging / source.folder / "raw")
        try:
            source.check(raw)
            source.dataset(str(staging), pre_transform=transform, **source.arguments)
        except UNREADABLE as error:
            raise ValueError(
                f"{raw} cannot be read as {source.name} ({error}); put the original files there: "
                f"{source.publisher}"
            ) from error
    return entry


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    r"""A temporary folder that becomes :obj:`path` if the block ends well, and vanishes if not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise ValueError(
            f"cache folder {path.parent} cannot be written ({error.strerror}); "
            "choose another one with cache="
        ) from error
    try:
        yield staging
        try:
            staging.rename(path)
        except OSError:
            # Another process may have been faster; what it made is the same.
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(source: GraphFiles, wanted: Path, cache: Path) -> Path:
    r"""Lets PyG download the raw files into the cache; returns their folder."""
    entry = cache / "downloads" / source.name
    raw = entry / source.folder / "raw"
    if not source.missing(raw):
        return raw
    import aiohttp  # PyG's downloader is built on it

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_TO_CONNECT)
    try:
        with whole_or_nothing(entry) as staging:
            _fetch(source, staging)
            missing = source.missing(staging / source.folder / "raw")
            if missing:
                raise FileNotFoundError(f"the download lacks {', '.join(missing)}")
    except (OSError, aiohttp.ClientError, zipfile.BadZipFile) as error:
        raise MissingDataError(
            source.name, wanted, source.missing(wanted), source.publisher
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return raw


class _Fetched(Exception):
    pass


def _fetch(source: GraphFiles, root: Path) -> None:
    def stop(self: InMemoryDataset) -> None:
        raise _Fetched

    # PyG downloads and processes in one constructor; only the first is wanted here.
    download_only = type(source.dataset.__name__, (source.dataset,), {"process": stop})
    with suppress(_Fetched):
        download_only(str(root), **source.arguments)


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(target, link, target_is_directory=True)
    except OSError:
        # Some systems let only administrators make links.
        shutil.copytree(target, link)
