"""How a ragged batch is cut into segments: the order in which the machine reads tokens.

Examples are sorted by number of segments, longest first, so that those still active at step t are a
prefix. Tokens are reordered step by step, so that each step reads one contiguous slice; a *group*
is one segment of one example.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsm_graph.ops.hoist import TokenGroups
from nsm_graph.partition import Partition
from nsm_graph.relation import Relation


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """The reading order of a batch of B examples with N states each.

    Args:
        token_order: ``[T]``, which input token stands at each place of the reading order.
        example_order: ``[B]``, which example stands at each rank.
        place: ``[T]``, index of each input token inside its segment.
        index: ``[T]``, index of each input token inside its example.
        groups: Where the tokens of each group begin, among the inputs and in reading order.
        full_length: How many tokens every segment has; ``None`` where they differ.
        relation: All segments at once: tokens -> (group, state), for what is hoisted.
        steps: What each step of the loop reads: its tokens -> the states of the first examples.
    """

    token_order: Tensor
    example_order: Tensor
    place: Tensor
    index: Tensor
    groups: TokenGroups
    full_length: int | None
    relation: Relation
    steps: list[Relation]

    @property
    def group_example(self) -> Tensor:
        """``[G]``, the example (not the rank) of each group."""
        ranks = [self.example_order[: step.num_examples] for step in self.steps]
        return torch.cat(ranks) if ranks else self.example_order[:0]


def plan_segments(
    counts: list[int], segment_length: int, num_states: int, device: torch.device
) -> SegmentPlan:
    """Cuts examples of the given token counts into segments.

    Runs on the host: the counts are Python numbers, and only finished index tensors go to the
    device.
    """
    count = torch.tensor(counts, dtype=torch.long)
    num_segments = (count + segment_length - 1) // segment_length
    example_order = torch.argsort(num_segments, descending=True, stable=True)
    sorted_count, sorted_segments = count[example_order], num_segments[example_order]
    num_steps = int(sorted_segments[0]) if counts else 0

    step_index = torch.arange(num_steps).unsqueeze(1)
    is_active = sorted_segments > step_index  # [steps, B], a prefix of each row
    group_count = (sorted_count - step_index * segment_length).clamp(0, segment_length)[is_active]
    group_rank = torch.arange(len(counts)).expand(num_steps, -1)[is_active]
    group_step = step_index.expand(-1, len(counts))[is_active]

    num_tokens = sum(counts)
    group_ptr = torch.cat([group_count.new_zeros(1), group_count.cumsum(0)])
    first_token = count.cumsum(0) - count
    first = first_token[example_order][group_rank] + group_step * segment_length
    group_of = torch.repeat_interleave(group_count, output_size=num_tokens)
    token_order = torch.arange(num_tokens) + (first - group_ptr[:-1])[group_of]
    index = torch.arange(num_tokens) - torch.repeat_interleave(first_token, count)
    is_full = bool((count % segment_length == 0).all())

    groups = Partition.from_counts(group_count).to(device)
    states = Partition.uniform(group_count.numel(), num_states, device)
    return SegmentPlan(
        token_order.to(device),
        example_order.to(device),
        (index % segment_length).to(device),
        index.to(device),
        TokenGroups(first, group_ptr),
        segment_length if is_full else None,
        Relation.between(groups, states),
        _make_steps(group_count, is_active.sum(1).tolist(), segment_length, num_states, device),
    )


def _make_steps(
    group_count: Tensor,
    num_active: list[int],
    segment_length: int,
    num_states: int,
    device: torch.device,
) -> list[Relation]:
    steps: list[Relation] = []
    full_steps: dict[int, Relation] = {}  # steps of as many full segments share one relation
    for count in group_count.split(num_active):
        num_examples = count.numel()
        is_full = int(count.min()) == segment_length
        step = full_steps.get(num_examples) if is_full else None
        if step is None:
            states = Partition.uniform(num_examples, num_states, device)
            step = Relation.between(Partition.from_counts(count).to(device), states)
            if is_full:
                full_steps[num_examples] = step
        steps.append(step)
    return steps
