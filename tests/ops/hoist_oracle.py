"""What is hoisted written plainly: one token, one head, one state at a time.

A case is a batch of grouped tokens with projections; nothing here is taken from the library.
"""

import math
from dataclasses import dataclass

import pytest
import torch

from nsm_graph.ops.hoist import HoistWeights, TokenGroups, hoist

#: Tokens of each group, in the order of the result.
RAGGED = [4, 3, 1, 7, 2]
#: More than a block holds, a group longer than a block, and blocks that end anywhere.
LONG = [70, 50, 9, 1, 150, 3, 64, 64, 127, 2]
#: States, channels of tokens, channels, heads: one of each, and few multiples of a vector.
SIZES = [(1, 1, 1, 1), (5, 6, 4, 2), (3, 17, 1, 3), (33, 7, 19, 1), (16, 32, 48, 2), (7, 40, 5, 4)]
sizes = pytest.mark.parametrize(("num_states", "width", "channels", "heads"), SIZES)
sharing = pytest.mark.parametrize("is_shared", [True, False], ids=["one", "apart"])
RESULTS = ("key", "value", "routed")


@dataclass
class Case:
    """A batch, the projections, and what belongs to a call."""

    x: torch.Tensor
    weights: HoistWeights  # `value` is None where values are keys
    first: list  # where each group begins among the inputs
    counts: list
    heads: int

    @property
    def groups(self):
        ptr = torch.tensor([0, *self.counts]).cumsum(0)
        return TokenGroups(torch.tensor(self.first, dtype=torch.long), ptr)

    @property
    def given(self):
        """Every tensor that may want a gradient, by name."""
        named = {"x": self.x} | self.weights._asdict()
        return {name: x for name, x in named.items() if x is not None}

    @property
    def is_grouped(self):
        """Of each token, whether it belongs to a group."""
        found = torch.zeros(len(self.x), dtype=torch.bool)
        for first, count in zip(self.first, self.counts, strict=True):
            found[first : first + count] = True
        return found

    def but(self, x=None, **changes):
        """The same case with other tensors."""
        x = self.x if x is None else x
        return Case(x, self.weights._replace(**changes), self.first, self.counts, self.heads)

    def to(self, dtype):
        return self.but(**{n: x.detach().to(dtype).requires_grad_() for n, x in self.given.items()})

    def detached(self, *wanted):
        """The same numbers; only what is named wants a gradient."""
        return self.but(
            **{n: x.detach().clone().requires_grad_(n in wanted) for n, x in self.given.items()}
        )

    def run(self, **options):
        options = {"backend": "cpu"} | options
        return hoist(self.x, self.groups, self.weights, self.heads, **options)


def make_case(
    num_states=5, width=6, channels=4, heads=2, *, counts=RAGGED, gaps=(0, 2, 1), is_shared=False,
    dtype=torch.float64, seed=0,
):  # fmt: skip
    """A case drawn from the seed: groups stand in any order, with gaps between them in turn."""
    generator = torch.Generator().manual_seed(seed)

    def linear(width_out):
        for shape in ((width_out, width), (width_out,)):
            uniform = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
            yield uniform * width**-0.5

    first, end = [0] * len(counts), 0
    for turn, group in enumerate(torch.randperm(len(counts), generator=generator).tolist()):
        first[group] = end + gaps[turn % len(gaps)]
        end = first[group] + counts[group]
    num_tokens = end + gaps[-1]
    x = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    key, value, out = ([*linear(channels)] for _ in range(3))
    logits = [3 * part for part in linear(heads * num_states)]
    value = [None, None] if is_shared else value
    weights = HoistWeights(*key, *value, *logits, *out)
    return Case(x, weights, first, counts, heads).to(dtype)


# The oracle ########################################################################


def route(token, w, heads):
    """The weight of each state for one token: the mean of a softmax for each head."""
    num_states = len(w.logits) // heads
    total = [0.0] * num_states
    for h in range(heads):
        rows = range(h * num_states, (h + 1) * num_states)
        powers = [(w.logits[row] @ token + w.logits_bias[row]).exp() for row in rows]
        mass = sum(powers)
        total = [a + power / mass / heads for a, power in zip(total, powers, strict=True)]
    return total


def oracle(case):
    """Keys, values, projected routed sums, and weights by group, state and token."""
    w, rows = case.weights, case.x.unbind()
    value, value_bias = (w.key, w.key_bias) if w.value is None else (w.value, w.value_bias)
    num_states = len(w.logits) // case.heads
    keys, values, routed, weights = [], [], [], []
    for first, count in zip(case.first, case.counts, strict=True):
        tokens = rows[first : first + count]
        keys += [w.key @ token + w.key_bias for token in tokens]
        values += [value @ token + value_bias for token in tokens]
        shares = [route(token, w, case.heads) for token in tokens]
        for n in range(num_states):
            total = sum(share[n] * token for share, token in zip(shares, tokens, strict=True))
            routed.append(w.out @ total + w.out_bias)
            weights += [share[n] for share in shares]
    return tuple(torch.stack(parts) for parts in (keys, values, routed, weights))


# Comparisons #######################################################################


def loss_of(results, asked=RESULTS):
    """A sum without symmetry, in which errors that add up to nothing cannot hide."""
    total = 0
    for i, (name, x) in enumerate(zip(RESULTS, results[:3], strict=True)):
        if name in asked:
            direction = torch.cos(torch.arange(x.numel(), dtype=torch.float64) + 7 * i)
            total = total + (x * direction.view(x.shape).to(x.dtype)).sum()
    return total


def gradients(results, case, asked=RESULTS, **options):
    """By name; zeros for what the loss does not depend on."""
    given = case.given
    found = torch.autograd.grad(
        loss_of(results, asked), list(given.values()), allow_unused=True, **options
    )
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(given.items(), found, strict=True)
    }


def assert_close(actual, expected, tolerance):
    """By norm. What cancels to nothing, as a logit's gradient may, is held to all the others."""
    whole = math.sqrt(sum(float(x.detach().square().sum()) for x in expected.values()))
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape, name
        error = (actual[name].double() - wanted.double()).norm()
        assert error <= tolerance * max(float(wanted.detach().norm()), 1e-2 * whole), name


def assert_equals_the_oracle(case, tolerance, asked=RESULTS, **options):
    """All four results, and every gradient of a loss on those asked for."""
    results, exact = case.run(**options), case.to(torch.float64)
    wanted = oracle(exact)
    for name, actual, expected in zip(results._fields, results, wanted, strict=True):
        assert actual.dtype == case.x.dtype
        assert_close({name: actual}, {name: expected}, tolerance)
    assert_close(gradients(results, case, asked), gradients(wanted, exact, asked), tolerance)


def assert_same(actual, expected):
    """The same bits, tensor by tensor or by name."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        actual, expected = actual.values(), expected.values()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
