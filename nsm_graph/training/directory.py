"""The run directory: made for a config, and not left half-made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nsm_graph.training.config import Config


@contextmanager
def run_directory(run: Path, config: Config) -> Iterator[None]:
    """Makes the run directory with its `config.yaml`; a run that fails before its first checkpoint
    leaves nothing.

    Raises:
        ValueError: If the folder holds anything already, or cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        if any(run.iterdir()):
            raise ValueError(
                f"--out: expected a new or empty folder; {run} holds files; choose another"
            )
        config.save(run / "config.yaml")
    except OSError as error:
        raise ValueError(
            f"--out: cannot write to {run}: {error.strerror}; choose another folder"
        ) from None
    try:
        yield
    except BaseException:
        if not (run / "checkpoint").exists():
            for name in ("config.yaml", "metrics.jsonl"):
                (run / name).unlink(missing_ok=True)
            shutil.rmtree(run / "tensorboard", ignore_errors=True)
            with suppress(OSError):
                run.rmdir()
        raise


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    scratch = path.with_name(f".{path.name}.new")
    try:
        scratch.write_text(text)
        os.replace(scratch, path)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise ValueError(
            f"cannot write {path}: {error.strerror}; choose a file in a folder that exists"
        ) from None
