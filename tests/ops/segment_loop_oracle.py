"""The loop over segments written plainly: one example, one head at a time, one matrix at a time.

A case is a batch with the weights of a cell; nothing here is taken from the library.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from nsm_graph.ops.segment_loop import LoopSegments, LoopWeights, segment_loop

ROWS = ("states", "routed", "key", "value")
#: Tokens that each example reads in each step, longest example first.
RAGGED = [[4, 3, 4, 1], [4, 4, 2], [1, 5], [4, 4], [3]]
#: More examples than threads, so that threads take turns, and rows that fill no tile.
CROWD = [[4, 3, 4, 1]] * 3 + [[4, 5, 2]] * 9 + [[2, 5]] * 7 + [[3]] * 4
#: States, channels and heads: one of each, and none that is a multiple of a vector.
SIZES = [(1, 1, 1), (5, 4, 4), (5, 6, 2), (1, 14, 2), (33, 32, 2), (33, 20, 1), (5, 40, 2)]
sizes = pytest.mark.parametrize(("num_states", "channels", "heads"), SIZES)
keeps = pytest.mark.parametrize("keep", [True, False])
#: Which results a loss reads: the states after every step, the final ones, or both.
asks = pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)], ids=["after", "final", "both"])
sharing = pytest.mark.parametrize("is_shared", [True, False], ids=["one", "apart"])
talking = pytest.mark.parametrize("talks", [True, False], ids=["talk", "silent"])


@dataclass
class Case:
    """A batch, the weights of a cell, and what belongs to a call."""

    rows: dict  # states, routed, key, value, an LSTM's cell by name; value may be the very key
    weights: LoopWeights
    counts: list
    num_states: int
    heads: int
    talk_heads: int | None = None  # of communication; None for as many

    @property
    def segments(self):
        steps = range(max(map(len, self.counts), default=0))
        groups = [row[t] for t in steps for row in self.counts if t < len(row)]
        return LoopSegments(
            torch.tensor([0, *groups]).cumsum(0),
            torch.tensor([sum(t < len(row) for row in self.counts) for t in steps]).long(),
        )

    @property
    def given(self):
        """Every tensor that may want a gradient, by name, each once."""
        named = dict(self.rows) | self.weights._asdict()
        if self.rows["value"] is self.rows["key"]:
            del named["value"]
        return {name: x for name, x in named.items() if x is not None}

    def but(self, **changes):
        """The same case with other tensors; a shared value follows its key."""
        if self.rows["value"] is self.rows["key"] and "key" in changes:
            changes.setdefault("value", changes["key"])
        rows = {name: changes.get(name, x) for name, x in self.rows.items()}
        weights = {name: changes.get(name, x) for name, x in self.weights._asdict().items()}
        return replace(self, rows=rows, weights=LoopWeights(**weights))

    def to(self, dtype):
        return self.but(**{n: x.detach().to(dtype).requires_grad_() for n, x in self.given.items()})

    def detached(self, *wanted):
        """The same numbers; only what is named wants a gradient."""
        return self.but(
            **{n: x.detach().clone().requires_grad_(n in wanted) for n, x in self.given.items()}
        )

    def run(self, **options):
        """The states after every step, and after the last one of each example; its last cell."""
        options = {"backend": "cpu", "talk_heads": self.talk_heads} | options
        return segment_loop(
            **self.rows, segments=self.segments, weights=self.weights, heads=self.heads, **options
        )


def make_case(
    num_states=5, channels=6, heads=2, *, counts=RAGGED, talks=True, is_shared=True, idle=1,
    dtype=torch.float64, seed=0, is_lstm=False, kept=0, talk_heads=None,
):  # fmt: skip
    """A case drawn from the seed, with parameters of the sizes that layers start with.

    The first ``kept`` of the channels are written by no step.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def linear(width_in, width_out):
        bound = width_in**-0.5
        for shape in ((width_out, width_in), (width_out,)):
            yield (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * bound

    gated = channels - kept
    num_groups, num_tokens = sum(map(len, counts)), sum(map(sum, counts))
    rows = {
        "states": normal((len(counts) + idle) * num_states, channels),
        "routed": normal(num_groups * num_states, channels),
        "key": normal(num_tokens, channels),
    }
    rows["value"] = rows["key"] if is_shared else normal(num_tokens, channels)
    weights = [*linear(channels, channels), *linear(channels, channels)]
    if is_lstm:
        rows["cell"] = normal(len(rows["states"]), gated)
        weights += [*linear(2 * channels, 4 * gated), None, None]
    else:
        weights += [*linear(2 * channels, 2 * gated), *linear(2 * channels, gated)]
    talk = [
        *linear(gated, 3 * gated), *linear(gated, gated),
        1 + 0.3 * normal(gated), 0.3 * normal(gated),
    ]  # fmt: skip
    weights = LoopWeights(*weights, *(talk if talks else [None] * 6))
    return Case(rows, weights, counts, num_states, heads, talk_heads).to(dtype)


# The oracle ########################################################################


def attend(query, key, value, heads):
    """Softmax over keys, head by head."""
    width, outs = query.size(1) // heads, []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        powers = (query[:, part] @ key[:, part].T / math.sqrt(width)).exp()
        outs.append(powers / powers.sum(1, keepdim=True) @ value[:, part])
    return torch.cat(outs, 1)


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def read_segment(w, s, routed, key, value, heads, talk_heads, cell):
    """The new states of one example, and its new cell."""
    update = routed + attend(s @ w.query.T + w.query_bias, key, value, heads) @ w.out.T + w.out_bias
    gated = w.gates.size(0) // (2 if cell is None else 4)
    kept, s = s[:, :-gated], s[:, -gated:]
    gates = torch.cat([s, update, kept], 1) @ w.gates.T + w.gates_bias
    if cell is None:
        reset, mix = sigmoid(gates).chunk(2, 1)
        candidate = torch.cat([reset * s, update, kept], 1) @ w.candidate.T + w.candidate_bias
        s = (1 - mix) * s + mix * candidate.tanh()
    else:
        i, f, o, g = gates.chunk(4, 1)
        cell = sigmoid(f) * cell + sigmoid(i) * g.tanh()
        s = sigmoid(o) * cell.tanh()
    if w.qkv is None:
        return torch.cat([kept, s], 1), cell
    q, k, v = (s @ w.qkv.T + w.qkv_bias).chunk(3, 1)
    s = s + attend(q, k, v, talk_heads) @ w.mix.T + w.mix_bias
    centred = s - s.mean(1, keepdim=True)
    s = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * w.scale + w.shift
    return torch.cat([kept, s], 1), cell


def oracle(case, read_first=None):
    """The states after every step, from those of each example alone, and the last ones of each.

    Where given, ``read_first`` makes of an example's states and its group those that a step reads.
    """
    ptr, num_states = case.segments.token_ptr.tolist(), case.num_states
    talk_heads = case.heads if case.talk_heads is None else case.talk_heads
    after, group = {}, 0
    final = list(case.rows["states"].split(num_states))
    is_lstm = "cell" in case.rows
    cells = list(case.rows["cell"].split(num_states)) if is_lstm else [None] * len(final)
    for t in range(max(map(len, case.counts), default=0)):
        for b, row in enumerate(case.counts):
            if t >= len(row):
                continue
            mine = slice(group * num_states, (group + 1) * num_states)
            tokens = slice(ptr[group], ptr[group + 1])
            found = final[b] if read_first is None else read_first(final[b], group, b)
            final[b], cells[b] = read_segment(
                case.weights, found, case.rows["routed"][mine], case.rows["key"][tokens],
                case.rows["value"][tokens], case.heads, talk_heads, cells[b],
            )  # fmt: skip
            after[b, t] = final[b]
            group += 1
    results = torch.cat(list(after.values())), torch.cat(final)
    return (*results, torch.cat(cells)) if is_lstm else results


# Comparisons #######################################################################


def loss_of(results, last=None):
    """A sum without symmetry, in which errors that add up to nothing cannot hide.

    Of the last rows only, where asked.
    """
    total = 0
    for i, x in enumerate(results):
        direction = torch.cos(torch.arange(x.numel(), dtype=torch.float64) + 7 * i).view(x.shape)
        rows = slice(0 if last is None else -last, None)
        total = total + (x[rows] * direction[rows].to(x)).sum()
    return total


def gradients_of(results, *tensors, **options):
    return torch.autograd.grad(loss_of(results), tensors, **options)


def gradients(results, case, last=None):
    """Of the loss of these results, by name; zeros for what they do not depend on."""
    found = torch.autograd.grad(
        loss_of(results, last), list(case.given.values()), allow_unused=True
    )
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(case.given.items(), found, strict=True)
    }


def assert_close(actual, expected, tolerance):
    """By norm. What cancels to nothing, as a score's gradient may, is held to all the others."""
    whole = torch.cat([x.flatten() for x in expected.values()]).norm()
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape, name
        error = (actual[name].double() - wanted.double()).norm()
        assert error <= tolerance * max(wanted.norm(), 1e-3 * whole), name


def assert_equals_the_oracle(case, tolerance, asked=None, last=None, **options):
    """All results, and every gradient of a loss on those asked for; on all if None."""
    results, exact = case.run(**options), case.to(torch.float64)
    wanted = oracle(exact)
    assert len(results) == len(wanted)
    for name, found, expected in zip(("after", "final", "cell"), results, wanted, strict=False):
        assert_close({name: found}, {name: expected}, tolerance)
    asked = range(len(results)) if asked is None else asked
    results, wanted = [[pair[i] for i in asked] for pair in (results, wanted)]
    assert_close(gradients(results, case, last), gradients(wanted, exact, last), tolerance)


def assert_same(actual, expected):
    """The same bits, tensor by tensor or by name."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        actual, expected = actual.values(), expected.values()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
