"""The ordered segment scan from its equations: one example, one token, one state at a time.

Reads weights by their names in the state dict and shares no code with the library.
"""

from dataclasses import dataclass

import torch


@dataclass
class ScanOptions:
    """What the scan was built with; the defaults are the scan's."""

    num_states: int
    heads: int = 4
    memory_heads: int = 0
    gated_heads: int | None = 1
    reflections: int = 2
    layers: int = 1
    decay: bool = False
    write: bool = False
    routed: bool = False
    read: str = "mean"

    def shares(self):
        """Transition and memory heads of each layer."""
        transition = self.heads - self.memory_heads - (self.gated_heads or 0)
        each, left = divmod(transition, self.layers)
        shares = [[each + (layer < left), 0] for layer in range(self.layers)]
        shares[-1][1] = self.memory_heads
        return shares


def affine(w, name, x):
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def gate(z):
    return (2 / (1 + torch.exp(-z)) - 0.5).clamp(0, 1)


def unit(v):
    length = v.square().sum().sqrt()
    return v / length if length > 0 else v * 0.0


def layer_norm(w, name, x):
    centred = x - x.mean()
    return (
        centred / (centred.square().mean() + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
    )


def convolve(w, x, tail=None, name="convolution.lin"):
    """Every token, knowing the one before, where there is a convolution."""
    if f"{name}.weight" not in w:
        return list(x)
    before = torch.zeros_like(x[0]) if tail is None else tail
    rows = []
    for token in x:
        rows.append(token + affine(w, name, torch.cat([before, token])))
        before = token
    return rows


def read_example(w, o, x, s, slots, weights=None, tail=None):
    """Tokens [L, C_t] of one example into its states [N, C]: the states, reads [L, C_t]."""
    if len(x) == 0:
        return s, x
    return read_convolved(w, o, convolve(w, x, tail), s, slots, weights)


def read_convolved(w, o, tokens, s, slots, weights=None):
    width = s.size(1) // o.heads
    columns = s.split(width, dim=1)  # one [N, D] for each head
    heads = [list(column) for column in columns]  # heads[h][j] is [D]
    normed = [[] for _ in tokens]
    first = 0
    for layer, (transition, memory) in enumerate(o.shares()):
        if layer > 0:
            tokens = [
                x + mix(w, layer - 1, x, read[-1]) for x, read in zip(tokens, normed, strict=True)
            ]
        for i, x in enumerate(tokens):
            row = None if weights is None else weights[i]
            name = f"layers.{layer}"
            reads = []
            if transition > 0:
                own = heads[first : first + transition]
                reads += compose(w, o, f"{name}.transition", x, own, row)
            if memory > 0:
                own = heads[first + transition : first + transition + memory]
                reads += recall(w, o, f"{name}.memory", x, own, slots)
            normed[i].append(layer_norm(w, f"norms.{layer}", torch.cat(reads)))
        first += transition + memory
    outs = [affine(w, "lin_read", torch.cat(read)) for read in normed]
    if o.layers > 1:
        outs = [
            out + mix(w, o.layers - 1, x, read[-1])
            for out, x, read in zip(outs, tokens, normed, strict=True)
        ]
    states = torch.cat([torch.stack(column) if column else s[:, :0] for column in heads], 1)
    return (states if len(s) else s), torch.stack(outs)


def mix(w, layer, x, read):
    hidden = affine(w, f"mixers.{layer}.0", torch.cat([x, read])).clamp(min=0)
    return affine(w, f"mixers.{layer}.2", hidden)


def compose(w, o, name, x, heads, weights):
    """One token to transition heads, changed in place: what it reads of each."""
    reads = []
    for h, states in enumerate(heads):
        width = w[f"{name}.lin_key.weight"].size(0) // (len(heads) * o.reflections)
        keys = affine(w, f"{name}.lin_key", x)
        betas = 2 * gate(affine(w, f"{name}.lin_beta", x))
        for r in range(o.reflections):
            place = h * o.reflections + r
            k, beta = unit(keys[place * width : (place + 1) * width]), betas[place]
            for j, s in enumerate(states):
                share = weights[j] if o.routed else 1.0
                states[j] = s - share * beta * (k @ s) * k
        for j in range(len(states)):
            if o.decay:
                states[j] = gate(affine(w, f"{name}.lin_decay", x)[h]) * states[j]
            if o.write:
                value = affine(w, f"{name}.lin_value", x)[h * width : (h + 1) * width]
                gamma = gate(affine(w, f"{name}.lin_write", x)[h])
                states[j] = states[j] + gamma * weights[j] * value
        total = x.new_zeros(width)
        for j, s in enumerate(states):
            total = total + (weights[j] if o.read == "routed" else 1 / len(states)) * s
        reads.append(total)
    return reads


def recall(w, o, name, x, heads, slots):
    """One token to memory heads, changed in place: what it reads of each."""
    reads = []
    for h, states in enumerate(heads):
        width = w[f"{name}.lin_value.weight"].size(0) // len(heads)
        rows = [slot * len(heads) + h for slot in slots]
        k = unit(affine(w, f"{name}.lin_key", x)[rows])
        q = unit(affine(w, f"{name}.lin_query", x)[rows])
        v = affine(w, f"{name}.lin_value", x)[h * width : (h + 1) * width]
        beta = gate(affine(w, f"{name}.lin_beta", x)[h])
        held = sum((k[j] * s for j, s in enumerate(states)), x.new_zeros(width))
        for j, s in enumerate(states):
            states[j] = s + beta * k[j] * (v - held)
        reads.append(sum((q[j] * s for j, s in enumerate(states)), x.new_zeros(width)))
    return reads
