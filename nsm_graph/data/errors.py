r"""What is raised when a dataset's files are not there."""

from collections.abc import Sequence
from pathlib import Path


class MissingDataError(FileNotFoundError):
    r"""The files of a dataset are missing and could not be fetched.

    The message is one line: what is missing, where to put it, and who publishes it.

    Args:
        name: Name of the dataset.
        folder: The folder that was searched.
        files: Names of the missing files.
        publisher: Where the files come from, in words.
    """

    def __init__(self, name: str, folder: Path, files: Sequence[str], publisher: str) -> None:
        self.name = name
        self.folder = folder
        self.files = tuple(files)
        super().__init__(
            f"{name} is missing: put {', '.join(files)} into {folder.absolute()} ({publisher})"
        )
