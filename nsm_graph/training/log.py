"""What a run writes down while it runs: metrics.jsonl, and the same for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

from nsm_graph.memory import EditEvent
from nsm_graph.models.state import NodeSetEvent


class Log:
    """One JSON line for every event, flushed at once; numbers also go to TensorBoard.

    Args:
        run: The run directory.
    """

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = (run / "metrics.jsonl").open("a")
        self._board = SummaryWriter(run / "tensorboard")

    def write(self, split: str, step: int, **values: float) -> None:
        """Records values of a split after a step; nothing to record for an empty split."""
        self._file.write(json.dumps({"split": split, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def write_edit(self, event: EditEvent) -> None:
        """Records an edit of the memory, and how many states there are since."""
        self._file.write(json.dumps({"split": "memory", **event.to_dict()}) + "\n")
        self._file.flush()
        self._board.add_scalar("memory/num_active", event.num_active, event.step)

    def write_node_sets(self, step: int, events: list[NodeSetEvent]) -> None:
        """Records who came to the node sets of single examples, and who left, as of a step."""
        for event in events:
            line = {"split": "memory", "step": step, **event.to_dict()}
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._board.close()
