"""The loop's scan written plainly: one example, one token, one state at a time.

A case is one of the token loop's with a scan; nothing here is taken from the library. What a token
is projected to is read in the order that `Layout` documents.
"""

from dataclasses import asdict, dataclass

import hoist_oracle
import segment_loop_oracle as loop_oracle
import token_loop_oracle
import torch

from nsm_graph.ops.delta_scan.cpu.arrays import make_layout
from nsm_graph.ops.segment_loop import LoopScan

TENSORS = LoopScan._fields[:6]
RESULTS = ("after", "final", "mass", "cell", "reads")


@dataclass
class Heads:
    """What heads a scan has, as `make_layout` is told."""

    num_states: int
    transition: int = 1
    memory: int = 1
    reflections: int = 2
    width: int = 2
    decays: bool = True
    writes: bool = True
    reads: int = 2

    @property
    def sizes(self):
        """How many numbers of a token there are of each kind, in the order of the layout."""
        heads, held = self.transition, self.memory
        return {
            "key": heads * self.reflections * self.width,
            "memory_key": held * self.num_states,
            "query": held * self.num_states,
            "value": self.writes * heads * self.width,
            "memory_value": held * self.width,
            "beta": heads * self.reflections,
            "decay": self.decays * heads,
            "write": self.writes * heads,
            "memory_beta": held,
        }


class Case(token_loop_oracle.Case):
    """Tokens that act on states one after another before a step reads them.

    Options of the heads, of the scan (a convolution, a tail, the stretch of gates) and of the loop.
    """

    def __init__(self, num_states=5, width=6, channels=8, *, heads=2, convolution=True, tail=True,
                 stretch=0.5, scale=1.0, dtype=torch.float64, scan=None, **options):  # fmt: skip
        super().__init__(num_states, width, channels, heads, dtype=dtype, **options)
        self.heads = Heads(num_states, **(scan or {}))
        generator = torch.Generator().manual_seed(3)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        x, num_columns = self.tokens.x, sum(self.heads.sizes.values())
        num_examples = len(self.loop.rows["states"]) // num_states
        tensors = {
            "x": normal(*x.shape),
            "weight": scale * normal(num_columns, width) * width**-0.5,
            "bias": 0.5 * normal(num_columns),
            "convolution": 0.5 * normal(width, 2 * width) * width**-0.5 if convolution else None,
            "convolution_bias": 0.5 * normal(width) if convolution else None,
            "tail": normal(num_examples, width) if tail else None,
        }
        layout = make_layout(**asdict(self.heads))
        self.scan = LoopScan(**tensors, layout=layout, stretch=stretch)
        self.change(dtype, **tensors)

    def change(self, dtype=None, **tensors):
        """Gives the scan other tensors."""
        dtype = dtype or self.scan.x.dtype
        leaves = {
            name: None if x is None else x.detach().to(dtype).requires_grad_()
            for name, x in tensors.items()
        }
        self.scan = self.scan._replace(**leaves)
        return self

    @property
    def given(self):
        tensors = {name: getattr(self.scan, name) for name in TENSORS}
        return super().given | {f"scan.{n}": x for n, x in tensors.items() if x is not None}

    def run(self, **options):
        return super().run(scan=self.scan, **options)

    def oracle(self):
        key, value, routed, weights = hoist_oracle.oracle(self.tokens)
        num_states, lengths = self.loop.num_states, self.tokens.counts
        shares = [
            part.view(num_states, -1) for part in weights.split([n * num_states for n in lengths])
        ]
        tail = self.scan.tail
        last = torch.zeros(len(self.loop.counts) + 1, self.scan.x.size(1)).to(self.scan.x)
        last = list(last if tail is None else tail)
        reads = []

        def read_first(states, group, example):
            first = self.tokens.first[group]
            for i in range(lengths[group]):
                token = self.scan.x[first + i]
                numbers = project(self.scan, self.heads, token, last[example])
                last[example] = token
                states, read = take(self.heads, states, numbers, shares[group][:, i])
                reads.append(read)
            return states

        loop = self.loop.but(key=key, value=value, routed=routed)
        after, final, *cell = loop_oracle.oracle(loop, read_first)
        mass = torch.cat([share.sum(1) for share in shares])
        read = [torch.stack(reads)] if self.heads.reads > 0 else []
        return after, final, mass, *cell, *read

    @property
    def names(self):
        """Of the results."""
        left_out = {"cell"} - set(self.loop.rows) | ({"reads"} if self.heads.reads == 0 else set())
        return [name for name in RESULTS if name not in left_out]


# A token ###########################################################################


def hard(z, stretch):
    """A gate that overshoots 0 and 1, and is cut off there."""
    return ((1 + 2 * stretch) * loop_oracle.sigmoid(z) - stretch).clamp(0, 1)


def unit(v):
    length = v.square().sum().sqrt()
    return v / length if length > 0 else 0 * v


def project(scan, heads, token, before):
    """What a token does, by the name of its part: keys and queries of norm 1, gates."""
    x = token
    if scan.convolution is not None:
        x = x + scan.convolution @ torch.cat([before, token]) + scan.convolution_bias
    numbers = (scan.weight @ x + scan.bias).split(list(heads.sizes.values()))
    found = dict(zip(heads.sizes, numbers, strict=True))
    for name in ("key", "value", "memory_value"):
        found[name] = found[name].split(heads.width) if len(found[name]) > 0 else ()
    for name in ("memory_key", "query"):
        found[name] = found[name].split(heads.num_states) if len(found[name]) > 0 else ()
    for name in ("key", "memory_key", "query"):
        found[name] = [unit(v) for v in found[name]]
    for name in ("beta", "decay", "write", "memory_beta"):
        found[name] = hard(found[name], scan.stretch)
    return found


def take(heads, states, numbers, shares):
    """The states after a token, and what it reads of all heads."""
    width, end = heads.width, (heads.transition + heads.memory) * heads.width
    columns, reads = [], []
    for h in range(heads.transition + heads.memory):
        own = [state[h * width : (h + 1) * width] for state in states]
        if h < heads.transition:
            own, read = compose(heads, h, own, numbers, shares)
        else:
            own, read = recall(heads, h - heads.transition, own, numbers)
        columns.append(torch.stack(own))
        reads.append(read)
    return torch.cat([*columns, states[:, end:]], 1), torch.cat(reads)


def compose(heads, h, states, numbers, shares):
    """Reflects, decays and writes each state of a transition head."""
    for r in range(heads.reflections):
        place = h * heads.reflections + r
        k, beta = numbers["key"][place], 2 * numbers["beta"][place]
        states = [s - beta * (k @ s) * k for s in states]
    if heads.decays:
        states = [numbers["decay"][h] * s for s in states]
    if heads.writes:
        written = numbers["write"][h] * numbers["value"][h]
        states = [s + share * written for s, share in zip(states, shares, strict=True)]
    if heads.reads == 1:
        shares = [1 / heads.num_states] * heads.num_states
    return states, sum(share * s for share, s in zip(shares, states, strict=True))


def recall(heads, h, states, numbers):
    """Holds a value under a key, which has a number for each state, as the query has."""
    k, q = numbers["memory_key"][h], numbers["query"][h]
    error = numbers["memory_value"][h] - sum(k[n] * s for n, s in enumerate(states))
    states = [s + numbers["memory_beta"][h] * k[n] * error for n, s in enumerate(states)]
    return states, sum(q[n] * s for n, s in enumerate(states))
