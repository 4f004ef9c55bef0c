"""Evaluation on sequences of any length, piece by piece, in memory that does not grow with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric.wrappers import _FabricModule as Engine
from torch import Tensor

from nsm_graph.data.sequences import TEST_SEED
from nsm_graph.data.tasks import IGNORED, SequenceTask
from nsm_graph.training.node_sets import NodeSetSizes

#: Tokens of each sequence that one call reads; a multiple of the segment length is taken.
PIECE = 1024

#: Lengths at which a range of lengths is looked at.
NUM_LENGTHS = 10


@dataclass(frozen=True)
class StreamTest:
    """What to evaluate on.

    Args:
        task: The task.
        length: Tokens of each sequence.
        num_examples: Number of sequences.
        segment_length: Tokens that the machine reads at a time; ``None`` for what it was built for.
    """

    task: SequenceTask
    length: int
    num_examples: int
    segment_length: int | None = None


def spread_lengths(task: SequenceTask, shortest: int, longest: int) -> list[int]:
    """Up to :data:`NUM_LENGTHS` lengths that the task has, evenly from one to another."""
    # The nearest length that a task has is not above the one asked for; the range is kept.
    first = next(n for n in range(shortest, longest + 2) if task.valid_length(n) >= shortest)
    steps = NUM_LENGTHS - 1
    evenly = [first + (longest - first) * step // steps for step in range(NUM_LENGTHS)]
    return sorted({task.valid_length(length) for length in evenly})


@torch.no_grad()
def evaluate_stream(
    engine: Engine, test: StreamTest, *, built_for: int | None, carries: bool
) -> dict[str, float]:
    """Accuracy of all answers, of the last one, and of whole sequences.

    ``scaled_...`` is zero at chance and one where all is right. A model that carries no state from
    call to call reads whole sequences at once.

    Args:
        engine: The model.
        test: What to evaluate on.
        built_for: The segment length that the model was built for; ``None`` for a baseline.
        carries: Whether the model carries a state from call to call.
    """
    was_training = engine.training
    engine.eval()
    count = _Count(test.num_examples)
    has_node_sets = getattr(getattr(engine, "cell", None), "allocator", None) is not None
    segment = test.segment_length or built_for or 1
    piece = max(1, PIECE // segment) * segment if carries else test.length
    generator = torch.Generator().manual_seed(TEST_SEED)
    options: dict[str, Any] = {}
    if test.segment_length is not None:
        options["segment_length"] = test.segment_length
    state, read = None, []
    for x, y in test.task.stream(test.num_examples, test.length, generator, piece):
        x, y = x.to(engine.device), y.to(engine.device)
        batch = torch.arange(x.size(0), device=x.device).repeat_interleave(x.size(1))
        output = engine.run(x.flatten(0, 1), batch, batch_size=x.size(0), state=state, **options)
        state = output.state
        count.add(output.out.argmax(-1).view_as(y), y)
        if has_node_sets:
            read.append(x)
    engine.train(was_training)
    sizes = NodeSetSizes()
    if has_node_sets:
        sizes.observe(state, test.task, torch.cat(read, 1))
    return count.metrics(test.task.chance) | sizes.metrics()


class _Count:
    """Hits so far, sequence by sequence."""

    def __init__(self, num_examples: int) -> None:
        self.hits = self.answers = 0
        self.is_whole = torch.ones(num_examples, dtype=torch.bool)
        self.is_last_right = torch.zeros(num_examples, dtype=torch.bool)

    def add(self, predicted: Tensor, y: Tensor) -> None:
        is_asked, is_right = y != IGNORED, predicted == y
        self.hits += int((is_asked & is_right).sum())
        self.answers += int(is_asked.sum())
        self.is_whole &= (is_right | ~is_asked).all(1).cpu()
        # The last answer of each sequence so far: in this piece, if it has one.
        place = torch.arange(y.size(1), device=y.device)
        last = torch.where(is_asked, place, -1).amax(1)
        right = is_right.gather(1, last.clamp(min=0).unsqueeze(1)).squeeze(1)
        self.is_last_right = torch.where(last.cpu() >= 0, right.cpu(), self.is_last_right)

    def metrics(self, chance: float) -> dict[str, float]:
        accuracy = self.hits / max(self.answers, 1)
        final = self.is_last_right.double().mean().item()
        return {
            "accuracy": accuracy,
            "final_accuracy": final,
            "full_sequence_accuracy": self.is_whole.double().mean().item(),
            "scaled_accuracy": (accuracy - chance) / (1 - chance),
            "scaled_final_accuracy": (final - chance) / (1 - chance),
        }
