"""Reading with an allocator, from its equations: one example, one token, one state at a time.

A node set is a dictionary from slots to states here. Uses the equations of the other oracle for
what an allocator leaves alone.
"""

import torch
import torch.nn.functional as F
from machine_oracle import affine, attend, embed, norm, propagate


def unit(x):
    return x / x.norm().clamp(min=1e-12)


class Example:
    """One stream: who is there, and what was decided."""

    def __init__(self, w, o, allocator, slots):
        self.w, self.o, self.a = w, o, allocator
        self.states = {m: w["manager.bank"][m] for m in slots}
        self.losses = []
        self.present = {m: torch.ones((), dtype=torch.float64) for m in slots}
        self.lasts = dict(self.present)
        self.cells = {m: self.no_cell() for m in slots}

    def no_cell(self):
        gated = self.w["manager.bank"].size(1) - self.a.address_channels
        return torch.zeros(gated, dtype=torch.float64)

    def passed(self, probability):
        return probability if self.a.gate == "continuous" else probability / probability.detach()

    def keeps(self, m):
        return affine(self.w, "cell.allocator.lin_keep", self.states[m])[0]

    def presence(self, m):
        return self.present[m]

    def match(self, address, m):
        known = unit(self.states[m][: self.a.address_channels])
        return self.w["cell.allocator.log_scale"].exp() * (address @ known)

    def found(self, addresses):
        """Asks the tokens of a segment one by one."""
        tau, fresh = self.w["cell.allocator.log_scale"].exp(), []
        bank = self.w["manager.bank"]
        for address in addresses:
            known = [self.match(address, m) + self.presence(m).log() for m in self.states]
            known += [tau * (address @ other) + gate.log() for other, gate in fresh]
            logit = self.w["cell.allocator.novelty"] - torch.stack(known).logsumexp(0)
            room = self.o.num_slots - len(self.states) - len(fresh)
            if float(logit.detach()) > 0 and room > 0:
                fresh.append((address, self.passed(logit.sigmoid())))
        for address, gate in fresh:
            m = min(set(range(self.o.num_slots)) - set(self.states))
            self.states[m] = torch.cat([address, bank[m][self.a.address_channels :]])
            self.present[m], self.cells[m] = gate, self.no_cell()
            self.lasts[m] = torch.ones((), dtype=torch.float64)
        slots = sorted(self.states)
        self.states = {m: self.states[m] for m in slots}

    def read(self, x, addresses):
        """One segment: [l, C_t] tokens with positions and the addresses of plain ones."""
        w, o, kept = self.w, self.o, self.a.address_channels
        self.found(addresses)
        slots = list(self.states)
        weight, bias = w["cell.router.lin_logits.weight"], w["cell.router.lin_logits.bias"]
        rows = []
        for x_i, address in zip(x, addresses, strict=True):
            per_head = []
            for h in range(o.heads):
                row = [
                    weight[m * o.heads + h] @ x_i
                    + bias[m * o.heads + h]
                    + F.logsigmoid(w["manager.importance"][m])
                    + self.match(address, m)
                    + self.presence(m).log()
                    for m in slots
                ]
                per_head.append(torch.stack(row).softmax(0))
            rows.append(sum(per_head) / o.heads)
        s = torch.stack([self.states[m] for m in slots])
        routed = torch.stack(rows).T @ x
        if o.routing_reduce == "mean":
            routed = routed / len(x)
        u = affine(w, "cell.router.lin_out", routed)
        if o.mix == "sum":
            key = affine(w, "cell.attention.lin_token", x)
            query = affine(w, "cell.attention.lin_query", s)
            u = u + affine(w, "cell.attention.lin_out", attend(query, key, key, o.heads))
        cells = torch.stack([self.cells[m] for m in slots])
        s, address_part = s[:, kept:], s[:, :kept]
        new, cells = propagate(w, o, s, cells, torch.cat([u, address_part], 1))
        if o.communication:
            query, key, value = affine(w, "cell.communication.lin_qkv", new).chunk(3, 1)
            read = attend(query, key, value, o.talk_heads)
            read = affine(w, "cell.communication.lin_out", read)
            new = norm(w, "cell.communication.norm", new + read)
        for j, m in enumerate(slots):
            self.states[m] = torch.cat([address_part[j], new[j]])
            if self.a.prune:
                gate = self.passed(self.keeps(m).sigmoid())
                self.present[m], self.lasts[m] = self.present[m] * gate, self.lasts[m] * gate
            if cells is not None:
                self.cells[m] = cells[j]
        if self.a.prune:
            self.leave()

    def leave(self):
        """Those whose keep logit is not positive, except the best."""
        logits = {m: float(self.keeps(m).detach()) for m in self.states}
        best = sorted(logits, key=lambda m: (-logits[m], m))[: self.o.min_states]
        stay = [m for m in self.states if logits[m] > 0 or m in best]
        self.states = {m: self.states[m] for m in stay}

    def look(self, x):
        """Read-outs of tokens, with the presence of states."""
        s = torch.stack(list(self.states.values()))
        key, value = affine(self.w, "head.readout.lin_state", s).chunk(2, 1)
        bias = torch.stack([self.presence(m).log() for m in self.states])
        bias = bias.view(1, -1, 1).expand(len(x), -1, self.o.heads).transpose(0, 1)
        query = affine(self.w, "head.readout.lin_query", x)
        self.note_losses(query, key)
        read = attend(query, key, value, self.o.heads, bias=bias)
        read = affine(self.w, "head.readout.lin_out", read)
        return affine(self.w, "head.lin_out", norm(self.w, "head.norm", x + read))

    def note_losses(self, query, key):
        """What each token would lose with states that leave."""
        width = query.size(1) // self.o.heads
        p = torch.stack([self.lasts[m] for m in self.states])
        here = torch.stack([self.presence(m).log() for m in self.states])
        for row in query:
            lost = 0.0
            for h in range(self.o.heads):
                part = slice(h * width, (h + 1) * width)
                score = key[:, part] @ row[part] / width**0.5
                weight = (score + here).softmax(0).detach()
                lost = lost + (weight**2 * (1 - p)).sum() / self.o.heads
            self.losses.append(lost)

    def pooled(self):
        p = torch.stack([self.presence(m) for m in self.states])
        self.losses = [1 - self.lasts[m] for m in self.states]
        s = torch.stack(list(self.states.values()))
        if self.o.pool == "mean":
            pooled = (p.unsqueeze(1) * s).sum(0) / p.sum()
        elif self.o.pool == "attention":
            score = s @ self.w["head.pool.lin_gate.weight"][0] + p.log()
            pooled = score.softmax(0) @ s
        else:
            zero = torch.zeros_like(s[0])
            rows = {m: row * q for m, row, q in zip(self.states, s, p, strict=True)}
            pooled = torch.cat([rows.get(m, zero) for m in range(self.o.num_slots)])
        return affine(self.w, "head.lin_out", pooled[None])


def read_example(w, o, allocator, slots, x):
    """One example [L, C_in]: predictions, and the node set in the end."""
    example = Example(w, o, allocator, slots)
    plain, outs = embed(w, x), []
    for segment in plain.split(o.segment_length) if len(x) else []:
        addresses = [unit(w["cell.allocator.lin_address.weight"] @ x_i) for x_i in segment]
        if o.position == "learned":
            segment = segment + w["position.table"][: len(segment)]
        if o.head == "next_token":
            outs.append(example.look(segment))
        example.read(segment, addresses)
        if o.head == "token":
            outs.append(example.look(segment))
    if o.head == "example":
        return example.pooled(), example
    return torch.cat(outs) if outs else x.new_zeros(0, len(w["head.lin_out.bias"])), example
