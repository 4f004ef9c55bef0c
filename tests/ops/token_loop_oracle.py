"""From tokens to states written plainly: what is hoisted, then the loop; nothing of the library."""

import hoist_oracle
import segment_loop_oracle as loop_oracle
import torch
from segment_loop_oracle import RAGGED, loss_of

from nsm_graph.ops.segment_loop import token_loop


class Case:
    """Tokens with their projections, and a loop that reads what is made of them."""

    def __init__(
        self, num_states=5, width=6, channels=4, heads=2, *, counts=RAGGED, is_shared=True,
        talks=True, gaps=(0, 2, 1), dtype=torch.float64, **loop_options,
    ):  # fmt: skip
        options = {"is_shared": is_shared, "dtype": dtype}
        self.loop = loop_oracle.make_case(
            num_states, channels, heads, counts=counts, talks=talks, idle=1, **options,
            **loop_options,
        )  # fmt: skip
        steps = range(max(map(len, counts)))
        groups = [row[t] for t in steps for row in counts if t < len(row)]
        self.tokens = hoist_oracle.make_case(
            num_states, width, channels, heads, counts=groups, gaps=gaps, **options
        )

    @property
    def given(self):
        named = {name: x for name, x in self.loop.rows.items() if name in ("states", "cell")}
        named |= {f"loop.{n}": x for n, x in self.loop.weights._asdict().items() if x is not None}
        return named | {f"tokens.{n}": x for n, x in self.tokens.given.items()}

    def run(self, **options):
        options = {"backend": "cpu", "talk_heads": self.loop.talk_heads} | options
        results = token_loop(
            self.loop.rows["states"], self.tokens.x, self.tokens.groups.first, self.tokens.weights,
            self.loop.segments, self.loop.weights, self.loop.heads,
            cell=self.loop.rows.get("cell"), **options,
        )  # fmt: skip
        return tuple(x for x in results if x is not None)

    def oracle(self):
        key, value, routed, weights = hoist_oracle.oracle(self.tokens)
        rows = {"key": key, "value": value, "routed": routed}
        after, final, *cell = loop_oracle.oracle(self.loop.but(**rows))
        num_states, lengths = self.loop.num_states, self.tokens.counts
        parts = weights.split([n * num_states for n in lengths])
        mass = torch.cat([x.view(num_states, -1).sum(1) for x in parts])
        return after, final, mass, *cell


def gradients(case, results, **options):
    found = torch.autograd.grad(
        loss_of(results), list(case.given.values()), allow_unused=True, **options
    )
    pairs = zip(case.given.items(), found, strict=True)
    return {name: torch.zeros_like(x) if grad is None else grad for (name, x), grad in pairs}
