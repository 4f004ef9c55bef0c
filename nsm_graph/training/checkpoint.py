"""Checkpoints: tensors as safetensors, the rest as JSON, the whole folder committed at once.
Nothing is pickled.

A checkpoint is a folder with `model.safetensors`, `optimizer.safetensors` (moments, and the states
of the random generators) and `meta.json`, which holds the digests of both and its own. A new one is
written beside the old one, flushed to disk and then takes its name. A crash at any moment leaves
the old or the new one whole: if it strikes between the two renames, the old one is found under its
side name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

FORMAT = 1
MODEL, OPTIMIZER, META = "model.safetensors", "optimizer.safetensors", "meta.json"


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    meta: Mapping[str, Any],
    generators: Mapping[str, Tensor] | None = None,
) -> None:
    """Replaces the checkpoint at `path` in one step.

    Args:
        path: The checkpoint folder.
        model: Its parameters and buffers are kept.
        optimizer: Its state and its groups are kept.
        meta: Anything JSON can hold.
        generators: States of random generators.
    """
    moments, groups = _split_optimizer(optimizer)
    moments |= {f"generator.{name}": state for name, state in (generators or {}).items()}
    files = {MODEL: save(_owned(model.state_dict())), OPTIMIZER: save(_owned(moments))}
    sidecar: dict[str, Any] = {
        "format": FORMAT,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "optimizer": groups,
        "meta": dict(meta),
    }
    sidecar["self"] = _digest(sidecar)
    files[META] = json.dumps(sidecar, indent=1).encode()

    fresh, old = _side(path, "new"), _side(path, "old")
    _settle(path)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for name, data in files.items():
        _write(fresh / name, data)
    _sync(fresh)
    if path.exists():
        os.rename(path, old)
    os.rename(fresh, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fills the model, and the optimizer if one is given; returns `meta` and the states of the
    generators.

    Raises:
        ValueError: If the checkpoint or one of its files is missing, damaged, or made for another
        model.
    """
    folder = _folder(path)
    sidecar = _read_meta(folder / META)
    data = {name: _read(folder / name) for name in (MODEL, OPTIMIZER)}
    for name, content in data.items():
        if hashlib.sha256(content).hexdigest() != sidecar["sha256"][name]:
            raise ValueError(
                f"checkpoint: {folder / name} is damaged (its digest is not the one in {META})"
            )
    tensors, moments = load(data[MODEL]), load(data[OPTIMIZER])
    _check_same(folder / MODEL, tensors, model.state_dict())
    model.load_state_dict(tensors)
    generators = {
        key[10:]: moments.pop(key) for key in list(moments) if key.startswith("generator.")
    }
    if optimizer is not None:
        optimizer.load_state_dict(_join_optimizer(moments, sidecar["optimizer"]))
    return sidecar["meta"], generators


def read_meta(path: Path) -> dict[str, Any]:
    """The `meta` of a checkpoint, without its tensors.

    Raises:
        ValueError: If the checkpoint or the file is missing or damaged.
    """
    return _read_meta(_folder(path) / META)["meta"]


def _folder(path: Path) -> Path:
    folder = path if path.exists() else _side(path, "old")
    if not folder.is_dir():
        raise ValueError(f"checkpoint: expected the folder {path}; it does not exist; train first")
    return folder


def _split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            kind = tensors if isinstance(value, Tensor) else scalars
            kind[f"{index}.{name}"] = value
    return tensors, {"groups": state["param_groups"], "scalars": scalars}


def _join_optimizer(tensors: dict[str, Tensor], groups: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **groups["scalars"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups["groups"]}


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Two names of one storage (tied weights) are refused by safetensors: each gets its own copy.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _check_same(file: Path, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in sorted(got.keys() ^ expected.keys()):
        have, want = ("has", "does not") if name in got else ("lacks", "does")
        raise ValueError(
            f"checkpoint: {file} {have} {name!r}, which the model {want}; was another config used?"
        )
    for name, tensor in expected.items():
        if got[name].shape != tensor.shape:
            raise ValueError(
                f"checkpoint: {name!r} in {file}: expected {tuple(tensor.shape)}; "
                f"got {tuple(got[name].shape)}"
            )


def _read_meta(file: Path) -> dict[str, Any]:
    try:
        sidecar = json.loads(_read(file))
        own = sidecar.pop("self")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ValueError) and str(error).startswith("checkpoint:"):
            raise
        raise ValueError(f"checkpoint: {file} is damaged (not the JSON that was written)") from None
    if own != _digest(sidecar):
        raise ValueError(f"checkpoint: {file} is damaged (its digest is not the one it names)")
    if sidecar["format"] != FORMAT:
        raise ValueError(f"checkpoint: {file}: expected format {FORMAT}; got {sidecar['format']}")
    return sidecar


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"checkpoint: cannot read {file}: {error.strerror}") from None


def _digest(sidecar: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(sidecar, sort_keys=True).encode()).hexdigest()


def _side(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _settle(path: Path) -> None:
    """Finishes or undoes what a crash left behind."""
    old = _side(path, "old")
    if old.exists() and not path.exists():
        os.rename(old, path)
    shutil.rmtree(old, ignore_errors=True)


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
