"""Rules that change from step to step: drawn anew, or as a plan says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from nsm_graph.relation import Relation
from nsm_graph.topology.base import Topology, ask, check_examples
from nsm_graph.topology.checks import at_least, check_enough
from nsm_graph.topology.node_set import NodeSet
from nsm_graph.topology.rows import Rows, relation_of_one, tile


def random(degree: int = 4, seed: int = 0) -> Topology:
    r"""Each node from ``degree`` others, drawn anew at every step.

    The draw is a function of the seed, the step and the number of nodes: the same in every
    example, whatever else is in the batch. From one node set to another, each target draws from
    all sources.

    Raises:
        ValueError: When asked, if an example has no more than ``degree`` nodes.

    Example:
        >>> from dataclasses import replace
        >>> rule, nodes = random(2), NodeSet.from_counts([8])
        >>> first, again = rule(nodes), rule(nodes)
        >>> later = rule(replace(nodes, step=1))
        >>> torch.equal(first.edge_index, again.edge_index), later.num_edges
        (True, 16)
    """
    return Random(degree, seed)


def scheduled(at: Mapping[int, Topology] | Callable[[int], Topology]) -> Topology:
    r"""At each step the rule that a plan names.

    Args:
        at: From which step on each rule holds, or a function of the step. Rules that learn must be
            in a mapping, where the machine that holds the schedule finds their parameters.

    Raises:
        ValueError: If nothing holds at step 0, or the function gives no topology.

    Example:
        >>> from nsm_graph.topology import complete, ring
        >>> plan = scheduled({0: complete(), 4: ring(1)})
        >>> plan.at(3), plan.at(4)
        (complete(), ring(1))
    """
    return Scheduled(at)


class Random(Topology):
    is_dynamic = True

    def __init__(self, degree: int, seed: int) -> None:
        super().__init__()
        at_least("random(degree)", "degree", degree, 1)
        self.degree, self.seed = degree, seed

    def forward(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
        is_one_set = targets is None or targets is sources
        targets = sources if targets is None else targets
        check_examples(self, sources, targets)
        check_enough(self, self.degree + int(is_one_set), sources, targets)
        step, device = sources.step, sources.ptr.device

        def one(num_src: int, num_dst: int) -> Relation:
            rows = Rows(torch.zeros(0, dtype=torch.long), self.degree)
            if num_dst > 0:
                rows = self._draw(num_src, num_dst, is_one_set, step)
            return relation_of_one(rows, (num_src, num_dst), device)

        return tile(one, sources.nodes, targets.nodes)

    def _draw(self, num_src: int, num_dst: int, is_one_set: bool, step: int) -> Rows:
        """Without repetition: the r-th draw of n takes n - r instead of what was drawn before."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        num_others = num_src - int(is_one_set)
        drawn = torch.full((num_dst, self.degree), -1, dtype=torch.long)
        for r in range(self.degree):
            last = num_others - self.degree + r
            choice = torch.randint(last + 1, (num_dst, 1), generator=generator)
            is_taken = (drawn == choice).any(1, keepdim=True)
            drawn[:, r : r + 1] = choice.masked_fill(is_taken, last)
        if is_one_set:
            drawn += drawn >= torch.arange(num_dst).unsqueeze(1)  # passes over the node itself
        return Rows(drawn.sort(1).values.flatten(), self.degree)

    def __repr__(self) -> str:
        return f"random({self.degree}, seed={self.seed})"


class Scheduled(Topology):
    is_dynamic = True

    def __init__(self, at: Mapping[int, Topology] | Callable[[int], Topology]) -> None:
        super().__init__()
        self._function = None if isinstance(at, Mapping) else at
        self.starts: list[int] = []
        if isinstance(at, Mapping):
            self.starts = sorted(at)
            if not self.starts or self.starts[0] != 0:
                raise ValueError(
                    f"scheduled needs a rule for step 0, but starts at "
                    f"{self.starts[0] if self.starts else 'no step'}; add 0: ..."
                )
            for start in self.starts:
                self._check(at[start], start)
            self.rules = nn.ModuleList([at[start] for start in self.starts])

    def at(self, step: int) -> Topology:
        """The rule that holds at a step."""
        if self._function is not None:
            return self._check(self._function(step), step)
        place = torch.searchsorted(torch.tensor(self.starts), step, right=True)
        rule = self.rules[max(int(place) - 1, 0)]
        assert isinstance(rule, Topology)
        return rule

    def reset_parameters(self) -> None:
        for start in self.starts:
            self.at(start).reset_parameters()

    def forward(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
        return ask(self.at(sources.step), sources, targets)

    def _check(self, rule: Topology, step: int) -> Topology:
        if not isinstance(rule, Topology):
            raise ValueError(
                f"scheduled needs a topology at step {step}, but got {rule!r}; wrap a function "
                f"with topology.rule"
            )
        return rule

    def __repr__(self) -> str:
        if self._function is not None:
            return f"scheduled({getattr(self._function, '__qualname__', 'at')})"
        shown = zip(self.starts, self.rules, strict=True)
        return f"scheduled({{{', '.join(f'{start}: {rule!r}' for start, rule in shown)}}})"
