"""The bar on a terminal, or now and then a line where there is none."""

from __future__ import annotations

import sys
import time
from types import TracebackType

LINE_SECONDS = 10.0


class Progress:
    """Shows how far a run is, on standard error.

    Args:
        title: Name of what is trained.
        show: Whether to show anything.
    """

    def __init__(self, title: str, show: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True, quiet=not show)
        columns = (
            TextColumn("{task.fields[title]}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._is_live = show and console.is_terminal
        self._bar = Bar(*columns, console=console, disable=not self._is_live)
        self._id = self._bar.add_task("", total=1.0, title=title, text="")
        self._title, self._show, self._last_line = title, show, time.monotonic()

    def update(self, done: float) -> None:
        """Moves the bar to a share of the run."""
        self._bar.update(self._id, completed=done)

    def report(self, epoch: int, train: str, validation: str, done: float) -> None:
        """Says how an epoch went."""
        text = f"epoch {epoch}  {train}  validation {validation}"
        self._bar.update(self._id, completed=done, text=text)
        now = time.monotonic()
        if (
            self._show
            and not self._is_live
            and (now - self._last_line > LINE_SECONDS or done >= 1.0)
        ):
            self._last_line = now
            print(f"{self._title}: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
