"""The whole machine from its documented equations: one example, one segment, one token at a time.

Reads weights by their names in the state dict and shares no code with the library. `w` maps names
to tensors (parameters, so that gradients can be compared), everything else is plain torch.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Options:
    """What the machine was built with; the defaults are the machine's."""

    num_slots: int
    heads: int = 2
    segment_length: int | None = 3
    cell: str = "gru"
    mix: str = "sum"
    communication: bool = True
    pool: str = "mean"
    head: str = "example"
    position: str | None = None
    top_k: int | None = None
    routing_reduce: str = "sum"
    num_steps: int = 1
    slots: tuple[int, ...] | None = None


def weights_of(machine):
    return dict(machine.named_parameters())


def affine(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(query, key, value, heads, allowed=None, bias=None):
    """[n, C] queries to [l, C] keys head by head; a row without an allowed key gives zeros."""
    width, outs = query.size(1) // heads, []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        rows = []
        for j in range(query.size(0)):
            keys = [i for i in range(key.size(0)) if allowed is None or allowed[i, j]]
            if not keys:
                rows.append(value.new_zeros(width))
                continue
            scores = [query[j, part] @ key[i, part] / math.sqrt(width) for i in keys]
            if bias is not None:
                scores = [score + bias[i, j, h] for score, i in zip(scores, keys, strict=True)]
            a = torch.stack(scores).softmax(0)
            rows.append(sum(a[n] * value[i, part] for n, i in enumerate(keys)))
        outs.append(torch.stack(rows))
    return torch.cat(outs, 1)


def routing(w, o, x, slots):
    """Weights [l, n] of the tokens of one segment, and which edges `top_k` keeps."""
    weight, bias = w["cell.router.lin_logits.weight"], w["cell.router.lin_logits.bias"]
    iota = w["manager.importance"]
    rows = []
    for x_i in x:
        per_head = []
        for h in range(o.heads):
            row = [
                weight[m * o.heads + h] @ x_i + bias[m * o.heads + h] + F.logsigmoid(iota[m])
                for m in slots
            ]
            per_head.append(torch.stack(row).softmax(0))
        rows.append(sum(per_head) / o.heads)
    weights = torch.stack(rows)
    kept = torch.ones_like(weights, dtype=torch.bool)
    if o.top_k is not None:
        kept = torch.zeros_like(kept)
        for i, row in enumerate(weights.tolist()):
            kept[i, sorted(range(len(row)), key=lambda j: (-row[j], j))[: o.top_k]] = True
        weights = weights * kept
        weights = weights / weights.sum(1, keepdim=True)
    return weights, kept


def rotate(key, heads):
    """Turns pairs of channels of each head by place times frequency."""
    width = key.size(1) // heads
    out = []
    for place, row in enumerate(key):
        parts = []
        for h in range(heads):
            for c in range(width // 2):
                angle = place * 10_000 ** (-2 * c / width)
                a, b = row[h * width + 2 * c], row[h * width + 2 * c + 1]
                parts.append(a * math.cos(angle) - b * math.sin(angle))
                parts.append(a * math.sin(angle) + b * math.cos(angle))
        out.append(torch.stack(parts))
    return torch.stack(out)


def propagate(w, o, s, c, u):
    both = torch.cat([s, u], 1)
    gates = affine(w, "cell.propagator.lin_gates", both)
    if o.cell == "gru":
        r, z = gates.sigmoid().chunk(2, 1)
        candidate = affine(w, "cell.propagator.lin_candidate", torch.cat([r * s, u], 1)).tanh()
        return (1 - z) * s + z * candidate, None
    i, f, out, g = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return out.sigmoid() * c.tanh(), c


def communicate(w, o, s):
    query, key, value = affine(w, "cell.communication.lin_qkv", s).chunk(3, 1)
    read = attend(query, key, value, o.heads)
    return norm(w, "cell.communication.norm", s + affine(w, "cell.communication.lin_out", read))


def read_segment(w, o, x, s, c, slots):
    """One call of the cell on the tokens [l, C_t] of one example."""
    allowed = bias = routed = None
    if o.mix != "attention":
        weights, allowed = routing(w, o, x, slots)
        if o.mix == "bias":
            bias = weights.clamp(min=1e-300).log().unsqueeze(2).expand(-1, -1, o.heads)
        else:
            routed = weights.T @ x
            if o.routing_reduce == "mean":
                routed = routed / len(x)
            routed = affine(w, "cell.router.lin_out", routed)
    u = routed
    if o.mix != "routing":
        key = value = affine(w, "cell.attention.lin_token", x)
        if "cell.attention.lin_value.weight" in w:
            value = affine(w, "cell.attention.lin_value", x)
        if o.position == "rotary":
            key = rotate(key, o.heads)
        if o.position == "relative":
            table = w["cell.relative.table"][: len(x)].unsqueeze(1).expand(-1, len(s), -1)
            bias = table if bias is None else bias + table
        query = affine(w, "cell.attention.lin_query", s)
        attended = affine(
            w, "cell.attention.lin_out", attend(query, key, value, o.heads, allowed, bias)
        )
        u = attended if u is None else u + attended
    new, new_c = propagate(w, o, s, c, u)
    if allowed is not None:  # a state that no edge enters keeps its value
        is_fed = allowed.any(0).unsqueeze(1)
        new = torch.where(is_fed, new, s)
        new_c = None if new_c is None else torch.where(is_fed, new_c, c)
    if o.communication:
        new = communicate(w, o, new)
    return new, new_c


def embed(w, x):
    if "embedding.lin.weight" in w:
        return affine(w, "embedding.lin", x)
    columns = x.view(len(x), -1)
    return sum(w[f"embedding.tables.{k}.weight"][columns[:, k]] for k in range(columns.size(1)))


def sines(index, channels):
    row = []
    for c in range(channels):
        angle = index * 10_000 ** (-2 * (c // 2) / channels)
        row.append(math.cos(angle) if c % 2 else math.sin(angle))
    return torch.tensor(row, dtype=torch.float64)


def read_tokens(w, o, x, s):
    """The head of token predictions: [l, C_t] and states to [l, out]."""
    key, value = affine(w, "head.readout.lin_state", s).chunk(2, 1)
    read = attend(affine(w, "head.readout.lin_query", x), key, value, o.heads)
    return affine(
        w,
        "head.lin_out",
        norm(w, "head.norm", x + affine(w, "head.readout.lin_out", read)),
    )


def read_example(w, o, x, s=None, c=None, offset=0):
    """One example [L, C_in]: prediction, final states and LSTM cells."""
    slots = list(range(o.num_slots)) if o.slots is None else list(o.slots)
    s = w["manager.bank"][slots] if s is None else s
    c = torch.zeros_like(s) if c is None and o.cell == "lstm" else c
    tokens, outs = embed(w, x), []
    segments = list(tokens.split(o.segment_length)) if len(x) else []
    for number, segment in enumerate(segments):
        if o.position == "learned":
            segment = segment + w["position.table"][: len(segment)]
        if o.position == "sinusoidal":
            first = offset + number * o.segment_length
            waves = [sines(first + i, segment.size(1)) for i in range(len(segment))]
            segment = segment + torch.stack(waves)
        before = s
        s, c = read_segment(w, o, segment, s, c, slots)
        if o.head != "example":
            outs.append(read_tokens(w, o, segment, before if o.head == "next_token" else s))
    if o.head != "example":
        return torch.cat(outs) if outs else x.new_zeros(0, len(w["head.lin_out.bias"])), s, c
    return predict(w, o, s, slots), s, c


def predict(w, o, s, slots):
    if o.pool == "mean":
        pooled = s.mean(0)
    elif o.pool == "attention":
        pooled = (s @ w["head.pool.lin_gate.weight"][0]).softmax(0) @ s
    else:
        rows = {m: s[j] for j, m in enumerate(slots)}
        zero = torch.zeros_like(s[0])
        pooled = torch.cat([rows.get(m, zero) for m in range(o.num_slots)])
    return affine(w, "head.lin_out", pooled[None])


def read_graph(w, o, x, edge_index, convs=None, pe=None):
    """One graph: `num_steps` passes, a conv before each and a read-back after all but the last."""
    slots = list(range(o.num_slots)) if o.slots is None else list(o.slots)
    s = w["manager.bank"][slots]
    c = torch.zeros_like(s) if o.cell == "lstm" else None
    x = embed(w, x)
    if pe is not None:
        x = x + affine(w, "graph_position.lin", pe)
    for k in range(o.num_steps):
        if convs is not None:
            message = convs[min(k, len(convs) - 1)](x, edge_index)
            x = norm(w, f"passes.conv_norms.{k}", x + message.relu())
        s, c = read_segment(w, o, x, s, c, slots)
        before_last = k < o.num_steps - 1
        if convs is not None and before_last:
            key, value = affine(w, "passes.readout.lin_state", s).chunk(2, 1)
            read = attend(affine(w, "passes.readout.lin_query", x), key, value, o.heads)
            read = affine(w, "passes.readout.lin_out", read)
            x = norm(w, f"passes.read_norms.{k}", x + read)
    return (predict(w, o, s, slots) if o.head == "example" else read_tokens(w, o, x, s)), s
